"""Memorised? Samples beside the training images that come nearest to them in feature space."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from scq.engine.processes import gather_objects
from scq.evaluation.metrics.distances import measuring_device, nearest_neighbors
from scq.evaluation.metrics.features import FeatureSet
from scq.evaluation.reference import Reference

PICTURED_NEIGHBOURS = 12


class NearestImages(NamedTuple):
    """Some samples, the training image nearest to each, and how near samples come to training images in all."""

    samples: torch.Tensor
    """(n, 3, H, W) uint8."""
    neighbours: torch.Tensor
    """Likewise."""
    median_distance: float
    """Over all samples, of the distance to the nearest training image: Euclidean, in features."""


def nearest_images(
    features: FeatureSet,
    training_set: FeatureSet,
    training: Reference,
    pictured: torch.Tensor,
    device: str | torch.device | None = None,
) -> NearestImages:
    """Look for the training image nearest to each sample.

    Args:
        features, training_set: of the samples (M, D), and of the images of ``training`` (N, D).
        pictured: (n, 3, H, W) uint8, the samples that come first in ``features``; no more than twelve are shown.
        device: for the distances; None for a GPU where there is one.

    Raises:
        UserError: the features are of different networks.
    """
    found = nearest_neighbors(features, training_set, device=measuring_device(device))
    pictured = pictured[:PICTURED_NEIGHBOURS]
    neighbours = training.images_at(found.positions[: len(pictured), 0].tolist())
    return NearestImages(pictured, neighbours, float(found.distances[:, 0].median()))


class FirstImages:
    """Keeps the first images of a set, in the order of their positions, while its batches go by."""

    def __init__(self, count: int = PICTURED_NEIGHBOURS):
        self.count = count
        self._kept: dict[int, torch.Tensor] = {}

    def passing(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches."""
        for batch in batches:
            for image, position in zip(batch.images, batch.positions.tolist(), strict=True):
                if position < self.count:
                    self._kept[position] = image.cpu()
            yield batch

    def gather(self) -> torch.Tensor:
        """(n, 3, H, W), of all processes; every one must call it."""
        kept = {position: image for part in gather_objects(self._kept) for position, image in part.items()}
        return torch.stack([kept[position] for position in sorted(kept)])
