"""The bytes of files in a folder, or behind a URL of one of a few protocols (http, s3, gs, ...), which fsspec reads.

A location may come from a file that somebody else wrote. So the protocols are a short list, and fsspec's chained URLs,
some of which run code or write files, are never parsed.

A failing read is retried with growing pauses, because networks and network file systems fail now and then; the final
error names the file. Handles belong to one process and are reopened after a fork.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from scq.data.pace import LARGEST_MANIFEST, Pace
from scq.engine.errors import DataError
from scq.engine.files import atomic_write, expand_home, make_folder, open_plain, sha256_of
from scq.engine.references import HIDDEN, shown, without_urls

PROTOCOLS = ("file", "http", "https", "s3", "gs", "hf")
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between attempts at a failing read
OPEN_FILES = 64
PIECE = 2**24
T = TypeVar("T")
# What no other attempt changes: there is no such file, it may not be read, is no plain file, or has no possible name.
_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError)
_LASTING_NUMBERS = frozenset([errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO])


def with_retries(read: Callable[[], T], what: str) -> T:
    """Call read() until it succeeds, and return its result.

    Raises:
        DataError: the last attempt failed, or the error is one that a retry cannot fix; the message names `what`.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except DataError:
            raise
        except Exception as error:  # every fsspec backend raises errors of its own
            if isinstance(error, _LASTING) or getattr(error, "errno", None) in _LASTING_NUMBERS:
                reason = getattr(error, "strerror", None) or type(error).__name__
                raise DataError(f"{what} cannot be read: {reason}") from error
            if pause is None:
                tries = len(PAUSES) + 1
                reason = f"{type(error).__name__}: {without_urls(str(error))}"
                raise DataError(f"{what} cannot be read after {tries} tries: {reason}") from error
            time.sleep(pause)
    raise AssertionError("unreachable")


class Storage(ABC):
    """A folder or URL with named files. If retries do not help, every method raises a DataError that names the file."""

    location: str

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole file; meant for manifests, not for shards."""

    @abstractmethod
    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes of the file, starting at `offset`."""

    def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        """Several ranges (name, offset, length), in order."""
        return [self.read_range(*wanted) for wanted in ranges]

    def sha256(self, name: str, length: int) -> str:
        """The sha256 of the file's first `length` bytes as hexadecimal text; the file is read in chunks."""
        digest = hashlib.sha256()
        for offset in range(0, length, PIECE):
            digest.update(self.read_range(name, offset, min(PIECE, length - offset)))
        return digest.hexdigest()

    def describe(self, name: str) -> str:
        """What messages call the file."""
        return f"'{shown(self.location).rstrip('/')}/{name}'"


class LocalStorage(Storage):
    """A local folder; a few files are kept open, so that an image costs one read."""

    def __init__(self, location: str | os.PathLike):
        self.location = os.fspath(location)
        self.directory = expand_home(location)
        self._descriptors: OrderedDict[str, int] = OrderedDict()  # least recently used first

    def read(self, name: str) -> bytes:
        def whole() -> bytes:
            try:
                with open_plain(self.directory / name) as file:
                    if os.fstat(file.fileno()).st_size > LARGEST_MANIFEST:
                        raise DataError(f"{self.describe(name)} is larger than any manifest")
                    return file.read()
            except IsADirectoryError as error:
                raise DataError(f"{self.describe(name)} is a folder, not a file") from error

        return with_retries(whole, self.describe(name))

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
            with open_plain(self.directory / name) as file:
                self._descriptors[name] = os.dup(file.fileno())
            if len(self._descriptors) > OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(name)
        return self._descriptors[name]

    def __del__(self):
        while getattr(self, "_descriptors", None):
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}


# Every connection ever made, so that none is garbage-collected. If a forked process collected its parent's, it would
# remove the sockets from the event loop's epoll set, which both share, and the parent would wait for replies forever.
_connections: list[Any] = []


