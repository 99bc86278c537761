"""The folder for everything that a page's users send and get: private, of one server, and gone when that ends."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Collection
from functools import cache, partial
from pathlib import Path

from gradio import processing_utils, route_utils, routes
from PIL import Image

from scq.engine.files import write_file

KEPT_SECONDS = 3600  # how long an upload or a drawn picture stays on the server
LARGEST_FOLDER = 2_000_000_000  # bytes; beyond them the oldest files go first
_PREFIX = "scq-page-"
_VARIABLE = "GRADIO_TEMP_DIR"  # where gradio looks for its folder
_SMALLEST = 4096  # bytes that the smallest file takes on disk
_writing = threading.Lock()  # equal pictures of one request are written by several threads


@cache
def private_folder() -> Path:
    """This process's folder, made at the first call, with mode 0700; gradio uses it from then on.

    It is in the folder that GRADIO_TEMP_DIR names, or else in the system's for temporary files. It is locked as long
    as the process lives. Folders of this user's that nobody has locked are those of servers that were killed; they are
    deleted.
    """
    parent = Path(os.environ.get(_VARIABLE) or tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{_PREFIX}*"):
        _delete_if_abandoned(left)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)).resolve()
    while _lock(folder) is None or not folder.is_dir():  # a server that starts now has taken it for abandoned
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)).resolve()
    os.environ[_VARIABLE] = str(folder)
    routes.DEFAULT_TEMP_DIR = str(folder)  # a copy of the variable from when gradio was imported
    processing_utils.save_pil_to_cache = save_picture
    # Parts of a drawing would first go to the system's folder, and stay there if their request breaks off.
    routes.GradioMultiPartParser = partial(route_utils.GradioMultiPartParser, upload_dir=folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def save_picture(img: Image.Image, cache_dir: str, name: str = "image", format: str = "webp") -> str:
    """Write a picture under the hash of its bytes, as gradio's function of the same arguments does; returns the path.

    Gradio writes the file of an equal picture again. A browser that is being sent it at that moment shows it as broken:
    the second time that a seed is drawn, or while later images are added to a gallery. Here it is written once.
    """
    encoded = processing_utils.encode_pil_to_bytes(img, format)
    path = Path(cache_dir).resolve() / processing_utils.hash_bytes(encoded) / f"{name}.{format}"
    with _writing:
        if path.is_file():
            os.utime(path)  # it is in use again, and `sweep` goes by age
        else:
            write_file(path, encoded)
    return str(path)


def sweep(
    folder: Path, keep: Collection[Path] = (), seconds: float = KEPT_SECONDS, largest: int = LARGEST_FOLDER
) -> int:
    """Delete files older than ``seconds``, then the oldest ones until ``largest`` bytes are left, and empty folders.

    Args:
        keep: files that stay.

    Returns:
        how many files were deleted.
    """
    now, deleted = time.time(), 0
    files = []
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                # An upload makes a folder, then moves its file there; so only one that has been empty for a while goes.
                if now - status.st_mtime > min(seconds, 60) and not any(path.iterdir()):
                    path.rmdir()
            elif path not in keep:
                files.append((status.st_mtime, max(status.st_size, _SMALLEST), path))
        except FileNotFoundError:  # requests go on meanwhile
            continue
    total = sum(size for _, size, _ in files)
    for changed, size, path in sorted(files):
        if now - changed > seconds or total > largest:
            path.unlink(missing_ok=True)
            total -= size
            deleted += 1
    return deleted


def _delete_if_abandoned(folder: Path) -> None:
    try:
        locked = _lock(folder) if folder.lstat().st_uid == os.getuid() else None
    except OSError:  # it is gone, or a link or a file of that name
        return
    if locked is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(locked)


def _lock(folder: Path) -> int | None:
    """Lock a folder until this process ends.

    Returns:
        the open descriptor that holds the lock; None if somebody else holds it, or if it is gone.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
