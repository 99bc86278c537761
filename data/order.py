"""The global sequence of images: one epoch's permutation after another, a pure function of (seed, position).

Every reader of images or tokens, with any number of processes and workers, asks this module which image is at a
position. An order does not remember what was read.
"""

from typing import Any

import numpy as np

from scq.engine.errors import DataError
from scq.engine.randomness import position_bits

FULL_SHUFFLE_LIMIT = 2**27  # images; two permutations of this many fill 1 GiB
SHARDS_PER_BLOCK = 16


class EpochOrder:
    """Maps positions in the endless global sequence to image numbers, fully shuffled or in order.

    Epoch e holds the positions [e*N, (e+1)*N) and is a permutation of all N images that depends on (seed, e) alone
    (PCG64); without shuffling it is 0..N-1. The permutations of two epochs are kept, 4 bytes per image each.
    """

    def __init__(self, num_images: int, seed: int, shuffle: bool = True):
        self.num_images, self.seed, self.shuffle = num_images, seed, shuffle
        self.description = f"full shuffle of all {num_images:,} images in every epoch" if shuffle else "in order"
        self._permutations: dict[int, np.ndarray] = {}

    def images(self, positions: np.ndarray) -> np.ndarray:
        """Image numbers int64 (n,) at positions int64 (n,) of the global sequence."""
        epochs, offsets = np.divmod(positions, self.num_images)
        if not self.shuffle:
            return offsets
        images = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            images[here] = self._permutation(int(epoch))[offsets[here]]
        return images

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            forget_oldest(self._permutations, keep=1)
            self._permutations[epoch] = permutation(self.num_images, self.seed, epoch)
        return self._permutations[epoch]


class BlockOrder:
    """Maps positions to image numbers where a full shuffle needs too much memory or too many remote shards at a time.

    In every epoch the shards are shuffled and divided into blocks of SHARDS_PER_BLOCK; then the images of each block
    are shuffled. An image may come at any time in the epoch, but its neighbours in time come from the same few shards.
    The shuffle is therefore only as good as the mix of images in that many shards of the source. Every image still
    comes exactly once per epoch, and the order is still a pure function of (seed, position).
    """

    def __init__(self, shard_sizes: list[int], seed: int):
        self.sizes = np.array([size for size in shard_sizes if size], np.int64)  # images per shard (S,)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])  # number of each shard's first image, and N (S + 1,)
        self.num_images, self.seed = int(self.first[-1]), seed
        self.description = f"shards shuffled, then images within blocks of {SHARDS_PER_BLOCK} shards"
        self._shards: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._blocks: dict[tuple[int, int], np.ndarray] = {}

    def images(self, positions: np.ndarray) -> np.ndarray:
        """Image numbers int64 (n,) at positions int64 (n,) of the global sequence."""
        epochs, offsets = np.divmod(positions, self.num_images)
        images = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            starts = self._shard_order(int(epoch))[1]  # offset of each block's first image, and N (blocks + 1,)
            blocks = np.searchsorted(starts, offsets[here], side="right") - 1
            found = np.empty(len(blocks), np.int64)
            for block in np.unique(blocks):
                inside = blocks == block
                found[inside] = self._block(int(epoch), int(block))[offsets[here][inside] - starts[block]]
            images[here] = found
        return images

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._shards:
            forget_oldest(self._shards, keep=1)
            order = permutation(len(self.sizes), self.seed, epoch)
            ends = np.cumsum(self.sizes[order])
            starts = np.concatenate([[0], ends[SHARDS_PER_BLOCK - 1 :: SHARDS_PER_BLOCK], ends[-1:]])
            self._shards[epoch] = (order, np.unique(starts))
        return self._shards[epoch]

    def _block(self, epoch: int, block: int) -> np.ndarray:
        if (epoch, block) not in self._blocks:
            forget_oldest(self._blocks, keep=1)
            shards = self._shard_order(epoch)[0][block * SHARDS_PER_BLOCK : (block + 1) * SHARDS_PER_BLOCK]
            images = np.concatenate([np.arange(self.first[s], self.first[s + 1]) for s in shards])
            self._blocks[epoch, block] = images[permutation(len(images), self.seed, epoch, block)]
        return self._blocks[epoch, block]


def create_order(shard_sizes: list[int], seed: int, shuffle: bool | str) -> EpochOrder | BlockOrder:
    """The order of a set.

    Args:
        shard_sizes: the number of images in each shard.
        seed: not negative.
        shuffle: False, True (fully up to FULL_SHUFFLE_LIMIT images, in blocks of shards beyond), or "blocks".

    Raises:
        DataError: ``shuffle`` is something else, or the seed is negative.
    """
    if shuffle not in (False, True, "blocks"):
        raise DataError(f"shuffle must be True, False or 'blocks', not {shuffle!r}")
    if seed < 0:
        raise DataError(f"the seed must not be negative: {seed}")
    num_images = sum(shard_sizes)
    if shuffle == "blocks" or (shuffle and num_images > FULL_SHUFFLE_LIMIT):
        return BlockOrder(shard_sizes, seed)
    return EpochOrder(num_images, seed, shuffle)


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation (count,) of 0..count-1 that depends on the key alone."""
    numbers = np.arange(count, dtype=np.uint32 if count < 2**32 else np.uint64)
    np.random.Generator(np.random.PCG64(key)).shuffle(numbers)
    return numbers


def forget_oldest(kept: dict, keep: int) -> None:
    """Keep only the `keep` entries that were added last: a stream does not go back to earlier ones."""
    while len(kept) > keep:
        del kept[next(iter(kept))]


def flips(seed: int, positions: np.ndarray) -> np.ndarray:
    """Whether the image at each position is mirrored, bool (n,): a fair coin per (seed, position)."""
    return (position_bits(seed, positions, purpose=1) & np.uint64(1)).astype(bool)


def rank_slice(batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """The part [start, stop) of every global batch that a rank reads.

    Raises:
        DataError: the batch cannot be divided evenly among the processes, or there is no such rank.
    """
    if batch_size < 1:
        raise DataError(f"batch size must be at least 1, not {batch_size}")
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} is not one of {world_size} processes")
    if batch_size % world_size:
        raise DataError(f"the global batch size {batch_size} cannot be divided evenly among {world_size} processes")
    share = batch_size // world_size
    return rank * share, (rank + 1) * share


class ResumableStream:
    """What all streams share: a count of the images they have yielded, which checkpoints save as their state.

    A stream with another seed or other contents refuses the state, because it would continue with other images.
    """

    def __init__(self, seed: int, contents: str):
        self.seed, self.contents, self.images_seen = seed, contents, 0

    def measured(self) -> dict[str, float]:
        """What a line of the log says of the data; every process must call it, and gets the same."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """{"images_seen", "seed", "fingerprint" of the contents}: enough to resume at the very next image."""
        return {"images_seen": self.images_seen, "seed": self.seed, "fingerprint": self.contents}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state.

        Raises:
            DataError: the state belongs to another seed or to other data.
        """
        for name, mine in (("fingerprint", self.contents), ("seed", self.seed)):
            if state[name] != mine:
                raise DataError(f"cannot resume the data stream: its {name} was {state[name]}, now it is {mine}")
        self.images_seen = int(state["images_seen"])
