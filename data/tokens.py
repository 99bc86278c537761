"""Token shards: dominant-code indices of a whole set, written by stage 1 and read by stage 2 at memory speed.

A shard is three plain files: the indices (n, views, h, w) as .npy, which is mapped into memory, the labels (n,) as
.npy, and the keys as lines of text. The manifest carries the tokenizer's fingerprint; a prior refuses tokens of another
tokenizer.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from scq.data.manifest import contents_fingerprint, parse_manifest, require_plain_name
from scq.data.order import ResumableStream, create_order, rank_slice
from scq.engine.errors import DataError
from scq.engine.files import atomic_write, remove_leftovers, sha256_of, write_json
from scq.engine.randomness import position_bits

MANIFEST, FORMAT = "manifest.json", "scq-tokens-1"
IMAGES_PER_SHARD = 10_000
OPEN_SHARDS = 512  # half the usual limit of open files per process


class TokenBatch(NamedTuple):
    """Token grids with their labels, and their positions in the global sequence."""

    indices: torch.Tensor  # int64 (b, h, w)
    labels: torch.Tensor  # int64 (b,)
    positions: torch.Tensor  # int64 (b,)


def token_dtype(codebook_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every index of the codebook."""
    return np.dtype("<u2" if codebook_size <= 2**16 else "<u4")


