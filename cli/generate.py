"""scq sample and scq app: images from a trained model."""

from __future__ import annotations

import argparse
import errno
import os
import re
import stat
import sys
from dataclasses import replace
from pathlib import Path
from socket import gethostname
from typing import Any
from urllib.parse import urlsplit

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
    parser.add_argument("--batch-size", type=positive, help="images drawn together; by default, what suits the device")
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

    from scq.engine.files import atomic_write, remove_leftovers
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
    remove_leftovers(options.out, of_others=True)
    with progress_bar("sample") as bar:
        together = options.batch_size or pipeline.together
        for start in range(0, options.num, together):
            count = min(together, options.num - start)
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
        "--name", type=_host_name, action="append", default=[], metavar="NAME",
        help="a further host name that users call this server by; others are refused; may be repeated",
    )  # fmt: skip
    parser.add_argument("--max-batch", type=positive, default=64, help="the most images one request may draw")
    parser.add_argument(
        "--results", type=Path, action="append", default=[], metavar="FOLDER",
        help="also show the report of the benchmark in this folder; may be repeated",
    )  # fmt: skip


def _app(options: argparse.Namespace) -> None:
    auth = _login(options)
    from scq.sampling.pipeline import EMBEDDED, SoftConvexPipeline

    pipeline = SoftConvexPipeline.from_pretrained(options.model or EMBEDDED, device())
    _shield_gradio()
    from scq.sampling.app import build_page, serve
    from scq.sampling.studio.results import find_reports

    for folder in options.results:
        if not folder.is_dir():
            raise UserError(f"--results {folder} is not a folder")
        if not find_reports([folder]):
            raise UserError(f"--results {folder} holds no report.md, and neither do the folders in it")
    page = build_page(pipeline, options.max_batch, [*options.results, *default_results()])
    names = [*options.name, gethostname()]
    serve(page, options.host, options.port, auth=auth, root_path=options.root_path, names=names)


def _shield_gradio() -> None:
    """Take out of the environment what Gradio, not imported yet, would obey: GRADIO_SHARE opens the page to the world,
    GRADIO_ALLOWED_PATHS serves further folders, GRADIO_VIBE_MODE lets users edit the program. One says where its files
    go, which `private_folder` heeds. From here on nothing is fetched but the page itself, which no proxy has."""
    ignored = sorted(name for name in os.environ if name.startswith("GRADIO_") and name != "GRADIO_TEMP_DIR")
    for name in ignored:
        del os.environ[name]
    if ignored:
        print(f"scq: {', '.join(ignored)} of the environment: no effect on this page", file=sys.stderr)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"


def _login(options: argparse.Namespace) -> tuple[str, str] | None:
    """The name and password that the page is to ask for.

    Raises:
        UserError: they are not USER:PASSWORD, or their file cannot be read.
    """
    if options.auth_file is not None:
        source, text = f"the first line of {options.auth_file}", _password_line(options.auth_file)
    elif options.auth is not None:
        source, text = "--auth", options.auth
    elif "SCQ_AUTH" in os.environ:
        source, text = "the environment variable SCQ_AUTH", os.environ["SCQ_AUTH"]
    else:
        return None
    user, _, password = text.strip().partition(":")
    user = user.strip()  # as the page does with what is typed
    if not (user and password):
        raise UserError(f"{source} must be USER:PASSWORD")
    if not (user + password).isprintable():
        raise UserError(f"{source} holds a character that cannot be typed; it must be USER:PASSWORD in one line")
    return user, password


def _password_line(path: Path) -> str:
    """The first line of a file with a password; if everybody on this machine may read it, that is said.

    Raises:
        UserError: it cannot be read, or is no regular file.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "it is not a file")  # a pipe would be waited for
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            line = file.readline()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"--auth-file {path}: {reason}") from error
    if about.st_mode & stat.S_IROTH:
        print(f"scq: everybody on this machine may read the password in {path}: chmod 600 {path}", file=sys.stderr)
    return line


def _root_path(text: str) -> str:
    """Where a proxy has the page, as the type of an argument: "", a path, or an http(s) address."""
    try:
        parts = urlsplit(text)
        address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:  # such as a port of 99999
        address = False
    known = address or (text.startswith("/") and not text.startswith("//"))
    if text and not (known and text.isprintable() and not set(text) & set(" ?#\\")):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a path, such as /scq, nor an http(s) address")
    return text


def _host_name(text: str) -> str:
    """The name of a host, without scheme, port and path, as the type of an argument."""
    if not re.fullmatch(r"[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a host, such as example.org")
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
