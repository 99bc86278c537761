"""How fast data is read: our stream, webdataset's own plain pipeline, and token shards, side by side in one run."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from scq.data.shards import ShardSet
from scq.data.stream import Batch, ImageStream
from scq.data.tokens import TokenStream, TokenWriter
from scq.engine.checks import MOST_WORKERS, whole_number
from scq.engine.errors import DataError
from scq.engine.files import expand_home
from scq.engine.references import shown

WEBDATASET, STREAM = "webdataset, plain pipeline", "scq, decoding every image"
IN_MEMORY, TOKENS = "scq, decoded images in memory", "scq, token shards"
SHUFFLE_BUFFER = 1000  # images; what webdataset's own examples use


def benchmark_data(
    shards: str | os.PathLike,
    tokens: str | os.PathLike | None = None,
    *,
    batch_size: int = 64,
    workers: int = 2,
    repeats: int = 5,
    seconds: float = 2.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Images per second of each way to read, measured in turns, so that a busy machine disturbs all alike.

    Args:
        shards: local set written by `pack`.
        tokens: token shards. None writes 16x16 tokens for every image of the set to a temporary folder; their values
            do not matter for speed.
        batch_size: images in a batch.
        workers: loader processes of the two ways that decode; the others read in this process.
        repeats: turns of each way.
        seconds: that a turn lasts, after a warm-up.
        progress: called with (done, total), counted in turns.

    Returns:
        ``{"images", "image_size", "batch_size", "workers", "cores", "ways": {name: {"median", "lowest", "highest",
        "runs"}}, "stream_to_webdataset", "tokens_to_webdataset"}``, rates in images per second, the last two as ratios
        of medians.

    Raises:
        DataError: the set is missing or remote, or has images of different sizes.
        UserError: there are more workers than MOST_WORKERS.
    """
    whole_number("workers", workers, 0, MOST_WORKERS)
    opened = ShardSet(shards)
    if opened.manifest["image_size"] is None:
        raise DataError(f"the images of '{shown(opened.location)}' have different sizes: batches cannot be compared")
    # Absolute, because webdataset takes the first word of pipe:... for a protocol, and runs what follows.
    files = [expand_home(opened.location).absolute() / shard["name"] for shard in opened.manifest["shards"]]
    if not all(file.is_file() for file in files):
        raise DataError(f"'{shown(opened.location)}' is not a complete folder of this machine: run `scq data check`")
    with tempfile.TemporaryDirectory(prefix="scq-benchmark-") as folder:
        token_folder = tokens if tokens is not None else _write_tokens(Path(folder), len(opened))
        ways: dict[str, Callable[[], Iterator[Any]]] = {
            WEBDATASET: lambda: _webdataset(files, batch_size, workers),
            STREAM: lambda: _stream(shards, batch_size, workers, keep_decoded=False),
            IN_MEMORY: lambda: _stream(shards, batch_size, 0, keep_decoded=True),
            TOKENS: lambda: TokenStream(token_folder, batch_size=batch_size).iterate(),
        }
        runs: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(repeats):
            for number, (name, open_batches) in enumerate(ways.items()):
                runs[name].append(_images_per_second(open_batches(), seconds, warm_up=4 * workers + 4))
                if progress is not None:
                    progress(turn * len(ways) + number + 1, repeats * len(ways))
    medians = {name: statistics.median(rates) for name, rates in runs.items()}
    return {
        "images": len(opened),
        "image_size": opened.manifest["image_size"],
        "batch_size": batch_size,
        "workers": workers,
        "cores": os.cpu_count(),
        "ways": {
            name: {"median": medians[name], "lowest": min(rates), "highest": max(rates), "runs": rates}
            for name, rates in runs.items()
        },
        "stream_to_webdataset": medians[STREAM] / medians[WEBDATASET],
        "tokens_to_webdataset": medians[TOKENS] / medians[WEBDATASET],
    }


def format_table(result: dict[str, Any]) -> str:
    """The result of `benchmark_data` as a table for people."""
    base = result["ways"][WEBDATASET]["median"]
    lines = [
        f"{result['images']:,} images of {result['image_size']}x{result['image_size']}, batches of "
        f"{result['batch_size']}, {result['workers']} workers, {result['cores']} cores",
        f"{'images per second':32} {'median':>12} {'lowest':>12} {'highest':>12} {'ratio':>8}",
    ]
    lines += [
        f"{name:32} {way['median']:12,.0f} {way['lowest']:12,.0f} {way['highest']:12,.0f} {way['median'] / base:7.2f}x"
        for name, way in result["ways"].items()
    ]
    return "\n".join(lines)


def _write_tokens(folder: Path, count: int, grid: tuple[int, int] = (16, 16), codebook_size: int = 1024) -> Path:
    writer = TokenWriter(
        folder, grid=grid, codebook_size=codebook_size, fingerprint="benchmark", source="random", num_classes=0
    )
    generator = torch.Generator().manual_seed(0)
    for begin in range(0, count, 1000):
        size = min(1000, count - begin)
        indices = torch.randint(codebook_size, (size, *grid), generator=generator)
        writer.write(indices, torch.zeros(size, dtype=torch.int64), [str(begin + i) for i in range(size)])
    writer.close()
    return folder


def _webdataset(files: list[Path], batch_size: int, workers: int) -> Iterator[list]:
    """The pipeline of webdataset's README: shuffle buffer, decode to uint8 (3, H, W), batch, WebLoader."""
    import webdataset

    dataset = webdataset.WebDataset([str(file) for file in files], shardshuffle=False, empty_check=False)
    decoded = ["png", "jpg", "cls"]  # webdataset would unpickle whatever else a shard holds
    dataset = dataset.repeat().shuffle(SHUFFLE_BUFFER).decode("torchrgb8", only=decoded).to_tuple("png;jpg", "cls")
    return iter(webdataset.WebLoader(dataset.batched(batch_size), batch_size=None, num_workers=workers))


def _stream(shards: str | os.PathLike, batch_size: int, workers: int, keep_decoded: bool) -> Iterator[Batch]:
    stream = ImageStream(shards, batch_size=batch_size, workers=workers, keep_decoded=keep_decoded)
    batches = stream.iterate()
    if keep_decoded:  # the first epoch decodes; what is measured is every later one
        for _ in range(stream.num_images // batch_size + 1):
            next(batches)
    return batches


def _images_per_second(batches: Iterator[Any], seconds: float, warm_up: int) -> float:
    """Images handed out per second, the loader's start and first prefetched batches not counted."""
    for _ in range(warm_up):
        next(batches)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        count += len(next(batches)[0])
    return count / elapsed
