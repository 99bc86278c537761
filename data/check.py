"""Inspecting a packed set: whether it is intact, and what its images look like."""

import os
from typing import Any

import numpy as np
from PIL import Image

from scq.data.shards import ShardSet, index_name, scan_shard
from scq.data.storage import LocalStorage, Storage
from scq.data.transforms import decode
from scq.engine.errors import DataError
from scq.engine.files import atomic_write, expand_home, make_folder


def check(out: str | os.PathLike) -> list[str]:
    """Verify a packed set against its manifest.

    Returns:
        the problems in words; empty if there are none.

    Raises:
        DataError: there is no finished set at ``out``.
    """
    packed = ShardSet(out)
    problems = [problem for shard in packed.manifest["shards"] if (problem := _problem(packed.storage, shard))]
    if isinstance(packed.storage, LocalStorage):
        known = {shard["name"] for shard in packed.manifest["shards"]}
        tars = sorted(path.name for path in packed.storage.directory.glob("*.tar"))
        problems += [f"{name} is not in the manifest" for name in tars if name not in known]
    if not problems:
        problems += _index_problems(packed)
    return problems


def _problem(storage: Storage, shard: dict[str, Any]) -> str | None:
    """What is wrong with one shard, in words; None if its bytes match the manifest."""
    name, size = shard["name"], shard["bytes"]
    if isinstance(storage, LocalStorage):
        path = storage.directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, but the manifest says {size}"
    try:
        sound = storage.sha256(name, size) == shard["sha256"]
    except DataError as error:
        return str(error)
    return None if sound else f"{name} was changed: its sha256 differs from the manifest's"


def _index_problems(packed: ShardSet) -> list[str]:
    """Compare the index with the tar headers of a local set whose shards are intact."""
    if not isinstance(packed.storage, LocalStorage):
        return []
    try:
        rows = packed.rows
        scanned = [
            scan_shard(packed.storage.directory / shard["name"], number)
            for number, shard in enumerate(packed.manifest["shards"])
        ]
    except DataError as error:
        return [str(error)]
    if not np.array_equal(np.concatenate(scanned), rows):
        return [f"{index_name(packed.manifest)} does not match the shards: delete it, and it will be rebuilt"]
    return []


def preview(out: str | os.PathLike, png_path: str | os.PathLike, columns: int = 8, rows: int = 8) -> None:
    """Write a contact sheet of images spread evenly over a packed set, as a PNG file in reading order.

    Cells are at least 64 pixels wide; small images are enlarged without smoothing so that their pixels can be seen.

    Raises:
        DataError: there is no finished set at ``out``, or the picture cannot be written.
    """
    packed = ShardSet(out)
    count = min(columns * rows, len(packed))
    images = [decode(packed.read(i * len(packed) // count)) for i in range(count)]
    cell = min(max(64, *(max(image.size) for image in images)), 256) if count > 1 else max(64, *images[0].size)
    sheet = Image.new("RGB", (columns * (cell + 2) + 2, -(-count // columns) * (cell + 2) + 2), "white")
    for i, image in enumerate(images):
        scale = cell / max(image.size)
        smooth = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BICUBIC
        image = image.resize([max(1, round(scale * side)) for side in image.size], smooth)
        sheet.paste(image, (2 + i % columns * (cell + 2), 2 + i // columns * (cell + 2)))
    try:
        path = expand_home(png_path)
        make_folder(path.parent)
        with atomic_write(path) as file:
            sheet.save(file, "PNG")
    except OSError as error:
        raise DataError(f"cannot write '{png_path}': {error.strerror}") from error
