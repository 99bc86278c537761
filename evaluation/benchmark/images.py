"""The real images of a benchmark: packed, opened, and described by their features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from scq.data import pack as packing
from scq.data.stream import ImageStream
from scq.engine.errors import UserError
from scq.engine.progress import progress_bar
from scq.evaluation.benchmark.results import RealImages, Shards
from scq.evaluation.metrics.features import FeatureSet
from scq.evaluation.metrics.networks import FeatureNetwork
from scq.evaluation.reference import Reference


class Images:
    """Where a benchmark's images lie, and the work of the phases that are about them.

    Args:
        shards: folders of the splits, by name: train and test.
        features: folder for the features of real images.
    """

    def __init__(self, shards: Mapping[str, Path | str], features: Path):
        self.shards, self._features = shards, features

    def pack(self, split: str, source: str, format: str, size: int, crop: str, dataset_split: str) -> Shards:
        """The work of packing a split; see `data.pack.pack`.

        Args:
            crop: empty for the format's own protocol.
            dataset_split: what the dataset calls this split.
        """
        with progress_bar(f"pack {format} {dataset_split}") as bar:
            packing.pack(
                source,
                self.shards[split],
                format=format,
                size=size,
                crop=crop or None,
                split=dataset_split,
                progress=bar,
            )
        return self.packed(split)

    def packed(self, split: str) -> Shards:
        """What is in the shards of a split.

        Raises:
            DataError: there are none, or they are damaged.
        """
        stream = ImageStream(self.shards[split], batch_size=1)
        return Shards(split, stream.num_images, stream.fingerprint)

    def describe(self, shards: Shards, count: int, network: FeatureNetwork) -> RealImages:
        """The work of extracting the features of ``count`` images, 0 for all; a file keeps them."""
        found = RealImages(shards.split, self.reference(shards, count).description, network.fingerprint)
        self.features(found, network)
        return found

    def reference(self, shards: Shards, count: int) -> Reference:
        """So many images of a split, always the same ones; 0 for all.

        Raises:
            UserError: the shards are others by now, or hold fewer images.
        """
        reference = Reference(self.shards[shards.split], count)
        if reference.description.sha256 != shards.fingerprint:
            raise UserError(f"{self.shards[shards.split]} holds other images than the benchmark began with")
        return reference

    def open(self, real: RealImages) -> Reference:
        """The images themselves.

        Raises:
            UserError: the shards hold others by now.
        """
        reference = Reference(self.shards[real.split], real.images.count)
        if reference.description != real.images:
            raise UserError(f"{self.shards[real.split]} holds other images than the benchmark began with")
        return reference

    def features(self, real: RealImages, network: FeatureNetwork) -> FeatureSet:
        """Their features, from the file where an earlier phase left them."""
        digest = hashlib.sha256(json.dumps([asdict(real.images), network.fingerprint]).encode()).hexdigest()
        file = self._features / f"{real.split}_{real.images.count}_{digest[:8]}.safetensors"
        title = f"features of {real.images.count} {real.images.dataset} images ({real.images.split})"
        with progress_bar(title) as bar:
            return self.open(real).features(network, file, bar)