class RemoteStorage(Storage):
    """A folder behind a URL, read by range requests.

    Raises:
        DataError: the URL is chained or of a protocol that is not one of PROTOCOLS, or its library is not installed.
    """

    def __init__(self, location: str):
        self.location = location
        self._system: tuple[int, Any, str] | None = None
        self._connect()

    def _connect(self) -> tuple[Any, str]:
        # A connection belongs to the process that made it.
        if self._system is None or self._system[0] != os.getpid():
            protocol, url = _checked(self.location)
            try:
                # Not fsspec's url_to_fs, which would look for chains in the URL.
                system_of = fsspec.get_filesystem_class(protocol)
                options = system_of._get_kwargs_from_urls(url)
                if protocol in ("http", "https"):
                    from scq.data.http_client import get_client  # its library comes with fsspec's own for HTTP

                    options = {**options, "get_client": get_client}
                system = system_of(**options)
                path = system_of._strip_protocol(url)
            except (ImportError, ValueError) as error:
                reason = without_urls(str(error))
                raise DataError(f"'{shown(self.location)}' cannot be opened: {reason}") from error
            _connections.append(system)
            self._system = (os.getpid(), system, path.rstrip("/"))
        return self._system[1:]

    def read(self, name: str) -> bytes:
        def whole() -> bytes:
            system, path = self._connect()
            text = system.cat_file(f"{path}/{name}")
            if len(text) > LARGEST_MANIFEST:
                raise DataError(f"{self.describe(name)} is larger than any manifest")
            return text

        return with_retries(whole, self.describe(name))

    def fetch(self, name: str, target: Path, most: int) -> None:
        """Copy the whole file, of at most so many bytes, to a local path, without retries.

        Raises:
            DataError: it has more of them.
        """
        system, path = self._connect()
        system.get_file(f"{path}/{name}", str(target), callback=_Watched(most, self.describe(name)))

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
                raise EOFError(f"only {len(data)} of {length} bytes arrived")
            return data

        return with_retries(read, self.describe(name))

    def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        # All at once, so that a batch costs little more than one round trip; ranges that fail are read again singly.
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


class _Watched(fsspec.Callback):
    """Ends a transfer of more bytes than there can be, or one that has no end."""

    def __init__(self, most: int, what: str):
        super().__init__()
        self.pace, self.what = Pace(most), what

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.pace.add(inc):
            raise DataError(f"{self.what} is longer than its manifest says; the set was changed, or its server fails")


class CachedStorage(Storage):
    """A remote folder whose files are fetched whole and verified on first use, then read from a local copy.

    Args:
        folder: of the local copies; several processes may share it.
        digests: the expected sha256 of each file; files without one are not verified.
        sizes: the bytes that each file has at most.
    """

    def __init__(self, remote: RemoteStorage, folder: Path, digests: dict[str, str], sizes: dict[str, int]):
        self.remote, self.location, self.digests, self.sizes = remote, remote.location, digests, sizes
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
        """The local path of the file, which is fetched first if it is not there yet."""
        path = self.local.directory / name
        try:
            make_folder(path.parent)
            with only_one_process(path.with_name(f"{name}.lock")):
                if not path.is_file():
                    with_retries(lambda: self._download(name, path), self.remote.describe(name))
        except OSError as error:
            raise DataError(f"the cache folder '{path.parent}' cannot be written: {error.strerror}") from error
        return path

    def _download(self, name: str, path: Path) -> None:
        with atomic_write(path) as target:
            self.remote.fetch(name, Path(target.name), self.sizes[name])
            if self.digests.get(name) not in (None, sha256_of(Path(target.name))):
                raise EOFError("what arrived has another sha256 than the manifest says")


@contextlib.contextmanager
def only_one_process(path: Path) -> Iterator[None]:
    """Wait until no other process is in the block for the same path; a dead process does not block the others."""
    with open_plain(path, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _checked(location: str) -> tuple[str, str]:
    """The protocol of a URL, and the URL with the protocol in lower case.

    Raises:
        DataError: see `RemoteStorage`.
    """
    protocol, mark, rest = location.partition("://")
    protocol = protocol.lower()
    host = re.match(r"([^/?#]*@)?\[[0-9A-Fa-f:.]+\]", rest)  # an IPv6 address, which may hold '::'
    if not mark or protocol not in PROTOCOLS or "::" in rest[host.end() if host else 0 :]:
        allowed = ", ".join(f"{each}://" for each in PROTOCOLS)
        raise DataError(
            f"'{shown(location)}' cannot be opened: a set lies in a folder, or at a URL without '::' that begins with "
            f"one of {allowed}"
        )
    if HIDDEN in rest:
        raise DataError(
            f"'{location}' lacks its credentials, which are never saved: give the whole URL again, or name them in the "
            "config as ${oc.env:VARIABLE}"
        )
    return protocol, f"{protocol}://{rest}"


def is_remote(location: str | os.PathLike) -> bool:
    """Whether the location is a URL rather than a local folder."""
    text = os.fspath(location)
    return "://" in text or ("::" in text and not Path(text).exists())


def open_storage(location: str | os.PathLike) -> LocalStorage | RemoteStorage:
    """The storage at a path or URL.

    Raises:
        DataError: see `RemoteStorage`.
    """
    return RemoteStorage(os.fspath(location)) if is_remote(location) else LocalStorage(location)
