"""scq data: pack images into shards, check them, and preview them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scq.cli.common import Parser, command, positive
from scq.engine.errors import UserError


def add_data(commands: Any) -> None:
    from scq.data.transforms import PROTOCOLS

    parser = commands.add_parser("data", help="pack images into shards, check them, and preview them")
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    pack = command(
        actions,
        "pack",
        _pack,
        "pack images into WebDataset shards with a manifest",
        "If it is killed, run it again: it resumes, and ends with the same bytes.",
    )
    pack.add_argument("source", help="folder, LMDB or archive of images; 'twemoji' for the installed emoji")
    pack.add_argument("out", type=Path, help="folder for the shards")
    pack.add_argument("--format", required=True, help="what SOURCE is: folder, lsun, cifar10, gtsrb or emoji")
    pack.add_argument("--size", type=positive, help="side of the square images, in pixels")
    protocols = "; ".join(f"{name}: {protocol.description}" for name, protocol in PROTOCOLS.items())
    pack.add_argument(
        "--crop",
        choices=sorted(PROTOCOLS),
        help=f"how images are made square; by default, as is usual for the format. {protocols}".replace("%", "%%"),
    )
    pack.add_argument("--split", help="which part of the source, for formats that have several, e.g. train or test")
    pack.add_argument("--images-per-shard", type=positive, default=1000, help="images in each shard")
    pack.add_argument("--workers", type=positive, help="number of processes; by default, one for each core")
    pack.add_argument("--keep-encoded", action="store_true", help="store the original bytes; needs --crop none")
    pack.add_argument(
        "--encoding", choices=("png", "webp"), default="png", help="both are lossless; webp takes a fifth less room"
    )
    pack.add_argument("--max-bad", type=float, default=0.01, help="largest share of unusable images before it fails")

    check = command(actions, "check", _check, "verify shards against their manifest")
    check.add_argument("out", metavar="SHARDS", help="folder or URL of shards that 'scq data pack' wrote")

    preview = command(actions, "preview", _preview, "make a contact sheet of images spread over a set of shards")
    preview.add_argument("out", metavar="SHARDS", help="folder or URL of shards that 'scq data pack' wrote")
    preview.add_argument("picture", type=Path, help="PNG file to write")


def _pack(options: argparse.Namespace) -> None:
    from scq.data.pack import pack
    from scq.data.sources import in_words
    from scq.engine.progress import progress_bar

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
            encoding=options.encoding,
            max_bad=options.max_bad,
            progress=bar,
        )
    bad = len(manifest["skipped"])
    named = f", {bad} unusable images skipped (named in manifest.json)" if bad else ""
    print(f"{options.out}: {manifest['num_images']} images in {len(manifest['shards'])} shards{named}")
    if passed_over := manifest.get("passed_over"):  # sets that were packed before do not say
        print(f"passed over: {in_words(passed_over)}")


def _check(options: argparse.Namespace) -> None:
    from scq.data.check import check

    problems = check(options.out)
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{options.out} does not match its manifest: {len(problems)} problems")
    print(f"{options.out}: every shard matches the manifest")


def _preview(options: argparse.Namespace) -> None:
    from scq.data.check import preview

    preview(options.out, options.picture)
    print(options.picture)
