"""Draw an image, redraw its right half four times, and continue it to the right.

python examples/sample_and_inpaint.py OUT [MODEL]      without MODEL, the small one that comes with the package
"""

import sys
from pathlib import Path

from PIL import Image

from scq.sampling.pipeline import EMBEDDED, SoftConvexPipeline

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
pipeline = SoftConvexPipeline.from_pretrained(sys.argv[2] if len(sys.argv) > 2 else EMBEDDED)
image = pipeline(num_images=1, seed=7).images[0]
mask = Image.new("L", image.size)
mask.paste(255, (image.width // 2, 0, image.width, image.height))  # light pixels are redrawn
image.save(out / "image.png")
for number, answer in enumerate(pipeline.inpaint(image, mask, num_images=4, seed=0).images):
    answer.save(out / f"inpainted_{number}.png")
pipeline.outpaint(image, right=image.width // 2, seed=0).images[0].save(out / "outpainted.png")
