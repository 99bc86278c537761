"""Folders that are replaced whole: checkpoints and models.

A reader finds the old folder or the complete new one at any moment, and a power cut leaves one of the two.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from scq.engine.errors import DataError, UserError, first_line
from scq.engine.files import JUST_MADE, make_folder, real_path, sync_file, sync_folder
from scq.engine.plain_json import read_json

Read = TypeVar("Read")
READINGS = 20  # of a folder that is replaced while it is read, before its reader gives up
_CLASS_FILES = ("model_index.json", "config.json")  # where diffusers records the class of the model in a folder
# What a model consists of. Everything else in its folder is the user's.
_OF_A_MODEL = re.compile(
    r"(README\.md|measured\.json|model_index\.json)"
    r"|((tokenizer|prior|refiner|scheduler)/)?"
    r"((scheduler_)?config\.json|diffusion_pytorch_model[^/]*\.safetensors(\.index(\.[^/]+)?\.json)?)"
)
_COMPONENTS = frozenset(["tokenizer", "prior", "refiner", "scheduler"])
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, and RENAME_SWAP of macOS
_NO_EXCHANGE = frozenset([errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP])
_NO_LINK = frozenset([errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP])


class _UnwrittenModel(UserError):
    """The files of a model cannot be written; the cause is the error of the system."""


@contextmanager
def atomic_folder(folder: Path, keeps: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill, which replaces ``folder`` if the block succeeds.

    A reader finds the old folder or the complete new one at any moment: Linux and macOS exchange the two in one step.
    Where a file system cannot do that (NFS), there is an instant between two renames; if an earlier process was killed
    in it, the old folder is put back first. Of several processes that write to one folder, the last one wins. All files
    obey the umask, whatever wrote them.

    Args:
        keeps: whether a file or folder of the old folder (a path relative to it) is to be in the new one, too; None
            keeps nothing.
    """
    make_folder(folder.parent)
    aside = _aside(folder)
    if aside.is_dir() and not folder.exists():
        aside.rename(folder)
    remove_leftover_folders(folder.parent, folder.name)
    fresh = folder.with_name(f".{folder.name}.tmp{secrets.token_hex(4)}")
    fresh.mkdir()
    lock = os.open(fresh, os.O_RDONLY)
    try:
        _lock(lock)
        yield fresh
        _finish_files(fresh)
        if keeps is not None and folder.is_dir():
            _carry_over(folder, fresh, keeps)
        for each in [path for path in fresh.rglob("*") if path.is_dir() and not path.is_symlink()] + [fresh]:
            sync_folder(each)
        _put(fresh, folder)
        sync_folder(folder.parent)
    finally:
        os.close(lock)
        shutil.rmtree(fresh, ignore_errors=True)  # the old folder by now, or the unfinished new one