class TokenWriter:
    """Writes token shards and manifest.json below `out`, in the order of the write calls.

    With several processes, each writes its own part; the last to close joins the parts in rank order, as
    `iterate_once(rank=, world_size=)` reads them. To resume an interrupted run, the caller starts at num_written
    (`iterate_once(..., start=writer.num_written)`).

    Args:
        grid: (h, w) of the latents.
        codebook_size: K, which every index must be below.
        fingerprint: of the tokenizer.
        source: what was tokenized, in plain values; recorded in the manifest.
        num_classes: 0 if the set has no classes.
        views: augmented views per image.

    Attributes:
        num_written: images of this rank that are on disk already.
        complete: whether the whole set is on disk already.

    Raises:
        DataError: `out` holds tokens of another tokenizer or with other settings, or is not writable.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        *,
        grid: tuple[int, int],
        codebook_size: int,
        fingerprint: str,
        source: Any,
        num_classes: int,
        views: int = 1,
        rank: int = 0,
        world_size: int = 1,
        images_per_shard: int = IMAGES_PER_SHARD,
    ):
        rank_slice(world_size, rank, world_size)
        self.directory = Path(out).expanduser()
        self.rank, self.world_size, self.images_per_shard = rank, world_size, images_per_shard
        self.settings = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "codebook_size": codebook_size,
            "grid": list(grid),
            "views": views,
            "num_classes": num_classes,
            "source": json.loads(json.dumps(source)),
        }
        self.dtype = token_dtype(codebook_size)
        self._pending: list[tuple[np.ndarray, np.ndarray, list[str]]] = []
        self._records: list[dict[str, Any]] = []
        self._part = self.directory / f"part-{rank:04d}-of-{world_size:04d}.json"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write tokens to '{out}': {error.strerror}") from error
        self.complete = self._resume()
        self.num_written = sum(record["images"] for record in self._records)

    def _resume(self) -> bool:
        """Read what an earlier run of this rank wrote; True if the whole set is complete."""
        path = self.directory / MANIFEST
        if path.is_file():
            manifest = parse_manifest(path.read_bytes(), str(path), FORMAT)
            self._refuse_other(manifest)
            self._records = manifest["shards"]
            return True
        others = [
            p.name for p in self.directory.glob("part-*.json") if not p.stem.endswith(f"-of-{self.world_size:04d}")
        ]
        if others:
            raise DataError(
                f"'{self.directory}' holds tokens of an interrupted run with another number of processes "
                f"({others[0]}): run again with that number, or choose another folder"
            )
        if self.world_size == 1:
            remove_leftovers(self.directory)
        if self._part.is_file():
            part = parse_manifest(self._part.read_bytes(), str(self._part), FORMAT)
            self._refuse_other(part)
            self._records = part["shards"]
        return False

    def _refuse_other(self, found: dict[str, Any]) -> None:
        changed = [key for key, value in self.settings.items() if found.get(key) != value]
        if changed:
            said = ", ".join(f"{key} was {found.get(key)!r}, now {self.settings[key]!r}" for key in changed)
            raise DataError(
                f"'{self.directory}' already holds other tokens ({said}): delete it or choose another folder"
            )

    def write(self, indices: torch.Tensor, labels: torch.Tensor, keys: Sequence[str]) -> None:
        """Append the tokens of some images.

        Args:
            indices: (b, h, w) or (b, views, h, w).
            labels: (b,).
            keys: one for each image.

        Raises:
            DataError: the shapes do not match the grid or each other, or an index is outside the codebook.
        """
        h, w = self.settings["grid"]
        array = indices.detach().cpu().numpy()
        array = array[:, None] if array.ndim == 3 else array  # (b, views, h, w)
        if array.shape[1:] != (self.settings["views"], h, w) or not len(array) == len(labels) == len(keys):
            raise DataError(
                f"tokens of shape {tuple(indices.shape)} with {len(labels)} labels and {len(keys)} keys do not match "
                f"{self.settings['views']} views of {h}x{w}"
            )
        if array.size and not 0 <= array.min() <= array.max() < self.settings["codebook_size"]:
            raise DataError(
                f"tokens span {array.min()}..{array.max()}, outside the codebook of {self.settings['codebook_size']}"
            )
        if not len(array):
            return
        self._pending.append((array.astype(self.dtype), labels.cpu().numpy().astype("<i4"), list(keys)))
        while sum(len(group[0]) for group in self._pending) >= self.images_per_shard:
            self._write_shard(self.images_per_shard)

    def _write_shard(self, count: int) -> None:
        """Write the first `count` pending images as one shard, then record it; only recorded shards count."""
        columns = list(zip(*self._pending, strict=True))
        indices, labels = np.concatenate(columns[0]), np.concatenate(columns[1])
        keys = [key for group in columns[2] for key in group]
        stem = f"tokens-{self.rank:04d}-{len(self._records):06d}"
        for name, array in ((f"{stem}.npy", indices), (f"{stem}.labels.npy", labels)):
            with atomic_write(self.directory / name) as file:
                np.save(file, array[:count], allow_pickle=False)
        with atomic_write(self.directory / f"{stem}.keys.txt") as file:
            file.writelines(json.dumps(key).encode() + b"\n" for key in keys[:count])
        self._records.append({"name": stem, "images": count, "sha256": sha256_of(self.directory / f"{stem}.npy")})
        self._save_part(finished=False)
        self.num_written += count
        self._pending = [(indices[count:], labels[count:], keys[count:])] if len(indices) > count else []

    def _save_part(self, finished: bool) -> None:
        write_json(self._part, {**self.settings, "finished": finished, "shards": self._records})

    def close(self) -> None:
        """Write what is pending; the last rank to close also writes manifest.json, which completes the set."""
        if self.complete:
            return
        if self._pending:
            self._write_shard(sum(len(group[0]) for group in self._pending))
        self._save_part(finished=True)
        parts = [self.directory / f"part-{r:04d}-of-{self.world_size:04d}.json" for r in range(self.world_size)]
        try:
            loaded = [parse_manifest(part.read_bytes(), str(part), FORMAT) for part in parts]
        except FileNotFoundError:  # a rank has not started, or another has just joined the parts
            self.complete = (self.directory / MANIFEST).is_file()
            return
        if not all(part["finished"] for part in loaded):
            return
        records = [record for part in loaded for record in part["shards"]]
        total = sum(record["images"] for record in records)
        manifest = {**self.settings, "dtype": self.dtype.name, "num_images": total, "shards": records}
        write_json(self.directory / MANIFEST, manifest)
        for part in parts:
            part.unlink(missing_ok=True)
        self.complete = True


class TokenDataset:
    """A finished set of tokens, memory-mapped.

    Attributes:
        manifest: the parsed manifest.json.
        fingerprint: of the tokenizer.
        codebook_size: K.
        grid: (h, w).
        views: augmented views of each image.
        num_images: N.
        num_classes: 0 if the set has no classes.
        labels: (N,) int64.

    Raises:
        DataError: there is no finished set at ``path``, or it is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.directory = Path(path).expanduser()
        file = self.directory / MANIFEST
        if not file.is_file():
            raise DataError(f"no tokens at '{os.fspath(path)}' ({MANIFEST} is missing): write them with `scq tokenize`")
        self.manifest = parse_manifest(file.read_bytes(), str(file), FORMAT)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.codebook_size, self.views = self.manifest["codebook_size"], self.manifest["views"]
        self.grid: tuple[int, int] = tuple(self.manifest["grid"])
        self.num_classes, self.num_images = self.manifest["num_classes"], self.manifest["num_images"]
        records = self.manifest["shards"]
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()  # least recently used first
        for number in range(len(records)):
            self._indices(number)  # a damaged shard fails now, not after hours
        labels = [self._load(record, ".labels.npy") for record in records]
        self.labels = np.concatenate([np.empty(0, "<i4"), *labels]).astype(np.int64)  # (N,)
        self._ends = np.cumsum([record["images"] for record in records])

    def _indices(self, shard: int) -> np.ndarray:
        """The codes (n, views, h, w) of a shard, memory-mapped; each mapping keeps a file open."""
        if shard not in self._mapped:
            self._mapped[shard] = self._load(self.manifest["shards"][shard], ".npy", mmap_mode="r")
            if len(self._mapped) > OPEN_SHARDS:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(shard)
        return self._mapped[shard]

    def _load(self, record: dict[str, Any], suffix: str, mmap_mode: str | None = None) -> np.ndarray:
        require_plain_name(record["name"], f"'{self.directory / MANIFEST}'")
        path = self.directory / f"{record['name']}{suffix}"
        try:
            array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"token shard '{path}' cannot be read: {error}") from error
        if len(array) != record["images"]:
            raise DataError(f"token shard '{path}' holds {len(array)} images, but its manifest says {record['images']}")
        return array

    def __len__(self) -> int:
        return self.num_images

    def read(self, images: np.ndarray, views: np.ndarray) -> torch.Tensor:
        """Indices int64 (b, h, w) of the images with these numbers int64 (b,), for each in the view `views` (b,)."""
        shards = np.searchsorted(self._ends, images, side="right")
        tokens = np.empty((len(images), *self.grid), np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            codes = self._indices(int(shard))
            within = images[here] - (self._ends[shard] - len(codes))
            tokens[here] = codes[within, views[here]]
        return torch.from_numpy(tokens)

    def keys(self) -> Iterator[str]:
        """Yield the keys of all images in order."""
        for record in self.manifest["shards"]:
            with (self.directory / f"{record['name']}.keys.txt").open(encoding="utf-8") as lines:
                yield from map(json.loads, lines)


class TokenStream(ResumableStream):
    """An endless stream of token batches in one global order, with the same sequence and state as ImageStream.

    If the set holds several views of each image, the view at a position is a pure function of (seed, position).

    Args:
        path: folder that a TokenWriter wrote.
        batch_size: global, images per step over all ranks.
        shuffle: see ImageStream.

    Attributes:
        dataset: the opened TokenDataset.
        fingerprint: of the tokenizer.
        codebook_size: K.
        grid: (h, w).
        num_images: N, the images of an epoch.
        num_classes: 0 if the set has no classes.
        manifest: the parsed manifest.json.
        images_seen: images yielded so far, over all ranks.
        order_description: one line for the log on how the images are shuffled.

    Raises:
        DataError: there is no finished set at ``path``, or the ranks cannot share the batch evenly.
    """

    unit = "token grids"

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ):
        self._part = rank_slice(batch_size, rank, world_size)
        self.dataset = TokenDataset(path)
        super().__init__(seed, contents_fingerprint(self.dataset.manifest))
        self.fingerprint = self.dataset.fingerprint
        self.manifest, self.batch_size = self.dataset.manifest, batch_size
        self.codebook_size, self.grid = self.dataset.codebook_size, self.dataset.grid
        self.num_images, self.num_classes = self.dataset.num_images, self.dataset.num_classes
        self._order = create_order([shard["images"] for shard in self.manifest["shards"]], seed, shuffle)
        self.order_description = self._order.description

    def iterate(self, start_image: int = 0) -> Iterator[TokenBatch]:
        """Endless batches of this rank from a position in the global sequence on; independent of images_seen."""
        while True:
            positions = np.arange(*self._part, dtype=np.int64) + start_image  # (b,)
            images = self._order.images(positions)
            views = (position_bits(self.seed, positions, purpose=2) % np.uint64(self.dataset.views)).astype(np.int64)
            labels = torch.from_numpy(self.dataset.labels[images])
            yield TokenBatch(self.dataset.read(images, views), labels, torch.from_numpy(positions))
            start_image += self.batch_size

    def __iter__(self) -> Iterator[TokenBatch]:
        """Endless batches from images_seen on, which counts them."""
        for batch in self.iterate(self.images_seen):
            self.images_seen += self.batch_size
            yield batch
