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

CACHE_BYTES = 512 * 2**20  # decoded sets smaller than this stay in memory


class Batch(NamedTuple):
    """images uint8 (b, 3, H, W) in 0..255; labels int64 (b,); positions int64 (b,), places in the global sequence."""

    images: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


class ImageReader:
    """Decoded images by number, (n, 3, H, W) uint8; a small set stays in memory after its first decoding.

    All in NumPy: torch's threads do not survive a fork, and a reader must work in forked processes.
    """

    def __init__(self, shards: ShardSet, keep_decoded: bool):
        self.shards = shards
        self.size = shards.manifest["image_size"]
        fits = self.size is not None and len(shards) * 3 * self.size**2 < CACHE_BYTES
        self.keep_decoded = keep_decoded and fits
        self._decoded: np.ndarray | None = None  # (N, 3, H, W)
        self._known: np.ndarray | None = None  # (N,) bool

    def decode(self, image: int, encoded: bytes) -> np.ndarray:
        """One image, uint8 (H, W, 3). Raises DataError naming its key if it cannot be decoded."""
        try:
            return np.asarray(decode(encoded))
        except BadImage as error:
            raise DataError(f"image '{self.shards.key(image)}' of '{self.shards.location}' {error}") from error

    def read(self, images: np.ndarray) -> np.ndarray:
        """The images with these numbers (n,) -> uint8 (n, 3, H, W). Raises DataError if their sizes differ."""
        if not self.keep_decoded:
            return self._stack(images)
        if self._decoded is None:
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
        """The images with these numbers (n,) as a Batch, those marked in `mirrored` (n,) turned left to right."""
        pixels = self.read(images)
        if mirrored is not None:
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        labels = self.shards.rows["label"][images].astype(np.int64)
        return Batch(torch.from_numpy(pixels), torch.from_numpy(labels), torch.from_numpy(positions))


class _Batches(Dataset):
    """Batch t of one rank, by number: what a DataLoader worker needs, and no more."""

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
            return error  # raised in a worker, torch would put that worker's traceback in front of what is wrong


def _or_raise(batch: Batch | DataError) -> Batch:
    if isinstance(batch, DataError):
        raise batch
    return batch


class ImageStream(ResumableStream):
    """An endless stream of image batches in one global order.

    The global sequence is the concatenation of epoch permutations; batch t holds its images [t*B, (t+1)*B), and rank r
    of W reads the contiguous part [r*B/W, (r+1)*B/W) of each batch. Batches run across epoch ends; nothing is dropped.
    Neither world_size nor workers changes the sequence.

    shards: folder written by `pack`, or its URL (http, s3, gs). batch_size: global, images per step over all ranks.
    workers: loader processes per rank; 0 decodes in this process and, with keep_decoded, keeps the decoded images of a
    set under 512 MiB in memory, so that later epochs cost nothing. flip: mirrors images by a coin that is a pure
    function of (seed, position). shuffle: True shuffles every epoch fully (beyond 2**27 images by shards and blocks of
    shards, see BlockOrder), "blocks" always does the latter, which keeps reads from a distance together; False is shard
    order. cache: folder that keeps the shards of a URL once they have been fetched; without it every image is a range
    request.

    Attributes: num_images, image_size (pixels, None if they differ), num_classes (0: none), manifest, fingerprint (of
    the shards' contents), images_seen, order_description (one line for the log: how well the order is shuffled).
    Raises DataError for a missing or damaged set, or a batch size that the ranks cannot share.
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
        opened.rows  # noqa: B018  built before workers start, so that they do not build it each
        self._batches = _Batches(
            ImageReader(opened, keep_decoded=keep_decoded and workers == 0), order, batch_size, part, flip
        )

    def iterate(self, start_image: int = 0) -> Iterator[Batch]:
        """Endless batches of this rank from a place in the global sequence; independent of images_seen."""
        starts = itertools.count(start_image, self.batch_size)
        if self.workers == 0:
            return map(_or_raise, map(self._batches.__getitem__, starts))
        # Without a generator of its own the loader would draw a seed from torch's global one, and reading data would
        # change what a training run draws next.
        loader = DataLoader(
            self._batches, batch_size=None, sampler=starts, num_workers=self.workers, generator=torch.Generator()
        )
        return map(_or_raise, loader)

    def __iter__(self) -> Iterator[Batch]:
        """Endless batches from images_seen on, counting them."""
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
    """Each image exactly once, in shard order; the last batch may be short. For tokenizing and evaluating.

    limit: only the first so many images of the set. Ranks read contiguous parts that differ by one image at most.
    batch_size is this rank's; start skips that many images of this rank's part without reading them. Positions are
    image numbers of the set.
    """
    rank_slice(batch_size * world_size, rank, world_size)
    opened = ShardSet(shards, cache)
    total = len(opened) if limit is None else min(limit, len(opened))
    first, last = (total * r // world_size for r in (rank, rank + 1))
    reader = ImageReader(opened, keep_decoded=False)
    for begin in range(first + start, last, batch_size):
        images = np.arange(begin, min(begin + batch_size, last), dtype=np.int64)
        yield reader.batch(images, images)