@contextmanager
def replaced_model(
    folder: Path | str, classes: Collection[str], keeps: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yield an empty folder to fill with a model, which replaces the model in ``folder`` (see `atomic_folder`).

    Only what a model consists of is replaced: the weights, the JSON files beside them, and the card, README.md. All
    other files in ``folder`` stay where they are.

    Args:
        classes: names of diffusers' classes whose saved models may be replaced.
        keeps: see `atomic_folder`; None keeps all that is no part of a model.

    Raises:
        UserError: see `refuse_to_replace`; or the files cannot be written, for example because the disk is full. The
            old model is still there then.
    """
    folder = real_path(folder)
    refuse_to_replace(folder, classes)
    try:
        with atomic_folder(folder, keeps=keeps or _is_a_users) as fresh:
            yield fresh
    except (OSError, SafetensorError, _UnwrittenModel) as error:
        cause = error.__cause__ if isinstance(error, _UnwrittenModel) else error  # of a model in the fresh folder
        left = "the model that was there is untouched" if folder.exists() else "nothing was left there"
        raise _UnwrittenModel(
            f"the model {folder} cannot be written ({first_line(cause)}): {left}; make room or name another folder, "
            "and run again"
        ) from cause


def refuse_to_replace(folder: Path | str, classes: Collection[str]) -> None:
    """Make sure that a model may be written to ``folder``.

    Raises:
        UserError: ``folder`` is a file, is or contains the current folder, is a git repository, or holds files but no
            model of one of ``classes``.
    """
    folder = real_path(folder)
    if Path.cwd().resolve().is_relative_to(folder):
        raise UserError(f"a model cannot replace {folder}, which is or contains the current folder; name another one")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; a model needs a folder of its own")
    if (folder / ".git").exists():
        raise UserError(f"{folder} is a git repository, whose files only git may replace; name an empty or new folder")
    if any(folder.iterdir()) and _class_in(folder) not in classes:
        raise UserError(f"{folder} holds something other than a model; name an empty or new folder")


def read_unmixed(folder: Path, read: Callable[[], Read]) -> Read:
    """What ``read`` makes of the files in ``folder``, none of them from before and none from after a replacement.

    It reads again where the folder was replaced meanwhile.

    Raises:
        UserError: it was replaced whenever it was read.
    """
    for _ in range(READINGS):
        try:
            held = os.open(folder, os.O_RDONLY)  # while it is open, no other folder gets its number
        except OSError:
            return read()  # there is no folder; the reader knows what to say
        try:
            found = read()
        except Exception:
            if _is_still(held, folder):
                raise
            continue
        finally:
            same = _is_still(held, folder)
            os.close(held)
        if same:
            return found
    raise UserError(f"{folder} was replaced each of the {READINGS} times that it was read; wait for who writes it")


def remove_leftover_folders(folder: Path, name: str = "") -> None:
    """Delete the temporary folders that killed processes left in a folder.

    Args:
        name: delete only what was to become the folder of this name; empty for all.
    """
    # A model that is saved into such a folder has one of its own, which begins with two dots.
    begins = (f".{name}.tmp", f"..{name}.tmp") if name else "."
    for path in folder.glob(".*.tmp*"):
        if path.is_dir() and path.name.startswith(begins) and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_a_users(path: Path) -> bool:
    """Whether a path, relative to a model's folder, is no part of a model."""
    return not _OF_A_MODEL.fullmatch(path.as_posix()) and path.as_posix() not in _COMPONENTS


def _class_in(folder: Path) -> str | None:
    """The diffusers class whose model is saved in a folder; None if there is none."""
    for index in _CLASS_FILES:
        try:
            return read_json(folder / index, "name another folder")["_class_name"]
        except (DataError, KeyError, TypeError):
            continue
    return None


def _finish_files(folder: Path) -> None:
    """Give every file the mode that the umask asks for, and sync it; safetensors writes files with mode 0600."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        path.chmod(mode)
        sync_file(path)


def _carry_over(old: Path, new: Path, keeps: Callable[[Path], bool]) -> None:
    """Link what is kept of ``old`` into ``new``: until ``old`` is deleted, both have it."""
    shutil.copymode(old, new)
    for parent, folders, files in os.walk(old):
        here = Path(parent)
        links = [name for name in folders if (here / name).is_symlink()]
        for path in (here / name for name in sorted([*files, *links])):
            target = new / path.relative_to(old)
            if keeps(path.relative_to(old)):
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(path, target)
        for path in (here / name for name in sorted(set(folders) - set(links))):
            if keeps(path.relative_to(old)):
                (new / path.relative_to(old)).mkdir(parents=True, exist_ok=True)
                shutil.copymode(path, new / path.relative_to(old))


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copy2(path, target, follow_symlinks=False)
        if not target.is_symlink():
            sync_file(target)


def _put(fresh: Path, folder: Path) -> None:
    """Move ``fresh`` to ``folder``; afterwards ``fresh`` is what was there, if anything was."""
    if not folder.exists():
        try:
            fresh.rename(folder)
            return
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    if not _exchange(fresh, folder):
        aside = _aside(folder)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        fresh.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False if the system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        current = -100  # AT_FDCWD
        failed = library.renameat2(current, paths[0], current, paths[1], _EXCHANGE)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*paths, _EXCHANGE)
    else:
        return False
    number = ctypes.get_errno()
    if failed and number not in _NO_EXCHANGE:
        raise OSError(number, os.strerror(number), str(one), None, str(other))
    return not failed


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _lock(descriptor: int) -> bool:
    """Hold an open folder until it is closed; whether no other process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held; or a file system that does not lock folders (NFS)
        return False
    return True


def _is_abandoned(folder: Path) -> bool:
    """Whether the process that made a temporary folder is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False  # it is gone, too
    try:
        # One that was just made may not be locked yet.
        return _lock(descriptor) and time.time() - os.fstat(descriptor).st_mtime > JUST_MADE
    finally:
        os.close(descriptor)


def _is_still(descriptor: int, folder: Path) -> bool:
    """Whether the open folder is the one at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except OSError:
        return False
