"""What a benchmark finds, as dataclasses: phases keep them, results.json holds them, the report reads them.

An arm is one quantizer with one seed. Numbers of single measurements are in `engine.measurements`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from scq.engine.files import write_json
from scq.engine.measurements import (
    CodebookSummary,
    MixtureSummary,
    NetworkUsed,
    RealSet,
    Reconstruction,
    SampleScores,
    from_plain,
    to_plain,
)
from scq.engine.plain_json import read_json
from scq.evaluation.benchmark.config import MeasureConfig
from scq.stage2_prior.scheduler import UnmaskingScheduler

Schema = TypeVar("Schema")
CODES = "codes"  # the way of decoding samples that every arm has: their dominant codes as they are
Curve = dict[str, list[int | float]]  # columns of a training log: the steps, and a term at each


@dataclass(frozen=True)
class Shards:
    """One split of the images, packed.

    Attributes:
        split: train or test, whatever the dataset calls it.
        images: how many there are.
        fingerprint: of the contents.
    """

    split: str
    images: int
    fingerprint: str


@dataclass(frozen=True)
class RealImages:
    """Real images that something is measured against.

    Attributes:
        split: train or test, of the packed `Shards`.
        images: which of that split's images they are.
        network: fingerprint of the network that their features are of; None where nobody needs features.
    """

    split: str
    images: RealSet
    network: str | None = None


@dataclass(frozen=True)
class TokenizerResult:
    """A trained tokenizer.

    Attributes:
        images_per_second: of training, in the median logging window: what else the machine did for a while does not
            count.
        soft_over_hard: squared error of soft latents as a share of that of the nearest codes, in the last logging
            window; None for a hard quantizer.
        seconds: of training, over all interruptions.
        cpu_seconds: of all threads, likewise; None where an older version trained.
        learned: ``rfid`` of held-out images at some steps, decoded from codes where there are codes, and the
            ``cpu_seconds`` of training up to there; None where nobody measured.
    """

    quantizer: str
    seed: int
    fingerprint: str
    parameters: int
    steps: int
    images_seen: int
    batch_size: int
    images_per_second: float
    seconds: float
    curve: Curve
    soft_over_hard: float | None = None
    cpu_seconds: float | None = None
    learned: Curve | None = None


@dataclass(frozen=True)
class ReconstructionsResult:
    """What a tokenizer's decoder makes of held-out images.

    Attributes:
        soft: whether the decoder is given more than codes.
        ways: by what was decoded, see `evaluation.reconstructions.Reconstructions`.
        codebook: its usage over these images; None where the quantizer has no codes.
        mixed: how the codes shared the weight of all mixtures; None where nothing is soft or an older version measured.
        token: which code of a soft latent its codes are, "dominant" or "nearest"; None, of an older version: dominant.
        dominant_is_nearest: share of latents whose dominant code is the nearest, of 256 images; None where unknown.
        dominant_weight: mean weight of the dominant code, likewise.
    """

    soft: bool
    ways: dict[str, Reconstruction]
    codebook: CodebookSummary | None = None
    mixed: MixtureSummary | None = None
    token: str | None = None
    dominant_is_nearest: float | None = None
    dominant_weight: float | None = None

    @property
    def codes(self) -> str:
        """What its codes are called in tables and pictures."""
        return f"{self.token or 'dominant'} codes" if self.soft else "codes"


@dataclass(frozen=True)
class TokensResult:
    """The codes of the training images, written for the prior.

    Attributes:
        fingerprint: says which tokenizer's they are, and of which images.
        usage: of the codebook.
    """

    fingerprint: str
    usage: CodebookSummary


@dataclass(frozen=True)
class PriorResult:
    """A trained prior; ``seconds`` of training, over all interruptions."""

    fingerprint: str
    parameters: int
    steps: int
    images_seen: int
    seconds: float
    curve: Curve


@dataclass(frozen=True)
class LikelihoodResult:
    """An upper bound on the bits that held-out codes need, see `stage2_prior.likelihood.LikelihoodBound`."""

    bits_per_image: float
    error: float
    bits_per_token: float
    images: int
    passes: int


@dataclass(frozen=True)
class CodesResult:
    """Codes that a prior drew, to be decoded in every way.

    Attributes:
        count: number of grids.
        steps: calls of the prior for each.
        fingerprint: of codes and seeds.
        seconds: that drawing them took.
    """

    count: int
    steps: int
    fingerprint: str
    seconds: float


@dataclass(frozen=True)
class RefinerResult:
    """A trained refiner; ``seconds`` of training, over all interruptions."""

    kind: str
    fingerprint: str
    parameters: int
    steps: int
    images_seen: int
    seconds: float


@dataclass(frozen=True)
class WayOfDecoding:
    """Samples whose codes were decoded in one way.

    Attributes:
        refiner: what refined the codes; None where they were decoded as they are.
        reconstruction: of held-out images from refined codes.
    """

    scores: SampleScores
    refiner: RefinerResult | None = None
    reconstruction: Reconstruction | None = None


@dataclass(frozen=True)
class SweptSettings:
    """Samples drawn with other settings, their codes decoded in the way that is named."""

    way: str
    scores: SampleScores


@dataclass(frozen=True)
class ArmResult:
    """One quantizer with one seed.

    Attributes:
        tokens, prior, likelihood: None where only reconstructions were asked for.
        held_out_usage: of the codebook over the whole held-out split; likewise.
        samples: by the way of decoding, ``codes`` first.
        sweep: by the settings of sampling.
    """

    tokenizer: TokenizerResult
    reconstructions: ReconstructionsResult
    tokens: TokensResult | None = None
    held_out_usage: CodebookSummary | None = None
    prior: PriorResult | None = None
    likelihood: LikelihoodResult | None = None
    samples: dict[str, WayOfDecoding] = field(default_factory=dict)
    sweep: dict[str, SweptSettings] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkResults:
    """Everything that a benchmark has found so far.

    Attributes:
        revision: git revision of the code.
        reference: the held-out images that reconstructions are measured against.
        sample_reference: the images that samples are measured against; None for ``reference``.
        sampling, measure: as the config had them, without the folders of this disk.
        arms: by name, one result for each seed.
        seconds, machines: of each phase, by name: how long it took, and on what.
        seconds_in_all: their sum.
    """

    title: str
    revision: str
    reference: RealSet
    network: NetworkUsed
    arms: dict[str, list[ArmResult]]
    seconds: dict[str, float]
    machines: dict[str, str]
    seconds_in_all: float
    sample_reference: RealSet | None = None
    sampling: UnmaskingScheduler | None = None
    measure: MeasureConfig | None = None


@dataclass(frozen=True)
class Floor:
    """The FID that no decoder is asked to beat: that of so many training images against the held-out ones."""

    images: int
    rfid: float


@dataclass(frozen=True)
class ComparisonResults:
    """What `scq benchmark tokenizers` has found so far.

    Attributes:
        revision: git revision of the code.
        reference: the held-out images that are reconstructed.
        network: of the FID; None where nobody asked for it.
        arms: by title, one result for each seed.
        seconds, machines: of each phase, by name: how long it took, and on what.
    """

    title: str
    revision: str
    reference: RealSet
    arms: dict[str, list[ArmResult]]
    seconds: dict[str, float]
    machines: dict[str, str]
    network: NetworkUsed | None = None
    floor: Floor | None = None


def save_results(results: BenchmarkResults | ComparisonResults, path: Path) -> None:
    """Write results as JSON; numbers that nobody measured are left out."""
    write_json(path, to_plain(results), indent=2)


def load_results(schema: type[Schema], path: Path) -> Schema:
    """The results in a file that `save_results` wrote.

    Args:
        schema: BenchmarkResults or ComparisonResults.

    Raises:
        UserError: the file is not there or damaged, or a field is missing or of another shape; the message names it.
    """
    return from_plain(schema, read_json(path, "run the benchmark again, which reuses its phases"), str(path))
