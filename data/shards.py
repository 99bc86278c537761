"""A packed set on disk: its manifest, its index, and random access to its images by number.

The index gives the location of every image's bytes inside the tar files, so that any image costs one read. It is built
once, kept beside the shards, and mapped into memory: processes on one machine share its pages.
"""

import os
import re
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from scq.data.manifest import contents_fingerprint, parse_manifest, require_plain_name
from scq.data.storage import CachedStorage, LocalStorage, RemoteStorage, Storage, open_storage
from scq.engine.errors import DataError
from scq.engine.files import atomic_write, cache_folder
from scq.engine.references import shown

MANIFEST, FORMAT = "manifest.json", "scq-images-1"
ROW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("shard", "<u4"), ("label", "<u4")])
LONGEST_NAME = 16384  # bytes; no file system allows a path that is longer than this when percent-encoded


def member_name(key: str) -> str:
    """The tar member name of a key: percent-encoded ASCII without dots or a leading slash.

    With such names, webdataset groups an image's members correctly, and unpacking never writes outside the folder.
    """
    name = quote(key, safe="/", errors="surrogateescape").replace(".", "%2E").replace("~", "%7E")
    return "%2F" + name[1:] if name.startswith("/") else name


def key_of(name: str) -> str:
    """The key of a tar member name (with its suffix): the inverse of member_name."""
    return unquote(name.rsplit(".", 1)[0], errors="surrogateescape")


def scan_shard(path: Path, shard: int) -> np.ndarray:
    """Read the tar headers of one shard.

    Args:
        shard: its number, which the rows carry.

    Returns:
        rows (n,) of dtype ROW, in the order of the images.

    Raises:
        DataError: the file cannot be read as a tar file.
    """
    rows: list[list[int]] = []
    current, row, label = "", None, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name, suffix = member.name.rsplit(".", 1)
                if name != current:
                    current, row, label = name, None, 0
                if suffix == "cls":
                    label = int(tar.extractfile(member).read())
                else:
                    row = [member.offset_data, member.size, shard, 0]
                    rows.append(row)
                if row is not None:  # webdataset sorts members by suffix: the label may precede or follow the image
                    row[3] = label
                tar.members = []  # otherwise tarfile keeps every member, and memory grows with the shard
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"shard '{path}' cannot be read: {error}") from error
    return np.array([tuple(row) for row in rows], ROW)


def index_name(manifest: dict[str, Any]) -> str:
    """The name of the index file of exactly these shards: an index of other contents has another name."""
    return f"index-{contents_fingerprint(manifest)[:16]}.npy"


def build_index(directory: Path, manifest: dict[str, Any]) -> Path:
    """Write the index of a packed set from its tar headers.

    Returns:
        the path of the index.

    Raises:
        DataError: a shard cannot be read, or does not hold as many images as its manifest says.
    """
    path = directory / index_name(manifest)
    with atomic_write(path) as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(ROW),
            "fortran_order": False,
            "shape": (manifest["num_images"],),
        }
        np.lib.format.write_array_header_1_0(file, header)
        for number, shard in enumerate(manifest["shards"]):
            rows = scan_shard(directory / shard["name"], number)
            if len(rows) != shard["images"]:
                raise DataError(
                    f"shard '{shard['name']}' holds {len(rows)} images, but its manifest says {shard['images']}: "
                    "run `scq data check`"
                )
            file.write(rows.tobytes())
    return path


