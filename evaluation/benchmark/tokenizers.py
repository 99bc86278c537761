"""Tokenizers that differ in one thing, trained alike, compared by reconstructions: ``scq benchmark tokenizers``."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from scq.engine.config import as_dict, load_config
from scq.engine.files import write_file
from scq.engine.progress import progress_bar
from scq.engine.tracking import read_metrics
from scq.evaluation.benchmark.decoded import reconstruction_table, training_table
from scq.evaluation.benchmark.phases import Phases
from scq.evaluation.benchmark.plots import curve
from scq.evaluation.evaluate import Reconstructions, Reference, evaluate_reconstructions
from scq.evaluation.metrics.features import FeatureSet
from scq.evaluation.metrics.inception import load_inception
from scq.evaluation.metrics.networks import FeatureNetwork
from scq.stage1_tokenizer.autoencoder import ImageTokenizer, to_float
from scq.stage1_tokenizer.losses import PerceptualLoss
from scq.stage1_tokenizer.train import TokenizerExperiment, load_tokenizer, train_tokenizer


@dataclass
class ComparisonConfig:
    """``arms`` maps a title to overrides of the ``tokenizer`` config, which lies beside this one."""

    tokenizer: str = ""
    images: int = 2000  # held-out images to reconstruct
    rfid: bool = False  # FID of reconstructions; the network takes about 15 images a second on two cores
    inception_weights: str = ""  # file of FID Inception weights; empty: the first one found
    lpips_weights: str = ""  # VGG16's weights for LPIPS; empty leaves LPIPS out
    seeds: dict[str, int] = field(default_factory=dict)  # how many seeds an arm is trained with, if not one
    arms: dict[str, list[str]] = field(default_factory=dict)


class Yardsticks:
    """What every arm is measured with.

    Args:
        network, real: the FID network and its features of the reference; None to leave FID out.
        lpips_weights: file of VGG16's weights; empty leaves LPIPS out.
        weight_bits: see `evaluate_reconstructions`.
        device: of the tokenizers that are measured.
    """

    def __init__(
        self,
        reference: Reference,
        network: FeatureNetwork | None,
        real: FeatureSet | None,
        lpips_weights: str = "",
        weight_bits: Sequence[int] = (),
        device: str = "cpu",
    ):
        self.reference, self.network, self.real, self.device = reference, network, real, device
        self.perceptual = PerceptualLoss(lpips_weights).to(device) if lpips_weights else None
        self.weight_bits = list(weight_bits)

    @property
    def description(self) -> list[Any]:
        """What numbers depend on, beside the models that are measured."""
        weights = self.network.fingerprint if self.network else None
        return [vars(self.reference.description), weights, self.perceptual is not None, self.weight_bits]

    def without_rounded_weights(self) -> Yardsticks:
        """The same with no ``weight_bits``; networks and features are shared."""
        others = copy(self)
        others.weight_bits = []
        return others

    def reconstructions(self, tokenizer: ImageTokenizer, **choices: Any) -> dict[str, Any]:
        """The ways of decoding that `measure` finds."""
        return self.measure(tokenizer, **choices).ways

    def measure(self, tokenizer: ImageTokenizer, **choices: Any) -> Reconstructions:
        """What `evaluate_reconstructions` finds, with its further arguments ``choices``."""
        with progress_bar("reconstructions") as bar:
            return evaluate_reconstructions(
                tokenizer, self.reference, self.network, self.real, bar, perceptual=self.perceptual, **choices
            )


def compare_tokenizers(config_path: Path, train: str, held_out: str, out: Path, overrides: list[str]) -> str:
    """Train every arm, or go on with it, and write results.json and table.md to ``out``.

    Args:
        train, held_out: shards.
        overrides: of the comparison's config, ``key=value``.

    Returns:
        the table.
    """
    config = load_config(ComparisonConfig, config_path, overrides)
    runs = [(title, seed) for title in config.arms for seed in range(config.seeds.get(title, 1))]
    phases = Phases(out / "phases", total=len(runs))
    reference = Reference(held_out, config.images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_inception(config.inception_weights or None, device) if config.rfid else None
    with progress_bar("features of held-out images") as bar:
        real = reference.features(network, out / "reference_features.safetensors", bar) if network else None
    yardsticks = Yardsticks(reference, network, real, config.lpips_weights, device=device)
    rows: dict[str, list[dict[str, Any]]] = {title: [] for title in config.arms}
    for title, seed in runs:
        experiment = load_config(TokenizerExperiment, config_path.parent / config.tokenizer, config.arms[title])
        name = f"{list(config.arms).index(title):02d}_{seed}"
        experiment.out, experiment.training.seed = str(out / name), experiment.training.seed + seed
        experiment.data.train, experiment.data.validation = train, held_out
        settings = {key: value for key, value in as_dict(experiment).items() if key not in ("out", "data")}
        rows[title].append(
            phases.run(
                f"{name} {title}",
                [settings, yardsticks.description],
                lambda e=experiment: measure_tokenizer(e, yardsticks),
            )
        )
    write_file(out / "results.json", json.dumps(rows, indent=1) + "\n")
    table = "\n".join(render(rows)) + "\n"
    write_file(out / "table.md", table)
    return table


def measure_tokenizer(experiment: TokenizerExperiment, yardsticks: Yardsticks) -> dict[str, Any]:
    """Train a tokenizer, or go on with it, and measure it: a row of results."""
    trained = train_tokenizer(experiment)
    started = time.monotonic()
    tokenizer = load_tokenizer(experiment.out).to(yardsticks.device)
    reference = yardsticks.reference
    found = yardsticks.measure(tokenizer, weight_bits=yardsticks.weight_bits)
    log = read_metrics(Path(experiment.out))
    return {
        "quantizer": experiment.quantizer.name,
        "fingerprint": tokenizer.fingerprint(),
        "seed": experiment.training.seed,
        **found.ways,
        "codebook": None if found.codebook is None else found.codebook.summary(),
        "latents": _of_latents(tokenizer, reference, log[-1]),
        "curve": curve(log, ["l2", "perplexity"] if found.codebook else ["l2"]),
        # Of the median logging window: what else the machine did for a while does not count.
        "images_per_second": statistics.median(row["images_per_second"] for row in log),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "steps": trained.steps,
        "images_seen": trained.steps * experiment.training.batch_size,
        "batch_size": experiment.training.batch_size,
        "training_seconds": trained.seconds,
        "seconds": trained.seconds + time.monotonic() - started,
    }


@torch.no_grad()
def _of_latents(tokenizer: ImageTokenizer, reference: Reference, last: dict[str, float]) -> dict[str, float]:
    """How often the dominant code is the nearest, its mean weight, and what mixing wins in latent space."""
    images = torch.cat([batch.images for batch in islice(reference.batches(), 4)]).to(tokenizer.device)
    stats = tokenizer.quantizer(tokenizer.latents(to_float(images))).stats
    found = {name: float(stats[name]) for name in ("dominant_is_nearest", "dominant_weight") if name in stats}
    if "soft_error" in last:
        found["soft_over_hard"] = last["soft_error"] / last["hard_error"]
    return found


def render(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The results as Markdown tables; of several seeds the mean, and the range in brackets."""
    arms = {title: [{"tokenizer": row} for row in each] for title, each in rows.items() if each}
    return [*reconstruction_table(arms), "", *training_table(arms)]
