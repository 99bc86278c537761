"""Bytes of files, wherever they lie: a folder, an http server, or any URL that fsspec knows (s3, gs, ...).

A failing read is tried again with growing pauses, because networks and network file systems fail now and then; what
still fails is named. Handles belong to one process and are opened again after a fork.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from scq.engine.errors import DataError
from scq.engine.files import atomic_write, sha256_of

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between the tries of a failing read
OPEN_FILES = 64
PIECE = 2**24
T = TypeVar("T")


def with_retries(read: Callable[[], T], what: str) -> T:
    """Calls read() until it succeeds; raises DataError naming `what` if the last try fails or another cannot help."""
    for pause in (*PAUSES, None):
        try:
            return read()
        except DataError:
            raise
        except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
            raise DataError(f"{what} cannot be read: {error.strerror or type(error).__name__}") from error
        except Exception as error:  # every fsspec backend raises kinds of its own
            if pause is None:
                tries = len(PAUSES) + 1
                raise DataError(
                    f"{what} cannot be read after {tries} tries: {type(error).__name__}: {error}"
                ) from error
            time.sleep(pause)
    raise AssertionError("unreachable")


class Storage(ABC):
    """A place with named files. Every method raises DataError naming the file, after retries."""

    location: str

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole file; for manifests, not for shards."""

    @abstractmethod
    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on."""

    def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        """Several ranges (name, offset, length), in order."""
        return [self.read_range(*wanted) for wanted in ranges]

    def sha256(self, name: str, length: int) -> str:
        """The sha256 of the file's first `length` bytes as hexadecimal text, read in pieces."""
        digest = hashlib.sha256()
        for offset in range(0, length, PIECE):
            digest.update(self.read_range(name, offset, min(PIECE, length - offset)))
        return digest.hexdigest()

    def describe(self, name: str) -> str:
        return f"'{self.location.rstrip('/')}/{name}'"


class LocalStorage(Storage):
    """A folder of this machine; a few files are kept open, so that an image costs one read."""

    def __init__(self, location: str | os.PathLike):
        self.location = os.fspath(location)
        self.directory = Path(location).expanduser()
        self._descriptors: OrderedDict[str, int] = OrderedDict()  # least recently used first

    def read(self, name: str) -> bytes:
        return with_retries((self.directory / name).read_bytes, self.describe(name))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        def read() -> bytes:
            try:
                return os.pread(self._descriptor(name), length, offset)
            except OSError:  # a network file system may have lost the file behind the handle
                if name in self._descriptors:
                    os.close(self._descriptors.pop(name))
                raise

        data = with_retries(read, self.describe(name))
        if len(data) != length:
            raise DataError(f"{self.describe(name)} is truncated: run `scq data check`")
        return data

    def _descriptor(self, name: str) -> int:
        if name not in self._descriptors:
            self._descriptors[name] = os.open(self.directory / name, os.O_RDONLY)
            if len(self._descriptors) > OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(name)
        return self._descriptors[name]

    def __del__(self):
        while getattr(self, "_descriptors", None):
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}


# Every connection ever made, never collected: a forked process that let go of its parent's would close the sockets in
# the event loop's epoll set, which both share, and the parent would wait for its answers forever.
_connections: list[Any] = []


class RemoteStorage(Storage):
    """A folder behind a URL, read by range requests."""

    def __init__(self, location: str):
        self.location = location
        self._system: tuple[int, Any, str] | None = None
        self._connect()

    def _connect(self) -> tuple[Any, str]:
        # A connection belongs to the process that made it.
        if self._system is None or self._system[0] != os.getpid():
            try:
                system, path = fsspec.core.url_to_fs(self.location)
            except (ImportError, ValueError) as error:
                raise DataError(f"'{self.location}' cannot be opened: {error}") from error
            _connections.append(system)
            self._system = (os.getpid(), system, path.rstrip("/"))
        return self._system[1:]

    def read(self, name: str) -> bytes:
        def whole() -> bytes:
            system, path = self._connect()
            return system.cat_file(f"{path}/{name}")

        return with_retries(whole, self.describe(name))

    def fetch(self, name: str, target: Path) -> None:
        """Copies the whole file to a local path; not retried."""
        system, path = self._connect()
        system.get_file(f"{path}/{name}", str(target))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        def read() -> bytes:
            system, path = self._connect()
            data = system.cat_file(f"{path}/{name}", start=offset, end=offset + length)
            if len(data) > length:
                raise DataError(
                    f"the server of {self.describe(name)} ignores range requests: name a cache folder, "
                    "so that whole shards are fetched"
                )
            if len(data) < length:
                raise EOFError(f"{len(data)} of {length} bytes came")
            return data

        return with_retries(read, self.describe(name))

    def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        # All at once, so that a batch costs little more than one round trip; what failed is read again one by one.
        system, path = self._connect()
        names = [f"{path}/{name}" for name, _, _ in ranges]
        starts, ends = [r[1] for r in ranges], [r[1] + r[2] for r in ranges]
        found = system.cat_ranges(names, starts, ends, on_error="return")
        return [
            data if isinstance(data, bytes) and len(data) == wanted[2] else self.read_range(*wanted)
            for data, wanted in zip(found, ranges, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_system": None}


class CachedStorage(Storage):
    """A remote place whose files are fetched whole at first need, verified, and read from a local folder from then on.

    digests: the expected sha256 of each file; files without one are not verified. Processes may share the folder.
    """

    def __init__(self, remote: RemoteStorage, folder: Path, digests: dict[str, str]):
        self.remote, self.location, self.digests = remote, remote.location, digests
        self.local = LocalStorage(folder)
        self._ready: set[str] = set()

    def read(self, name: str) -> bytes:
        return self.remote.read(name)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        if name not in self._ready:
            self.fetch(name)
            self._ready.add(name)
        return self.local.read_range(name, offset, length)

    def fetch(self, name: str) -> Path:
        """The local path of the file, fetched if it is not there yet."""
        path = self.local.directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with only_one_process(path.with_name(f"{name}.lock")):
                if not path.is_file():
                    with_retries(lambda: self._download(name, path), self.remote.describe(name))
        except OSError as error:
            raise DataError(f"the cache folder '{path.parent}' cannot be written: {error.strerror}") from error
        return path

    def _download(self, name: str, path: Path) -> None:
        with atomic_write(path) as target:
            self.remote.fetch(name, Path(target.name))
            if self.digests.get(name) not in (None, sha256_of(Path(target.name))):
                raise EOFError("what came has another sha256 than the manifest says")


@contextlib.contextmanager
def only_one_process(path: Path) -> Iterator[None]:
    """Waits until no other process is inside the block for the same path; a dead process holds nothing up."""
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_remote(location: str | os.PathLike) -> bool:
    """Whether the location is a URL rather than a folder of this machine."""
    return "://" in os.fspath(location) or "::" in os.fspath(location)


def open_storage(location: str | os.PathLike) -> LocalStorage | RemoteStorage:
    """The storage at a path or URL."""
    return RemoteStorage(os.fspath(location)) if is_remote(location) else LocalStorage(location)


def default_cache() -> Path:
    """Where the indexes of remote sets are kept: $SCQ_CACHE, or scq in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SCQ_CACHE") or f"{cache}/scq").expanduser()
