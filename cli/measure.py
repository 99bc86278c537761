"""scq quickstart, scq evaluate and scq benchmark: what is measured."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from scq.cli.common import add_model, check_writable, command, natural, positive
from scq.engine.errors import UserError


def add_quickstart(commands: Any) -> None:
    parser = command(
        commands,
        "quickstart",
        _quickstart,
        "run the whole main job on emoji: shards, two tokenizers, two priors, samples, FID, report",
        "Seven to fifteen minutes on two CPU cores. Run again, it reuses what is finished and goes on with the rest.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything it makes")


def _quickstart(options: argparse.Namespace) -> None:
    from scq.evaluation.benchmark.run import quickstart

    results = quickstart(options.out)
    print(f"{options.out / 'report.md'} ({results['seconds_in_all']:.0f} s)")
    print(f"now: scq app --model {options.out / 'model'}")


def add_evaluate(commands: Any) -> None:
    parser = command(
        commands,
        "evaluate",
        _evaluate,
        "measure a model on held-out images: reconstructions, codebook usage, FID and KID",
        "A tokenizer alone is measured without samples. For several processes or GPUs: accelerate launch --module "
        "cli.main evaluate --model DIR ...; the numbers are the same.",
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
    from scq.engine.files import write_file
    from scq.engine.processes import join_processes, rank_and_world_size
    from scq.engine.progress import progress_bar, say
    from scq.evaluation.evaluate import Extras, Reference, evaluate
    from scq.evaluation.metrics.dinov2 import load_transformer
    from scq.evaluation.metrics.inception import load_inception
    from scq.sampling.hub import is_hub_name, local_folder
    from scq.sampling.pipeline import SoftConvexPipeline
    from scq.stage1_tokenizer.losses import PerceptualLoss
    from scq.stage1_tokenizer.model_folder import load_tokenizer
    from scq.stage2_prior.model_card import with_numbers
    from scq.stage2_prior.model_folder import model_root

    if options.second_weights and not options.second_backbone:
        raise UserError("--second-weights needs --second-backbone, the name of the network that they are of")
    on = join_processes()
    rank, processes = rank_and_world_size()
    main = rank == 0
    for file in filter(None, (options.out, options.cache)):
        check_writable(file)
    if options.card and is_hub_name(str(options.model)):
        raise UserError(f"--card writes into a model's folder, and {options.model} is on the hub; download it first")
    reference = Reference(options.data, options.num_real)
    folder = local_folder(options.model)
    root = model_root(folder)
    if options.card and root is None:
        raise UserError(f"--card needs a model with both stages; {folder} holds none, and a tokenizer has no card")
    if root is None and (options.train or options.second_backbone):
        raise UserError(f"--train and --second-backbone are about samples, and {options.model} is a tokenizer alone")
    pipeline = SoftConvexPipeline.from_pretrained(root, on) if root else None
    training = Reference(options.train, options.neighbours) if options.train else None
    tokenizer = pipeline.tokenizer if pipeline else load_tokenizer(folder).to(on)
    network = load_inception(options.inception_weights, on)
    second = load_transformer(options.second_backbone, options.second_weights, on) if options.second_backbone else None
    extras = Extras(second, training, options.out.with_name(f"{options.out.stem}_neighbours.png"))
    if main:
        say(f"Inception: {network.description}")
        if second is not None:
            say(f"second backbone: {second.description}")
        if processes > 1:
            say(f"{processes} processes share the work")
    draw = pipeline.stream if pipeline else None
    refined: dict[str, Any] = {}
    if pipeline and pipeline.refiner is not None:
        refined = {"refiners": {"refined": pipeline.refiner}, "refiner_steps": pipeline.scheduler.refiner_steps}
    bar = partial(progress_bar, quiet=not main)
    perceptual = PerceptualLoss(options.lpips_weights).to(on) if options.lpips_weights else None
    results = evaluate(
        tokenizer, draw, reference, network, options.num_samples, options.cache, bar, extras,
        perceptual=perceptual, weight_bits=options.weight_bits, **refined,
    )  # fmt: skip
    if main:
        if options.card:
            pipeline.measured = with_numbers(pipeline.measured, results)
            pipeline.write_card(root)
        write_file(options.out, json.dumps({"model": str(options.model), **results}, indent=2) + "\n")
        print(options.out)
