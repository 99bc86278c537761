"""Shards -> batches. Batch t is a pure function of (seed, t), for any number of processes and workers."""

import itertools
import math
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from scq.data.order import BlockOrder, EpochOrder, ResumableStream, create_order, flips, rank_slice
from scq.data.shards import ShardSet
from scq.data.transforms import decode
from scq.engine.errors import BadImage, DataError
from scq.engine.interruption import outlive_signals
from scq.engine.processes import gather_objects
from scq.engine.progress import say
from scq.engine.references import shown

CACHE_BYTES = 512 * 2**20  # decoded sets smaller than this stay in memory


class Batch(NamedTuple):
    """Images with their labels, and their positions in the global sequence."""

    images: torch.Tensor  # uint8 (b, 3, H, W) in 0..255
    labels: torch.Tensor  # int64 (b,)
    positions: torch.Tensor  # int64 (b,)


class UnusableImage(DataError):
    """An image of a set cannot be used; ``image`` is its number."""

    def __init__(self, message: str, image: int = -1):
        super().__init__(message)
        self.image = image


class ImageReader:
    """Decoded images by number, (n, 3, H, W) uint8; a small set stays in memory once it is decoded.

    It uses NumPy alone, because it must work in forked processes, and torch's threads do not survive a fork.

    Args:
        max_bad: share of the set's images that may be unusable. The next usable image of the set stands in for one, so
            that a batch depends on nothing but the set and the numbers asked for.

    Attributes:
        bad: what is wrong with each unusable image that was met, by number.
        bad_allowed: how many there may be.
    """

    def __init__(self, shards: ShardSet, keep_decoded: bool, max_bad: float = 0.0):
        check_max_bad(max_bad)
        self.shards = shards
        self.bad: dict[int, str] = {}
        self.bad_allowed = min(math.floor(max_bad * len(shards) + 1e-9), len(shards) - 1)
        self.size = shards.manifest["image_size"]
        fits = self.size is not None and len(shards) * 3 * self.size**2 < CACHE_BYTES
        self.keep_decoded = keep_decoded and fits
        self._decoded: np.ndarray | None = None  # (N, 3, H, W)
        self._known: np.ndarray | None = None  # (N,) bool

    def decode(self, image: int, encoded: bytes) -> np.ndarray:
        """One image, uint8 (H, W, 3).

        Raises:
            UnusableImage: it cannot be decoded, or has another size than the set; the message names its key.
        """
        try:
            pixels = np.asarray(decode(encoded))
            if self.size is not None and pixels.shape[:2] != (self.size, self.size):
                raise BadImage(f"is {pixels.shape[1]}x{pixels.shape[0]}, but its set is of {self.size} pixels")
        except BadImage as error:
            named = f"image '{self.shards.key(image)}' of '{shown(self.shards.location)}' {error}"
            raise UnusableImage(named, image) from error
        return pixels

    def read(self, images: np.ndarray) -> np.ndarray:
        """The images with these numbers (n,), uint8 (n, 3, H, W).

        Raises:
            DataError: their sizes differ, or one cannot be decoded.
        """
        if not self.keep_decoded:
            return self._stack(images)
        if self._decoded is None or self._known is None:
            self._decoded = np.empty((len(self.shards), 3, self.size, self.size), np.uint8)
            self._known = np.zeros(len(self.shards), bool)
        missing = np.unique(images[~self._known[images]])
        if len(missing):
            self._decoded[missing] = self._stack(missing)
            self._known[missing] = True
        return self._decoded[images]

    def _stack(self, images: np.ndarray) -> np.ndarray:
        encoded = self.shards.read_many(images)
        arrays = [self.decode(int(image), data) for image, data in zip(images, encoded, strict=True)]
        shapes = [array.shape[:2] for array in arrays]
        if len(set(shapes)) > 1:
            other = next(i for i, shape in enumerate(shapes) if shape != shapes[0])
            first, second = ((self.shards.key(int(images[i])), *shapes[i][::-1]) for i in (0, other))
            raise DataError(
                "images of different sizes cannot share a batch: '{}' is {}x{}, '{}' is {}x{}; "
                "pack the set with a crop and --size".format(*first, *second)
            )
        return np.ascontiguousarray(np.stack(arrays).transpose(0, 3, 1, 2))  # (n, 3, H, W)

    def batch(self, images: np.ndarray, positions: np.ndarray, mirrored: np.ndarray | None = None) -> Batch:
        """The images with these numbers (n,) as a Batch, flipped left to right where `mirrored` (n,) is true.

        Raises:
            DataError: an image cannot be used, and there are more such images than the set may have.
        """
        while True:
            usable = np.array([self._stand_in(image) for image in images.tolist()]) if self.bad else images
            try:
                pixels = self.read(usable)
                break
            except UnusableImage as error:
                self.bad[error.image] = str(error)
                if len(self.bad) > self.bad_allowed:
                    raise too_many(self.bad, self.bad_allowed) from error
        if mirrored is not None:
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        labels = self.shards.rows["label"][usable].astype(np.int64)
        return Batch(torch.from_numpy(pixels), torch.from_numpy(labels), torch.from_numpy(positions))

    def _stand_in(self, image: int) -> int:
        """The number of the image itself if it is usable as far as is known, else of the next one that is."""
        while image in self.bad:
            image = (image + 1) % len(self.shards)
        return image


