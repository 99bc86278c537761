"""Token shards: dominant-code indices of a whole set, written by stage 1 and read by stage 2 at memory speed.

A shard is three plain files: the indices (n, views, h, w) as .npy, which is mapped into memory, the labels (n,) as
.npy, and the keys as lines of text. The manifest carries the tokenizer's fingerprint; a prior refuses tokens of another
tokenizer.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from scq.data.arrays import is_intact, map_array, npy_bytes
from scq.data.manifest import MANIFEST, TOKENS, contents_fingerprint, parse_manifest
from scq.data.order import ResumableStream, create_order, rank_slice
from scq.data.storage import LocalStorage, with_retries
from scq.engine.errors import DataError
from scq.engine.files import expand_home, make_folder, open_plain, read_plain, remove_leftovers, write_file, write_json
from scq.engine.plain_json import parse_json
from scq.engine.randomness import position_bits

LABEL = np.dtype("<i4")
FILES = {"sha256": ".npy", "labels_sha256": ".labels.npy", "keys_sha256": ".keys.txt"}  # of a shard, by their digests
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
    (`iterate_once(..., start=writer.num_written)`). A part is locked from the beginning until `close`, and at once says
    which tokens will be there, so that no other writer mixes in its own.

    Args:
        grid: (h, w) of the latents.
        codebook_size: K, which every index must be below.
        fingerprint: of the tokenizer.
        source: what was tokenized, in plain values; recorded in the manifest.
        num_classes: 0 if the set has no classes.
        class_names: by label; empty if they have none.
        views: augmented views per image.

    Attributes:
        num_written: images of this rank that are on disk already.
        complete: whether the whole set is on disk already.

    Raises:
        DataError: `out` holds tokens of another tokenizer or with other settings, another process is writing there, it
            is not writable, or what an interrupted run left there is damaged.
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
        class_names: Sequence[str] = (),
        views: int = 1,
        rank: int = 0,
        world_size: int = 1,
        images_per_shard: int = IMAGES_PER_SHARD,
    ):
        rank_slice(world_size, rank, world_size)
        self.directory = expand_home(out)
        self.rank, self.world_size, self.images_per_shard = rank, world_size, images_per_shard
        self.settings = {
            "format": TOKENS,
            "fingerprint": fingerprint,
            "codebook_size": codebook_size,
            "grid": list(grid),
            "views": views,
            "num_classes": num_classes,
            "class_names": list(class_names),
            "source": json.loads(json.dumps(source)),
        }
        self.dtype = token_dtype(codebook_size)
        self._pending: list[tuple[np.ndarray, np.ndarray, list[str]]] = []
        self._records: list[dict[str, Any]] = []
        self._part = self._part_of(rank)
        self._locked: IO[bytes] | None = None
        self.num_written = 0
        try:
            make_folder(self.directory)
            self.complete = self._resume()
        except OSError as error:
            self._unlock()
            raise self._cannot_write(error) from error
        except DataError:
            self._unlock()
            raise
        self.num_written = sum(record["images"] for record in self._records)

    def _part_of(self, rank: int) -> Path:
        return self.directory / f"part-{rank:04d}-of-{self.world_size:04d}.json"

    def _cannot_write(self, error: OSError) -> DataError:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += "; make room and run it again"
        kept = f"; it will go on after {self.num_written} images" if self.num_written else ""
        return DataError(f"cannot write tokens to '{self.directory}': {reason}{kept}")

    def _resume(self) -> bool:
        """Claim this rank's part, and read what an earlier run wrote of it; True if the whole set is complete."""
        if self._finished():
            return True
        self._lock()
        if self._finished():  # by another process, just before we got the lock
            self._unlock()
            return True
        claimed = self._part.is_file()
        if claimed:
            part = self._read(self._part)
            self._refuse_other(part)
            self._records = part["shards"]
        elif stray := self._unclaimed():
            raise DataError(f"'{self.directory}' holds tokens without a manifest ({stray} ...): choose another folder")
        else:
            self._save_part(finished=False)
        try:
            self._refuse_other_parts()
        except DataError:
            if not claimed:
                self._part.unlink(missing_ok=True)
            raise
        for record in self._records:
            _verify_shard(self.directory, record, "delete that folder, and run it again")
        if self.world_size == 1:
            remove_leftovers(self.directory)
        return False

    def _unclaimed(self) -> str | None:
        """The name of a file of tokens in a folder where no process has said whose they are."""
        claimed = any(self.directory.glob("part-*.json"))
        return None if claimed else min((path.name for path in self.directory.glob("tokens-*")), default=None)

    def _finished(self) -> bool:
        """Whether the set is complete; these are its settings then."""
        path = self.directory / MANIFEST
        if not path.is_file():
            return False
        manifest = parse_manifest(read_plain(path), f"'{path}'", TOKENS)
        self._refuse_other(manifest)
        self._records = manifest["shards"]
        return True

    def _read(self, part: Path) -> dict[str, Any]:
        return parse_manifest(read_plain(part), f"'{part}'", TOKENS, part=True)

    def _refuse_other_parts(self) -> None:
        """Raise DataError if another process writes other tokens here, or has begun to."""
        for path in sorted(self.directory.glob("part-*.json")):
            if not path.stem.endswith(f"-of-{self.world_size:04d}"):
                raise DataError(
                    f"'{self.directory}' holds tokens of a run with another number of processes ({path.name}), which "
                    "was interrupted or is still writing: run again with that number, or choose another folder"
                )
            if path != self._part:
                self._refuse_other(self._read(path))

    def _refuse_other(self, found: dict[str, Any]) -> None:
        # Sets of older versions have no names of classes.
        changed = [
            k for k, value in self.settings.items() if found.get(k, value if k == "class_names" else None) != value
        ]
        if changed:
            said = ", ".join(f"{key} was {found.get(key)!r}, now {self.settings[key]!r}" for key in changed)
            raise DataError(
                f"'{self.directory}' already holds other tokens ({said}): delete it or choose another folder"
            )

    def _lock(self) -> None:
        """Keep other writers from this rank's part until it is closed; the lock ends with the process in any case."""
        path = self.directory / f".{self._part.stem}.lock"
        lock = open_plain(path, "ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise DataError(
                f"another process is writing tokens to '{self.directory}': wait for it, or choose another folder"
            ) from error
        if not path.is_file() or not os.path.samestat(
            path.stat(), os.fstat(lock.fileno())
        ):  # its last owner has just removed it
            lock.close()
            self._lock()
            return
        self._locked = lock

    def _unlock(self) -> None:
        if self._locked is not None:
            Path(self._locked.name).unlink(missing_ok=True)
            self._locked.close()
            self._locked = None

    def write(self, indices: torch.Tensor, labels: torch.Tensor, keys: Sequence[str]) -> None:
        """Append the tokens of some images.

        Args:
            indices: (b, h, w) or (b, views, h, w).
            labels: (b,).
            keys: one for each image.

        Raises:
            DataError: the shapes do not match the grid or each other, an index is outside the codebook, or the files
                cannot be written.
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
        self._pending.append((array.astype(self.dtype), labels.cpu().numpy().astype(LABEL), list(keys)))
        while sum(len(group[0]) for group in self._pending) >= self.images_per_shard:
            self._write_shard(self.images_per_shard)

    def _write_shard(self, count: int) -> None:
        """Write the first `count` pending images as one shard, then record it; only recorded shards count."""
        columns = list(zip(*self._pending, strict=True))
        indices, labels = np.concatenate(columns[0]), np.concatenate(columns[1])
        keys = [key for group in columns[2] for key in group]
        record: dict[str, Any] = {"name": f"tokens-{self.rank:04d}-{len(self._records):06d}", "images": count}
        lines = "".join(json.dumps(key) + "\n" for key in keys[:count])
        contents = npy_bytes(indices[:count]), npy_bytes(labels[:count]), lines.encode()
        try:
            for (digest, suffix), content in zip(FILES.items(), contents, strict=True):
                write_file(self.directory / f"{record['name']}{suffix}", content)
                record[digest] = hashlib.sha256(content).hexdigest()
            self._records.append(record)
            self._save_part(finished=False)
        except OSError as error:
            raise self._cannot_write(error) from error
        self.num_written += count
        self._pending = [(indices[count:], labels[count:], keys[count:])] if len(indices) > count else []

    def _save_part(self, finished: bool) -> None:
        write_json(self._part, {**self.settings, "finished": finished, "shards": self._records})

    def close(self) -> None:
        """Write what is pending; the last rank to close also writes manifest.json, which completes the set.

        Raises:
            DataError: the files cannot be written.
        """
        if self.complete:
            return
        if self._pending:
            self._write_shard(sum(len(group[0]) for group in self._pending))
        try:
            self._save_part(finished=True)
            self.complete = self._join()
        except OSError as error:
            raise self._cannot_write(error) from error
        finally:
            self._unlock()

    def _join(self) -> bool:
        """Make one set of all parts if all are finished; whether the set is complete."""
        parts = [self._part_of(rank) for rank in range(self.world_size)]
        try:
            loaded = [self._read(part) for part in parts]
        except FileNotFoundError:  # a rank has not started, or another has just joined the parts
            return (self.directory / MANIFEST).is_file()
        if not all(part["finished"] for part in loaded):
            return False
        for part in loaded:
            self._refuse_other(part)
        records = [record for part in loaded for record in part["shards"]]
        total = sum(record["images"] for record in records)
        manifest = {**self.settings, "dtype": self.dtype.name, "num_images": total, "shards": records}
        write_json(self.directory / MANIFEST, manifest)
        for part in parts:
            part.unlink(missing_ok=True)
        return True


def _verify_shard(directory: Path, record: dict[str, Any], advice: str) -> None:
    """Raise DataError unless the files of a shard have the digests that its record gives."""
    for digest, suffix in FILES.items():
        path = directory / f"{record['name']}{suffix}"
        if digest in record and not is_intact(path, record[digest]):
            raise DataError(f"token shard '{path}' was changed: its sha256 is not that of the manifest; {advice}")


class TokenDataset:
    """A finished set of tokens, memory-mapped.

    Everything that can be wrong with it is found when it is opened: digests, shapes, ranges of codes and labels. That
    reads every file once in a process, at about a gigabyte a second.

    Attributes:
        manifest: the parsed manifest.json.
        fingerprint: of the tokenizer.
        codebook_size: K.
        grid: (h, w).
        views: augmented views of each image.
        num_images: N.
        num_classes: 0 if the set has no classes.
        class_names: by label; empty if the set has no classes, or was written by a version that did not name them.
        labels: (N,) int64.

    Raises:
        DataError: there is no finished set at ``path``, or it is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        storage = LocalStorage(path)
        self.directory = storage.directory
        try:
            text = storage.read(MANIFEST)
        except DataError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise DataError(
                f"no tokens at '{os.fspath(path)}' ({MANIFEST} is missing): write them with `scq tokenize`"
            ) from error
        self.manifest = parse_manifest(text, storage.describe(MANIFEST), TOKENS)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.codebook_size, self.views = self.manifest["codebook_size"], self.manifest["views"]
        self.grid: tuple[int, int] = tuple(self.manifest["grid"])
        self.num_classes, self.num_images = self.manifest["num_classes"], self.manifest["num_images"]
        self.class_names: tuple[str, ...] = tuple(self.manifest.get("class_names", ()))
        records = self.manifest["shards"]
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()  # least recently used first
        self._labels = [self._verified(number) for number in range(len(records))]
        self.labels = np.concatenate(self._labels).astype(np.int64)  # (N,)
        self._ends = np.cumsum([record["images"] for record in records])

    def _verified(self, shard: int) -> np.ndarray:
        """Make sure that a shard is sound: a damaged one fails now, not after hours. Returns its labels (n,)."""
        record = self.manifest["shards"][shard]
        codes = self._indices(shard)
        labels = map_array(self.directory / f"{record['name']}.labels.npy", LABEL, (record["images"],))
        _verify_shard(self.directory, record, "write the tokens again")
        for what, values, count in (("codes", codes, self.codebook_size), ("labels", labels, max(1, self.num_classes))):
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= count:
                raise DataError(
                    f"token shard '{self.directory / record['name']}' has {what} from {low} to {high}, but they must "
                    f"be from 0 to {count - 1}: write the tokens again"
                )
        return np.array(labels)

    def _indices(self, shard: int) -> np.ndarray:
        """The codes (n, views, h, w) of a shard, memory-mapped; each mapping keeps a file open."""
        if shard not in self._mapped:
            record = self.manifest["shards"][shard]
            path, shape = self.directory / f"{record['name']}.npy", (record["images"], self.views, *self.grid)
            self._mapped[shard] = map_array(path, token_dtype(self.codebook_size), shape)
            if len(self._mapped) > OPEN_SHARDS:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(shard)
        return self._mapped[shard]

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
        """Yield the keys of all images in order.

        Raises:
            DataError: a file of keys cannot be read, or holds anything but one key for each image.
        """
        for record in self.manifest["shards"]:
            path = self.directory / f"{record['name']}.keys.txt"
            lines = with_retries(lambda file=path: read_plain(file), f"'{path}'").splitlines()
            keys = [parse_json(line, f"'{path}'", "write the tokens again") for line in lines]
            if len(keys) != record["images"] or not all(isinstance(key, str) for key in keys):
                raise DataError(f"'{path}' does not hold one key for each of {record['images']} images")
            yield from keys


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
        class_names: by label; empty if they have none.
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
        self.class_names = self.dataset.class_names
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
