"""Arms of one experiment through both stages with everything shared but the quantizer: ``scq quickstart`` and
``scq benchmark quality``.

images -> shards -> tokenizers -> token shards -> priors, refiners -> samples -> FID, KID and the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scq.engine.config import CONFIG_ROOT, git_revision
from scq.engine.measurements import Measured, TrainedFor, TrainingFacts
from scq.engine.progress import say
from scq.evaluation.benchmark.arm import ArmPhases, Shared, arm_phases
from scq.evaluation.benchmark.config import BenchmarkConfig, DatasetConfig, load_benchmark, load_recipes
from scq.evaluation.benchmark.images import Images
from scq.evaluation.benchmark.phases import Job, Phase
from scq.evaluation.benchmark.plots import PICTURES
from scq.evaluation.benchmark.report import write_report
from scq.evaluation.benchmark.results import (
    CODES,
    ArmResult,
    BenchmarkResults,
    PriorResult,
    RealImages,
    RefinerResult,
    Shards,
    TokenizerResult,
    save_results,
)
from scq.evaluation.benchmark.work import ArmWork, Lpips
from scq.evaluation.metrics.inception import load_inception
from scq.evaluation.metrics.networks import FeatureNetwork
from scq.evaluation.samples import describe
from scq.sampling.pipeline import SoftConvexPipeline


@dataclass(frozen=True)
class Benchmark:
    """Every phase of a benchmark: those that all arms share, then each arm's, once for every seed, by the arm's name.

    One seed of every arm comes before the second of any: whoever stops early has a whole comparison.
    """

    shared: Shared
    arms: list[tuple[str, ArmPhases]]

    def listed(self) -> list[Phase[Any]]:
        """In the order in which they run."""
        return self.shared.listed() + [phase for _, arm in self.arms for phase in arm.listed()]


def quickstart(out: Path | str) -> BenchmarkResults:
    """The whole main job on emoji; see configs/quickstart."""
    return run_benchmark(CONFIG_ROOT / "quickstart" / "benchmark.yaml", out, results_name="metrics.json")


def run_benchmark(
    config_path: Path, out: Path | str, overrides: Sequence[str] = (), results_name: str = "results.json"
) -> BenchmarkResults:
    """Run, or go on with, an experiment; write its results, report.md, its pictures and ``model/`` to ``out``.

    All of these are written anew after each arm and each seed.

    Raises:
        UserError, DataError: a config, the data or an earlier run in ``out`` does not fit.
    """
    config, out = load_benchmark(config_path, list(overrides)), Path(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_inception(config.measure.inception_weights or None, device)
    say(f"Inception: {network.description}")
    benchmark = list_phases(config, config_path.parent, out, network, device)
    job = Job(benchmark.listed(), out / "phases")
    for phase in benchmark.shared.listed():
        job.run(phase)
    arms: dict[str, list[ArmResult]] = {}
    results = _results(config, benchmark.shared, job, arms)
    for name, arm in benchmark.arms:
        for phase in arm.listed():
            job.run(phase)
        arms.setdefault(name, []).append(arm.result(job))
        results = _results(config, benchmark.shared, job, arms)
        _export_model(config, results, out)
        save_results(results, out / results_name)
        write_report(results, out)
    return results


def list_phases(
    config: BenchmarkConfig, beside: Path, out: Path, network: FeatureNetwork, device: str = "cpu"
) -> Benchmark:
    """Every phase of a benchmark, before the first of them runs. Nothing is read but the configs of its trainings.

    Args:
        beside: the folder that these configs are relative to.
        out: the benchmark's folder.
        network: the Inception network.
        device: for what is measured.

    Raises:
        UserError: a training's config is missing or unfit.
    """
    images = benchmark_images(out)
    shared = _shared_phases(config, images, network, device)
    arms = []
    for seed in range(max(each.seeds for each in config.arms.values())):
        for name, each in config.arms.items():
            if seed < each.seeds:
                title = f"{name}_seed{seed}" if seed else name
                work = ArmWork(title, out / "arms" / title, out / PICTURES / title, images, device)
                recipes = load_recipes(config, beside, each, seed)
                arms.append((name, arm_phases(work, recipes, shared, first=seed == 0, sweep=each.sweep)))
    return Benchmark(shared, arms)


def _shared_phases(config: BenchmarkConfig, images: Images, network: FeatureNetwork, device: str) -> Shared:
    measure = config.measure
    train, held_out = pack_phases(config.dataset, images)

    def features(name: str, shards: Phase[Shards], count: int) -> Phase[RealImages]:
        return Phase(name, images.describe, {"shards": shards, "count": count, "network": network}, RealImages)

    real = against = features("features of the held-out images", held_out, measure.reference_images)
    if measure.sample_reference == "train":
        name = "features that samples are measured against"
        against = features(name, train, measure.sample_reference_images)
    neighbours = None
    if measure.neighbours:
        neighbours = features("features of training images", train, measure.neighbours)
    lpips = Lpips(measure.lpips_weights, device) if measure.lpips_weights else None
    return Shared(train, held_out, real, against, neighbours, network, lpips, config.sampling, measure)


def pack_phases(dataset: DatasetConfig, images: Images) -> tuple[Phase[Shards], Phase[Shards]]:
    """The phases that pack the training images and the held-out ones."""
    kind = {"format": dataset.format, "size": dataset.size, "crop": dataset.crop, "encoding": dataset.encoding}

    def pack(name: str, split: str, source: str, dataset_split: str) -> Phase[Shards]:
        inputs = {"split": split, "source": source, **kind, "dataset_split": dataset_split}
        return Phase(name, images.pack, inputs, Shards)

    train = pack("pack training images", "train", dataset.source, dataset.train_split)
    return train, pack("pack held-out images", "test", dataset.test_source or dataset.source, dataset.test_split)


def benchmark_images(out: Path) -> Images:
    """The images of the benchmark in the folder ``out``."""
    return Images({"train": out / "shards" / "train", "test": out / "shards" / "test"}, out / "features")


def _results(config: BenchmarkConfig, shared: Shared, job: Job, arms: dict[str, list[ArmResult]]) -> BenchmarkResults:
    measure = config.measure
    names = {name: Path(getattr(measure, name)).name for name in ("lpips_weights", "inception_weights")}
    return BenchmarkResults(
        title=config.title,
        revision=git_revision(),
        reference=job.found(shared.real).images,
        sample_reference=job.found(shared.against).images,
        network=describe(shared.network),
        sampling=config.sampling,
        measure=replace(measure, **names),
        arms=arms,
        seconds=dict(job.seconds),
        machines=dict(job.machines),
        seconds_in_all=round(sum(job.seconds.values()), 1),
    )


def _export_model(config: BenchmarkConfig, results: BenchmarkResults, out: Path) -> None:
    """Write the first arm's model, with its numbers on its card."""
    first, arm = next(iter(config.arms.items()))
    way = arm.refiners[0] if arm.refiners else CODES
    model = out / "arms" / first / ("prior" if way == CODES else f"refiner_{way}") / "model"
    if model.is_dir():  # not where this job goes on with the phases of another machine
        pipeline = SoftConvexPipeline.from_pretrained(model, scheduler=config.sampling)
        pipeline.measured = measured_of(results, results.arms[first][0], way)
        pipeline.save_pretrained(out / "model")


def measured_of(results: BenchmarkResults, arm: ArmResult, way: str) -> Measured:
    """What is known of an arm's model, its codes decoded in one way, as its card shows it."""

    def trained(network: TokenizerResult | PriorResult | RefinerResult | None) -> TrainedFor | None:
        return None if network is None else TrainedFor(network.steps, network.images_seen)

    return Measured(
        training=TrainingFacts(
            dataset=results.reference.dataset,
            revision=results.revision,
            tokenizer=trained(arm.tokenizer),
            prior=trained(arm.prior),
            refiner=trained(arm.samples[way].refiner),
        ),
        reference=results.reference,
        sample_reference=results.sample_reference,
        network=results.network,
        reconstruction={name: arm.reconstructions.ways[name] for name in ("z_q", "dominant")},
        codebook=arm.held_out_usage,
        samples=arm.samples[way].scores,
    )
