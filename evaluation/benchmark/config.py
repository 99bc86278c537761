"""What a benchmark is asked for: its data, its arms, what they share, and how much is measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from scq.engine.config import load_config
from scq.engine.errors import UserError
from scq.stage1_tokenizer.stage import ScoreConfig, TokenizerExperiment
from scq.stage2_prior.prior_stage import PriorExperiment
from scq.stage2_prior.refiner_stage import RefinerExperiment
from scq.stage2_prior.scheduler import UnmaskingScheduler

Experiment = TypeVar("Experiment", TokenizerExperiment, PriorExperiment, RefinerExperiment)


@dataclass
class DatasetConfig:
    """What is packed into shards before anything else."""

    source: str = "twemoji"
    test_source: str = ""  # where the held-out split lies elsewhere, as LSUN's does
    format: str = "emoji"
    size: int = 32
    crop: str = ""  # empty: the format's own protocol
    encoding: str = "png"  # png | webp, which takes a fifth less room; both are lossless
    train_split: str = "train"
    test_split: str = "test"


@dataclass
class MeasureConfig:
    """How much is measured."""

    reference_images: int = 0  # held-out images, for reconstructions and as FID's real set; 0 for the whole split
    sample_reference: str = "test"  # test | train: the split whose images samples are measured against
    sample_reference_images: int = 0  # of the training split; 0 for all of it
    samples: int = 0  # generated images; 0 for as many as the reference
    pictured: int = 64  # samples in the picture
    seed: int = 0
    sweep: list[str] = field(default_factory=list)  # further settings of sampling, each as "steps=8 sampler=halton"
    sweep_samples: int = 1000  # generated images for each of those
    # Soft latents of the first seed with weights of so many bits, and their rate.
    weight_bits: list[int] = field(default_factory=list)
    # VGG16's weights for LPIPS; empty leaves LPIPS out. Trainings use them, too, where their config names none.
    lpips_weights: str = ""
    inception_weights: str = ""  # file of FID Inception weights; empty: the first one found
    # Training images among which samples' nearest neighbours are looked for, and against which their FID is measured,
    # too; 0 for none.
    neighbours: int = 0


@dataclass
class ArmConfig:
    """What makes an arm differ from the others."""

    tokenizer: str = ""  # its config file, relative to the benchmark's; empty: the benchmark's tokenizer
    overrides: list[str] = field(default_factory=list)  # of the tokenizer's config
    seeds: int = 1
    prior: bool = True  # False: reconstructions only
    # Kinds of refiners: regression, flow. The first is the arm's own, trained with the first seeds; others with one.
    refiners: list[str] = field(default_factory=list)
    refiner_seeds: int = 0  # how many seeds that is; 0 for all
    sweep: bool = False  # measure the benchmark's further settings of sampling, with the first seed

    def refiners_of(self, seed: int) -> list[str]:
        """The kinds of refiners that are trained with the seed of this number."""
        if seed == 0:
            return self.refiners
        return self.refiners[:1] if seed < (self.refiner_seeds or self.seeds) else []


@dataclass
class BenchmarkConfig:
    """An experiment with several arms; config files are relative to this one.

    The first arm is the one that is exported, with its first refiner.
    """

    title: str = ""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    tokenizer: str = ""
    prior: str = ""
    refiner: str = ""
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    sampling: UnmaskingScheduler = field(default_factory=UnmaskingScheduler)
    measure: MeasureConfig = field(default_factory=MeasureConfig)


def load_benchmark(path: Path, overrides: list[str] | None = None) -> BenchmarkConfig:
    """The benchmark in a YAML file.

    Raises:
        UserError: the file is unfit, it names no arm or no prior, or its first arm cannot be exported.
    """
    config = load_config(BenchmarkConfig, path, overrides)
    if not config.arms or not config.prior:
        raise UserError(f"{path} names no arms, or no prior")
    if not next(iter(config.arms.values())).prior:
        raise UserError(f"the first arm of {path} is exported, so it needs a prior: move it down")
    if config.measure.sample_reference not in ("test", "train"):
        raise UserError(f"measure.sample_reference is {config.measure.sample_reference!r}; it must be test or train")
    return config


# Settings that came after results which are kept, each with the value that trains as it was done before: with that
# value they do not count, and the kept phases stay what they are.
_LATER_SETTINGS: dict[str, dict[str, Any]] = {
    "optimizer": {"name": "adamw"},
    "loss": {
        "perceptual_start": 0,
        "perceptual_stages": 5,
        "perceptual_share": 1.0,
        "discriminator": "patch",
        "discriminator_rate": 1.0,
        "discriminator_betas": [],
    },
}


@dataclass(frozen=True)
class Recipe(Generic[Experiment]):
    """A training's config as the input of a phase: it stands for all that decides the weights.

    Attributes:
        config: whose run folder and data are still to be named.
    """

    config: Experiment

    def shifted(self, seed: int) -> Recipe[Experiment]:
        """The same training with a seed that is larger by ``seed``."""
        training = self.config.training
        return Recipe(replace(self.config, training=replace(training, seed=training.seed + seed)))

    @property
    def identity(self) -> dict[str, Any]:
        """The config without what only says where on this disk something lies, who reads it, or which checkpoint is the
        best: a benchmark takes the last one."""
        settings = asdict(self._of_the_training())
        for section, later in _LATER_SETTINGS.items():
            here = settings.get(section, {})
            for name in [name for name, before in later.items() if name in here and here[name] == before]:
                del here[name]
        return settings

    def _of_the_training(self) -> Experiment:
        config = self.config
        nowhere: dict[str, Any] = {"train": "", "validation": ""}
        if isinstance(config, PriorExperiment):
            return replace(config, out="", tokenizer="", data=replace(config.data, **nowhere))
        data = replace(config.data, **nowhere, cache="", workers=0, max_bad=0.0)
        if isinstance(config, RefinerExperiment):
            return replace(config, out="", tokenizer="", prior="", data=data)
        loss = replace(config.loss, perceptual_weights="")
        return replace(config, out="", data=data, loss=loss, score=ScoreConfig())


@dataclass(frozen=True)
class Recipes:
    """The trainings of one arm with one seed; no prior where only reconstructions are asked for."""

    tokenizer: Recipe[TokenizerExperiment]
    prior: Recipe[PriorExperiment] | None
    refiners: dict[str, Recipe[RefinerExperiment]]


def load_recipes(config: BenchmarkConfig, beside: Path, arm: ArmConfig, seed: int = 0) -> Recipes:
    """The trainings of an arm, all of whose seeds are shifted alike.

    Args:
        beside: the folder that config files are relative to.
        seed: number of the arm's seed, from 0.

    Raises:
        UserError: a config is missing or unfit.
    """

    def load(schema: type[Experiment], file: str, overrides: list[str] | None = None) -> Recipe[Experiment]:
        return Recipe(load_config(schema, beside / file, overrides)).shifted(seed)

    kinds = arm.refiners_of(seed)
    return Recipes(
        tokenizer=load_tokenizer_recipe(
            beside / (arm.tokenizer or config.tokenizer), arm.overrides, config.measure.lpips_weights, seed
        ),
        prior=load(PriorExperiment, config.prior) if arm.prior else None,
        refiners={kind: load(RefinerExperiment, config.refiner, [f"architecture.kind={kind}"]) for kind in kinds},
    )


def load_tokenizer_recipe(
    file: Path, overrides: list[str], lpips_weights: str, seed: int
) -> Recipe[TokenizerExperiment]:
    """A tokenizer's training, its seed shifted; VGG16's weights are those of the measure where its loss names none.

    Raises:
        UserError: the config is missing or unfit.
    """
    config = load_config(TokenizerExperiment, file, overrides)
    if not config.loss.perceptual_weights:  # it is the same network
        config = replace(config, loss=replace(config.loss, perceptual_weights=lpips_weights))
    return Recipe(config).shifted(seed)