def check_max_bad(max_bad: float) -> None:
    """Raise DataError unless ``max_bad`` is a share of images that may be unusable, in [0, 1)."""
    if not 0 <= max_bad < 1:
        raise DataError(f"the largest share of unusable images must be in [0, 1), not {max_bad}")


def too_many(bad: dict[int, str], allowed: int) -> DataError:
    """The error for more unusable images than a set may have."""
    first = next(iter(bad.values()))
    if allowed == 0:
        return DataError(first)
    return DataError(f"{len(bad)} images cannot be used, but at most {allowed} may be bad (see max_bad): {first}, ...")


def _replaced(wrong: str) -> str:
    return f"{wrong}; the next image of the set takes its place"


class _Batches(Dataset):
    """The batches of one rank by the position of their global batch; all that a DataLoader worker needs."""

    def __init__(
        self, reader: ImageReader, order: EpochOrder | BlockOrder, batch_size: int, part: tuple[int, int], flip: bool
    ):
        self.reader, self.order, self.batch_size, self.part, self.flip = reader, order, batch_size, part, flip

    def __getitem__(self, first_image: int) -> tuple[Batch | DataError, dict[int, str]]:
        """A batch, or why there is none; and what is wrong with the unusable images that others stand in for."""
        positions = np.arange(*self.part, dtype=np.int64) + first_image  # (b,)
        mirrored = flips(self.order.seed, positions) if self.flip else None
        images, bad = self.order.images(positions), self.reader.bad
        try:
            batch = self.reader.batch(images, positions, mirrored)
        except DataError as error:
            return error, {}  # raised in a worker, torch would put the worker's traceback before the message
        return batch, {image: bad[image] for image in images.tolist() if image in bad} if bad else {}


def _processes_can_share() -> bool:
    """Whether processes can share a lock, as loader workers must; if not, say so."""
    try:
        multiprocessing.Lock()
    except OSError as error:  # a container without /dev/shm, for one
        say(f"images are read in one process, because several cannot share a lock on this machine: {error}")
        return False
    return True


