"""Arms of one experiment through both stages with everything shared but the quantizer: ``scq quickstart`` and
``scq benchmark quality``.

images -> shards -> tokenizers -> token shards -> priors, refiners -> samples -> FID, KID and the report.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scq.data import pack as packing
from scq.engine.config import CONFIG_ROOT, as_dict, git_revision, load_config
from scq.engine.errors import UserError
from scq.engine.files import write_file
from scq.engine.progress import progress_bar, say
from scq.evaluation.benchmark.arm import CODES, Arm, SampleBudget
from scq.evaluation.benchmark.phases import Phases
from scq.evaluation.benchmark.plots import PICTURES
from scq.evaluation.benchmark.report import write_report
from scq.evaluation.benchmark.tokenizers import Yardsticks
from scq.evaluation.evaluate import Reference
from scq.evaluation.metrics.features import FeatureSet
from scq.evaluation.metrics.inception import InceptionFeatures, load_inception
from scq.sampling.pipeline import SoftConvexPipeline
from scq.sampling.scheduler import UnmaskingScheduler
from scq.stage1_tokenizer.train import TokenizerExperiment
from scq.stage2_prior.train import PriorExperiment
from scq.stage2_prior.train_refiner import RefinerExperiment


@dataclass
class DatasetConfig:
    """What is packed into shards before anything else."""

    source: str = "twemoji"
    test_source: str = ""  # where the held-out split lies elsewhere, as LSUN's does
    format: str = "emoji"
    size: int = 32
    crop: str = ""  # empty: the format's own protocol
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
    lpips_weights: str = ""  # VGG16's weights for LPIPS; empty leaves LPIPS out
    inception_weights: str = ""  # file of FID Inception weights; empty: the first one found
    neighbours: int = 0  # training images among which samples' nearest neighbours are looked for; 0 for none


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


def quickstart(out: Path | str) -> dict[str, Any]:
    """The whole main job on emoji; see configs/quickstart."""
    return run_benchmark(CONFIG_ROOT / "quickstart" / "benchmark.yaml", out, results_name="metrics.json")


def run_benchmark(
    config_path: Path, out: Path | str, overrides: list[str] | None = None, results_name: str = "results.json"
) -> dict[str, Any]:
    """Run, or go on with, an experiment; write its results, report.md, its pictures and ``model/`` to ``out``.

    Raises:
        UserError, DataError: a config, the data or an earlier run in ``out`` does not fit.
    """
    config = load_config(BenchmarkConfig, config_path, overrides)
    if not config.arms or not config.prior:
        raise UserError(f"{config_path} names no arms, or no prior")
    if not next(iter(config.arms.values())).prior:
        raise UserError(f"the first arm of {config_path} is exported, so it needs a prior: move it down")
    if config.measure.sample_reference not in ("test", "train"):
        raise UserError(f"measure.sample_reference is {config.measure.sample_reference!r}; it must be test or train")
    out = Path(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_inception(config.measure.inception_weights or None, device)
    say(f"Inception: {network.description}")
    phases = Phases(out / "phases", total=0)
    shards = {"train": out / "shards" / "train", "test": out / "shards" / "test"}
    phases.total = (
        2
        + bool(config.measure.neighbours)
        + (config.measure.sample_reference == "train")
        + sum(_count_phases(each, config) for each in config.arms.values())
    )
    phases.run("pack", as_dict(config.dataset), lambda: _pack(config.dataset, shards))
    reference = Reference(shards["test"], config.measure.reference_images)
    real = _features(phases, "features of the held-out images", reference, network, out / "reference.safetensors")
    training_set = None
    if config.measure.neighbours:
        known = Reference(shards["train"], config.measure.neighbours)
        training_set = _features(phases, "features of training images", known, network, out / "training.safetensors")
    drawn_against, against = reference, real
    if config.measure.sample_reference == "train":
        drawn_against = Reference(shards["train"], config.measure.sample_reference_images)
        name, cache = "features that samples are measured against", out / "sample_reference.safetensors"
        against = _features(phases, name, drawn_against, network, cache)
    measure = config.measure
    yardsticks = Yardsticks(reference, network, real, measure.lpips_weights, measure.weight_bits, device)
    results = {
        "title": config.title,
        "revision": git_revision(),
        "reference": vars(reference.description),
        "sample_reference": vars(drawn_against.description),
        "network": {"weights": network.description, "fingerprint": network.fingerprint, "protocol": network.protocol},
        "sampling": as_dict(config.sampling),
        "measure": {
            **as_dict(measure),  # names, no places of this disk
            "lpips_weights": Path(measure.lpips_weights).name,
            "inception_weights": Path(measure.inception_weights).name,
        },
        "arms": {},
    }
    # One seed of every arm before the second of any: whoever stops early has a whole comparison.
    for seed in range(max(each.seeds for each in config.arms.values())):
        for name, each in config.arms.items():
            if seed < each.seeds:
                by = yardsticks.without_rounded_weights() if seed else yardsticks
                arm = _arm(config, config_path, out, name, each, seed, by, shards, training_set, drawn_against)
                results["arms"].setdefault(name, []).append(arm.run(phases, network, against))
                results |= {"seconds": phases.seconds, "seconds_in_all": round(sum(phases.seconds.values()), 1)}
                results["machines"] = phases.machines
                _write(results, config, out, results_name)
    return results


def _write(results: dict[str, Any], config: BenchmarkConfig, out: Path, results_name: str) -> None:
    """What is known so far: the first arm's model, the numbers, and the report."""
    first, each = next(iter(config.arms.items()))
    model = out / "arms" / first / (f"model_{each.refiners[0]}" if each.refiners else "model")
    if model.is_dir():  # not where this job goes on with the phases of another machine
        pipeline = SoftConvexPipeline.from_pretrained(model)
        way = each.refiners[0] if each.refiners else CODES
        pipeline.measured = _measured(results, results["arms"][first][0], way)
        pipeline.save_pretrained(out / "model")
    write_file(out / results_name, json.dumps(results, indent=2) + "\n")
    write_report(results, out)


