"""The real images of a benchmark: packed, opened, and described by their features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from scq.data import pack as packing
from scq.data.shards import ShardSet
from scq.engine.errors import UserError
from scq.engine.progress import progress_bar
from scq.evaluation.benchmark.results import Floor, RealImages, Shards
from scq.evaluation.metrics.distances import fid
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
        self._shards, self._features = shards, features

    def pack(
        self, split: str, source: str, format: str, size: int, crop: str, encoding: str, dataset_split: str
    ) -> Shards:
        """Pack a split; see `data.pack.pack`.

        Args:
            crop: empty for the format's own protocol.
            dataset_split: what the dataset calls this split.
        """
        with progress_bar(f"pack {format} {dataset_split}") as bar:
            packing.pack(
                source,
                self._shards[split],
                format=format,
                size=size,
                crop=crop or None,
                encoding=encoding,
                split=dataset_split,
                progress=bar,
            )
        return self.packed(split)

    def packed(self, split: str) -> Shards:
        """What is in the shards of a split.

        Raises:
            DataError: there are none, or they are damaged.
        """
        shards = ShardSet(self._shards[split])
        return Shards(split, len(shards), shards.fingerprint)

    def describe(self, shards: Shards, count: int, network: FeatureNetwork | None) -> RealImages:
        """Say which images ``count`` of a split are, 0 for all, and extract their features, which a file keeps.

        Args:
            network: None where nobody needs features.
        """
        images = self.reference(shards, count).description
        if network is None:
            return RealImages(shards.split, images)
        found = RealImages(shards.split, images, network.fingerprint)
        self.features(found, network)
        return found

    def floor(self, shards: Shards, real: RealImages, network: FeatureNetwork) -> Floor:
        """FID of as many images of ``shards`` as there are ``real`` ones, against these."""
        drawn = self.describe(shards, real.images.count, network)
        return Floor(real.images.count, fid(self.features(real, network), self.features(drawn, network)).value)

    def folder(self, shards: Shards) -> str:
        """Where these shards lie.

        Raises:
            UserError: other images lie there by now.
        """
        self._refuse_others(shards.split, shards.fingerprint)
        return str(self._shards[shards.split])

    @property
    def shown(self) -> str:
        """The folder of held-out images, for what has no say in any result: the pictures in a run's folder."""
        return str(self._shards["test"])

    def reference(self, shards: Shards, count: int) -> Reference:
        """So many images of a split, always the same ones; 0 for all.

        Raises:
            UserError: other images lie there by now, or fewer.
        """
        return Reference(self.folder(shards), count)

    def open(self, real: RealImages) -> Reference:
        """The images themselves.

        Raises:
            UserError: other images lie there by now.
        """
        self._refuse_others(real.split, real.images.sha256)
        return Reference(self._shards[real.split], real.images.count)

    def features(self, real: RealImages, network: FeatureNetwork) -> FeatureSet:
        """Their features, from the file where an earlier phase left them."""
        digest = hashlib.sha256(json.dumps([asdict(real.images), network.fingerprint]).encode()).hexdigest()
        file = self._features / f"{real.split}_{real.images.count}_{digest[:8]}.safetensors"
        title = f"features of {real.images.count} {real.images.dataset} images ({real.images.split})"
        with progress_bar(title) as bar:
            return self.open(real).features(network, file, bar)

    def _refuse_others(self, split: str, fingerprint: str) -> None:
        if self.packed(split).fingerprint != fingerprint:
            folder = self._shards[split]
            raise UserError(f"{folder} holds other images than the phases before worked with; choose another --out")
