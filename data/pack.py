"""Source -> WebDataset shards and a manifest; killed at any moment and run again, the bytes come out the same.

Shard i is a pure function of the source's entries [i*N, (i+1)*N) and the settings: nothing in it depends on the number
of workers, on the clock, or on what was packed before. A journal names the shards that are complete.
"""

import collections
import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO, Any

import PIL
from PIL import Image

from scq.data import shards
from scq.data.manifest import parse_manifest
from scq.data.source import Entry, Source
from scq.data.sources import open_source
from scq.data.transforms import PROTOCOLS, decode, get_protocol
from scq.engine.errors import BadImage, DataError
from scq.engine.files import atomic_write, remove_leftovers, sha256_of, write_json

JOURNAL = "pack.jsonl"
ENTRIES_PER_TASK = 16
Progress = Callable[[int, int], None]
# One packed image: (entry, suffix, encoded bytes, (width, height)); one that could not be: (entry, None, reason, None).
Packed = tuple[Entry, str | None, bytes | str, tuple[int, int] | None]


def pack(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    format: str,
    size: int | None = None,
    crop: str | None = None,
    split: str | None = None,
    images_per_shard: int = 1000,
    workers: int | None = None,
    keep_encoded: bool = False,
    max_bad: float = 0.01,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Packs a source into WebDataset tar shards and manifest.json below `out`; returns the manifest.

    size is in pixels; crop names a protocol of data.transforms (by default the source's own). Images are stored as
    lossless PNG, or with keep_encoded as their original bytes (crop 'none' only). An image that cannot be read or is
    smaller than the crop is left out, counted and named in the manifest; above the share max_bad (0..1) the pack fails.
    workers: processes (default: one per core; 0 packs in this process). progress(done, total) counts source images.
    A set that is complete with the same settings is returned as it is; an interrupted one goes on.

    Raises DataError for a missing source, settings that contradict each other or what lies in `out`, or too many bad
    images.
    """
    images = open_source(format, source, split)
    crop = crop or ("none" if keep_encoded and size is None else images.default_crop)
    get_protocol(crop, size)
    if keep_encoded and crop != "none":
        raise DataError(f"keeping the original bytes needs crop protocol 'none', not '{crop}'")
    if images_per_shard < 1:
        raise DataError(f"images per shard must be at least 1, not {images_per_shard}")
    if not 0 <= max_bad <= 1:
        raise DataError(f"the share of bad images must lie in 0..1, not {max_bad}")
    settings = {
        "format": shards.FORMAT,
        "source": {
            "format": format,
            "path": os.fspath(source),
            "name": _name(format, source),
            "split": images.split,
            "images": len(images),
        },
        "protocol": {
            "crop": crop,
            "size": size,
            "description": PROTOCOLS[crop].description,
            "encoding": "original bytes" if keep_encoded else "png",
        },
        "class_names": list(images.class_names),
        "images_per_shard": images_per_shard,
        "pillow": PIL.__version__,  # another version may compress to other bytes
    }
    directory = Path(out).expanduser()
    if finished := _finished(directory, settings):
        return finished
    packers = _packers(images, crop, size, keep_encoded, os.cpu_count() or 1 if workers is None else workers)
    try:
        with _locked_journal(directory) as journal:
            if finished := _finished(directory, settings):  # by another process, just before the lock was ours
                return finished
            done = _resume(directory, journal, settings)
            bad_allowed = math.floor(max_bad * len(images) + 1e-9)
            with packers as submit:
                _write_shards(images, directory, journal, done, images_per_shard, submit, bad_allowed, progress)
            manifest = _manifest(settings, done)
            shards.build_index(directory, manifest)
            write_json(directory / shards.MANIFEST, manifest)
            (directory / JOURNAL).unlink(missing_ok=True)
    except OSError as error:  # an unreadable image is not among these: it is bad and named
        reason = error.strerror or error
        raise DataError(
            f"packing stopped at '{error.filename or directory}': {reason}; it goes on when run again"
        ) from error
    return manifest


def _name(format: str, source: str | os.PathLike) -> str | None:
    """What reports call the set: the last component of the source's path; None where the format says it better."""
    # Emoji stay "emoji", from the package or a folder "72x72": model cards know by it whose graphics they are.
    return None if format == "emoji" else Path(source).expanduser().absolute().name or None


@contextlib.contextmanager
def _locked_journal(directory: Path) -> Iterator[IO[bytes]]:
    """The journal of the pack, held by this process alone; the lock goes away with the process, however it ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        journal = (directory / JOURNAL).open("a+b")
    except OSError as error:
        raise DataError(f"cannot write to '{directory}': {error.strerror}") from error
    with journal:
        try:
            # A POSIX record lock: unlike flock's it does not live on in the workers of a killed process.
            fcntl.lockf(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise DataError(
                f"another process is packing into '{directory}': wait for it, or choose another folder"
            ) from error
        yield journal


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Says in words where two settings differ."""
    flat = [{**s, **{f"source {k}": v for k, v in s["source"].items()}, **s["protocol"]} for s in (old, new)]
    # The name follows from the path; packs of before it was kept have none.
    changed = [k for k in flat[1] if k not in ("source", "protocol", "source name") and flat[0].get(k) != flat[1][k]]
    return ", ".join(f"{key} was {flat[0].get(key)!r}, now {flat[1][key]!r}" for key in changed)


def _finished(directory: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a set that is already complete with these settings; None if there is none."""
    path = directory / shards.MANIFEST
    if not path.is_file():
        return None
    manifest = parse_manifest(path.read_bytes(), str(path), shards.FORMAT)
    (directory / JOURNAL).unlink(missing_ok=True)  # left by a kill between the last two steps of a pack
    if difference := _difference(manifest, {**settings, "pillow": manifest["pillow"]}):
        raise DataError(f"'{directory}' already holds another set ({difference}): delete it or choose another folder")
    return manifest


def _resume(directory: Path, journal: IO[bytes], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the shards that an interrupted pack completed; starts the journal where there is none."""
    remove_leftovers(directory)
    journal.seek(0)
    lines = journal.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):  # the kill came while this line was being written
        journal.truncate(sum(map(len, lines[:-1])))
        lines = lines[:-1]
    if not lines:
        if stray := sorted(p.name for p in directory.glob("shard-*.tar")):
            raise DataError(f"'{directory}' holds shards without a manifest ({stray[0]} ...): choose another folder")
        _append(journal, settings)
        return []
    before, *records = map(json.loads, lines)
    if difference := _difference(before, settings):
        raise DataError(
            f"'{directory}' holds an unfinished pack with other settings ({difference}): "
            "delete it or choose another folder"
        )
    for record in records:
        path = directory / record["name"]
        if not path.is_file() or sha256_of(path) != record["sha256"]:
            raise DataError(
                f"shard '{path}' of the unfinished pack is missing or changed: delete '{directory}' and pack again"
            )
    return records


def _append(journal: IO[bytes], record: dict[str, Any]) -> None:
    journal.write(json.dumps(record).encode() + b"\n")
    journal.flush()
    os.fsync(journal.fileno())


def _pack_entries(source: Source, crop: str, size: int | None, keep: bool, entries: list[Entry]) -> list[Packed]:
    """Loads, crops and encodes some entries; a bad one carries its reason instead of bytes."""
    packed: list[Packed] = []
    for entry in entries:
        try:
            loaded = source.load(entry)
            image = PROTOCOLS[crop].apply(decode(loaded), size)
        except (BadImage, OSError) as error:
            packed.append((entry, None, str(error), None))
            continue
        if keep and isinstance(loaded, bytes):
            suffix = (Image.open(io.BytesIO(loaded)).format or "img").lower()
            packed.append((entry, "jpg" if suffix == "jpeg" else suffix, loaded, image.size))
        else:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            packed.append((entry, "png", buffer.getvalue(), image.size))
    return packed


_task: tuple = ()  # what _pack_entries needs besides the entries, set once in each worker process


def _start_worker(*task: Any) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    # A worker whose parent was killed would wait for tasks forever.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _run_task(entries: list[Entry]) -> list[Packed]:
    return _pack_entries(*_task, entries)


@contextlib.contextmanager
def _packers(source: Source, crop: str, size: int | None, keep: bool, workers: int) -> Iterator[Callable]:
    """Yields submit(entries) -> function that returns the packed images, in processes or (0) right here."""
    if workers < 1:
        yield lambda entries: lambda: _pack_entries(source, crop, size, keep, entries)
        return
    task = (source, crop, size, keep)
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=task) as pool:
        try:
            yield lambda entries: pool.submit(_run_task, entries).result
        except BrokenProcessPool as error:
            raise DataError(
                "a packing process was killed, perhaps for want of memory: pack again, with fewer workers; it goes on "
                "where it stopped"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _in_order(
    source: Source, first_shard: int, images_per_shard: int, submit: Callable
) -> Iterator[tuple[int, list[Packed]]]:
    """Yields (shard number, packed images) in source order, with a bounded number of tasks under way."""

    def tasks() -> Iterator[tuple[int, list[Entry]]]:
        entries = itertools.islice(source.entries(), first_shard * images_per_shard, None)
        for number in itertools.count(first_shard):
            shard = itertools.islice(entries, images_per_shard)
            empty = True
            while chunk := list(itertools.islice(shard, ENTRIES_PER_TASK)):
                empty = False
                yield number, chunk
            if empty:
                return

    waiting: collections.deque = collections.deque()
    for number, chunk in tasks():
        waiting.append((number, submit(chunk)))
        if len(waiting) >= 4 * (os.cpu_count() or 1):
            ready, result = waiting.popleft()
            yield ready, result()
    while waiting:
        ready, result = waiting.popleft()
        yield ready, result()


class _Hashing:
    """A file that also takes the sha256 and the length of what is written to it."""

    def __init__(self, file: IO[bytes]):
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def _write_shards(
    source: Source,
    directory: Path,
    journal: IO[bytes],
    done: list[dict[str, Any]],
    images_per_shard: int,
    submit: Callable,
    bad_allowed: int,
    progress: Progress | None,
) -> None:
    """Writes the shards that are not done yet and appends their records to `done` and to the journal."""
    import webdataset  # here, because it takes a second that `--help` and reading need not pay

    total = len(source)
    seen = min(len(done) * images_per_shard, total)
    bad = [skipped for record in done for skipped in record["skipped"]]
    packed = _in_order(source, len(done), images_per_shard, submit)
    for number, group in itertools.groupby(packed, key=lambda item: item[0]):
        record = {"name": f"shard-{number:06d}.tar", "images": 0, "bytes": 0, "sha256": "", "sizes": [], "skipped": []}
        with atomic_write(directory / record["name"]) as file:
            hashing = _Hashing(file)
            with webdataset.TarWriter(hashing, encoder=False, mtime=0) as tar:
                for entry, suffix, data, size in itertools.chain.from_iterable(images for _, images in group):
                    seen += 1
                    if suffix is None:
                        record["skipped"].append({"key": entry.key, "reason": data})
                        bad.append(record["skipped"][-1])
                        if len(bad) > bad_allowed:
                            _refuse(bad, seen, total, bad_allowed)
                    else:
                        tar.write({"__key__": shards.member_name(entry.key), suffix: data, "cls": b"%d" % entry.label})
                        record["images"] += 1
                        if list(size) not in record["sizes"] and len(record["sizes"]) < 2:
                            record["sizes"].append(list(size))
                    if progress is not None and (seen % ENTRIES_PER_TASK == 0 or seen == total):
                        progress(seen, total)
            record["bytes"], record["sha256"] = hashing.bytes, hashing.sha256.hexdigest()
        done.append(record)
        _append(journal, record)


def _refuse(bad: list[dict[str, str]], seen: int, total: int, allowed: int) -> None:
    named = "; ".join(f"'{image['key']}' {image['reason']}" for image in bad[:3])
    more = ", ..." if len(bad) > 3 else ""
    raise DataError(
        f"{len(bad)} of the first {seen} images cannot be used (of {total} at most {allowed} may be bad, "
        f"see --max-bad): {named}{more}"
    )


def _manifest(settings: dict[str, Any], done: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of the finished set; image_size is None where the images have different sizes."""
    sizes = {tuple(s) for record in done for s in record["sizes"]}
    common = next(iter(sizes)) if len(sizes) == 1 else None
    if common is not None and common[0] != common[1]:
        common = None
    num_images = sum(record["images"] for record in done)
    if num_images == 0:
        raise DataError(f"not one image of '{settings['source']['path']}' could be used")
    return {
        **settings,
        "num_images": num_images,
        "image_size": common[0] if common else None,
        "bytes": sum(record["bytes"] for record in done),
        "shards": [{k: record[k] for k in ("name", "images", "bytes", "sha256")} for record in done],
        "skipped": [skipped for record in done for skipped in record["skipped"]],
    }
