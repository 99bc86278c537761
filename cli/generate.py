"""scq sample and scq app: images from a trained model."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from socket import gethostname
from typing import Any

from scq.cli.common import add_model, command, device, make_folder, port_number, positive
from scq.engine.errors import UserError


def add_sample(commands: Any) -> None:
    parser = command(
        commands,
        "sample",
        _sample,
        "draw images, and save them as PNG files",
        "Image i is drawn with seed SEED + i: the same seed gives the same image in any batch.",
    )
    add_model(parser, "a model that 'scq train prior' or 'scq quickstart' wrote", embedded=True)
    parser.add_argument("--num", type=positive, default=16, help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images, named by their seeds")
    parser.add_argument("--class", dest="label", type=int, help="draw this class, for a class-conditional prior")
    parser.add_argument("--batch-size", type=positive, default=16, help="images that are drawn together")
    parser.add_argument("--steps", type=positive, help="sampling steps; by default, the model's own number")
    parser.add_argument(
        "--temperature", type=float, help="temperature of the distribution of codes; by default, the model's own"
    )
    parser.add_argument(
        "--guidance-scale", type=float, help="strength of guidance towards the class; by default, the model's own"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="precision of the networks; codes and refiner stay in fp32",
    )
    parser.add_argument("--compile", action="store_true", help="compile the prior with torch.compile first")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="other sampling settings, such as sampler=halton or top_p=0.9"
    )


def _sample(options: argparse.Namespace) -> None:
    import torch

    from scq.engine.files import atomic_write
    from scq.engine.progress import progress_bar
    from scq.sampling.arguments import LARGEST_SEED
    from scq.sampling.pipeline import EMBEDDED, SoftConvexPipeline
    from scq.stage2_prior.scheduler import parse_settings

    settings = parse_settings(options.settings)
    for name in ("steps", "temperature", "guidance_scale"):
        if (value := getattr(options, name)) is not None:
            settings[name] = value
    if options.seed > LARGEST_SEED - options.num:
        raise UserError(f"--seed {options.seed} leaves no room for {options.num} seeds up to {LARGEST_SEED}; lower it")
    dtype = torch.bfloat16 if options.precision == "bf16" else None
    pipeline = SoftConvexPipeline.from_pretrained(options.model or EMBEDDED, device(), dtype=dtype)
    if options.compile:
        pipeline.prior.compile()
    make_folder(options.out)
    with progress_bar("sample") as bar:
        for start in range(0, options.num, options.batch_size):
            count = min(options.batch_size, options.num - start)
            try:
                images = pipeline(
                    num_images=count,
                    seed=options.seed + start,
                    class_labels=options.label,
                    batch_size=count,
                    **settings,
                ).images
            except ValueError as error:
                raise UserError(str(error)) from error
            for i, image in enumerate(images):
                with atomic_write(options.out / f"{options.seed + start + i:06d}.png") as file:
                    image.save(file, format="PNG")
            bar(start + count, options.num)
    print(f"{options.out}: {options.num} images")


def add_app(commands: Any) -> None:
    parser = command(
        commands,
        "app",
        _app,
        "serve a Gradio page for generating, editing and inspecting images",
        "With --auth-file or the environment variable SCQ_AUTH, both USER:PASSWORD, it asks users for that name and "
        "password.",
        keep_freed_memory=False,
    )
    add_model(parser, "a model that 'scq train prior' or 'scq quickstart' wrote", embedded=True)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 opens it to the network, :: to IPv6, too"
    )
    parser.add_argument("--port", type=port_number, default=7860, help="port to listen on")
    login = parser.add_mutually_exclusive_group()
    login.add_argument("--auth-file", type=Path, metavar="FILE", help="file whose first line is USER:PASSWORD")
    login.add_argument(
        "--auth", metavar="USER:PASSWORD", help="the same, for tests: everybody on this machine can see it (ps)"
    )
    parser.add_argument(
        "--root-path", type=_root_path, default="", metavar="PATH",
        help="where a proxy in front has the page: /scq, or better the whole address, https://example.org/scq",
    )  # fmt: skip
    parser.add_argument(
        "--name", action="append", default=[], metavar="NAME",
        help="a further host name that users call this server by; others are refused; may be repeated",
    )  # fmt: skip
    parser.add_argument("--max-batch", type=positive, default=64, help="the most images one request may draw")
    parser.add_argument(
        "--results", type=Path, action="append", default=[], metavar="FOLDER",
        help="also show the report of the benchmark in this folder; may be repeated",
    )  # fmt: skip


def _app(options: argparse.Namespace) -> None:
    auth = _login(options)
    from scq.sampling.app import build_page, serve
    from scq.sampling.pipeline import EMBEDDED, SoftConvexPipeline
    from scq.sampling.studio.results import find_reports

    for folder in options.results:
        if not folder.is_dir():
            raise UserError(f"--results {folder} is not a folder")
        if not find_reports([folder]):
            raise UserError(f"--results {folder} holds no report.md, and neither do the folders in it")
    pipeline = SoftConvexPipeline.from_pretrained(options.model or EMBEDDED, device())
    page = build_page(pipeline, options.max_batch, [*options.results, *default_results()])
    names = [*options.name, gethostname()]
    serve(page, options.host, options.port, auth=auth, root_path=options.root_path, names=names)


def _login(options: argparse.Namespace) -> tuple[str, str] | None:
    """The name and password that the page is to ask for.

    Raises:
        UserError: they are not USER:PASSWORD, or their file cannot be read.
    """
    if options.auth_file is not None:
        try:
            lines = options.auth_file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"--auth-file {options.auth_file}: {reason}") from error
        source, text = f"the first line of {options.auth_file}", lines[0] if lines else ""
    elif options.auth is not None:
        source, text = "--auth", options.auth
    elif "SCQ_AUTH" in os.environ:
        source, text = "the environment variable SCQ_AUTH", os.environ["SCQ_AUTH"]
    else:
        return None
    user, _, password = text.strip().partition(":")
    if not (user and password):
        raise UserError(f"{source} must be USER:PASSWORD")
    return user, password


def _root_path(text: str) -> str:
    if text and not text.startswith(("/", "http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a path, such as /scq, nor an http(s) address")
    return text


def default_results() -> list[Path]:
    """The folders with the project's own reports: a checkout has one, an installed package has none."""
    from scq.engine.config import PACKAGE

    results = PACKAGE / "docs" / "results"
    return [results] if results.is_dir() else []


def add_export(commands: Any) -> None:
    parser = command(
        commands,
        "export",
        _export,
        "write a copy of a model for sharing, its weights in half precision",
        "The folder has a model card, can be loaded with from_pretrained, and can be uploaded to a model hub.",
    )
    add_model(parser, "a model that 'scq train prior' or 'scq quickstart' wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the copy; a model in it is replaced")
    parser.add_argument("--license", help="licence of the weights, for the model card, such as cc-by-4.0 or mit")


def _export(options: argparse.Namespace) -> None:
    from scq.sampling.export import export_half
    from scq.sampling.pipeline import SoftConvexPipeline

    pipeline = SoftConvexPipeline.from_pretrained(options.model)
    if options.license:
        pipeline.measured = replace(pipeline.measured, license=options.license)
    export_half(pipeline, options.out)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {size / 1e6:.1f} MB")
