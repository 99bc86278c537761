"""What was measured of a model, and how it was trained: dataclasses that become JSON and come back from it.

They lie in the ground because every room above reads them: the metrics fill them in, a benchmark keeps them, and a
model's card shows them. None of them computes anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from scq.engine.errors import UserError

Schema = TypeVar("Schema")


@dataclass(frozen=True)
class RealSet:
    """Which real images a model was measured against: what must be equal for two numbers to be comparable.

    Attributes:
        dataset: the name that the user knows it by.
        split: "train", "val", ...
        count: number of images.
        crop: name of the crop and resize protocol, with the size in pixels ("center-bicubic 256").
        sha256: of the dataset's manifest, "" when there is none.
    """

    dataset: str
    split: str
    count: int
    crop: str
    sha256: str = ""


@dataclass(frozen=True)
class NetworkUsed:
    """The feature network of FID and its kin: what must be equal for two numbers to be comparable.

    Attributes:
        weights: which weights they are and where they came from, in words.
        fingerprint: sha256 (hex) of the weights.
        protocol: how an image becomes the network's input, in words.
    """

    weights: str
    fingerprint: str
    protocol: str


@dataclass(frozen=True)
class Reconstruction:
    """How near reconstructions are to their originals.

    Attributes:
        mse: mean squared error over all images, channels and pixels, values in [0, 1]; lower is better.
        psnr: 10 log10(1 / mse) in dB, from the mean error of the whole set (not the mean of per-image PSNRs, which is
            higher); infinite when nothing differs.
        ssim: mean over images of SSIM (Wang et al. 2004): RGB, Gaussian 11x11 window, sigma 1.5; 1 is identical.
        count: number of images.
        lpips: mean perceptual distance, lower is better; None when no network was given.
        rfid, rkid, rkid_error: FID and KID against the originals, and KID's standard error; None when nobody asked.
        bits_per_image: what latents with rounded weights cost; None where the rate is no property of the latents.
    """

    mse: float
    psnr: float
    ssim: float
    count: int
    lpips: float | None = None
    rfid: float | None = None
    rkid: float | None = None
    rkid_error: float | None = None
    bits_per_image: float | None = None


@dataclass(frozen=True)
class CodebookSummary:
    """How a codebook of K codes was used over a set of images.

    Attributes:
        used_share: share of the codes that occur at least once, in (0, 1].
        perplexity: 2 ** bits_per_token, in [1, K].
        bits_per_token: empirical entropy of single codes, at most log2(K).
        bits_per_image: tokens per image times bits_per_token.
        fixed_bits_per_image: tokens per image times log2(K), the rate without entropy coding.
        tokens: number of tokens that were counted.
        images: number of images that they are of.
    """

    used_share: float
    perplexity: float
    bits_per_token: float
    bits_per_image: float
    fixed_bits_per_image: float
    tokens: int
    images: int


@dataclass(frozen=True)
class MixtureSummary:
    """How the K codes of a soft quantizer shared the weight of all mixtures of a set of images.

    Attributes:
        used_share: share of the codes that have any weight in any mixture, in (0, 1].
        perplexity: 2 ** entropy of the mean weights, in [1, K]: what arXiv 2310.03004 calls perplexity. A single code
            in each mixture makes it that of the codes.
    """

    used_share: float
    perplexity: float


@dataclass(frozen=True)
class FrechetInfinity:
    """FID without the bias of finitely many generated images; that of finitely many real ones remains.

    Attributes:
        value: the extrapolated FID.
        low, high: ends of the bootstrap interval over the generated images (not over training anew).
        counts: numbers of images at which FID was taken.
        fids: FID at each of ``counts``, the points of the fitted line.
    """

    value: float
    low: float
    high: float
    counts: list[int]
    fids: list[float]


@dataclass(frozen=True)
class SecondBackbone:
    """The Frechet distance and KID of samples in the features of a further network.

    Attributes:
        biased: whether a set has no more images than features, as in `SampleScores`.
        kid_error: standard error of ``kid``.
    """

    frechet_distance: float
    biased: bool
    kid: float
    kid_error: float
    network: NetworkUsed


@dataclass(frozen=True)
class SamplingSeconds:
    """Where the time of drawing went: seconds of the prior, and of everything after it (refiner and decoder)."""

    prior: float
    decode: float


@dataclass(frozen=True)
class SampleScores:
    """Generated images against real ones.

    Attributes:
        count: number of generated images.
        fid: Frechet distance in Inception features, lower is better.
        fid_biased: whether a set has no more images than features, so that FID means little alone.
        fid_note: the warning to print beside FID; empty when there is none.
        kid: squared maximum mean discrepancy, lower is better; it may be slightly negative.
        kid_error: standard error of ``kid`` that comes from finite sets.
        kid_subsets, kid_subset_size: how many subsets KID is the mean of, and of how many images each.
        precision: share of generated images within the real manifold, in [0, 1].
        recall: share of real images within the generated manifold, in [0, 1].
        fid_infinity: FID extrapolated to infinitely many images; None for fewer than twice as many as features.
        seconds_of: where the time went; None when nobody looked.
        steps: calls of the prior for an image; None when it was not written down.
        nearest_training_distance: median distance to the nearest training image; None when nobody looked.
        nearest_training_among: number of training images that were searched.
        fid_to_training: FID against those training images, as most papers on CIFAR-10 measure it; None when nobody
            looked. A model that memorises its training set has a low one.
        second_backbone: the same comparison with a further network; None when nobody asked.
    """

    count: int
    fid: float
    fid_biased: bool
    fid_note: str
    kid: float
    kid_error: float
    kid_subsets: int
    kid_subset_size: int
    precision: float
    recall: float
    fid_infinity: FrechetInfinity | None = None
    seconds_of: SamplingSeconds | None = None
    steps: int | None = None
    nearest_training_distance: float | None = None
    nearest_training_among: int | None = None
    fid_to_training: float | None = None
    second_backbone: SecondBackbone | None = None


@dataclass(frozen=True)
class TrainedFor:
    """How long one network was trained: optimizer steps, and images seen in them."""

    steps: int
    images_seen: int


@dataclass(frozen=True)
class TrainingFacts:
    """How a model was trained, as far as it is known.

    Attributes:
        dataset: the name that the user knows it by.
        revision: git revision of the code.
        tokenizer, prior, refiner: how long each was trained.
    """

    dataset: str | None = None
    revision: str | None = None
    tokenizer: TrainedFor | None = None
    prior: TrainedFor | None = None
    refiner: TrainedFor | None = None


@dataclass(frozen=True)
class Measured:
    """What is known of one model: kept beside it as ``measured.json``, and shown on its card.

    Attributes:
        training: how it was trained.
        license: of the weights, by its name on the hub.
        reference: the held-out images that reconstructions, and samples unless stated otherwise, are measured against.
        sample_reference: the real images that samples are measured against; None for ``reference``.
        network: the feature network of FID and KID.
        reconstruction: by what was decoded: ``z_q``, ``dominant``, ``refined``, ``z_q_4_bits`` and such.
        codebook: usage over the held-out images; None where the quantizer has no codes.
        samples: None where there is no prior.
        seconds: of each part of the measuring.
    """

    training: TrainingFacts = field(default_factory=TrainingFacts)
    license: str | None = None
    reference: RealSet | None = None
    sample_reference: RealSet | None = None
    network: NetworkUsed | None = None
    reconstruction: dict[str, Reconstruction] = field(default_factory=dict)
    codebook: CodebookSummary | None = None
    samples: SampleScores | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def with_numbers(self, found: Measured) -> Measured:
        """What is known after ``found`` was measured: its numbers, and this model's training and license."""
        return replace(found, training=self.training, license=self.license)


def to_plain(value: Any) -> dict[str, Any]:
    """A dataclass as what JSON can hold; fields that are None are left out."""
    return _adapter(type(value)).dump_python(value, mode="json", exclude_none=True)


def from_plain(cls: type[Schema], plain: Any, source: str = "these measurements") -> Schema:
    """The reverse of `to_plain`. Keys that ``cls`` has no field for are ignored: files of other versions load.

    Args:
        cls: a dataclass.
        plain: what JSON held.
        source: where it comes from, for the message.

    Raises:
        UserError: a field is missing or of another shape; the message names it.
    """
    try:
        return _adapter(cls).validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or cls.__name__
        raise UserError(f"{source} cannot be read: {name}: {first['msg']}") from error


@cache
def _adapter(cls: type[Schema]) -> TypeAdapter[Schema]:
    return TypeAdapter(cls)
