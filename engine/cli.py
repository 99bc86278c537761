"""The command line. It sits on top of every room, and nothing imports it; each command imports only what it needs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError

DESCRIPTION = """\
scq: image generation with soft convex quantization.

  scq quickstart                        the whole way on real images, in minutes, without a GPU
  scq data pack PHOTOS shards --format folder --size 64
  scq train tokenizer --config configs/cifar10/tokenizer_scq.yaml
  scq tokenize --model runs/tokenizer --data shards --out tokens
  scq train prior --config configs/cifar10/prior.yaml
  scq sample --model runs/prior --num 16 --out samples
  scq evaluate --model runs/prior --data shards-test --out evaluation.json
  scq app --model runs/prior
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for a user's mistake, 130 for an interruption."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    from data.errors import DataError

    try:
        options.run(options)
    except (UserError, DataError) as error:
        if options.debug:
            raise
        print(f"scq: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scq: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="scq", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _add_quickstart(commands)
    _add_data(commands)
    _add_train(commands)
    _add_tokenize(commands)
    _add_sample(commands)
    _add_evaluate(commands)
    _add_benchmark(commands)
    _add_app(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse, with --debug everywhere and mistakes in one line."""

    def __init__(self, **keywords: Any):
        keywords.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**keywords)
        self.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake")

    def error(self, message: str) -> None:
        print(f"scq: {message}; see '{self.prog} --help'", file=sys.stderr)
        raise SystemExit(2)


def _command(commands: Any, name: str, run: Any, help: str, description: str = "") -> _Parser:
    parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}. {description}")
    parser.set_defaults(run=run)
    return parser


# quickstart ----------------------------------------------------------------------------------------------------------


def _add_quickstart(commands: Any) -> None:
    parser = _command(
        commands,
        "quickstart",
        _quickstart,
        "run the whole main job on emoji: shards, two tokenizers, two priors, samples, FID, report",
        "About ten minutes on two CPU cores. What is finished is reused by the next run; an interrupted run goes on.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything it makes")


def _quickstart(options: argparse.Namespace) -> None:
    from evaluation.benchmark import quickstart

    results = quickstart(options.out)
    print(f"{options.out / 'report.md'} ({results['seconds_in_all']:.0f} s)")
    print(f"now: scq app --model {options.out / 'model'}")


# data ----------------------------------------------------------------------------------------------------------------


def _add_data(commands: Any) -> None:
    from data.transforms import PROTOCOLS

    parser = commands.add_parser("data", help="pack images into shards, and look after them")
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    pack = _command(
        actions,
        "pack",
        _pack,
        "pack images into WebDataset shards with a manifest",
        "Killed at any moment and run again, it goes on and ends with the same bytes.",
    )
    pack.add_argument("source", help="folder, LMDB or archive of images; 'twemoji' for the installed emoji")
    pack.add_argument("out", type=Path, help="folder for the shards")
    pack.add_argument("--format", required=True, help="what SOURCE is: folder, lsun, cifar10, gtsrb or emoji")
    pack.add_argument("--size", type=_positive, help="side of the square images, in pixels")
    protocols = "; ".join(f"{name}: {protocol.description}" for name, protocol in PROTOCOLS.items())
    pack.add_argument(
        "--crop",
        choices=sorted(PROTOCOLS),
        help=f"how images become square, by default the usual way of the format. {protocols}".replace("%", "%%"),
    )
    pack.add_argument("--split", help="which part of the source, for formats that have several, e.g. train or test")
    pack.add_argument("--images-per-shard", type=_positive, default=1000, help="images in each shard")
    pack.add_argument("--workers", type=int, help="processes; by default one for each core")
    pack.add_argument("--keep-encoded", action="store_true", help="store the original bytes; needs --crop none")
    pack.add_argument("--max-bad", type=float, default=0.01, help="largest share of unusable images, else it fails")

    check = _command(actions, "check", _check, "verify shards against their manifest")
    check.add_argument("out", metavar="SHARDS", help="folder or URL of what 'scq data pack' wrote")

    preview = _command(actions, "preview", _preview, "draw a contact sheet of images spread over a set of shards")
    preview.add_argument("out", metavar="SHARDS", help="folder or URL of what 'scq data pack' wrote")
    preview.add_argument("picture", type=Path, help="PNG file to write")


def _pack(options: argparse.Namespace) -> None:
    from data.pack import pack
    from engine.progress import progress_bar

    with progress_bar("pack") as bar:
        manifest = pack(
            options.source,
            options.out,
            format=options.format,
            size=options.size,
            crop=options.crop,
            split=options.split,
            images_per_shard=options.images_per_shard,
            workers=options.workers,
            keep_encoded=options.keep_encoded,
            max_bad=options.max_bad,
            progress=bar,
        )
    bad = len(manifest["skipped"])
    named = f", {bad} unusable ones left out (named in manifest.json)" if bad else ""
    print(f"{options.out}: {manifest['num_images']} images in {len(manifest['shards'])} shards{named}")


def _check(options: argparse.Namespace) -> None:
    from data.pack import check

    problems = check(options.out)
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{options.out} does not match its manifest: {len(problems)} problems")
    print(f"{options.out}: every shard matches the manifest")


def _preview(options: argparse.Namespace) -> None:
    from data.pack import preview

    preview(options.out, options.picture)
    print(options.picture)


# train ---------------------------------------------------------------------------------------------------------------


def _add_train(commands: Any) -> None:
    parser = commands.add_parser("train", help="train a tokenizer, then a prior over its tokens")
    stages = parser.add_subparsers(title="stages", metavar="STAGE", required=True, parser_class=_Parser)
    for stage, run, help in (
        ("tokenizer", _train_tokenizer, "stage 1: train an autoencoder with a quantizer"),
        ("prior", _train_prior, "stage 2: train a masked transformer over the dominant codes"),
    ):
        each = _command(
            stages,
            stage,
            run,
            help,
            "Run again, it goes on from its newest checkpoint. For several processes or GPUs: "
            f"accelerate launch --module engine.cli train {stage} --config FILE",
        )
        each.add_argument("--config", type=Path, required=True, help="YAML file; the ready ones are in configs/")
        each.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.steps=1000")


def _train_tokenizer(options: argparse.Namespace) -> None:
    from engine.config import load_config
    from stage1_tokenizer.train import TokenizerExperiment, train_tokenizer

    config = load_config(TokenizerExperiment, options.config, options.overrides)
    train_tokenizer(config)
    _say_once(f"{Path(config.out) / 'model'}")


def _train_prior(options: argparse.Namespace) -> None:
    from accelerate import PartialState

    from engine.config import load_config
    from engine.pictures import picture_grid
    from sampling.pipeline import SoftConvexPipeline
    from stage1_tokenizer.train import load_tokenizer
    from stage2_prior.train import PriorExperiment, train_prior

    config = load_config(PriorExperiment, options.config, options.overrides)
    if not config.tokenizer:
        raise UserError("tokenizer is empty: name the tokenizer's folder, for example tokenizer=runs/tokenizer")
    tokenizer = load_tokenizer(config.tokenizer)

    def draw(prior: Any) -> Any:
        pipeline = SoftConvexPipeline(tokenizer, prior).to(prior.device)
        return picture_grid(next(pipeline.stream(32, batch_size=32)), columns=8)

    trained = train_prior(config, tokenizer.fingerprint(), draw)
    if PartialState().is_main_process:
        SoftConvexPipeline(tokenizer, trained.averaged.cpu()).save_pretrained(Path(config.out) / "model")
    _say_once(f"{Path(config.out) / 'model'}")


def _say_once(text: str) -> None:
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(text)


# tokenize, sample, evaluate, app -------------------------------------------------------------------------------------


def _add_tokenize(commands: Any) -> None:
    parser = _command(commands, "tokenize", _tokenize, "write the dominant codes of every image as token shards")
    _add_model(parser, "a tokenizer that 'scq train tokenizer' wrote")
    parser.add_argument("--data", required=True, help="shards that 'scq data pack' wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokens")
    parser.add_argument("--batch-size", type=_positive, default=64, help="images at a time")


def _tokenize(options: argparse.Namespace) -> None:
    from accelerate import PartialState

    from engine.progress import progress_bar
    from stage1_tokenizer.train import load_tokenizer
    from stage1_tokenizer.write_tokens import write_tokens

    tokenizer = load_tokenizer(options.model)
    with progress_bar("tokenize", quiet=not PartialState().is_main_process) as bar:
        tokens = write_tokens(tokenizer, options.data, options.out, options.batch_size, bar)
    h, w = tokens.grid
    _say_once(f"{options.out}: {len(tokens)} grids of {h}x{w} codes out of {tokens.codebook_size}")


def _add_sample(commands: Any) -> None:
    parser = _command(
        commands,
        "sample",
        _sample,
        "draw images as PNG files",
        "Image i is drawn with seed S + i: the same seed gives the same image in any batch.",
    )
    _add_model(parser, "a model that 'scq train prior' or 'scq quickstart' wrote")
    parser.add_argument("--num", type=_positive, default=16, help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images, named by their seeds")
    parser.add_argument("--class", dest="label", type=int, help="draw this class, for a class-conditional prior")
    parser.add_argument("--batch-size", type=_positive, default=16, help="images at a time")
    parser.add_argument("--steps", type=_positive, help="sampling steps; by default the model's own")
    parser.add_argument("--temperature", type=float, help="of the codes' distribution; by default the model's own")
    parser.add_argument("--guidance-scale", type=float, help="towards the class; by default the model's own")


def _sample(options: argparse.Namespace) -> None:
    from data.files import atomic_write
    from engine.progress import progress_bar
    from sampling.pipeline import SoftConvexPipeline

    pipeline = SoftConvexPipeline.from_pretrained(options.model, _device())
    _make_folder(options.out)
    with progress_bar("sample") as bar:
        for start in range(0, options.num, options.batch_size):
            count = min(options.batch_size, options.num - start)
            try:
                images = pipeline(
                    num_images=count,
                    seed=options.seed + start,
                    class_labels=None if options.label is None else [options.label] * count,
                    steps=options.steps,
                    temperature=options.temperature,
                    guidance_scale=options.guidance_scale,
                    batch_size=count,
                ).images
            except ValueError as error:
                raise UserError(str(error)) from error
            for i, image in enumerate(images):
                with atomic_write(options.out / f"{options.seed + start + i:06d}.png") as file:
                    image.save(file, format="PNG")
            bar(start + count, options.num)
    print(f"{options.out}: {options.num} images")


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        _evaluate,
        "measure a model on held-out images: reconstructions, codebook usage, FID and KID",
        "A tokenizer alone is measured without samples.",
    )
    _add_model(parser, "a pipeline or a tokenizer")
    parser.add_argument("--data", required=True, help="shards the model was not trained on")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--num-real", type=int, default=0, help="held-out images to use; 0 for all")
    parser.add_argument("--num-samples", type=int, default=0, help="images to draw; 0 for as many as real ones")
    parser.add_argument("--inception-weights", help="file of FID Inception weights; by default the first one found")
    parser.add_argument("--cache", type=Path, help="file that keeps the real images' features for the next run")


def _evaluate(options: argparse.Namespace) -> None:
    from engine.config import write_atomically
    from engine.progress import progress_bar, say
    from evaluation.evaluate import Reference, evaluate
    from evaluation.inception import load_inception
    from sampling.pipeline import SoftConvexPipeline, is_pipeline
    from stage1_tokenizer.train import load_tokenizer

    device = _device()
    reference = Reference(options.data, options.num_real)
    pipeline = SoftConvexPipeline.from_pretrained(options.model, device) if is_pipeline(options.model) else None
    tokenizer = pipeline.tokenizer if pipeline else load_tokenizer(options.model).to(device)
    network = load_inception(options.inception_weights, device)
    say(f"Inception: {network.description}")
    bars: list[Any] = []

    def progress(title: str) -> Any:
        bars.append(progress_bar(title))
        return bars[-1].__enter__()

    try:
        results = evaluate(
            tokenizer,
            pipeline.stream if pipeline else None,
            reference,
            network,
            options.num_samples,
            options.cache,
            progress,
        )
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)
    write_atomically(options.out, json.dumps({"model": str(options.model), **results}, indent=2) + "\n")
    print(options.out)


def _add_benchmark(commands: Any) -> None:
    parser = commands.add_parser("benchmark", help="measure speed, side by side with what others use")
    subjects = parser.add_subparsers(title="subjects", metavar="SUBJECT", required=True, parser_class=_Parser)
    data = _command(
        subjects,
        "data",
        _benchmark_data,
        "read shards with our stream and with webdataset's plain pipeline, in turns",
        "Then decoded images from memory, and token shards.",
    )
    data.add_argument("--data", required=True, metavar="SHARDS", help="local shards that 'scq data pack' wrote")
    data.add_argument("--batch-size", type=_positive, default=64, help="images in a batch")
    data.add_argument("--workers", type=int, default=2, help="decoding processes of the two that decode")
    data.add_argument("--repeats", type=_positive, default=5, help="turns of each way to read")
    data.add_argument("--out", type=Path, help="JSON file to write")

    speed = _command(
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
    speed.add_argument("--repeats", type=_positive, default=7, help="turns of each quantizer")
    speed.add_argument("--out", type=Path, default=Path("runs/benchmark_speed"), help="folder for JSON and plot")


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
    benchmark_speed(options.out, cells=cells, rho=options.rho, repeats=options.repeats, device=_device())
    print(options.out)


def _add_app(commands: Any) -> None:
    parser = _command(commands, "app", _app, "open the Gradio page in which images are generated")
    _add_model(parser, "a model that 'scq train prior' or 'scq quickstart' wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 opens it to the network")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")


def _app(options: argparse.Namespace) -> None:
    from sampling.app import build_page, serve
    from sampling.pipeline import SoftConvexPipeline

    serve(build_page(SoftConvexPipeline.from_pretrained(options.model, _device())), options.host, options.port)


def _add_model(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--model", type=Path, required=True, help=f"folder of {help}")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _cell(text: str) -> tuple[int, int, int]:
    sizes = text.split(",")
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,F,K, for example 16384,8,1024")
    return tuple(_positive(size) for size in sizes)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or os.strerror(error.errno)}") from error


if __name__ == "__main__":
    raise SystemExit(main())
