"""The real images that a model is measured against, and those it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch

from scq.data.stream import Batch, ImageStream
from scq.engine.errors import UserError
from scq.engine.measurements import RealSet
from scq.engine.processes import rank_and_world_size
from scq.engine.references import shown
from scq.evaluation.metrics.features import FeatureSet, cached_features, extract_features
from scq.evaluation.metrics.networks import FeatureNetwork

Progress = Callable[[int, int], None]  # images done, images in all
_REFERENCE_SEED = 0  # of the shuffle that picks a reference when not the whole split is asked for


class Reference:
    """The real images that a model is measured against: ``count`` images of a split, always the same ones.

    Args:
        shards: a folder that ``scq data pack`` wrote.
        count: number of images; 0 for all.
        batch_size: images over all processes in a batch of `batches`; the images are the same for any.
        alone: this process reads all of them by itself, whatever others there are, and waits for none.

    Attributes:
        description: what must be equal for two numbers to be comparable.
        processes: how many share the images.

    Raises:
        UserError: more images are asked for than the split holds.
    """

    def __init__(self, shards: Path | str, count: int = 0, batch_size: int = 64, alone: bool = False):
        self.shards = shards
        self.rank, self.processes = (0, 1) if alone else rank_and_world_size()
        if self.processes > 1:  # every process gets a share of a set that is no larger than a batch, too
            batch_size = self.processes * max(1, min(batch_size, count or batch_size) // self.processes)
        self.stream = ImageStream(
            shards, batch_size=batch_size, seed=_REFERENCE_SEED, rank=self.rank, world_size=self.processes
        )
        self.count = count or self.stream.num_images
        self.batch_size = batch_size
        if self.count > self.stream.num_images:
            raise UserError(f"{shown(shards)} holds {self.stream.num_images} images, {self.count} were asked for")
        source, protocol = self.stream.manifest["source"], self.stream.manifest["protocol"]
        self.description = RealSet(
            dataset=source.get("name") or source["format"],  # older packs have no name
            split=str(source["split"]),
            count=self.count,
            crop=f"{protocol['crop']} {protocol['size']}",
            sha256=self.stream.fingerprint,
        )

    def batches(self) -> Iterator[Batch]:
        """This process's share of the images, in batches."""
        left = self.count - self.rank * self.batch_size // self.processes
        for batch in islice(self.stream.iterate(), -(-self.count // self.batch_size)):
            if left > 0:
                yield Batch(*(field[:left] for field in batch))
            left -= self.batch_size

    def features(
        self, network: FeatureNetwork, cache: Path | None = None, progress: Progress | None = None
    ) -> FeatureSet:
        """The network's features, from the file ``cache`` where an earlier run left them."""
        count = image_counter(progress, self.count, self.processes)
        if cache is not None:
            return cached_features(cache, self.description, network, self.batches, count, alone=self.processes == 1)
        return self.whole(extract_features(self.batches(), network, name="real", progress=count))

    def whole(self, share: FeatureSet) -> FeatureSet:
        """The features of the whole set from this process's share; all that share the images must call it."""
        return share.gather() if self.processes > 1 else share

    def images_at(self, positions: list[int]) -> torch.Tensor:
        """The images (n, 3, H, W) uint8 with these positions, whichever process's share they are in."""
        single = ImageStream(self.shards, batch_size=1, seed=_REFERENCE_SEED)
        return torch.cat([next(single.iterate(position)).images for position in positions])


def image_counter(progress: Progress | None, total: int, processes: int = 1) -> Callable[[int], None]:
    """A callback that takes the size of each of this process's batches, from one that takes (done, total)."""
    done = 0

    def add(fresh: int) -> None:
        nonlocal done
        done = min(done + fresh * processes, total) if total else done + fresh
        if progress is not None:
            progress(done, total)

    return add
