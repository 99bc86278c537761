"""The global sequence of images: epoch permutations one after the other, a pure function of (seed, position).

Everything that reads data, images or tokens, for any number of processes and workers, asks this file which image
stands at a position. Nothing here remembers what was read.
"""

import numpy as np

from data.errors import DataError


class EpochOrder:
    """Maps positions of the endless global sequence to image numbers.

    Epoch e holds the positions [e*N, (e+1)*N) and is a permutation of all N images that depends on (seed, e) alone
    (PCG64); without shuffling it is 0..N-1. The permutations of two epochs are kept, 4 bytes per image each.
    """

    def __init__(self, num_images: int, seed: int, shuffle: bool = True):
        self.num_images, self.seed, self.shuffle = num_images, seed, shuffle
        self._permutations: dict[int, np.ndarray] = {}

    def permutation(self, epoch: int) -> np.ndarray:
        """The image numbers of one epoch, (N,)."""
        if epoch not in self._permutations:
            while len(self._permutations) > 1:
                self._permutations.pop(min(self._permutations))
            images = np.arange(self.num_images, dtype=np.uint32 if self.num_images < 2**32 else np.uint64)
            np.random.Generator(np.random.PCG64([self.seed, epoch])).shuffle(images)
            self._permutations[epoch] = images
        return self._permutations[epoch]

    def images(self, positions: np.ndarray) -> np.ndarray:
        """Image numbers int64 (n,) at positions int64 (n,) of the global sequence."""
        epochs, places = np.divmod(positions, self.num_images)
        if not self.shuffle:
            return places
        images = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            images[here] = self.permutation(int(epoch))[places[here]]
        return images


def random_bits(seed: int, positions: np.ndarray, purpose: int) -> np.ndarray:
    """64 random bits for each position, uint64 (n,): a pure function of (seed, position, purpose).

    The purpose keeps draws for different decisions independent. SplitMix64 (Steele, Lea, Flood 2014), used as a
    counter-based generator.
    """
    with np.errstate(over="ignore"):
        x = np.uint64(_mix(np.uint64(seed % 2**64)) + np.uint64(purpose)) + np.asarray(positions).astype(np.uint64)
        return _mix(_mix(x))


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def flips(seed: int, positions: np.ndarray) -> np.ndarray:
    """Whether the image at each position is mirrored, bool (n,): a fair coin per (seed, position)."""
    return (random_bits(seed, positions, purpose=1) & np.uint64(1)).astype(bool)


def rank_slice(batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """The part [start, stop) of every global batch that a rank reads. Raises DataError if it cannot be divided."""
    if batch_size < 1:
        raise DataError(f"batch size must be at least 1, not {batch_size}")
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} is not one of {world_size} processes")
    if batch_size % world_size:
        raise DataError(f"the global batch size {batch_size} cannot be divided among {world_size} processes")
    share = batch_size // world_size
    return rank * share, (rank + 1) * share


class Place:
    """The bookkeeping every stream shares: images seen, and the state dict that names seed and contents.

    A stream of another seed or other contents refuses the state: it would go on at another place.
    """

    def __init__(self, seed: int, fingerprint: str):
        self.seed, self.fingerprint, self.images_seen = seed, fingerprint, 0

    def state_dict(self) -> dict[str, int | str]:
        """{"images_seen", "seed", "fingerprint"}: all that is needed to go on at the very next image."""
        return {"images_seen": self.images_seen, "seed": self.seed, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Goes on from a state; raises DataError if it belongs to another seed or to other data."""
        for name, mine in (("fingerprint", self.fingerprint), ("seed", self.seed)):
            if state[name] != mine:
                raise DataError(f"cannot resume the data stream: its {name} was {state[name]}, now it is {mine}")
        self.images_seen = int(state["images_seen"])
