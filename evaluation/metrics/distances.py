"""What is measured, from features, image pairs and code indices; none of it knows which model they came from.

torchmetrics computes FID, KID, MSE and SSIM; here is what surrounds it: features fed in once for all, fixed random
draws, error bars, and a word of warning where a number is known to be off.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MeanSquaredError, SumMetric
from torchmetrics.image import FrechetInceptionDistance, KernelInceptionDistance, StructuralSimilarityIndexMeasure

from scq.engine.errors import UserError
from scq.engine.processes import sum_across_processes
from scq.evaluation.metrics.features import FeatureSet


def measuring_device(device: str | torch.device | None = None) -> str | torch.device:
    """The device given; without one a GPU where there is one."""
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

    FID from N images is biased upward by about C/N, C depending on the model (Chong & Forsyth 2020): compare values
    only at the same N. Raises UserError for sets of different networks or with fewer than 2 images.
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

    The mean over random subsets without replacement. `subset_size` defaults to 1000, as published values have it, or
    to half the smaller set when that is less. From n images, subsets of m scatter with a variance (n - m) / m times
    that of the whole estimate (the delete-(n-m) jackknife, Shao & Wu 1989), which gives `error`; when the sets' sizes
    differ, n is the smaller and the error is on the wide side. The same seed gives the same subsets.

    For reconstructions against their own originals the value is low by about 2 / n (k(x, x) - mean k): each image meets
    its twin. Compare such values with each other only.

    Raises UserError for sets of different networks or a subset that is not smaller than the smaller set.
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
    """Improved precision and recall (Kynkaanniemi et al. 2019, eqs. (1), (2)), k = 3 as published.

    A set's manifold is the union of balls around its points that reach to the k-th nearest other point. Both depend on
    the counts: compare at equal counts. Raises UserError for sets of different networks or of at most k images.
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
    """The `count` training images nearest to each generated one: shown side by side, they tell what was memorised.

    Raises UserError for sets of different networks or fewer than `count` real images.
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
    """Raises UserError for sets of different networks, or with fewer images than `at_least`."""
    if real.network != fake.network:
        raise UserError(
            f"{real.name!r} and {fake.name!r} have features of different networks "
            f"({real.network[:12]} and {fake.network[:12]}): extract both with one"
        )
    for features in (real, fake):
        if features.count < at_least:
            raise UserError(f"{features.name!r} has {features.count} images; this metric needs at least {at_least}")


class Reconstruction(NamedTuple):
    """How near reconstructions are to their originals."""

    mse: float
    """Mean squared error over all images, channels and pixels, values in [0, 1]; lower is better."""
    psnr: float
    """10 log10(1 / mse) in dB, from the mean error of the whole set (not the mean of per-image PSNRs, which is higher);
    infinite when nothing differs."""
    ssim: float
    """Mean over images of SSIM (Wang et al. 2004): RGB, Gaussian 11x11 window, sigma 1.5; 1 is identical."""
    count: int
    lpips: float | None = None
    """Mean perceptual distance, lower is better; None when no network was given."""


class ReconstructionMetrics:
    """Accumulates MSE, PSNR, SSIM and, given a network, LPIPS over batches of image pairs.

    `perceptual` maps two batches (b, 3, H, W) in [-1, 1] on `device` to their mean distance, such as
    `stage1_tokenizer.losses.PerceptualLoss`. A network that a model was trained on flatters that model.

    With `across_processes`, `compute` adds the sums of all distributed processes, and every one of them must call it.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        across_processes: bool = False,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self._perceptual = perceptual
        self._lpips = MeanMetric(sync_on_compute=across_processes).set_dtype(torch.float64).to(device)
        self._lpips.update(0, weight=0)  # as for the images below
        self._mse = MeanSquaredError(sync_on_compute=across_processes).set_dtype(torch.float64).to(device)
        ssim = StructuralSimilarityIndexMeasure(data_range=1.0, sync_on_compute=across_processes)
        # In float32 the variance of flat areas cancels: identical emoji on white would get 0.9999.
        self._ssim = ssim.set_dtype(torch.float64).to(device)
        self._images = SumMetric(sync_on_compute=across_processes).set_dtype(torch.float64).to(device)
        self._images.update(0)  # a process may have no share of a small set

    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Both uint8 (b, 3, H, W): what would be written to PNG, so rounding is part of the measure.

        Raises TypeError for other dtypes, ValueError for different shapes or images not larger than 5 pixels.
        """
        if originals.dtype != torch.uint8 or reconstructions.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, not {originals.dtype} and {reconstructions.dtype}")
        if originals.shape != reconstructions.shape or min(originals.shape[2:]) <= 5:
            raise ValueError(
                f"shapes {tuple(originals.shape)} and {tuple(reconstructions.shape)} must be equal, above 5x5 pixels"
            )
        self._images.update(len(originals))
        a, b = (images.to(self._mse.device).double() / 255 for images in (originals, reconstructions))
        self._mse.update(b.flatten(), a.flatten())
        self._ssim.update(b, a)
        if self._perceptual is not None:
            with torch.no_grad():
                distance = self._perceptual(a.float() * 2 - 1, b.float() * 2 - 1)
            self._lpips.update(distance, weight=len(originals))

    def compute(self) -> Reconstruction:
        """The measures over every pair seen. Raises UserError when there was none."""
        count = int(self._images.compute())
        if not count:
            raise UserError("there are no reconstructions to measure")
        mse = float(self._mse.compute())
        psnr = -10 * math.log10(mse) if mse > 0 else math.inf
        ssim = float(self._ssim.compute())
        lpips = float(self._lpips.compute()) if self._perceptual is not None else None
        return Reconstruction(mse, psnr, ssim, count, lpips)


@dataclass(frozen=True, eq=False)
class CodebookUsage:
    """How often each code was used over a set; usages of two parts of a set add up with `+`.

    Attributes:
        counts: (K,) int64, occurrences of each code.
        images: number of images.
    """

    counts: Tensor
    images: int

    def __add__(self, other: "CodebookUsage") -> "CodebookUsage":
        return CodebookUsage(self.counts + other.counts, self.images + other.images)

    def gather(self) -> "CodebookUsage":
        """The sum over all processes, on every process; every one must call it."""
        images = int(sum_across_processes(torch.tensor([self.images])))
        return CodebookUsage(sum_across_processes(self.counts), images)

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def used_share(self) -> float:
        """Share of the codebook that occurs at least once, in (0, 1]."""
        return float((self.counts > 0).double().mean())

    @property
    def bits_per_token(self) -> float:
        """Empirical entropy of single codes, in bits: at most log2(K), reached by uniform use."""
        p = self.counts[self.counts > 0].double() / self.tokens
        return float(-(p * p.log2()).sum())

    @property
    def perplexity(self) -> float:
        """2 ** bits_per_token: the number of codes that, used uniformly, would carry as much. In [1, K]."""
        return 2**self.bits_per_token

    @property
    def bits_per_image(self) -> float:
        """Tokens per image times bits_per_token: what an ideal code for single tokens would need."""
        return self.tokens / self.images * self.bits_per_token

    @property
    def fixed_bits_per_image(self) -> float:
        """Tokens per image times log2(K): the nominal rate, without any entropy coding."""
        return self.tokens / self.images * math.log2(len(self.counts))

    def summary(self) -> dict[str, float]:
        """The numbers for a table or a JSON file."""
        names = ("used_share", "perplexity", "bits_per_token", "bits_per_image", "fixed_bits_per_image")
        return {**{name: getattr(self, name) for name in names}, "tokens": self.tokens, "images": self.images}


class CodeCounter:
    """Accumulates the `CodebookUsage` of batches of code indices in [0, codebook_size)."""

    def __init__(self, codebook_size: int):
        self.usage = CodebookUsage(torch.zeros(codebook_size, dtype=torch.int64), 0)

    def update(self, indices: Tensor) -> None:
        """Indices int64 (b, h, w), or (b, any...). Raises UserError for one outside the codebook."""
        size = len(self.usage.counts)
        codes = indices.flatten().cpu()
        if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise UserError(
                f"code indices from {int(codes.min())} to {int(codes.max())} do not fit a codebook of {size}"
            )
        self.usage += CodebookUsage(codes.bincount(minlength=size), len(indices))


def codebook_usage(indices: Iterable[Tensor], codebook_size: int) -> CodebookUsage:
    """Usage of the codebook over a whole set.

    Args:
        indices: batches of int64 (b, h, w) (or (b, any...)) code indices in [0, codebook_size).
        codebook_size: K.

    Raises UserError for an index outside the codebook or an empty set.
    """
    counter = CodeCounter(codebook_size)
    for batch in indices:
        counter.update(batch)
    if not counter.usage.tokens:
        raise UserError("there are no code indices to measure")
    return counter.usage
