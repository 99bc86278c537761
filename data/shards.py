"""A packed set as it lies on disk: manifest, index, and any one image by its number.

The index says where every image's bytes lie inside the tar files, so that the n-th image costs one read, whatever came
before it. It is built once, kept beside the shards, and mapped into memory: processes on one machine share its pages.
"""

import hashlib
import os
import re
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from data.errors import DataError
from data.files import atomic_write, parse_manifest

MANIFEST, FORMAT = "manifest.json", "scq-images-1"
ROW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("shard", "<u4"), ("label", "<u4")])
OPEN_FILES = 64
LONGEST_NAME = 16384  # bytes; no file system allows longer paths, percent-encoded


def member_name(key: str) -> str:
    """The tar member name of a key: percent-encoded ASCII without dots or a leading slash.

    So webdataset groups the members of one image rightly, and unpacking a shard never writes outside its folder.
    """
    name = quote(key, safe="/", errors="surrogateescape").replace(".", "%2E").replace("~", "%7E")
    return "%2F" + name[1:] if name.startswith("/") else name


def key_of(name: str) -> str:
    """The key of a tar member name (with its suffix): the inverse of member_name."""
    return unquote(name.rsplit(".", 1)[0], errors="surrogateescape")


def scan_shard(path: Path, shard: int) -> np.ndarray:
    """Reads the tar headers of one shard -> rows (n,) of dtype ROW, in the order of the images.

    Raises DataError if the file is no tar file or an image lies in it without its label.
    """
    rows: list[list[int]] = []
    current, last_label = None, {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name, suffix = member.name.rsplit(".", 1)
                if name != current:
                    current, last_label = name, {"label": 0, "row": None}
                if suffix == "cls":
                    last_label["label"] = int(tar.extractfile(member).read())
                else:
                    last_label["row"] = len(rows)
                    rows.append([member.offset_data, member.size, shard, 0])
                if last_label["row"] is not None:
                    rows[last_label["row"]][3] = last_label["label"]
                tar.members = []  # tarfile remembers every member otherwise: memory would grow with the shard
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"shard '{path}' cannot be read: {error}") from error
    return np.array([tuple(row) for row in rows], ROW)


def fingerprint(manifest: dict[str, Any]) -> str:
    """A name for the contents of a set: sha256 over its shards' sha256, independent of where the set lies."""
    return hashlib.sha256("".join(shard["sha256"] for shard in manifest["shards"]).encode()).hexdigest()


def index_name(manifest: dict[str, Any]) -> str:
    """The index file that belongs to exactly these shards: an index of other contents has another name."""
    return f"index-{fingerprint(manifest)[:16]}.npy"


def build_index(directory: Path, manifest: dict[str, Any]) -> Path:
    """Writes the index of a packed set from its tar headers and returns its path."""
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
                    f"shard '{shard['name']}' holds {len(rows)} images, its manifest says {shard['images']}: "
                    "run `scq data check`"
                )
            file.write(rows.tobytes())
    return path


class ShardSet:
    """A packed set, opened for reading.

    Attributes: location, manifest (dict), rows (memory-mapped index of dtype ROW, one row per image), fingerprint.
    Raises DataError if the location holds no finished set.
    """

    def __init__(self, location: str | os.PathLike):
        self.location = os.fspath(location)
        self.directory = Path(self.location).expanduser()
        path = self.directory / MANIFEST
        if not path.is_file():
            unfinished = (self.directory / "pack.jsonl").is_file()
            hint = "the pack was interrupted, run it again" if unfinished else "write it with `scq data pack`"
            raise DataError(f"no packed images at '{self.location}' ({MANIFEST} is missing): {hint}")
        self.manifest = parse_manifest(path.read_bytes(), str(path), FORMAT)
        self.fingerprint = fingerprint(self.manifest)
        self._rows: np.ndarray | None = None
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recently used first

    def __len__(self) -> int:
        return self.manifest["num_images"]

    @property
    def rows(self) -> np.ndarray:
        """The index (N,), memory-mapped read-only; built on first use where it is missing."""
        if self._rows is None:
            path = self.directory / index_name(self.manifest)
            if not path.is_file():
                build_index(self.directory, self.manifest)
            try:
                rows = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError):
                rows = np.empty(0)
            if rows.dtype != ROW or len(rows) != len(self):
                raise DataError(f"index '{path}' is damaged: delete it, it is built again")
            self._rows = rows
        return self._rows

    def read(self, image: int) -> bytes:
        """The encoded bytes of image number `image` (0 <= image < len)."""
        row = self.rows[image]
        data = self._read_range(int(row["shard"]), int(row["offset"]), int(row["length"]))
        if len(data) != int(row["length"]):
            raise DataError(f"shard '{self._shard_name(int(row['shard']))}' is truncated: run `scq data check`")
        return data

    def key(self, image: int) -> str:
        """The key of an image, read from the tar header that stands before its bytes."""
        row = self.rows[image]
        shard, offset = int(row["shard"]), int(row["offset"])
        name = tarfile.TarInfo.frombuf(self._read_range(shard, offset - 512, 512), "utf-8", "surrogateescape").name
        if len(name) == 100:  # the header has no room for more: the whole name may stand in the pax record before it
            before = self._read_range(shard, max(0, offset - LONGEST_NAME), min(offset, LONGEST_NAME))
            whole = [path.decode() for path in re.findall(rb" path=([^\n]+)\n", before)]
            name = whole[-1] if whole and whole[-1].startswith(name) else name
        return key_of(name)

    def _shard_name(self, shard: int) -> str:
        return self.manifest["shards"][shard]["name"]

    def _read_range(self, shard: int, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor(shard), length, offset)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            path = self.directory / self._shard_name(shard)
            try:
                self._files[shard] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"shard '{path}' cannot be opened: {error.strerror}") from error
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        """Closes the shard files; the set can still be used and opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self):
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None, "_files": OrderedDict()}
