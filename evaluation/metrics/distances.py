"""How far generated images are from real ones: distances of two feature sets, and what lies near what in them.

torchmetrics computes FID and KID. Here is what surrounds it: features that were extracted once for all, fixed random
draws, error bars, and a word of warning where a number is known to be off.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.image import FrechetInceptionDistance, KernelInceptionDistance

from scq.engine.errors import UserError
from scq.evaluation.metrics.features import FeatureSet


def measuring_device(device: str | torch.device | None = None) -> str | torch.device:
    """The device given; without one a GPU where there is one, else the CPU."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


class _Given(nn.Module):
    """Stands where torchmetrics expects the feature network when the features are already there."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance(NamedTuple):
    """FID, at least 0 up to rounding, lower is better."""

    value: float
    biased: bool
    """True when a set has no more images than features: a covariance is singular and the value means little alone."""
    note: str
    """The warning to print beside the number; empty when there is none."""


def fid(real: FeatureSet, fake: FeatureSet) -> FrechetDistance:
    """Frechet distance of the Gaussians fitted to two feature sets (Heusel et al. 2017, eq. (6)), in float64.

    FID from N images is biased upward by about C / N, and C depends on the model (Chong & Forsyth 2020). Compare values
    only at the same N.

    Args:
        real, fake: features (N, D) and (M, D) of one network.

    Raises:
        UserError: the sets are of different networks, or one has fewer than 2 images.
    """
    check_comparable(real, fake, at_least=2)
    num_features = real.features.shape[1]
    sets = [real.features, fake.features]  # (N, D), (M, D)
    if real.count + fake.count < num_features:
        # Few images span few dimensions, and FID does not change when the axes are turned into them: the eigenvalues
        # of 600 x 600 instead of 2048 x 2048 matrices take a second instead of half a minute on a busy machine.
        axes = torch.linalg.qr(torch.cat(sets).double().T).Q  # (D, N + M)
        sets = [features.double() @ axes for features in sets]  # (N, N + M), (M, N + M)
    # Distributed processes hold the gathered set each: torchmetrics must not add it up once more.
    metric = FrechetInceptionDistance(feature=_Given(sets[0].shape[1]), sync_on_compute=False)
    for features, is_real in zip(sets, (True, False), strict=True):
        for chunk in features.split(4096):
            metric.update(chunk.double(), real=is_real)
    smallest = min(real.count, fake.count)
    biased = smallest <= num_features
    note = (
        f"FID at {smallest} samples is biased upward (singular covariance: {num_features} features); "
        f"compare only with FID at the same count, and trust KID first"
        if biased
        else ""
    )
    return FrechetDistance(float(metric.compute()), biased, note)


class KernelDistance(NamedTuple):
    """KID, lower is better; slightly negative values are legitimate, as the estimator has no bias."""

    value: float
    error: float
    """Standard error of `value` that comes from the finite sets (not from training anew)."""
    subset_std: float
    """Standard deviation over the subsets: what other codes print as the error of KID, for comparison with them."""
    subsets: int
    subset_size: int


def kid(
    real: FeatureSet, fake: FeatureSet, *, subsets: int = 100, subset_size: int | None = None, seed: int = 0
) -> KernelDistance:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, KID).

    It is the mean over random subsets, drawn without replacement. From n images, subsets of m scatter with a variance
    (n - m) / m times that of the whole estimate (the delete-(n-m) jackknife, Shao & Wu 1989), which gives `error`. When
    the sets' sizes differ, n is the smaller, and the error is on the wide side.

    For reconstructions against their own originals the value is low by about 2 / n (k(x, x) - mean k), because each
    image meets its twin. Compare such values with each other only.

    Args:
        real, fake: features (N, D) and (M, D) of one network.
        subsets: how many, at least 1.
        subset_size: images in each; None for 1000, as published values have it, or half the smaller set when that is
            less.
        seed: the same seed gives the same subsets.

    Raises:
        UserError: the sets are of different networks or have fewer than 4 images, or a subset is not smaller than the
            smaller set.
    """
    check_comparable(real, fake, at_least=4)
    smallest = min(real.count, fake.count)
    size = subset_size or min(1000, smallest // 2)
    if not 2 <= size < smallest:
        raise UserError(f"KID subset size {size} must be at least 2 and below {smallest}, the smaller set's count")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer.*")
        metric = KernelInceptionDistance(
            feature=_Given(real.features.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
    metric.update(real.features, real=True)
    metric.update(fake.features, real=False)
    # torchmetrics draws from the global generator: seed it for the draw and leave it as it was found.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mean, std = (float(x) for x in metric.compute())
    return KernelDistance(mean, std * math.sqrt(size / (smallest - size)), std, subsets, size)


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1], higher is better."""

    precision: float
    """Share of fake images that lie within the real manifold (fidelity)."""
    recall: float
    """Share of real images that lie within the fake manifold (coverage)."""


def precision_recall(
    real: FeatureSet, fake: FeatureSet, *, neighbors: int = 3, device: str | torch.device = "cpu"
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eqs. (1), (2)).

    A set's manifold is the union of balls around its points that reach to the k-th nearest other point. Both shares
    depend on the counts: compare at equal counts.

    Args:
        real, fake: features (N, D) and (M, D) of one network.
        neighbors: k; 3 as published.
        device: where the distances are computed.

    Raises:
        UserError: the sets are of different networks, or one has at most k images.
    """
    check_comparable(real, fake, at_least=neighbors + 1)

    def share_inside(points: Tensor, manifold: Tensor) -> float:
        # k + 1, because each point is its own nearest.
        radii = torch.cat([torch.cdist(c, manifold).kthvalue(neighbors + 1).values for c in manifold.split(1024)])
        inside = [(torch.cdist(chunk, manifold) <= radii).any(dim=1) for chunk in points.split(1024)]
        return torch.cat(inside).double().mean().item()

    real_points, fake_points = real.features.to(device), fake.features.to(device)  # (N, D), (M, D)
    return PrecisionRecall(share_inside(fake_points, real_points), share_inside(real_points, fake_points))


class Neighbors(NamedTuple):
    """For each of M images, its nearest ones in another set, nearest first."""

    distances: Tensor
    """(M, k) float32, Euclidean in features."""
    positions: Tensor
    """(M, k) int64, the neighbours' positions in their set."""


def nearest_neighbors(
    fake: FeatureSet, real: FeatureSet, *, count: int = 1, device: str | torch.device = "cpu"
) -> Neighbors:
    """The training images nearest to each generated one: shown side by side, they tell what was memorised.

    Args:
        fake, real: features (M, D) and (N, D) of one network.
        count: k, how many for each generated image.
        device: where the distances are computed.

    Raises:
        UserError: the sets are of different networks, or there are fewer than ``count`` real images.
    """
    check_comparable(real, fake, at_least=1)
    if real.count < count:
        raise UserError(f"{real.name!r} has {real.count} images, fewer than the {count} neighbours asked for")
    manifold = real.features.to(device)  # (N, D)
    nearest = [
        torch.cdist(chunk.to(device), manifold).topk(count, largest=False) for chunk in fake.features.split(1024)
    ]
    distances = torch.cat([found.values for found in nearest]).cpu()  # (M, k)
    indices = torch.cat([found.indices for found in nearest]).cpu()  # (M, k)
    return Neighbors(distances, real.positions[indices])


def check_comparable(real: FeatureSet, fake: FeatureSet, at_least: int) -> None:
    """Refuse two sets that no metric can compare.

    Raises:
        UserError: they are of different networks, or one has fewer than ``at_least`` images.
    """
    if real.network != fake.network:
        raise UserError(
            f"{real.name!r} and {fake.name!r} have features of different networks "
            f"({real.network[:12]} and {fake.network[:12]}): extract both with one"
        )
    for features in (real, fake):
        if features.count < at_least:
            raise UserError(f"{features.name!r} has {features.count} images; this metric needs at least {at_least}")
