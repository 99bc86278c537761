"""From a folder of photographs to new images, through the same functions that the command line calls.

python examples/train_on_your_photos.py PHOTOS RUN [STEPS]
"""

import sys
from pathlib import Path

from scq.data.pack import pack
from scq.engine.config import CONFIG_ROOT, load_config
from scq.sampling import SoftConvexPipeline
from scq.stage1_tokenizer.train import TokenizerExperiment, load_tokenizer, train_tokenizer
from scq.stage1_tokenizer.write_tokens import write_tokens
from scq.stage2_prior.train import PriorExperiment, train_prior


def main(photos: str, run: str, steps: int = 1000) -> None:
    out = Path(run)
    pack(photos, out / "shards", format="folder", size=32)

    few = [f"training.steps={steps}", f"training.checkpoint_every={steps}", "training.batch_size=16"]
    places = [f"out={out / 'tokenizer'}", f"data.train={out / 'shards'}"]
    tokenizer_config = CONFIG_ROOT / "quickstart" / "tokenizer_scq.yaml"
    train_tokenizer(load_config(TokenizerExperiment, tokenizer_config, [*few, *places]))
    tokenizer = load_tokenizer(out / "tokenizer")
    write_tokens(tokenizer, out / "shards", out / "tokens")

    places = [f"out={out / 'prior'}", f"data.train={out / 'tokens'}"]
    prior_config = load_config(PriorExperiment, CONFIG_ROOT / "quickstart" / "prior.yaml", [*few, *places])
    prior = train_prior(prior_config, tokenizer.fingerprint(), tokenizer.codes()).averaged

    pipeline = SoftConvexPipeline(tokenizer, prior)
    pipeline.save_pretrained(out / "model")
    for number, image in enumerate(pipeline(num_images=4, seed=0).images):
        image.save(out / f"sample_{number}.png")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
