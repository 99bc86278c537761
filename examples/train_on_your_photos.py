"""From a folder of photographs to new images, through the same functions that the command line calls.

python examples/train_on_your_photos.py PHOTOS RUN [STEPS]
"""

import sys
from pathlib import Path

from scq import SoftConvexPipeline
from scq.data.pack import pack
from scq.engine.config import CONFIG_ROOT, load_config
from scq.engine.run import run
from scq.stage1_tokenizer.model_folder import load_tokenizer
from scq.stage1_tokenizer.stage import TokenizerExperiment, TokenizerStage
from scq.stage1_tokenizer.write_tokens import write_tokens
from scq.stage2_prior.prior_stage import PriorExperiment, PriorStage


def main(photos: str, folder: str, steps: int = 1000) -> None:
    out, configs = Path(folder), CONFIG_ROOT / "quickstart"
    pack(photos, out / "shards", format="folder", size=32)

    few = [f"training.steps={steps}", f"training.checkpoint_every={steps}", "training.batch_size=16"]
    own = [f"out={out / 'tokenizer'}", f"data.train={out / 'shards'}"]
    run(TokenizerStage(load_config(TokenizerExperiment, configs / "tokenizer_scq.yaml", [*few, *own])))
    write_tokens(load_tokenizer(out / "tokenizer"), out / "shards", out / "tokens")

    own = [f"out={out / 'prior'}", f"data.train={out / 'tokens'}", f"tokenizer={out / 'tokenizer'}"]
    run(PriorStage(load_config(PriorExperiment, configs / "prior.yaml", [*few, *own])))

    pipeline = SoftConvexPipeline.from_pretrained(out / "prior")
    for number, image in enumerate(pipeline(num_images=4, seed=0).images):
        image.save(out / f"sample_{number}.png")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
