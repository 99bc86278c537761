"""scq quickstart, scq evaluate and scq benchmark: what is measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scq.cli.common import add_model, check_writable, command, natural, positive


def add_quickstart(commands: Any) -> None:
    parser = command(
        commands,
        "quickstart",
        _quickstart,
        "run everything once on emoji: shards, two tokenizers, two priors, samples, FID, report",
        "Seven to fifteen minutes on two CPU cores. Run it again, and it reuses what is finished and does the rest.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything it makes")


def _quickstart(options: argparse.Namespace) -> None:
    from scq.evaluation.benchmark.run import quickstart

    results = quickstart(options.out)
    print(f"{options.out / 'report.md'} ({results.seconds_in_all:.0f} s)")
    print(f"now: scq app --model {options.out / 'model'}")


def add_evaluate(commands: Any) -> None:
    parser = command(
        commands,
        "evaluate",
        _evaluate,
        "measure a model on held-out images: reconstructions, codebook usage, FID and KID",
        "A tokenizer alone is measured without samples. For several processes or GPUs: accelerate launch --module "
        "scq evaluate --model DIR ...; the numbers are the same.",
    )
    add_model(parser, "a pipeline or a tokenizer")
    parser.add_argument("--data", required=True, help="shards the model was not trained on")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--num-real", type=natural, default=0, help="held-out images to use; 0 for all")
    parser.add_argument("--num-samples", type=natural, default=0, help="images to draw; 0 for as many as real ones")
    parser.add_argument("--inception-weights", help="file of FID Inception weights; by default the first one found")
    parser.add_argument("--cache", type=Path, help="file that keeps the real images' features for the next run")
    parser.add_argument("--card", action="store_true", help="write the numbers into the model's card, too")
    parser.add_argument("--lpips-weights", help="file of VGG16's weights; without it LPIPS is left out")
    parser.add_argument(
        "--second-backbone", metavar="NAME",
        help="a vision transformer of timm, such as vit_large_patch14_dinov2, for a second Frechet distance",
    )  # fmt: skip
    parser.add_argument("--second-weights", metavar="FILE", help="its weights; without it timm's cache or download")
    parser.add_argument("--train", metavar="SHARDS", help="training images, to picture the nearest ones of samples")
    parser.add_argument("--neighbours", type=natural, default=5000, help="training images to look through; 0 for all")
    parser.add_argument(
        "--weight-bits", type=positive, action="append", default=[], metavar="BITS",
        help="decode z_q with its weights rounded to so many bits, too, and say what that costs; repeat for several",
    )  # fmt: skip


def _evaluate(options: argparse.Namespace) -> None:
    from dataclasses import fields

    from scq.cli.common import say_once
    from scq.engine.files import write_json
    from scq.engine.measurements import to_plain
    from scq.engine.processes import rank_and_world_size
    from scq.evaluation.model import Evaluation, evaluate_model

    for file in filter(None, (options.out, options.cache)):
        check_writable(file)
    picture = options.out.with_name(f"{options.out.stem}_neighbours.png")
    given = {**vars(options), "picture": picture}
    found = evaluate_model(Evaluation(**{each.name: given[each.name] for each in fields(Evaluation)}))
    if rank_and_world_size()[0] == 0:
        numbers = {name: value for name, value in to_plain(found).items() if value}  # no facts of its training
        write_json(options.out, {"model": str(options.model), **numbers}, indent=2)
    say_once(options.out)
