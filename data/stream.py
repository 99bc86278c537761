"""Shards -> batches. Batch t is a pure function of (seed, t), for any number of processes and workers."""

import itertools
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
from scq.engine.references import shown

CACHE_BYTES = 512 * 2**20  # decoded sets smaller than this stay in memory


class Batch(NamedTuple):
    """Images with their labels, and their positions in the global sequence."""

    images: torch.Tensor  # uint8 (b, 3, H, W) in 0..255
    labels: torch.Tensor  # int64 (b,)
    positions: torch.Tensor  # int64 (b,)


class ImageReader:
    """Decoded images by number, (n, 3, H, W) uint8; a small set stays in memory once it is decoded.

    It uses NumPy alone, because it must work in forked processes, and torch's threads do not survive a fork.
    """

    def __init__(self, shards: ShardSet, keep_decoded: bool):
        self.shards = shards
        self.size = shards.manifest["image_size"]
        fits = self.size is not None and len(shards) * 3 * self.size**2 < CACHE_BYTES
        self.keep_decoded = keep_decoded and fits
        self._decoded: np.ndarray | None = None  # (N, 3, H, W)
        self._known: np.ndarray | None = None  # (N,) bool

    def decode(self, image: int, encoded: bytes) -> np.ndarray:
        """One image, uint8 (H, W, 3).

        Raises:
            DataError: it cannot be decoded; the message names its key.
        """
        try:
            return np.asarray(decode(encoded))
        except BadImage as error:
            raise DataError(f"image '{self.shards.key(image)}' of '{shown(self.shards.location)}' {error}") from error

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
        """The images with these numbers (n,) as a Batch, flipped left to right where `mirrored` (n,) is true."""
        pixels = self.read(images)
        if mirrored is not None:
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        labels = self.shards.rows["label"][images].astype(np.int64)
        return Batch(torch.from_numpy(pixels), torch.from_numpy(labels), torch.from_numpy(positions))


class _Batches(Dataset):
    """The batches of one rank by the position of their global batch; all that a DataLoader worker needs."""

    def __init__(
        self, reader: ImageReader, order: EpochOrder | BlockOrder, batch_size: int, part: tuple[int, int], flip: bool
    ):
        self.reader, self.order, self.batch_size, self.part, self.flip = reader, order, batch_size, part, flip

    def __getitem__(self, first_image: int) -> Batch | DataError:
        positions = np.arange(*self.part, dtype=np.int64) + first_image  # (b,)
        mirrored = flips(self.order.seed, positions) if self.flip else None
        try:
            return self.reader.batch(self.order.images(positions), positions, mirrored)
        except DataError as error:
            return error  # if it were raised in a worker, torch would put the worker's traceback before the message


def _or_raise(batch: Batch | DataError) -> Batch:
    if isinstance(batch, DataError):
        raise batch
    return batch


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
        keep_decoded: without workers, keep the decoded images of a set under 512 MiB in memory, so that later epochs
            cost nothing.

    Attributes:
        num_images: N, the images of an epoch.
        image_size: side in pixels; None if the images differ in size.
        num_classes: 0 if the set has no classes.
        manifest: the parsed manifest.json.
        fingerprint: of the shards' contents.
        images_seen: images yielded so far, over all ranks.
        order_description: one line for the log on how the images are shuffled.

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
        keep_decoded: bool = True,
    ):
        part = rank_slice(batch_size, rank, world_size)
        opened = ShardSet(shards, cache)
        super().__init__(seed, opened.fingerprint)
        self.fingerprint = opened.fingerprint
        self.manifest: dict[str, Any] = opened.manifest
        self.num_images, self.image_size = len(opened), opened.manifest["image_size"]
        self.num_classes = len(opened.manifest["class_names"])
        self.batch_size, self.workers = batch_size, workers
        order = create_order([shard["images"] for shard in self.manifest["shards"]], seed, shuffle)
        self.order_description = order.description
        opened.rows  # noqa: B018  built before workers start, so that not every worker builds it
        self._batches = _Batches(
            ImageReader(opened, keep_decoded=keep_decoded and workers == 0), order, batch_size, part, flip
        )

    def iterate(self, start_image: int = 0) -> Iterator[Batch]:
        """Endless batches of this rank from a position in the global sequence on; independent of images_seen."""
        starts = itertools.count(start_image, self.batch_size)
        if self.workers == 0:
            return map(_or_raise, map(self._batches.__getitem__, starts))
        # Without a generator of its own, the loader would draw a seed from torch's global one, and reading data would
        # change the random numbers of a training run.
        loader = DataLoader(
            self._batches, batch_size=None, sampler=starts, num_workers=self.workers, generator=torch.Generator()
        )
        return map(_or_raise, loader)

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
) -> Iterator[Batch]:
    """Yield each image exactly once, in shard order, for tokenizing and evaluating; the last batch may be short.

    Ranks read contiguous parts, whose sizes differ by at most one image. Positions are the images' numbers in the set.

    Args:
        batch_size: of this rank.
        limit: take only the first ``limit`` images of the set.
        start: skip this many images of this rank's part without reading them.
        cache: see ImageStream.

    Raises:
        DataError: the set is missing or damaged.
    """
    rank_slice(batch_size * world_size, rank, world_size)
    opened = ShardSet(shards, cache)
    total = len(opened) if limit is None else min(limit, len(opened))
    first, last = (total * r // world_size for r in (rank, rank + 1))
    reader = ImageReader(opened, keep_decoded=False)
    for begin in range(first + start, last, batch_size):
        images = np.arange(begin, min(begin + batch_size, last), dtype=np.int64)
        yield reader.batch(images, images)
