"""Which phases an arm consists of, and on what each depends."""

from __future__ import annotations

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
class Shared:
    """What all arms share: the images, and what the arms are measured with.

    Attributes:
        train, held_out: the packed splits.
        real: the held-out images that reconstructions are measured against.
        against: the images that samples are measured against.
        neighbours: training images among which samples' nearest ones are looked for; None for none.
        lpips: None to leave it out.
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
    name: str,
    work: ArmWork,
    recipe: Recipe[TokenizerExperiment],
    train: Phase[Shards] | Shards,
    real: Phase[RealImages] | RealImages,
    network: FeatureNetwork | None,
    lpips: Lpips | None,
    weight_bits: list[int],
) -> ArmPhases:
    """An arm without a prior: a tokenizer, and its reconstructions of held-out images.

    Args:
        real: the held-out images.
        network: for the FID; None to leave it out.
        lpips: None to leave it out.
        weight_bits: see `evaluation.reconstructions.evaluate_reconstructions`.
    """
    tokenizer = Phase(f"{name} tokenizer", work.train_tokenizer, {"shards": train, "recipe": recipe}, TokenizerResult)
    measured = {"real": real, "network": network, "lpips": lpips, "weight_bits": weight_bits}
    reconstructions = Phase(
        f"{name} reconstructions", work.reconstruct, {"tokenizer": tokenizer, **measured}, ReconstructionsResult
    )
    return ArmPhases(tokenizer, reconstructions)


def arm_phases(name: str, work: ArmWork, recipes: Recipes, shared: Shared, first: bool, sweep: bool) -> ArmPhases:
    """An arm with one seed.

    Args:
        name: what its phases begin with.
        first: of the arm's seeds; rounded weights and other settings of sampling are measured with that one.
        sweep: measure those other settings.
    """
    bits = shared.measure.weight_bits if first else []
    network, lpips = shared.network, shared.lpips
    arm = tokenizer_phases(name, work, recipes.tokenizer, shared.train, shared.real, network, lpips, bits)
    if recipes.prior is None:
        return arm
    prior = _prior_phases(name, work, recipes.prior, arm.tokenizer, shared)
    refined = {
        kind: _refined_phases(f"{name} {kind}", work, recipe, arm.tokenizer, prior, shared)
        for kind, recipe in recipes.refiners.items()
    }
    chosen = next((each.trained for each in refined.values()), None)
    swept = {
        settings: _sweep_phase(f"{name} {settings}", work, settings, prior.trained, chosen, shared)
        for settings in (shared.measure.sweep if first and sweep else [])
    }
    return replace(arm, prior=replace(prior, refined=refined, sweep=swept))


def _prior_phases(
    name: str, work: ArmWork, recipe: Recipe[PriorExperiment], tokenizer: Phase[TokenizerResult], shared: Shared
) -> PriorPhases:
    measure = shared.measure
    tokens = Phase(f"{name} tokens", work.write_tokens, {"tokenizer": tokenizer, "shards": shared.train}, TokensResult)
    usage = Phase(
        f"{name} codebook", work.count_codes, {"tokenizer": tokenizer, "shards": shared.held_out}, CodebookSummary
    )
    prior = Phase(
        f"{name} prior", work.train_prior, {"tokenizer": tokenizer, "tokens": tokens, "recipe": recipe}, PriorResult
    )
    likelihood = Phase(
        f"{name} likelihood",
        work.bound_likelihood,
        {"prior": prior, "shards": shared.held_out, "count": measure.reference_images},
        LikelihoodResult,
    )
    codes = Phase(
        f"{name} codes",
        work.draw_codes,
        {
            "prior": prior,
            # Codes are the same, whatever decodes them afterwards.
            "sampling": replace(shared.sampling, refine=True, refiner_steps=1),
            "count": measure.samples,
            "like": None if measure.samples else shared.real,
            "seed": measure.seed,
        },
        CodesResult,
    )
    samples = Phase(
        f"{name} samples",
        work.measure_samples,
        {"prior": prior, "codes": codes, **_of_samples(shared)},
        SampleScores,
    )
    return PriorPhases(tokens, usage, prior, likelihood, codes, samples)


def _refined_phases(
    name: str,
    work: ArmWork,
    recipe: Recipe[RefinerExperiment],
    tokenizer: Phase[TokenizerResult],
    prior: PriorPhases,
    shared: Shared,
) -> RefinedPhases:
    trained = Phase(
        f"{name} refiner",
        work.train_refiner,
        {"tokenizer": tokenizer, "prior": prior.trained, "shards": shared.train, "recipe": recipe},
        RefinerResult,
    )
    refined = {"prior": prior.trained, "refiner": trained}
    reconstruction = Phase(
        f"{name} reconstructions",
        work.reconstruct_refined,
        {
            **refined,
            "real": shared.real,
            "network": shared.network,
            "lpips": shared.lpips,
            "refiner_steps": shared.sampling.refiner_steps,
        },
        Reconstruction,
    )
    samples = Phase(
        f"{name} samples",
        work.measure_samples,
        {**refined, "codes": prior.codes, **_of_samples(shared), "sampling": shared.sampling},
        SampleScores,
    )
    return RefinedPhases(trained, reconstruction, samples)


def _of_samples(shared: Shared) -> dict[str, Any]:
    """What the measures of samples depend on, beside the samples."""
    return {
        "real": shared.against,
        "network": shared.network,
        "neighbours": shared.neighbours,
        "pictured": shared.measure.pictured,
    }


def _sweep_phase(
    name: str,
    work: ArmWork,
    settings: str,
    prior: Phase[PriorResult],
    refiner: Phase[RefinerResult] | None,
    shared: Shared,
) -> Phase[SweptSettings]:
    inputs = {
        "prior": prior,
        "refiner": refiner,
        "real": shared.against,
        "network": shared.network,
        "sampling": shared.sampling,
        "settings": settings,
        "count": shared.measure.sweep_samples,
        "seed": shared.measure.seed,
    }
    return Phase(name, work.measure_settings, inputs, SweptSettings)
