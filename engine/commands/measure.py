"""scq quickstart, scq evaluate and scq benchmark: what is measured."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from engine.commands.common import Parser, add_model, command, device, join_processes, positive


def add_quickstart(commands: Any) -> None:
    parser = command(
        commands,
        "quickstart",
        _quickstart,
        "run the whole main job on emoji: shards, two tokenizers, two priors, samples, FID, report",
        "About eleven minutes on two CPU cores. Run again, it reuses what is finished and goes on with what is not.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything it makes")


def _quickstart(options: argparse.Namespace) -> None:
    from evaluation.benchmark import quickstart

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
        "engine.cli evaluate --model DIR ...; the numbers are the same.",
    )
    add_model(parser, "a pipeline or a tokenizer")
    parser.add_argument("--data", required=True, help="shards the model was not trained on")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--num-real", type=int, default=0, help="held-out images to use; 0 for all")
    parser.add_argument("--num-samples", type=int, default=0, help="images to draw; 0 for as many as real ones")
    parser.add_argument("--inception-weights", help="file of FID Inception weights; by default the first one found")
    parser.add_argument("--cache", type=Path, help="file that keeps the real images' features for the next run")
    parser.add_argument("--lpips-weights", help="file of VGG16's weights; without it LPIPS is left out")
    parser.add_argument(
        "--weight-bits", type=positive, action="append", default=[], metavar="BITS",
        help="decode z_q with its weights rounded to so many bits, too, and say what that costs; repeat for several",
    )  # fmt: skip


def _evaluate(options: argparse.Namespace) -> None:
    from engine.config import write_atomically
    from engine.processes import process_place
    from engine.progress import progress_bar, say
    from evaluation.evaluate import Reference, evaluate
    from evaluation.inception import load_inception
    from sampling.pipeline import SoftConvexPipeline, is_pipeline
    from stage1_tokenizer.losses import PerceptualLoss
    from stage1_tokenizer.train import load_tokenizer

    on = join_processes()
    main = process_place()[0] == 0
    reference = Reference(options.data, options.num_real)
    pipeline = SoftConvexPipeline.from_pretrained(options.model, on) if is_pipeline(options.model) else None
    tokenizer = pipeline.tokenizer if pipeline else load_tokenizer(options.model).to(on)
    network = load_inception(options.inception_weights, on)
    if main:
        say(f"Inception: {network.description}")
    draw = pipeline.stream if pipeline else None
    refined = {"refined": pipeline.refiner} if pipeline and pipeline.refiner is not None else {}
    bar = partial(progress_bar, quiet=not main)
    perceptual = PerceptualLoss(options.lpips_weights).to(on) if options.lpips_weights else None
    results = evaluate(
        tokenizer, draw, reference, network, options.num_samples, options.cache, bar,
        perceptual=perceptual, refiners=refined, weight_bits=options.weight_bits,
    )  # fmt: skip
    if main:
        write_atomically(options.out, json.dumps({"model": str(options.model), **results}, indent=2) + "\n")
        print(options.out)


def add_benchmark(commands: Any) -> None:
    parser = commands.add_parser("benchmark", help="measure speed, side by side with what others use")
    subjects = parser.add_subparsers(title="subjects", metavar="SUBJECT", required=True, parser_class=Parser)
    data = command(
        subjects,
        "data",
        _benchmark_data,
        "read shards with our stream and with webdataset's plain pipeline, in turns",
        "Then decoded images from memory, and token shards.",
    )
    data.add_argument("--data", required=True, metavar="SHARDS", help="local shards that 'scq data pack' wrote")
    data.add_argument("--batch-size", type=positive, default=64, help="images in a batch")
    data.add_argument("--workers", type=int, default=2, help="decoding processes of the two that decode")
    data.add_argument("--repeats", type=positive, default=5, help="turns of each way to read")
    data.add_argument("--out", type=Path, help="JSON file to write")

    speed = command(
        subjects,
        "speed",
        _benchmark_speed,
        "forward and backward of the convex solvers, plain VQ and vector-quantize-pytorch, in turns",
        "Prints ratios to plain VQ and peak memory.",
    )
    speed.add_argument(
        "--cell", type=_cell, action="append", metavar="N,F,K", help="latents, channels and codes; repeat for several"
    )
    speed.add_argument("--rho", type=float, default=0.3, help="lambda in units of the mean nearest-code distance")
    speed.add_argument("--repeats", type=positive, default=7, help="turns of each quantizer")
    speed.add_argument("--out", type=Path, default=Path("runs/benchmark_speed"), help="folder for JSON and plot")

    step = command(
        subjects,
        "step",
        _benchmark_step,
        "whole training steps of several tokenizer configs, in turns",
        "Ratios are to the first config.",
    )
    step.add_argument("--config", type=Path, action="append", required=True, help="YAML file; repeat for several")
    step.add_argument("--data", required=True, metavar="SHARDS", help="shards that 'scq data pack' wrote")
    step.add_argument("--warmup", type=positive, default=30, help="untimed steps of each")
    step.add_argument("--repeats", type=positive, default=20, help="timed steps of each")
    step.add_argument("overrides", nargs="*", metavar="key=value", help="for all configs")

    tokenizers = command(
        subjects,
        "tokenizers",
        _benchmark_tokenizers,
        "train tokenizers that differ in one thing and compare their reconstructions",
        "Finished arms are reused, an interrupted one goes on.",
    )
    tokenizers.add_argument("--config", type=Path, required=True, help="YAML file of arms")
    tokenizers.add_argument("--train", required=True, metavar="SHARDS", help="shards to train on")
    tokenizers.add_argument("--held-out", required=True, metavar="SHARDS", help="shards to reconstruct")
    tokenizers.add_argument("--out", type=Path, required=True, help="folder for runs, results and table")
    tokenizers.add_argument("overrides", nargs="*", metavar="key=value", help="of the comparison, as images=1000")


def _benchmark_tokenizers(options: argparse.Namespace) -> None:
    from evaluation.tokenizers import compare_tokenizers

    print(compare_tokenizers(options.config, options.train, options.held_out, options.out, options.overrides))


def _benchmark_step(options: argparse.Namespace) -> None:
    from engine.progress import progress_bar
    from stage1_tokenizer.step_speed import benchmark_step

    with progress_bar("benchmark step") as bar:
        rows = benchmark_step(
            options.config,
            options.data,
            overrides=options.overrides,
            warmup=options.warmup,
            repeats=options.repeats,
            progress=bar,
        )
    for row in rows:
        quartiles = f"{1e3 * row['low_s']:.1f} - {1e3 * row['high_s']:.1f}"
        print(f"{row['config']:48} {1e3 * row['median_s']:8.1f} ms  ({quartiles})  {row['ratio']:.2f}x")


def _benchmark_data(options: argparse.Namespace) -> None:
    from data.benchmark import benchmark_data, format_table
    from engine.config import write_atomically
    from engine.progress import progress_bar

    with progress_bar("benchmark data") as bar:
        result = benchmark_data(
            options.data,
            batch_size=options.batch_size,
            workers=options.workers,
            repeats=options.repeats,
            progress=bar,
        )
    if options.out:
        write_atomically(options.out, json.dumps(result, indent=2) + "\n")
    print(format_table(result))


def _benchmark_speed(options: argparse.Namespace) -> None:
    from stage1_tokenizer.quantizers.speed import CELLS, benchmark_speed

    cells = tuple(options.cell) if options.cell else CELLS
    benchmark_speed(options.out, cells=cells, rho=options.rho, repeats=options.repeats, device=device())
    print(options.out)


def _cell(text: str) -> tuple[int, int, int]:
    sizes = text.split(",")
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,F,K, for example 16384,8,1024")
    return tuple(positive(size) for size in sizes)
