"""Arms of one experiment through both stages with everything shared but the quantizer: ``scq quickstart``.

images -> shards -> tokenizers -> token shards -> priors -> samples -> FID, KID and the report.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import pack as packing
from data.stream import iterate_once
from engine.config import CONFIG_ROOT, as_dict, git_revision, load_config, write_atomically
from engine.errors import UserError
from engine.progress import progress_bar, say
from evaluation.evaluate import Reference, evaluate_codebook, evaluate_reconstructions, evaluate_samples
from evaluation.inception import load_inception
from evaluation.metrics import codebook_usage
from evaluation.phases import Phases
from evaluation.report import save_images, write_report
from sampling.pipeline import SamplingConfig, SoftConvexPipeline
from stage1_tokenizer.autoencoder import to_float, to_uint8
from stage1_tokenizer.train import TokenizerExperiment, load_tokenizer, train_tokenizer
from stage1_tokenizer.write_tokens import write_tokens
from stage2_prior.train import PriorExperiment, train_prior


@dataclass
class DatasetConfig:
    """What is packed into shards before anything else."""

    source: str = "twemoji"
    format: str = "emoji"
    size: int = 32
    crop: str = ""  # empty: the format's own protocol
    train_split: str = "train"
    test_split: str = "test"


@dataclass
class MeasureConfig:
    """How much is measured."""

    reference_images: int = 0  # held-out images, for reconstructions and as FID's real set; 0 for the whole split
    samples: int = 0  # generated images; 0 for as many as the reference
    pictured: int = 64  # samples in the picture
    seed: int = 0


@dataclass
class BenchmarkConfig:
    """An experiment with several arms.

    ``arms`` maps a plain name to the tokenizer's config file, ``prior`` is the prior's; both relative to this file.
    The first arm is the one that is exported.
    """

    title: str = ""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    arms: dict[str, str] = field(default_factory=dict)
    prior: str = ""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)


PHASES_PER_ARM = 5
PICTURED_RECONSTRUCTIONS = 12


def quickstart(out: Path | str) -> dict[str, Any]:
    """The whole main job on emoji; see configs/quickstart."""
    return run_benchmark(CONFIG_ROOT / "quickstart" / "benchmark.yaml", out)


def run_benchmark(config_path: Path, out: Path | str, overrides: list[str] | None = None) -> dict[str, Any]:
    """Run, or go on with, an experiment; write metrics.json, report.md, its pictures and ``model/`` to ``out``.

    Raises:
        UserError, DataError: a config, the data or an earlier run in ``out`` does not fit.
    """
    config = load_config(BenchmarkConfig, config_path, overrides)
    if not config.arms or not config.prior:
        raise UserError(f"{config_path} names no arms, or no prior")
    out = Path(out)
    network = load_inception()
    say(f"Inception: {network.description}")
    phases = Phases(out / "phases", total=2 + PHASES_PER_ARM * len(config.arms))
    shards = _pack(config.dataset, phases, out)
    reference = Reference(shards["test"], config.measure.reference_images)
    reference_name = vars(reference.description)

    def reference_features() -> dict[str, Any]:
        with progress_bar("real images") as bar:
            reference.features(network, out / "reference.safetensors", bar)
        return {}

    phases.run("features of the held-out images", [reference_name, network.fingerprint], reference_features)
    real = reference.features(network, out / "reference.safetensors")

    arms = {}
    for name, file in config.arms.items():
        arm = _Arm(name, config_path.parent / file, config, config_path.parent / config.prior, out, shards)
        arms[name] = arm.run(phases, reference, network, real)
    results = {
        "title": config.title,
        "revision": git_revision(),
        "machine": _machine(),
        "reference": reference_name,
        "network": {"weights": network.description, "fingerprint": network.fingerprint, "protocol": network.protocol},
        "sampling": vars(config.sampling),
        "arms": arms,
        "seconds": phases.seconds,
        "seconds_in_all": round(sum(phases.seconds.values()), 1),
    }
    best = next(iter(config.arms))
    SoftConvexPipeline.from_pretrained(out / "arms" / best / "model").save_pretrained(out / "model")
    write_atomically(out / "metrics.json", json.dumps(results, indent=2) + "\n")
    write_report(results, out)
    return results


def _pack(dataset: DatasetConfig, phases: Phases, out: Path) -> dict[str, Path]:
    folders = {"train": out / "shards" / "train", "test": out / "shards" / "test"}

    def work() -> dict[str, Any]:
        counts = {}
        for part, split in (("train", dataset.train_split), ("test", dataset.test_split)):
            with progress_bar(f"pack {dataset.format} {split}") as bar:
                manifest = packing.pack(
                    dataset.source,
                    folders[part],
                    format=dataset.format,
                    size=dataset.size,
                    crop=dataset.crop or None,
                    split=split,
                    progress=bar,
                )
            counts[part] = manifest["num_images"]
        return counts

    phases.run("pack", as_dict(dataset), work)
    return folders


class _Arm:
    """One quantizer through both stages."""

    def __init__(
        self, name: str, tokenizer: Path, config: BenchmarkConfig, prior: Path, out: Path, shards: dict[str, Path]
    ):
        self.name, self.config, self.shards, self.folder = name, config, shards, out / "arms" / name
        self.tokenizer_config = load_config(TokenizerExperiment, tokenizer)
        self.tokenizer_config.out = str(self.folder / "tokenizer")
        self.tokenizer_config.data.train = str(shards["train"])
        self.tokenizer_config.data.validation = str(shards["test"])
        self.prior_config = load_config(PriorExperiment, prior)
        self.prior_config.out = str(self.folder / "prior")
        self.prior_config.tokenizer = str(self.folder / "tokenizer" / "model")
        self.prior_config.data.train = str(self.folder / "tokens")

    def run(self, phases: Phases, reference: Reference, network: Any, real: Any) -> dict[str, Any]:
        measured = [vars(reference.description), network.fingerprint]
        trained = phases.run(
            f"{self.name} train tokenizer", self._settings(self.tokenizer_config), self._train_tokenizer
        )
        fingerprint = trained["fingerprint"]
        reconstruction = phases.run(
            f"{self.name} reconstruct",
            [fingerprint, measured],
            lambda: self._reconstruct(reference, network, real),
        )
        codebook = phases.run(f"{self.name} tokenize", [fingerprint], self._tokenize)
        prior = phases.run(
            f"{self.name} train prior", [fingerprint, self._settings(self.prior_config)], self._train_prior
        )
        settings = [prior, measured, vars(self.config.sampling), vars(self.config.measure)]
        samples = phases.run(f"{self.name} sample", settings, lambda: self._sample(reference, network, real))
        return {"tokenizer": trained, "reconstruction": reconstruction, "codebook": codebook, "prior": prior} | {
            "samples": samples
        }

    def _settings(self, experiment: TokenizerExperiment | PriorExperiment) -> list[Any]:
        """What the result of a training depends on; not where on this disk it lies."""
        places = {"out", "tokenizer", "data"}
        choices = {key: value for key, value in as_dict(experiment).items() if key not in places}
        return [choices, as_dict(experiment)["data"].get("flip"), as_dict(self.config.dataset)]

    def _train_tokenizer(self) -> dict[str, Any]:
        trained = train_tokenizer(self.tokenizer_config)
        tokenizer = load_tokenizer(self.tokenizer_config.out)
        return {
            "fingerprint": tokenizer.fingerprint(),
            "quantizer": self.tokenizer_config.quantizer.name,
            "parameters": tokenizer.num_parameters(),
            "steps": trained.steps,
            "images_seen": trained.steps * self.tokenizer_config.training.batch_size,
            "seconds": trained.seconds,
        }

    def _reconstruct(self, reference: Reference, network: Any, real: Any) -> dict[str, Any]:
        tokenizer = load_tokenizer(self.tokenizer_config.out)
        with progress_bar("reconstructions") as bar:
            results = evaluate_reconstructions(tokenizer, reference, network, real, bar)
        images = next(reference.batches()).images[:PICTURED_RECONSTRUCTIONS]
        with torch.no_grad():
            encoding = tokenizer.encode(to_float(images))
            rows = [images, to_uint8(tokenizer.decode(encoding.z_q))]
            rows.append(to_uint8(tokenizer.decode_indices(encoding.indices)))
        save_images(self.folder / "reconstructions.npy", torch.cat(rows))
        return results

    def _tokenize(self) -> dict[str, Any]:
        tokenizer = load_tokenizer(self.tokenizer_config.out)
        with progress_bar("tokenize") as bar:
            tokens = write_tokens(tokenizer, self.shards["train"], self.prior_config.data.train, progress=bar)
        held_out = evaluate_codebook(tokenizer, iterate_once(self.shards["test"], batch_size=64))
        everything = (tokens.read(np.array([i]), np.array([0])) for i in range(len(tokens)))
        return {"train": codebook_usage(everything, tokens.codebook_size).summary(), "held_out": held_out.summary()}

    def _train_prior(self) -> dict[str, Any]:
        tokenizer = load_tokenizer(self.tokenizer_config.out)
        trained = train_prior(self.prior_config, tokenizer.fingerprint())
        pipeline = SoftConvexPipeline(tokenizer, trained.averaged)
        pipeline.sampling = self.config.sampling
        pipeline.save_pretrained(self.folder / "model")
        return {
            "parameters": trained.averaged.num_parameters(),
            "steps": trained.steps,
            "images_seen": trained.steps * self.prior_config.training.batch_size,
            "seconds": trained.seconds,
        }

    def _sample(self, reference: Reference, network: Any, real: Any) -> dict[str, Any]:
        pipeline = SoftConvexPipeline.from_pretrained(self.folder / "model")
        measure = self.config.measure
        with progress_bar("samples") as bar:
            images = pipeline.stream(measure.samples or reference.count, measure.seed)
            results = evaluate_samples(images, measure.samples or reference.count, network, real, bar)
        pictured = torch.cat(list(pipeline.stream(measure.pictured, measure.seed)))
        save_images(self.folder / "samples.npy", pictured)
        return results


def _machine() -> dict[str, Any]:
    """What the seconds were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.cpu.get_capabilities()["cpu_name"]
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
