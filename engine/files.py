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
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from scq.engine.progress import say

JUST_MADE = 60.0  # seconds in which somebody may still be at work on what is temporary
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
    except OSError as error:
        if str(error.filename) == str(temporary):
            error.filename = str(path)  # the name that the user knows
        raise
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


def open_plain(path: Path, mode: str = "rb") -> IO[bytes]:
    """Open a plain file, at once: a pipe is not waited for, and a device, which may have no end, is not read.

    Args:
        mode: as ``open`` has it, of bytes.

    Raises:
        OSError: it cannot be opened, or is no plain file.
    """
    file: IO[bytes] = open(path, mode, opener=open_at_once)  # noqa: SIM115, the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.ENXIO, "it is not a plain file", str(path))
    return file


def read_plain(path: Path) -> bytes:
    """The bytes of a plain file (see `open_plain`)."""
    with open_plain(path) as file:
        return file.read()


def open_at_once(path: str, flags: int) -> int:
    """The opener of files that may be pipes, which are not waited for."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)  # the umask takes its part of the mode


def expand_home(path: str | os.PathLike) -> Path:
    """Expand a leading ~ to the user's home, as a shell does; if no user has that name, it is a name like any other."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def real_path(path: str | os.PathLike) -> Path:
    """The absolute path behind all symbolic links; `Path.resolve` fails on one that leads to itself."""
    return Path(os.path.realpath(path))


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


def remove_leftovers(folder: Path, of_others: bool = False) -> None:
    """Delete the temporary files that killed processes left in a folder.

    Args:
        of_others: whether other processes may be writing there; then files of the last JUST_MADE seconds stay.
    """
    for path in folder.glob(".*.tmp*"):
        with suppress(FileNotFoundError):  # another process may have renamed it
            ours = re.fullmatch(r"\..+\.tmp\d+", path.name) and path.is_file()
            if ours and not (of_others and time.time() - path.stat().st_mtime < JUST_MADE):
                path.unlink()


def sha256_of(path: Path) -> str:
    """The sha256 of a file as hexadecimal text; the file is read in chunks."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]  it is buffered


def cache_folder() -> Path:
    """The folder for what another run need not make again: $SCQ_CACHE, or scq in the user's cache folder.

    A cache is optional. A user without a home, or whose home cannot be written, gets a folder that goes with the
    process.
    """
    named = Path(os.environ.get("SCQ_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "scq"))
    return _cache_folder(named)


@cache
def _cache_folder(named: Path) -> Path:
    named = expand_home(named)
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
