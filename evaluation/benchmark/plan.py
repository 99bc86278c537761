"""How long trainings may be, so that one arm of a benchmark fits a given time on this machine: ``scq benchmark plan``.

A pilot takes the first arm through every phase, with trainings of a hundred steps and a hundredth of the samples. What
it took says what the whole will take. All lengths in steps are then multiplied by one factor, the same for every arm,
so that the budgets of the arms stay equal. The pilot also finds what is missing before an hour is spent, and leaves
behind the real images' features and the compiled networks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from scq.engine.config import load_config, save_config
from scq.engine.errors import UserError
from scq.engine.files import make_folder, write_file, write_json
from scq.engine.tracking import read_metrics
from scq.evaluation.benchmark.config import BenchmarkConfig, load_benchmark
from scq.evaluation.benchmark.results import BenchmarkResults
from scq.evaluation.benchmark.run import run_benchmark
from scq.stage1_tokenizer.stage import TokenizerExperiment
from scq.stage2_prior.prior_stage import PriorExperiment
from scq.stage2_prior.refiner_stage import RefinerExperiment

Experiment = TypeVar("Experiment", TokenizerExperiment, PriorExperiment, RefinerExperiment)
Change = Callable[[Any], Any]  # of a training's config

PLANNED = "benchmark.yaml"
_WINDOWS = 6  # of logging in a pilot's training: the first one compiles, and the median of them is the pace
_LEAST_SAMPLES = 2500  # of a pilot: FID and KID need some
# What a training's config counts in steps, by its section. What overrides say is left as it is.
_LENGTHS: Mapping[str, Sequence[str]] = {
    "training": ("steps", "checkpoint_every", "images_every"),
    "optimizer": ("warmup_steps",),
    "loss": ("adversarial_start", "adversarial_ramp", "discriminator_lead"),
    "robustness": ("steps",),
}


@dataclass(frozen=True)
class Plan:
    """What a pilot found.

    Attributes:
        factor: by which all lengths in steps are multiplied.
        budget: seconds that one arm was given.
        fixed: predicted seconds of an arm's phases but for the steps of its trainings, by the phase's name.
        steps: predicted seconds of all steps of a training, by the phase's name.
    """

    factor: float
    budget: float
    fixed: dict[str, float]
    steps: dict[str, float]


def plan_benchmark(
    config_path: Path, out: Path, seconds: float, overrides: Sequence[str] = (), longest: float = math.inf
) -> Path:
    """Run a pilot, and write the configs of a benchmark whose every arm takes about ``seconds``.

    Args:
        out: the benchmark's folder: the pilot runs in ``pilot/``, the configs go to ``config/``, the plan to
            ``plan.json``. Configs that are there already are left alone.
        longest: times the lengths in the configs of the trainings, at most.

    Returns:
        the benchmark's config, for `run_benchmark`.

    Raises:
        UserError, DataError: as `run_benchmark`, or the time does not even suffice for what is not training.
    """
    planned = out / "config" / PLANNED
    if planned.is_file():
        return planned
    config = load_benchmark(config_path, list(overrides))
    pilot = pilot_of(config)
    shorter = write_configs(pilot, config_path.parent, out / "pilot" / "config", pilot_training)
    for shared in ("shards", "features"):
        make_folder(out / shared)
        if not (out / "pilot" / shared).exists():
            (out / "pilot" / shared).symlink_to(Path("..") / shared)
    _share_packed(out)
    found = run_benchmark(shorter, out / "pilot")
    plan = _plan(config, config_path.parent, found, out / "pilot", seconds, longest)
    write_json(out / "plan.json", vars(plan), indent=2)
    return write_configs(config, config_path.parent, out / "config", lambda training: scaled(training, plan.factor))


def scaled(training: Experiment, factor: float) -> Experiment:
    """A training whose every length in steps is ``factor`` times as large, and at least 1 where it was not 0."""
    changed = {}
    for section in fields(training):
        found = getattr(training, section.name)
        lengths = {name: getattr(found, name) for name in _LENGTHS.get(section.name, ()) if hasattr(found, name)}
        if lengths:
            longer = {name: max(1, round(factor * length)) if length else 0 for name, length in lengths.items()}
            changed[section.name] = replace(found, **longer)
    return replace(training, **changed)


def pilot_of(config: BenchmarkConfig) -> BenchmarkConfig:
    """The first arm alone with its first seed, without refiners, and with a twentieth of the samples."""
    name, arm = next(iter(config.arms.items()))
    samples = config.measure.samples
    return replace(
        config,
        title=f"{config.title} (pilot)",
        arms={name: replace(arm, seeds=1, refiners=[], sweep=False)},
        measure=replace(
            config.measure, samples=min(samples, max(_LEAST_SAMPLES, samples // 20)), sweep=[], weight_bits=[]
        ),
    )


def pilot_training(training: Experiment) -> Experiment:
    """A few windows of logging, with every loss switched on from the first step."""
    short = scaled(training, 1 / training.training.steps)
    steps = _WINDOWS * training.training.log_every
    short = replace(short, training=replace(short.training, steps=steps, checkpoint_every=steps, images_every=0))
    if isinstance(short, TokenizerExperiment):
        return replace(short, loss=replace(short.loss, adversarial_start=0, adversarial_ramp=0, discriminator_lead=0))
    return short


def write_configs(config: BenchmarkConfig, beside: Path, folder: Path, change: Change) -> Path:
    """Write a benchmark's config and those of its trainings, each changed by ``change``.

    Args:
        beside: the folder that the names of the trainings' configs are relative to.

    Returns:
        the benchmark's, which names the others.
    """
    make_folder(folder)

    def written(schema: type, file: str, name: str) -> str:
        if not file:
            return ""
        save_config(change(load_config(schema, beside / file)), folder / name)
        return name

    arms = {
        name: replace(arm, tokenizer=written(TokenizerExperiment, arm.tokenizer, f"tokenizer_{name}.yaml"))
        for name, arm in config.arms.items()
    }
    changed = replace(
        config,
        tokenizer=written(TokenizerExperiment, config.tokenizer, "tokenizer.yaml"),
        prior=written(PriorExperiment, config.prior, "prior.yaml"),
        refiner=written(RefinerExperiment, config.refiner, "refiner.yaml"),
        arms=arms,
    )
    save_config(changed, folder / PLANNED)
    return folder / PLANNED


def _share_packed(out: Path) -> None:
    """Let the pilot know the images that are packed already: where a bundle brought them, their source is not there."""
    for phase in (out / "phases").glob("pack_*.json"):
        write_file(out / "pilot" / "phases" / phase.name, phase.read_bytes())


def _plan(
    config: BenchmarkConfig, beside: Path, pilot: BenchmarkResults, folder: Path, seconds: float, longest: float
) -> Plan:
    name = next(iter(config.arms))
    taken = {phase.removeprefix(f"{name} "): s for phase, s in pilot.seconds.items() if phase.startswith(f"{name} ")}
    wanted = config.measure.samples or pilot.reference.count
    more = wanted / pilot.arms[name][0].samples["codes"].scores.count
    fixed = {phase: s * (more if phase in ("codes", "samples") else 1) for phase, s in taken.items()}
    steps = {}
    for phase, schema, file in (
        ("tokenizer", TokenizerExperiment, config.arms[name].tokenizer or config.tokenizer),
        ("prior", PriorExperiment, config.prior),
    ):
        whole = load_config(schema, beside / file).training
        log = read_metrics(folder / "arms" / name / phase)
        pace = statistics.median(row["images_per_second"] for row in log)
        piloted = log[-1]["step"] * whole.batch_size / pace
        fixed[phase] = max(0.0, taken[phase] - piloted)
        steps[phase] = whole.steps * whole.batch_size / pace
    factor = min(longest, (seconds - sum(fixed.values())) / sum(steps.values()))
    if factor <= 0:
        raise UserError(
            f"{seconds:.0f} seconds for an arm do not suffice: what is not training takes {sum(fixed.values()):.0f} "
            "seconds here. Give more, or measure less (measure.samples)"
        )
    return Plan(factor, seconds, fixed, {phase: factor * each for phase, each in steps.items()})
