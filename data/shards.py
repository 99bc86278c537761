"""A packed set on disk: its manifest, its index, and random access to its images by number.

The index gives the location of every image's bytes inside the tar files, so that any image costs one read. It is built
once, kept beside the shards, and mapped into memory: processes on one machine share its pages.
"""

import contextlib
import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from scq.data.arrays import LONGEST_HEADER, is_intact, map_array
from scq.data.manifest import IMAGES, MANIFEST, contents_fingerprint, parse_manifest
from scq.data.storage import CachedStorage, LocalStorage, RemoteStorage, Storage, open_storage, with_retries
from scq.engine.errors import DataError
from scq.engine.files import atomic_write, cache_folder, expand_home, open_plain, read_plain, write_file
from scq.engine.references import shown

ROW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("shard", "<u4"), ("label", "<u4")])
LONGEST_NAME = 16384  # bytes; no file system allows a path that is longer than this when percent-encoded
LONGEST_LABEL = 32  # bytes of a .cls member that are read


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
        DataError: the file cannot be read as a tar file of images and labels.
    """

    def scan() -> np.ndarray:
        try:
            return np.array([tuple(row) for row in _members(path, shard)], ROW)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise DataError(f"shard '{path}' is damaged ({error}): run `scq data check`") from error

    return with_retries(scan, f"shard '{path}'")


def _members(path: Path, shard: int) -> list[list[int]]:
    """The values of ROW for each image of a shard."""
    rows: list[list[int]] = []
    current, row, label, end = "", None, 0, 0
    with open_plain(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            # Links and sparse files would lead elsewhere, or claim more bytes than there are.
            if not member.isreg() or member.issparse() or member.offset_data < end or member.size < 0:
                raise ValueError(f"at byte {member.offset} is no file that a pack writes")
            end = member.offset_data + member.size
            name, suffix = member.name.rsplit(".", 1)
            if name != current:
                current, row, label = name, None, 0
            if suffix == "cls":
                label = int(tar.extractfile(member).read(LONGEST_LABEL))
            else:
                row = [member.offset_data, member.size, shard, 0]
                rows.append(row)
            if row is not None:  # webdataset sorts members by suffix: the label may precede or follow the image
                row[3] = label
            tar.members = []  # otherwise tarfile keeps every member, and memory grows with the shard
    return rows


def index_name(manifest: dict[str, Any]) -> str:
    """The name of the index file of exactly these shards: an index of other contents has another name."""
    return f"index-{contents_fingerprint(manifest)[:16]}.npy"


def build_index(directory: Path, manifest: dict[str, Any]) -> str:
    """Write the index of a packed set from its tar headers.

    Returns:
        the sha256 of its rows, which belongs into the manifest as ``index_sha256``.

    Raises:
        DataError: a shard cannot be read, or does not hold what its manifest says.
    """
    digest, expected = hashlib.sha256(), manifest.get("index_sha256")
    with atomic_write(directory / index_name(manifest)) as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(ROW),
            "fortran_order": False,
            "shape": (manifest["num_images"],),
        }
        np.lib.format.write_array_header_1_0(file, header)
        for rows in _scanned(directory, manifest):
            digest.update(rows)
            file.write(rows)
        if expected not in (None, digest.hexdigest()):
            raise DataError(
                f"the shards in '{directory}' hold other images than their manifest says: run `scq data check`"
            )
    return digest.hexdigest()


def _scanned(directory: Path, manifest: dict[str, Any]) -> Iterator[bytes]:
    """The rows of each shard, from its tar headers."""
    for number, shard in enumerate(manifest["shards"]):
        rows = scan_shard(directory / shard["name"], number)
        if len(rows) != shard["images"]:
            raise DataError(
                f"shard '{shard['name']}' holds {len(rows)} images, but its manifest says {shard['images']}: "
                "run `scq data check`"
            )
        yield rows.tobytes()


def _check_rows(rows: np.ndarray, manifest: dict[str, Any]) -> bool:
    """Whether the rows (N,) of an index lead to images within the shards, and to labels that have a name."""
    classes, last = max(1, len(manifest["class_names"])), 0
    for number, shard in enumerate(manifest["shards"]):
        mine = rows[last : last + shard["images"]]
        last += shard["images"]
        ends = mine["offset"] + mine["length"]
        inside = (mine["offset"] >= tarfile.BLOCKSIZE) & (ends <= shard["bytes"]) & (ends >= mine["offset"])
        if not (inside & (mine["shard"] == number) & (mine["label"] < classes)).all():
            return False
    return True


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
            folder = expand_home(cache) if cache else cache_folder()
            digests = {shard["name"]: shard["sha256"] for shard in self.manifest["shards"]}
            sizes = {shard["name"]: shard["bytes"] for shard in self.manifest["shards"]}
            sizes[index_name(self.manifest)] = len(self) * ROW.itemsize + LONGEST_HEADER
            self._kept = CachedStorage(self.storage, folder / self.fingerprint[:16], digests, sizes)
            if cache:
                self.storage = self._kept

    def _read_manifest(self) -> dict[str, Any]:
        try:
            text = self.storage.read(MANIFEST)
        except DataError as error:
            if not isinstance(self.storage, LocalStorage) or not isinstance(error.__cause__, FileNotFoundError):
                raise
            unfinished = (self.storage.directory / "pack.jsonl").is_file()
            hint = "the pack was interrupted, run it again" if unfinished else "write it with `scq data pack`"
            raise DataError(f"no packed images at '{shown(self.location)}' ({MANIFEST} is missing): {hint}") from error
        return parse_manifest(text, self.storage.describe(MANIFEST), IMAGES)

    def __len__(self) -> int:
        return self.manifest["num_images"]

    @property
    def rows(self) -> np.ndarray:
        """The index (N,) of dtype ROW, memory-mapped read-only; built on first use if it is missing.

        Its sha256 is that of the manifest. Sets that were packed by older versions have none there: then the shards
        are read once, and it is written down beside the index. Of such a set behind a URL, only ranges are checked.

        Raises:
            DataError: the index is damaged or was altered, or cannot be built.
        """
        if self._rows is None:
            name = index_name(self.manifest)
            if self._kept is not None:
                path, expected = self._kept.fetch(name), self.manifest.get("index_sha256")
            else:
                path = self.storage.directory / name
                expected = self._local_index(path)
            try:
                rows = map_array(path, ROW, (len(self),))
                good = expected is None or is_intact(path, expected, rows.offset)
            except DataError as error:
                if isinstance(error.__cause__, OSError):
                    raise
                good = False
            if not good or not _check_rows(rows, self.manifest):
                raise DataError(f"index '{path}' is damaged or was altered: delete it, and it will be rebuilt")
            self._rows = rows
        return self._rows

    def _local_index(self, path: Path) -> str:
        """Build the index of a local set if it is missing; returns the sha256 that its rows must have."""
        noted, expected = path.with_suffix(".sha256"), self.manifest.get("index_sha256")
        try:
            if expected is None and noted.is_file():
                expected = read_plain(noted).decode(errors="replace").strip()
            if not path.is_file():
                scanned = build_index(path.parent, self.manifest)
            elif expected is None:
                scanned = hashlib.sha256(b"".join(_scanned(path.parent, self.manifest))).hexdigest()
            else:
                return expected
        except OSError as error:
            raise DataError(f"the index '{path}' cannot be built: {error.strerror}") from error
        if "index_sha256" not in self.manifest:
            with contextlib.suppress(OSError):  # where nothing can be written, the shards are read again next time
                write_file(noted, scanned + "\n")
        return scanned

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
        try:
            name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.TarError as error:
            raise DataError(f"{self.storage.describe(shard)} is damaged ({error}): run `scq data check`") from error
        if len(name) == 100:  # the header holds no more: the full name may be in the pax record before it
            before = self.storage.read_range(shard, max(0, offset - LONGEST_NAME), min(offset, LONGEST_NAME))
            records = re.findall(rb" path=([^\n]+)\n", before)
            whole = [path.decode("utf-8", "surrogateescape") for path in records]
            name = whole[-1] if whole and whole[-1].startswith(name) else name
        return key_of(name)

    def _shard_name(self, shard: int) -> str:
        return self.manifest["shards"][shard]["name"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}