def _measured(results: dict[str, Any], run: dict[str, Any], way: str) -> dict[str, Any]:
    """The exported model's numbers as `evaluation.evaluate.evaluate` returns them."""
    return {
        "reference": results["reference"],
        "sample_reference": results["sample_reference"],
        "network": results["network"],
        "reconstruction": {name: run["tokenizer"][name] for name in ("z_q", "dominant")},
        "codebook": run["codebook"]["held_out"],
        "samples": run["samples"][way],
        "training": {
            "dataset": results["reference"]["dataset"],
            "revision": results["revision"],
            **{
                stage: {"steps": found["steps"], "images_seen": found["images_seen"]}
                for stage, found in (
                    ("tokenizer", run["tokenizer"]),
                    ("prior", run["prior"]),
                    ("refiner", run["samples"][way].get("refiner")),
                )
                if found is not None
            },
        },
    }


def _count_phases(each: ArmConfig, config: BenchmarkConfig) -> int:
    if not each.prior:
        return each.seeds
    refined = sum(len(_refiners(each, seed)) for seed in range(each.seeds))
    return 4 * each.seeds + 3 * refined + (len(config.measure.sweep) if each.sweep else 0)


def _refiners(each: ArmConfig, seed: int) -> list[str]:
    if seed == 0:
        return each.refiners
    return each.refiners[:1] if seed < (each.refiner_seeds or each.seeds) else []


def _pack(dataset: DatasetConfig, folders: dict[str, Path]) -> dict[str, Any]:
    counts = {}
    for part, split in (("train", dataset.train_split), ("test", dataset.test_split)):
        with progress_bar(f"pack {dataset.format} {split}") as bar:
            manifest = packing.pack(
                (part == "test" and dataset.test_source) or dataset.source,
                folders[part],
                format=dataset.format,
                size=dataset.size,
                crop=dataset.crop or None,
                split=split,
                progress=bar,
            )
        counts[part] = manifest["num_images"]
    return counts


def _features(phases: Phases, name: str, images: Reference, network: InceptionFeatures, cache: Path) -> FeatureSet:
    def work() -> dict[str, Any]:
        with progress_bar(name) as bar:
            images.features(network, cache, bar)
        return {}

    phases.run(name, [vars(images.description), network.fingerprint], work)
    return images.features(network, cache)


def _arm(
    config: BenchmarkConfig,
    config_path: Path,
    out: Path,
    name: str,
    each: ArmConfig,
    seed: int,
    yardsticks: Yardsticks,
    shards: dict[str, Path],
    training_set: FeatureSet | None,
    drawn_against: Reference,
) -> Arm:
    """One arm with one seed; all its experiments shift their seeds alike."""
    beside = config_path.parent
    tokenizer = load_config(TokenizerExperiment, beside / (each.tokenizer or config.tokenizer), each.overrides)
    prior = load_config(PriorExperiment, beside / config.prior) if each.prior else None
    refiners = {kind: load_config(RefinerExperiment, beside / config.refiner) for kind in _refiners(each, seed)}
    for experiment in (tokenizer, prior, *refiners.values()):
        if experiment is not None:
            experiment.training.seed += seed
    measure = config.measure
    samples = SampleBudget(
        count=measure.samples or yardsticks.reference.count,
        pictured=measure.pictured,
        seed=measure.seed,
        sweep=measure.sweep if each.sweep and not seed else [],
        sweep_count=measure.sweep_samples,
        scheduler=config.sampling,
        against=vars(drawn_against.description),
    )
    title = f"{name}_seed{seed}" if seed else name
    return Arm(
        title, out / "arms" / title, out / PICTURES / title, tokenizer, prior, refiners, yardsticks, samples, shards,
        training_set,
    )  # fmt: skip