class ShardSet:
    """A packed set, opened for reading from a folder or a URL.

    Args:
        location: the folder or URL.
        cache: folder that keeps the shards of a URL once they are fetched; without it, every image of a URL is a range
            request. The index of a URL is always kept: there, or in the user's cache folder.

    Attributes:
        location: as given.
        manifest: the parsed manifest.json.
        fingerprint: of the shards' contents.

    Raises:
        DataError: there is no finished set at the location.
    """

    def __init__(self, location: str | os.PathLike, cache: str | os.PathLike | None = None):
        self.location = os.fspath(location)
        self.storage: Storage = open_storage(location)
        self.manifest = self._read_manifest()
        self.fingerprint = contents_fingerprint(self.manifest)
        self._rows: np.ndarray | None = None
        self._kept: CachedStorage | None = None
        if isinstance(self.storage, RemoteStorage):
            folder = Path(cache).expanduser() if cache else cache_folder()
            digests = {shard["name"]: shard["sha256"] for shard in self.manifest["shards"]}
            self._kept = CachedStorage(self.storage, folder / self.fingerprint[:16], digests)
            if cache:
                self.storage = self._kept

    def _read_manifest(self) -> dict[str, Any]:
        if isinstance(self.storage, LocalStorage) and not (self.storage.directory / MANIFEST).is_file():
            unfinished = (self.storage.directory / "pack.jsonl").is_file()
            hint = "the pack was interrupted, run it again" if unfinished else "write it with `scq data pack`"
            raise DataError(f"no packed images at '{shown(self.location)}' ({MANIFEST} is missing): {hint}")
        manifest = parse_manifest(self.storage.read(MANIFEST), self.storage.describe(MANIFEST), FORMAT)
        for shard in manifest["shards"]:
            require_plain_name(shard["name"], self.storage.describe(MANIFEST))
        return manifest

    def __len__(self) -> int:
        return self.manifest["num_images"]

    @property
    def rows(self) -> np.ndarray:
        """The index (N,) of dtype ROW, memory-mapped read-only; built on first use if it is missing.

        Raises:
            DataError: the index is damaged, or cannot be built.
        """
        if self._rows is None:
            path = self._index_path()
            try:
                rows = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError):
                rows = np.empty(0)
            if rows.dtype != ROW or len(rows) != len(self):
                raise DataError(f"index '{path}' is damaged: delete it, and it will be rebuilt")
            self._rows = rows
        return self._rows

    def _index_path(self) -> Path:
        name = index_name(self.manifest)
        if self._kept is not None:
            return self._kept.fetch(name)
        path = self.storage.directory / name
        try:
            return path if path.is_file() else build_index(self.storage.directory, self.manifest)
        except OSError as error:
            raise DataError(f"the index '{path}' is missing and cannot be written: {error.strerror}") from error

    def read(self, image: int) -> bytes:
        """The encoded bytes of image number `image` (0 <= image < len)."""
        return self.read_many(np.array([image]))[0]

    def read_many(self, images: np.ndarray) -> list[bytes]:
        """The encoded bytes of the images with these numbers (n,), in the order given."""
        return self.storage.read_ranges(
            [(self._shard_name(shard), offset, length) for offset, length, shard, _ in self.rows[images].tolist()]
        )

    def key(self, image: int) -> str:
        """The key of image number `image`."""
        return self.keys(np.array([image]))[0]

    def keys(self, images: np.ndarray) -> list[str]:
        """The keys of the images with these numbers (n,), read from the tar headers just before their bytes."""
        locations = [(self._shard_name(shard), offset) for offset, _, shard, _ in self.rows[images].tolist()]
        headers = self.storage.read_ranges([(shard, offset - 512, 512) for shard, offset in locations])
        return [self._key(header, *location) for header, location in zip(headers, locations, strict=True)]

    def _key(self, header: bytes, shard: str, offset: int) -> str:
        name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        if len(name) == 100:  # the header holds no more: the full name may be in the pax record before it
            before = self.storage.read_range(shard, max(0, offset - LONGEST_NAME), min(offset, LONGEST_NAME))
            whole = [path.decode() for path in re.findall(rb" path=([^\n]+)\n", before)]
            name = whole[-1] if whole and whole[-1].startswith(name) else name
        return key_of(name)

    def _shard_name(self, shard: int) -> str:
        return self.manifest["shards"][shard]["name"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}
