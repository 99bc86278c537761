"""The one way to write files: under a temporary name, synced to disk, then renamed.

A reader sees either the old file or the complete new one, and a power cut leaves one of the two. Everything that the
project writes goes through this module or `engine.folders`, except logs, which are appended to.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from scq.engine.progress import say

FULL = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EFBIG])  # what a full disk, quota or file size limit answers


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that appears at ``path``, complete and synced to disk, only if the block succeeds.

    The parent folder must exist.

    Raises:
        OSError: it cannot be written; on a full disk, too, the error names ``path``.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with named_when_full(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def named_when_full(path: Path) -> Iterator[None]:
    """Name the file in the error of a full disk: the system names it when a file is opened, but not when written."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and not error.filename:
            error.filename = str(path)
        raise


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, each of them synced to disk, where they do not exist."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in reversed(missing):
        sync_folder(each.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes atomically; parent folders are created."""
    make_folder(path.parent)
    with atomic_write(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, indent: int = 1) -> None:
    """Write plain values as JSON, atomically; the same value always gives the same bytes."""
    write_file(path, json.dumps(value, indent=indent, ensure_ascii=True) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that killed processes left in a folder."""
    for path in folder.glob(".*.tmp*"):
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The sha256 of a file as hexadecimal text; the file is read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """The folder for what another run need not make again: $SCQ_CACHE, or scq in the user's cache folder.

    A cache is optional. A user without a home, or whose home cannot be written, gets a folder that goes with the
    process.
    """
    named = Path(os.environ.get("SCQ_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "scq"))
    return _cache_folder(named)


@cache
def _cache_folder(named: Path) -> Path:
    with suppress(RuntimeError):  # the user has no home
        named = named.expanduser()
    if named.parts[0] != "~" and is_writable(named):
        return named
    say(f"nothing can be kept in {named}, so that every run makes it again; SCQ_CACHE may name another folder")
    folder = Path(tempfile.mkdtemp(prefix="scq-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_writable(folder: Path) -> bool:
    """Whether files can be written to a folder, which is created if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def sync_file(path: Path) -> None:
    """Make what was written to a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system allows it (Windows cannot open folders)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
