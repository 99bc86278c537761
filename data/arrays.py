"""The .npy files of a set: opened only if they are what the manifest says, and mapped into memory."""

import hashlib
import io
import math
import os
import time
import warnings
from pathlib import Path

import numpy as np

from scq.data.storage import with_retries
from scq.engine.errors import DataError
from scq.engine.files import open_plain

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
LONGEST_HEADER = 4096  # bytes; numpy writes 128
_SETTLED = 1.0  # seconds after which a file system surely gives a changed file another time
_verified: set[tuple[object, ...]] = set()  # files of this process whose digest was right, as they were then


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def map_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """Map an .npy file into memory, read-only. Nothing is taken from its header but whether it is as expected.

    Raises:
        DataError: the file cannot be read, is no .npy file, or has another dtype, shape or size.
    """
    what = f"'{path}'"

    def header() -> tuple[tuple[int, ...], bool, np.dtype, int, int]:
        with open_plain(path) as file, warnings.catch_warnings():
            try:
                warnings.simplefilter("error")  # about headers that Python 2 wrote; we never did
                found = _HEADERS[np.lib.format.read_magic(file)](file, max_header_size=LONGEST_HEADER)
            except OSError:
                raise
            except Exception as error:  # numpy's parser has an error of its own for every kind of damage
                raise DataError(f"{what} is damaged: it does not begin as an .npy file does") from error
            return *found, file.tell(), os.fstat(file.fileno()).st_size

    said, by_columns, kind, start, size = with_retries(header, what)
    if said != shape or kind != dtype or by_columns:
        raise DataError(f"{what} holds {kind} of shape {said}, but its manifest says {dtype} of shape {shape}")
    if size != start + math.prod(shape) * dtype.itemsize:
        raise DataError(f"{what} is damaged: it has {size} bytes, which is not the size that its header says")
    return with_retries(lambda: np.memmap(path, dtype, "r", start, shape), what)


def is_intact(path: Path, sha256: str, start: int = 0) -> bool:
    """Whether the bytes of a file from ``start`` on have this sha256.

    A file is read once in a process: what was right stays right as long as its size and time stay the same.

    Raises:
        DataError: the file cannot be read.
    """
    state = with_retries(path.stat, f"'{path}'")
    known = (str(path), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, start, sha256)
    if known in _verified:
        return True

    def digest() -> str:
        with open_plain(path) as file:
            file.seek(start)
            return hashlib.file_digest(file, "sha256").hexdigest()

    intact = with_retries(digest, f"'{path}'") == sha256
    # A file that was written just now could change again without its time showing it.
    if intact and time.time() - state.st_mtime > _SETTLED:
        _verified.add(known)
    return intact
