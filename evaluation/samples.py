"""Generated images against real ones: FID, KID, precision and recall from their features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from scq.engine.measurements import NetworkUsed, SampleScores, SecondBackbone
from scq.engine.processes import rank_and_world_size
from scq.evaluation.metrics.distances import fid, kid, measuring_device, precision_recall
from scq.evaluation.metrics.features import FeatureSet, extract_with_each
from scq.evaluation.metrics.fid_infinity import fid_infinity
from scq.evaluation.metrics.networks import FeatureNetwork
from scq.evaluation.reference import Progress, image_counter


def sample_features(
    images: Iterable[Any], count: int, networks: Sequence[FeatureNetwork], progress: Progress | None = None
) -> list[FeatureSet]:
    """Features of generated images, one set for each network, in one pass over the images.

    Of several processes every one must call it, and every one gets the whole sets.

    Args:
        images: batches as in metrics.features, this process's share.
        count: number of images over all processes, for the progress.
    """
    bar = image_counter(progress, count, rank_and_world_size()[1])
    return [share.gather() for share in extract_with_each(images, networks, name="samples", progress=bar)]


def evaluate_samples(features: FeatureSet, real: FeatureSet, device: str | torch.device | None = None) -> SampleScores:
    """Every number that features tell of generated images.

    From 4,098 images on (twice as many as Inception has features, and two) FID at infinity is among them.

    Args:
        features, real: of generated and of real images, (M, D) and (N, D).
        device: for what is large; None for a GPU where there is one.

    Raises:
        UserError: the sets are of different networks, or too small for a metric.
    """
    device = measuring_device(device)
    distance, kernel = fid(real, features), kid(real, features)
    manifold = precision_recall(real, features, device=device)
    enough = features.count >= 2 * (features.features.shape[1] + 1)
    return SampleScores(
        count=features.count,
        fid=distance.value,
        fid_biased=distance.biased,
        fid_note=distance.note,
        kid=kernel.value,
        kid_error=kernel.error,
        kid_subsets=kernel.subsets,
        kid_subset_size=kernel.subset_size,
        precision=manifold.precision,
        recall=manifold.recall,
        fid_infinity=fid_infinity(real, features, device=device) if enough else None,
    )


def evaluate_with_second(features: FeatureSet, real: FeatureSet, network: FeatureNetwork) -> SecondBackbone:
    """The Frechet distance and KID of generated images in the features of a further network.

    Raises:
        UserError: the sets are of different networks, or too small for KID.
    """
    distance, kernel = fid(real, features), kid(real, features)
    return SecondBackbone(distance.value, distance.biased, kernel.value, kernel.error, describe(network))


def describe(network: FeatureNetwork) -> NetworkUsed:
    """What must be equal for two numbers to be comparable."""
    return NetworkUsed(network.description, network.fingerprint, network.protocol)
