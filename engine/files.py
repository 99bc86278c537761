"""The one way to write files: under a temporary name, synced to disk, then renamed.

A reader sees either the old file or folder or the complete new one, and a power cut leaves one of the two. Everything
that the project writes goes through this module, except logs, which are appended to.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from scq.engine.errors import UserError
from scq.engine.progress import say

_CLASS_FILES = ("model_index.json", "config.json")  # where diffusers records the class of the model in a folder


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that appears at ``path``, complete and synced to disk, only if the block succeeds.

    The parent folder must exist.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes atomically; parent folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, indent: int = 1) -> None:
    """Write plain values as JSON, atomically; the same value always gives the same bytes."""
    write_file(path, json.dumps(value, indent=indent, ensure_ascii=True) + "\n")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which replaces ``folder`` if the block succeeds.

    A reader always finds the old folder or the complete new one, except in the instant between two renames. If an
    earlier process was killed in that instant, the old folder is put back first.
    """
    fresh, aside = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    if aside.is_dir() and not folder.exists():
        aside.rename(folder)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        for path in sorted(fresh.rglob("*")):
            _sync_folder(path) if path.is_dir() else _sync_file(path)
        _sync_folder(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)  # the disk may be full
        raise
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    fresh.rename(folder)
    _sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def replaced_model(folder: Path | str, classes: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder to fill with a model, which replaces ``folder`` (see `atomic_folder`).

    Args:
        classes: names of diffusers' classes whose saved models may be replaced.

    Raises:
        UserError: see `refuse_to_replace`.
    """
    folder = Path(folder).resolve()
    refuse_to_replace(folder, classes)
    with atomic_folder(folder) as fresh:
        yield fresh


def refuse_to_replace(folder: Path | str, classes: Collection[str]) -> None:
    """Make sure that a model may be written to ``folder``.

    Raises:
        UserError: ``folder`` is a file, is or contains the current folder, or holds anything but a model of one of
            ``classes``.
    """
    folder = Path(folder).resolve()
    if Path.cwd().resolve().is_relative_to(folder):
        raise UserError(f"a model cannot replace {folder}, which is or contains the current folder; name another one")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; a model needs a folder of its own")
    if any(folder.iterdir()) and (_class_in(folder) not in classes or (folder / ".git").exists()):
        raise UserError(
            f"{folder} holds something other than a model, which would be lost; name an empty or new folder"
        )


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


def _class_in(folder: Path) -> str | None:
    """The diffusers class whose model is saved in a folder; None if there is none."""
    for index in _CLASS_FILES:
        try:
            return json.loads((folder / index).read_text())["_class_name"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system allows it (Windows cannot open folders)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
