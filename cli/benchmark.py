"""scq benchmark: what is measured side by side."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from scq.cli.common import Parser, above_zero, add_model, command, config_file, device, natural, positive


def add_benchmark(commands: Any) -> None:
    parser = commands.add_parser("benchmark", help="compare quality and speed with what others use, side by side")
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
    data.add_argument("--workers", type=natural, default=2, help="decoding processes of the two that decode")
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
    step.add_argument(
        "--config", type=config_file, action="append", required=True, help="YAML file; repeat for several"
    )
    step.add_argument("--data", required=True, metavar="SHARDS", help="shards that 'scq data pack' wrote")
    step.add_argument("--warmup", type=positive, default=30, help="untimed steps of each")
    step.add_argument("--repeats", type=positive, default=20, help="timed steps of each")
    step.add_argument("overrides", nargs="*", metavar="key=value", help="for all configs")

    tokenizers = command(
        subjects,
        "tokenizers",
        _benchmark_tokenizers,
        "train tokenizers that differ in one thing and compare their reconstructions",
        "Finished arms are reused, an interrupted one goes on. Processes that are given different arms share a folder.",
    )
    tokenizers.add_argument("--config", type=config_file, required=True, help="YAML file of arms")
    tokenizers.add_argument("--train", required=True, metavar="SHARDS", help="shards to train on")
    tokenizers.add_argument("--held-out", required=True, metavar="SHARDS", help="shards to reconstruct")
    tokenizers.add_argument("--out", type=Path, required=True, help="folder for runs, results and report")
    tokenizers.add_argument(
        "--only", action="append", default=[], metavar="ARM", help="work on this arm alone; repeat for several"
    )
    tokenizers.add_argument("overrides", nargs="*", metavar="key=value", help="of the comparison, as images=1000")

    quality = command(
        subjects,
        "quality",
        _benchmark_quality,
        "train every arm of an experiment through both stages with equal budgets, and compare samples and all else",
        "Finished phases are reused, an interrupted one goes on. Ends with results.json, report.md and its pictures.",
    )
    quality.add_argument("--config", type=config_file, required=True, help="YAML file; see configs/benchmarks/")
    quality.add_argument("--out", type=Path, required=True, help="folder for everything it makes")
    quality.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.source=FOLDER")

    plan = command(
        subjects,
        "plan",
        _benchmark_plan,
        "take a pilot through every phase, and make trainings as long as a given time allows on this machine",
        "Writes OUT/config/benchmark.yaml, which 'quality' then runs with the same --out.",
    )
    plan.add_argument("--config", type=config_file, required=True, help="YAML file; see configs/benchmarks/")
    plan.add_argument("--out", type=Path, required=True, help="folder of the benchmark")
    plan.add_argument("--seconds", type=above_zero, required=True, help="for one arm, from training to its last number")
    plan.add_argument(
        "--longest", type=above_zero, default=math.inf, metavar="FACTOR", help="times the configs' lengths, at most"
    )
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.source=FOLDER")

    bundle = command(
        subjects,
        "bundle",
        _benchmark_bundle,
        "pack what 'quality' needs into parts for a machine without a network",
        "Copy run.sh, run.py, manifest.json and the parts there, as many at a time as fit, and call run.sh.",
    )
    bundle.add_argument("--config", type=config_file, required=True, help="YAML file; see configs/benchmarks/")
    bundle.add_argument("--out", type=Path, required=True, help="folder for the bundle")
    bundle.add_argument(
        "--packages", type=Path, required=True, metavar="FILE", help="what 'pip list' says on the other machine"
    )
    bundle.add_argument("--python", default="3.12", metavar="VERSION", help="the other machine's")
    bundle.add_argument("--part-size", type=positive, default=45, metavar="MIB", help="of a part at most")
    bundle.add_argument("--from", type=Path, dest="earlier", metavar="RUN", help="a benchmark's folder to go on with")
    bundle.add_argument("--seconds", type=above_zero, default=600.0, help="for one arm, see 'plan'")
    bundle.add_argument("--longest", type=above_zero, default=3.0, metavar="FACTOR", help="as of 'plan'")
    bundle.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.source=FOLDER")

    collect = command(
        subjects, "collect", _benchmark_collect, "put together again what a bundle handed out on the other machine"
    )
    collect.add_argument("folders", type=Path, nargs="+", metavar="RESULTS", help="what run.sh wrote, the newest last")
    collect.add_argument("--out", type=Path, required=True, help="folder of the benchmark")

    sampling = command(
        subjects,
        "sampling",
        _benchmark_sampling,
        "images a second over sampling steps, beside a plain loop around the same network, in turns",
        "And the share of time in prior, refiner and decoder.",
    )
    add_model(sampling, "a pipeline")
    sampling.add_argument("--steps", type=positive, action="append", metavar="STEPS", help="repeat for several")
    sampling.add_argument("--num", type=positive, default=64, help="images in a turn")
    sampling.add_argument("--batch-size", type=positive, default=64, help="images drawn together")
    sampling.add_argument("--repeats", type=positive, default=5, help="turns of each")
    sampling.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="as 'scq sample' has it")
    sampling.add_argument("--compile", action="store_true", help="compile the prior with torch.compile first")
    sampling.add_argument("--out", type=Path, help="JSON file to write")


def _benchmark_quality(options: argparse.Namespace) -> None:
    from scq.evaluation.benchmark.run import run_benchmark

    results = run_benchmark(options.config, options.out, options.overrides)
    print(f"{options.out / 'report.md'} ({results.seconds_in_all:.0f} s)")


def _benchmark_plan(options: argparse.Namespace) -> None:
    from scq.evaluation.benchmark.plan import plan_benchmark

    print(plan_benchmark(options.config, options.out, options.seconds, options.overrides, options.longest))


def _benchmark_bundle(options: argparse.Namespace) -> None:
    from scq.evaluation.bundle.make import Budget, make_bundle, parts_and_sizes

    manifest = make_bundle(
        options.config,
        options.out,
        packages=options.packages,
        python=options.python,
        part_bytes=options.part_size << 20,
        earlier=options.earlier,
        budget=Budget(arm=options.seconds, longest=options.longest),
        overrides=options.overrides,
    )
    print("\n".join(parts_and_sizes(manifest)))


def _benchmark_collect(options: argparse.Namespace) -> None:
    from scq.evaluation.bundle.collect import collect

    missing = collect(options.folders, options.out)
    print(f"{options.out}; pieces still to come: {', '.join(missing) or 'none'}")


def _benchmark_sampling(options: argparse.Namespace) -> None:
    import torch

    from scq.engine.files import write_json
    from scq.engine.progress import progress_bar
    from scq.evaluation.speed.sampling import benchmark_sampling, format_table
    from scq.sampling.pipeline import SoftConvexPipeline

    dtype = torch.bfloat16 if options.precision == "bf16" else None  # as `scq sample` has it
    pipeline = SoftConvexPipeline.from_pretrained(options.model, device(), dtype=dtype)
    with progress_bar("benchmark sampling") as bar:
        rows = benchmark_sampling(
            pipeline,
            options.steps or [4, 8, 16],
            num_images=options.num,
            batch_size=options.batch_size,
            repeats=options.repeats,
            compiled=options.compile,
            progress=bar,
        )
    if options.out:
        write_json(options.out, rows, indent=2)
    print("\n".join(format_table(rows)))


def _benchmark_tokenizers(options: argparse.Namespace) -> None:
    from scq.evaluation.benchmark.report import summary_table
    from scq.evaluation.benchmark.tokenizers import compare_tokenizers

    found = compare_tokenizers(
        options.config, options.train, options.held_out, options.out, options.overrides, options.only
    )
    print("\n".join(summary_table(found)))
    print(options.out / "report.md")


def _benchmark_step(options: argparse.Namespace) -> None:
    from scq.engine.progress import progress_bar
    from scq.evaluation.speed.training_step import benchmark_step, format_table

    with progress_bar("benchmark step") as bar:
        rows = benchmark_step(
            options.config,
            options.data,
            overrides=options.overrides,
            warmup=options.warmup,
            repeats=options.repeats,
            progress=bar,
        )
    print("\n".join(format_table(rows)))


def _benchmark_data(options: argparse.Namespace) -> None:
    from scq.engine.files import write_json
    from scq.engine.progress import progress_bar
    from scq.evaluation.speed.reading import benchmark_data, format_table

    with progress_bar("benchmark data") as bar:
        result = benchmark_data(
            options.data,
            batch_size=options.batch_size,
            workers=options.workers,
            repeats=options.repeats,
            progress=bar,
        )
    if options.out:
        write_json(options.out, result, indent=2)
    print(format_table(result))


def _benchmark_speed(options: argparse.Namespace) -> None:
    from scq.evaluation.speed.quantizers import benchmark_speed

    cells = tuple(options.cell) if options.cell else None
    benchmark_speed(options.out, cells=cells, rho=options.rho, repeats=options.repeats, device=device())
    print(options.out)


def _cell(text: str) -> tuple[int, int, int]:
    sizes = text.split(",")
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,F,K, for example 16384,8,1024")
    latents, channels, codes = map(positive, sizes)
    return latents, channels, codes
