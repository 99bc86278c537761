"""Source -> WebDataset shards and a manifest. A pack may be killed at any moment: run again, it gives the same bytes.

Shard i is a pure function of the source's entries [i*N, (i+1)*N) and the settings: nothing in it depends on the number
of workers, on the clock, or on what was packed before. A journal lists the shards that are complete.
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
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO, Any

import PIL
from PIL import Image

from scq.data import shards
from scq.data.image_files import open_image
from scq.data.manifest import IMAGES, parse_manifest
from scq.data.source import Entry, Source
from scq.data.sources import open_source
from scq.data.storage import with_retries
from scq.data.transforms import PROTOCOLS, decode, get_protocol
from scq.engine.checks import MOST_WORKERS, one_of, whole_number
from scq.engine.errors import BadImage, DataError
from scq.engine.files import (
    atomic_write,
    expand_home,
    make_folder,
    open_plain,
    read_plain,
    remove_leftovers,
    sha256_of,
    write_json,
)
from scq.engine.interruption import outlive_signals
from scq.engine.plain_json import parse_json
from scq.engine.progress import say

JOURNAL = "pack.jsonl"
TIMES = "source_times.json"  # beside the manifest, which is the same on every machine that packs the same source
ENTRIES_PER_TASK = 16
# How images are stored, and what Pillow is told. WebP's own default for lossless files is a fifth smaller than PNG.
ENCODINGS: dict[str, dict[str, Any]] = {"png": {}, "webp": {"lossless": True}}
LARGEST_WEBP = 16383  # pixels of a side
FEWER_WORKERS = "pack again with fewer workers; packing resumes where it stopped"
Progress = Callable[[int, int], None]
# A packed image: (entry, suffix, encoded bytes, (width, height)); one that cannot be used: (entry, None, reason, None).
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
    encoding: str = "png",
    max_bad: float = 0.01,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack a source into WebDataset tar shards and manifest.json below `out`.

    An image that is damaged or smaller than the crop is skipped and named in the manifest. One that cannot be read is
    tried again, and then ends the pack. If the set is already complete with the same source and settings, nothing is
    done; an interrupted pack is resumed.

    Args:
        format: of the source, see data.sources.
        size: side of the square images in pixels; None keeps the size (crop 'none' only).
        crop: a protocol of data.transforms; None for the source's own, or 'none' if the original bytes are kept.
        split: of the source, if it has several.
        images_per_shard: images in each shard but the last.
        workers: processes; None for one per core, 0 to pack in this process.
        keep_encoded: store the original bytes (crop 'none' only) instead of encoding the images again.
        encoding: one of ENCODINGS. Both are lossless; "webp" takes a fifth less room, and images of at most 16,383
            pixels on each side.
        max_bad: largest share of images that may be unusable, in [0, 1].
        progress: called as progress(done, total), in images of the source.

    Returns:
        the manifest.

    Raises:
        DataError: the source is missing, was changed since, or cannot be read; the settings contradict each other or
            what is already in `out`; too many images are unusable; or the disk is full or not writable.
        UserError: a number is out of range, or the encoding is unknown.
    """
    one_of("encoding", encoding, ENCODINGS)
    whole_number("images_per_shard", images_per_shard, most=2**31)
    if workers is not None:
        whole_number("workers", workers, 0, MOST_WORKERS)
    images = open_source(format, source, split)
    crop = crop or ("none" if keep_encoded and size is None else images.default_crop)
    get_protocol(crop, size)
    if keep_encoded and crop != "none":
        raise DataError(f"keeping the original bytes needs the crop protocol 'none', not '{crop}'")
    if images_per_shard < 1:
        raise DataError(f"images per shard must be at least 1, not {images_per_shard}")
    if not 0 <= max_bad <= 1:
        raise DataError(f"the largest share of unusable images must be in 0..1, not {max_bad}")
    Image.init()  # every decoder, while there are files and memory to load it: a missing one would look like bad images
    files = images.survey()
    settings = {
        "format": IMAGES,
        "source": {
            "format": format,
            "path": os.fspath(source),
            "name": _name(format, source),
            "split": images.split,
            "images": len(images),
        },
        "source_files": files._asdict(),
        "protocol": {
            "crop": crop,
            "size": size,
            "description": PROTOCOLS[crop].description,
            "encoding": "original bytes" if keep_encoded else encoding,
        },
        "class_names": list(images.class_names),
        "images_per_shard": images_per_shard,
        "pillow": PIL.__version__,  # another version may compress to different bytes
    }
    directory = expand_home(out)
    if finished := _finished(directory, settings):
        return finished
    kept = None if keep_encoded else encoding
    packers = _packers(images, crop, size, kept, os.cpu_count() or 1 if workers is None else workers)
    try:
        with _locked_journal(directory) as journal:
            if finished := _finished(directory, settings):  # by another process, just before we got the lock
                return finished
            done = _resume(directory, journal, settings)
            bad_allowed = math.floor(max_bad * settings["source"]["images"] + 1e-9)
            with packers as submit:
                _write_shards(images, directory, journal, done, settings, submit, bad_allowed, progress)
            manifest = _manifest(settings, done, images.passed_over())
            manifest["index_sha256"] = shards.build_index(directory, manifest)
            write_json(directory / TIMES, {"times": files.times})
            write_json(directory / shards.MANIFEST, manifest)
            (directory / JOURNAL).unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"packing stopped at '{error.filename or directory}': {reason}; run it again to resume"
        ) from error
    return manifest


