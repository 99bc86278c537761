"""Which phases an arm consists of, and on what each depends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scq.engine.measurements import CodebookSummary, Reconstruction, SampleScores
from scq.evaluation.benchmark.config import MeasureConfig, Recipe, Recipes
from scq.evaluation.benchmark.phases import Job, Phase
from scq.evaluation.benchmark.results import (
    CODES,
    ArmResult,
    CodesResult,
    LikelihoodResult,
    PriorResult,
    RealImages,
    ReconstructionsResult,
    RefinerResult,
    Shards,
    SweptSettings,
    TokenizerResult,
    TokensResult,
    WayOfDecoding,
)
from scq.evaluation.benchmark.work import ArmWork, Lpips
from scq.evaluation.metrics.networks import FeatureNetwork
from scq.stage1_tokenizer.stage import TokenizerExperiment
from scq.stage2_prior.prior_stage import PriorExperiment
from scq.stage2_prior.refiner_stage import RefinerExperiment
from scq.stage2_prior.scheduler import UnmaskingScheduler


@dataclass(frozen=True)
class Yardstick:
    """What reconstructions are measured with.

    Attributes:
        real: the held-out images.
        network: for the FID; None leaves it out.
        lpips: None leaves it out.
    """

    real: Phase[RealImages]
    network: FeatureNetwork | None
    lpips: Lpips | None

    def inputs(self) -> dict[str, Any]:
        """As the inputs of a phase."""
        return {"real": self.real, "network": self.network, "lpips": self.lpips}


@dataclass(frozen=True)
class Shared:
    """What all arms share: the images, and what the arms are measured with.

    Attributes:
        train, held_out: the packed splits.
        real: the held-out images that reconstructions are measured against.
        against: the images that samples are measured against.
        neighbours: training images among which samples' nearest ones are looked for; None for none.
        lpips: None leaves it out.
    """

    train: Phase[Shards]
    held_out: Phase[Shards]
    real: Phase[RealImages]
    against: Phase[RealImages]
    neighbours: Phase[RealImages] | None
    network: FeatureNetwork
    lpips: Lpips | None
    sampling: UnmaskingScheduler
    measure: MeasureConfig

    @property
    def yardstick(self) -> Yardstick:
        """For reconstructions."""
        return Yardstick(self.real, self.network, self.lpips)

    def listed(self) -> list[Phase[Any]]:
        """The phases that come before those of any arm, in the order in which they run."""
        phases = dict.fromkeys((self.train, self.held_out, self.real, self.neighbours, self.against))
        return [phase for phase in phases if phase is not None]


@dataclass(frozen=True)
class RefinedPhases:
    """A refiner: trained, and what becomes of held-out images and of samples with it."""

    trained: Phase[RefinerResult]
    reconstruction: Phase[Reconstruction]
    samples: Phase[SampleScores]


@dataclass(frozen=True)
class PriorPhases:
    """A prior: its tokens, its training, and what it draws."""

    tokens: Phase[TokensResult]
    held_out_usage: Phase[CodebookSummary]
    trained: Phase[PriorResult]
    likelihood: Phase[LikelihoodResult]
    codes: Phase[CodesResult]
    samples: Phase[SampleScores]
    refined: dict[str, RefinedPhases] = field(default_factory=dict)
    sweep: dict[str, Phase[SweptSettings]] = field(default_factory=dict)


@dataclass(frozen=True)
class ArmPhases:
    """The phases of one quantizer with one seed; no prior where only reconstructions are asked for."""

    tokenizer: Phase[TokenizerResult]
    reconstructions: Phase[ReconstructionsResult]
    prior: PriorPhases | None = None

    def listed(self) -> list[Phase[Any]]:
        """All of them, in the order in which they run."""
        phases: list[Phase[Any]] = [self.tokenizer, self.reconstructions]
        if self.prior is not None:
            prior = self.prior
            phases += [prior.tokens, prior.held_out_usage, prior.trained, prior.likelihood, prior.codes, prior.samples]
            for refined in prior.refined.values():
                phases += [refined.trained, refined.reconstruction, refined.samples]
            phases += prior.sweep.values()
        return phases

    def result(self, job: Job) -> ArmResult:
        """What they found, once all of them ran."""
        tokenizer, reconstructions = job.found(self.tokenizer), job.found(self.reconstructions)
        if self.prior is None:
            return ArmResult(tokenizer, reconstructions)
        prior = self.prior
        samples = {CODES: WayOfDecoding(job.found(prior.samples))}
        for kind, refined in prior.refined.items():
            samples[kind] = WayOfDecoding(
                job.found(refined.samples), job.found(refined.trained), job.found(refined.reconstruction)
            )
        return ArmResult(
            tokenizer,
            reconstructions,
            tokens=job.found(prior.tokens),
            held_out_usage=job.found(prior.held_out_usage),
            prior=job.found(prior.trained),
            likelihood=job.found(prior.likelihood),
            samples=samples,
            sweep={settings: job.found(phase) for settings, phase in prior.sweep.items()},
        )


def tokenizer_phases(
    work: ArmWork,
    recipe: Recipe[TokenizerExperiment],
    train: Phase[Shards] | Shards,
    yardstick: Yardstick,
    weight_bits: Sequence[int] = (),
    scored: Phase[RealImages] | None = None,
) -> ArmPhases:
    """An arm without a prior: a tokenizer, and its reconstructions of held-out images.

    Args:
        weight_bits: see `evaluation.reconstructions.evaluate_reconstructions`.
        scored: held-out images on which every checkpoint's rFID is measured; None for no learning curve.
    """
    learned: dict[str, Any] = {"shards": train, "recipe": recipe}
    if scored is not None:
        learned |= {"scored": scored, "network": yardstick.network}
    tokenizer = Phase(f"{work.title} tokenizer", work.train_tokenizer, learned, TokenizerResult)
    measured = {"tokenizer": tokenizer, **yardstick.inputs(), "weight_bits": list(weight_bits)}
    reconstructions = Phase(f"{work.title} reconstructions", work.reconstruct, measured, ReconstructionsResult)
    return ArmPhases(tokenizer, reconstructions)


def arm_phases(work: ArmWork, recipes: Recipes, shared: Shared, first: bool, sweep: bool) -> ArmPhases:
    """An arm with one seed.

    Args:
        first: of the arm's seeds; rounded weights and other settings of sampling are measured with that one.
        sweep: measure those other settings.
    """
    bits = shared.measure.weight_bits if first else []
    arm = tokenizer_phases(work, recipes.tokenizer, shared.train, shared.yardstick, bits)
    if recipes.prior is None:
        return arm
    listing = _Listing(work, shared, arm.tokenizer)
    prior = listing.prior(recipes.prior)
    refined = {kind: listing.refined(kind, recipe, prior) for kind, recipe in recipes.refiners.items()}
    chosen = next((each.trained for each in refined.values()), None)
    settings = shared.measure.sweep if first and sweep else []
    swept = {each: listing.swept(each, prior.trained, chosen) for each in settings}
    return replace(arm, prior=replace(prior, refined=refined, sweep=swept))


@dataclass(frozen=True)
class _Listing:
    """What the phases behind an arm's tokenizer have in common."""

    work: ArmWork
    shared: Shared
    tokenizer: Phase[TokenizerResult]

    def prior(self, recipe: Recipe[PriorExperiment]) -> PriorPhases:
        work, shared, measure, tokenizer = self.work, self.shared, self.shared.measure, self.tokenizer
        written = {"tokenizer": tokenizer, "shards": shared.train}
        tokens = Phase(f"{work.title} tokens", work.write_tokens, written, TokensResult)
        counted = {"tokenizer": tokenizer, "shards": shared.held_out}
        usage = Phase(f"{work.title} codebook", work.count_codes, counted, CodebookSummary)
        learned = {"tokenizer": tokenizer, "tokens": tokens, "recipe": recipe}
        prior = Phase(f"{work.title} prior", work.train_prior, learned, PriorResult)
        bounded = {"prior": prior, "shards": shared.held_out, "count": measure.reference_images}
        likelihood = Phase(f"{work.title} likelihood", work.bound_likelihood, bounded, LikelihoodResult)
        drawn = {
            "prior": prior,
            # Codes are the same, whatever decodes them afterwards.
            "sampling": replace(shared.sampling, refine=True, refiner_steps=1),
            "count": measure.samples,
            "like": None if measure.samples else shared.real,
            "seed": measure.seed,
        }
        codes = Phase(f"{work.title} codes", work.draw_codes, drawn, CodesResult)
        decoded = {"prior": prior, "codes": codes, **self._of_samples()}
        samples = Phase(f"{work.title} samples", work.measure_samples, decoded, SampleScores)
        return PriorPhases(tokens, usage, prior, likelihood, codes, samples)

    def refined(self, kind: str, recipe: Recipe[RefinerExperiment], prior: PriorPhases) -> RefinedPhases:
        work, shared, name = self.work, self.shared, f"{self.work.title} {kind}"
        learned = {"tokenizer": self.tokenizer, "prior": prior.trained, "shards": shared.train, "recipe": recipe}
        refiner = Phase(f"{name} refiner", work.train_refiner, learned, RefinerResult)
        both = {"prior": prior.trained, "refiner": refiner}
        measured = {**both, **shared.yardstick.inputs(), "refiner_steps": shared.sampling.refiner_steps}
        reconstruction = Phase(f"{name} reconstructions", work.reconstruct_refined, measured, Reconstruction)
        decoded = {**both, "codes": prior.codes, **self._of_samples(), "sampling": shared.sampling}
        samples = Phase(f"{name} samples", work.measure_samples, decoded, SampleScores)
        return RefinedPhases(refiner, reconstruction, samples)

    def swept(
        self, settings: str, prior: Phase[PriorResult], refiner: Phase[RefinerResult] | None
    ) -> Phase[SweptSettings]:
        shared, measure = self.shared, self.shared.measure
        inputs = {
            "prior": prior,
            "refiner": refiner,
            "real": shared.against,
            "network": shared.network,
            "sampling": shared.sampling,
            "settings": settings,
            "count": measure.sweep_samples,
            "seed": measure.seed,
        }
        return Phase(f"{self.work.title} {settings}", self.work.measure_settings, inputs, SweptSettings)

    def _of_samples(self) -> dict[str, Any]:
        """What the measures of samples depend on, beside the samples."""
        shared = self.shared
        return {
            "real": shared.against,
            "network": shared.network,
            "neighbours": shared.neighbours,
            "pictured": shared.measure.pictured,
        }