class ImageStream(ResumableStream):
    """An endless stream of image batches in one global order.

    The global sequence is the concatenation of epoch permutations; batch t holds its images [t*B, (t+1)*B), and rank r
    of W reads the contiguous part [r*B/W, (r+1)*B/W) of each batch. Batches run across epoch ends; nothing is dropped.
    Neither world_size nor workers changes the sequence.

    Args:
        shards: folder written by `pack`, or its URL (see data.storage.PROTOCOLS).
        batch_size: global, images per step over all ranks.
        workers: loader processes per rank; 0 decodes in this process.
        shuffle: True shuffles every epoch fully (beyond 2**27 images in blocks of shards, see BlockOrder). "blocks"
            always takes blocks of shards, which keeps remote reads together. False is shard order.
        flip: mirrors images left to right with probability 1/2, a pure function of (seed, position).
        cache: folder that keeps the shards of a URL once they are fetched; without it, every image is a range request.
        max_bad: share of the set's images that may be unusable, as `pack`'s. For each, the next one of the set is read
            in its place. Of a set, a position always gives the same image, as without them.
        keep_decoded: without workers, keep the decoded images of a set under 512 MiB in memory, so that later epochs
            cost nothing.

    Attributes:
        num_images: N, the images of an epoch.
        image_size: side in pixels; None if the images differ in size.
        num_classes: 0 if the set has no classes.
        class_names: by label.
        manifest: the parsed manifest.json.
        fingerprint: of the shards' contents.
        images_seen: images yielded so far, over all ranks.
        order_description: one line for the log on how the images are shuffled.
        bad: what is wrong with each unusable image that came up so far, by number.

    Raises:
        DataError: the set is missing or damaged, or the ranks cannot share the batch evenly.
    """

    unit = "images"

    def __init__(
        self,
        shards: str | os.PathLike,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        shuffle: bool | str = True,
        flip: bool = False,
        cache: str | os.PathLike | None = None,
        max_bad: float = 0.0,
        keep_decoded: bool = True,
    ):
        part = rank_slice(batch_size, rank, world_size)
        opened = ShardSet(shards, cache)
        super().__init__(seed, opened.fingerprint)
        self.fingerprint = opened.fingerprint
        self.manifest: dict[str, Any] = opened.manifest
        self.num_images, self.image_size = len(opened), opened.manifest["image_size"]
        self.class_names: tuple[str, ...] = tuple(opened.manifest["class_names"])
        self.num_classes = len(self.class_names)
        self.batch_size, self.workers = batch_size, workers
        order = create_order([shard["images"] for shard in self.manifest["shards"]], seed, shuffle)
        self.order_description = order.description
        opened.rows  # noqa: B018  built before workers start, so that not every worker builds it
        reader = ImageReader(opened, keep_decoded and workers == 0, max_bad)
        self._batches = _Batches(reader, order, batch_size, part, flip)
        self.bad: dict[int, str] = {}
        self._bad_allowed = reader.bad_allowed

    def iterate(self, start_image: int = 0) -> Iterator[Batch]:
        """Endless batches of this rank from a position in the global sequence on; independent of images_seen."""
        starts = itertools.count(start_image, self.batch_size)
        if self.workers == 0 or not _processes_can_share():
            return map(self._received, map(self._batches.__getitem__, starts))
        # Without a generator of its own, the loader would draw a seed from torch's global one, and reading data would
        # change the random numbers of a training run.
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=starts,
            num_workers=self.workers,
            generator=torch.Generator(),
            worker_init_fn=outlive_signals,
        )
        return map(self._received, loader)

    def _received(self, item: tuple[Batch | DataError, dict[int, str]]) -> Batch:
        """The batch; raises the error if there is none, and counts and names unusable images that are new."""
        batch, bad = item
        if isinstance(batch, DataError):
            raise batch
        for image, wrong in bad.items():
            if image not in self.bad:
                self.bad[image] = wrong
                say(_replaced(wrong))
        self._refuse_too_many()
        return batch

    def _refuse_too_many(self) -> None:
        if len(self.bad) > self._bad_allowed:
            raise too_many(self.bad, self._bad_allowed)

    def measured(self) -> dict[str, float]:
        """{"bad_images": how many unusable images came up so far, in all processes} if there may be any.

        Raises:
            DataError: there are more than the set may have.
        """
        if not self._bad_allowed:
            return {}
        for bad in gather_objects(self.bad):
            self.bad |= bad
        self._refuse_too_many()
        return {"bad_images": float(len(self.bad))}

    def state_dict(self) -> dict[str, Any]:
        """As of every stream, with the numbers of the unusable images that came up so far."""
        return super().state_dict() | ({"bad": sorted(self.bad)} if self.bad else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.bad = {image: f"image {image} cannot be used" for image in state.get("bad", [])}

    def __iter__(self) -> Iterator[Batch]:
        """Endless batches from images_seen on, which counts them."""
        for batch in self.iterate(self.images_seen):
            self.images_seen += self.batch_size
            yield batch


def iterate_once(
    shards: str | os.PathLike,
    batch_size: int,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    cache: str | os.PathLike | None = None,
    max_bad: float = 0.0,
) -> Iterator[Batch]:
    """Yield each image exactly once, in shard order, for tokenizing and evaluating; the last batch may be short.

    Ranks read contiguous parts, whose sizes differ by at most one image. Positions are the images' numbers in the set.

    Args:
        batch_size: of this rank.
        limit: take only the first ``limit`` images of the set.
        start: skip this many images of this rank's part without reading them.
        cache: see ImageStream.
        max_bad: likewise, of the images that this rank reads. Each image that another takes the place of is named.

    Raises:
        DataError: the set is missing or damaged, or an image cannot be used and may not be bad.
    """
    rank_slice(batch_size * world_size, rank, world_size)
    opened = ShardSet(shards, cache)
    total = len(opened) if limit is None else min(limit, len(opened))
    first, last = (total * r // world_size for r in (rank, rank + 1))
    reader = ImageReader(opened, False, max_bad)
    for begin in range(first + start, last, batch_size):
        images = np.arange(begin, min(begin + batch_size, last), dtype=np.int64)
        known = len(reader.bad)
        batch = reader.batch(images, images)
        for wrong in list(reader.bad.values())[known:]:
            say(_replaced(wrong))
        yield batch