def _name(format: str, source: str | os.PathLike) -> str | None:
    """The set's name in reports: the last component of the source's path; None if the format is the better name."""
    # Emoji are called "emoji", whether from the package or a folder "72x72": model cards credit the graphics by it.
    return None if format == "emoji" else expand_home(source).absolute().name or None


@contextlib.contextmanager
def _locked_journal(directory: Path) -> Iterator[IO[bytes]]:
    """Yield the journal of the pack, locked for this process alone; the lock ends with the process in any case."""
    try:
        make_folder(directory)
        journal = open_plain(directory / JOURNAL, "a+b")
    except OSError as error:
        raise DataError(f"cannot write to '{directory}': {error.strerror}") from error
    with journal:
        try:
            # A POSIX record lock: unlike flock's, workers that outlive a killed process do not hold it.
            fcntl.lockf(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise DataError(
                f"another process is packing into '{directory}': wait for it, or choose another folder"
            ) from error
        yield journal


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """How two settings differ, in words; empty if they do not."""
    flat = [{**s, **{f"source {k}": v for k, v in s["source"].items()}, **s["protocol"]} for s in (old, new)]
    # The name follows from the path, and packs older than this field have none. The files are compared below.
    apart = ("source", "protocol", "source name", "source_files")
    changed = [k for k in flat[1] if k not in apart and flat[0].get(k) != flat[1][k]]
    words = [f"{key} was {flat[0].get(key)!r}, now {flat[1][key]!r}" for key in changed]
    before, now = old.get("source_files") or {}, new["source_files"]  # older packs do not know their files
    newest = f"'{now['newest']}' was written last"
    if before.get("names_and_sizes", now["names_and_sizes"]) != now["names_and_sizes"]:
        sizes = f"{before['bytes']} bytes before, now {now['bytes']}"
        words.append(f"names or sizes of the source's files changed, {sizes}; {newest}")
    elif before.get("times", now["times"]) != now["times"]:
        words.append(f"the source's files were written again, {newest}")
    return ", ".join(words)


def _finished(directory: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a set that is already complete with these settings; None if there is none."""
    path = directory / shards.MANIFEST
    if not path.is_file():
        return None
    manifest = parse_manifest(read_plain(path), f"'{path}'", IMAGES)
    (directory / JOURNAL).unlink(missing_ok=True)  # left behind if a pack was killed between its last two steps
    if difference := _difference(_with_times(manifest, directory), {**settings, "pillow": manifest["pillow"]}):
        raise DataError(f"'{directory}' already holds another set ({difference}): delete it or choose another folder")
    return manifest


def _with_times(manifest: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The manifest with the times of the source's files, if they are known: whoever deletes TIMES keeps the set."""
    try:
        times = parse_json(read_plain(directory / TIMES), f"'{directory / TIMES}'", "delete it")["times"]
    except FileNotFoundError:
        return manifest
    except (DataError, TypeError, KeyError) as error:
        raise DataError(f"'{directory / TIMES}' is damaged: delete it, and the times are not compared") from error
    return {**manifest, "source_files": {**manifest.get("source_files", {}), "times": times}}


def _resume(directory: Path, journal: IO[bytes], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the shards that an interrupted pack completed; starts the journal if it is empty."""
    remove_leftovers(directory)
    journal.seek(0)
    lines = journal.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):  # killed while writing this line
        journal.truncate(sum(map(len, lines[:-1])))
        lines = lines[:-1]
    if not lines:
        if stray := sorted(p.name for p in directory.glob("shard-*.tar")):
            raise DataError(f"'{directory}' holds shards without a manifest ({stray[0]} ...): choose another folder")
        _append(journal, settings)
        return []
    try:
        before, *records = [parse_json(line, f"'{directory / JOURNAL}'", "delete it") for line in lines]
        difference = _difference(before, settings)
        named = [(directory / record["name"], record["sha256"]) for record in records]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"'{directory / JOURNAL}' is damaged: delete '{directory}' and pack again") from error
    if difference:
        raise DataError(
            f"'{directory}' holds an unfinished pack with other settings ({difference}): "
            "delete it or choose another folder"
        )
    for path, sha256 in named:
        if not path.is_file() or sha256_of(path) != sha256:
            raise DataError(
                f"shard '{path}' of the unfinished pack is missing or changed: delete '{directory}' and pack again"
            )
    return records


def _append(journal: IO[bytes], record: dict[str, Any]) -> None:
    journal.write(json.dumps(record).encode() + b"\n")
    journal.flush()
    os.fsync(journal.fileno())


def _pack_entries(
    source: Source, crop: str, size: int | None, encoding: str | None, entries: list[Entry]
) -> list[Packed]:
    """Load, crop and encode some entries; an unusable one gets the reason instead of bytes.

    Args:
        encoding: one of ENCODINGS; None keeps the original bytes.

    Raises:
        DataError: one cannot be read or handled here and now, which says nothing about the image.
    """
    packed: list[Packed] = []
    for entry in entries:
        try:
            loaded = with_retries(lambda entry=entry: source.load(entry), f"'{entry.key}'")
            image = PROTOCOLS[crop].apply(decode(loaded), size)
        except BadImage as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno is not None:  # of the system, not of a decoder
                raise DataError(
                    f"packing stopped at '{entry.key}': {cause.strerror}; run it again to resume"
                ) from error
            packed.append((entry, None, str(error), None))
            continue
        except DataError as error:
            raise DataError(f"packing stopped: {error}; run it again to resume") from error
        except MemoryError as error:
            raise DataError(f"packing stopped at '{entry.key}': memory ran out; {FEWER_WORKERS}") from error
        if encoding is None and isinstance(loaded, bytes):
            suffix = (open_image(loaded).format or "img").lower()
            packed.append((entry, "jpg" if suffix == "jpeg" else suffix, loaded, image.size))
        else:
            buffer, suffix = io.BytesIO(), encoding or "png"
            if suffix == "webp" and max(image.size) > LARGEST_WEBP:
                reason = f"is {image.width}x{image.height}, and WebP ends at {LARGEST_WEBP}: pack with --encoding png"
                packed.append((entry, None, reason, None))
                continue
            image.save(buffer, suffix, **ENCODINGS[suffix])
            packed.append((entry, suffix, buffer.getvalue(), image.size))
    return packed


_task: tuple = ()  # what _pack_entries needs besides the entries, set once in each worker process


def _start_worker(*task: Any) -> None:
    global _task
    _task = task
    outlive_signals()
    parent = multiprocessing.parent_process()
    # Without this, a worker whose parent was killed would wait for tasks forever.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _run_task(entries: list[Entry]) -> list[Packed]:
    return _pack_entries(*_task, entries)


@contextlib.contextmanager
def _packers(source: Source, crop: str, size: int | None, encoding: str | None, workers: int) -> Iterator[Callable]:
    """Yield submit(entries) -> a function that returns the packed images; with 0 workers, this process packs them."""
    if workers < 1:
        yield lambda entries: lambda: _pack_entries(source, crop, size, encoding, entries)
        return
    task = (source, crop, size, encoding)
    try:
        started = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=task)
    except (OSError, NotImplementedError) as error:  # a container without /dev/shm, for one
        say(f"packing in one process, because several cannot share a lock on this machine: {error}")
        yield lambda entries: lambda: _pack_entries(source, crop, size, encoding, entries)
        return
    with started as pool:
        try:
            yield lambda entries: pool.submit(_run_task, entries).result
        except BrokenProcessPool as error:
            raise DataError(f"a packing process was killed, perhaps because memory ran out: {FEWER_WORKERS}") from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _in_order(
    source: Source, first_shard: int, images_per_shard: int, submit: Callable
) -> Iterator[tuple[int, list[Packed]]]:
    """Yield (shard number, packed images) in source order, with a bounded number of tasks in flight."""

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
    """A file that also computes the sha256 and the length of what is written to it."""

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
    settings: dict[str, Any],
    submit: Callable,
    bad_allowed: int,
    progress: Progress | None,
) -> None:
    """Write the shards that are not done yet, and append their records to `done` and to the journal."""
    import webdataset  # imported here because it takes a second, which `--help` and readers need not spend

    total, images_per_shard = settings["source"]["images"], settings["images_per_shard"]
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
        f"{len(bad)} of the first {seen} images cannot be used (of all {total}, at most {allowed} may be bad, "
        f"see --max-bad): {named}{more}"
    )


def _manifest(settings: dict[str, Any], done: list[dict[str, Any]], passed_over: Counter[str]) -> dict[str, Any]:
    """The manifest of the finished set; image_size is None if the images differ in size or are not square."""
    sizes = {tuple(s) for record in done for s in record["sizes"]}
    common = next(iter(sizes)) if len(sizes) == 1 else None
    if common is not None and common[0] != common[1]:
        common = None
    num_images = sum(record["images"] for record in done)
    if num_images == 0:
        raise DataError(f"none of the images of '{settings['source']['path']}' can be used")
    files = settings["source_files"]
    return {
        **settings,
        "source_files": {"bytes": files["bytes"], "names_and_sizes": files["names_and_sizes"]},
        "passed_over": dict(sorted(passed_over.items())),
        "num_images": num_images,
        "image_size": common[0] if common else None,
        "bytes": sum(record["bytes"] for record in done),
        "shards": [{k: record[k] for k in ("name", "images", "bytes", "sha256")} for record in done],
        "skipped": [skipped for record in done for skipped in record["skipped"]],
    }
