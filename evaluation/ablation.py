"""Many tokenizers that differ in one thing, trained alike and compared in pixels: ``scq benchmark ablation``."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from engine.config import as_dict, load_config, write_atomically
from engine.tracking import read_metrics
from evaluation.evaluate import Reference
from evaluation.metrics import ReconstructionMetrics, codebook_usage
from evaluation.phases import Phases
from evaluation.report import markdown_table
from stage1_tokenizer.autoencoder import ImageTokenizer, to_float, to_uint8
from stage1_tokenizer.train import TokenizerExperiment, load_tokenizer, train_tokenizer


@dataclass
class AblationConfig:
    """``arms`` maps a title to overrides of the ``tokenizer`` config, which lies beside this one."""

    tokenizer: str = ""
    images: int = 2000  # held-out images to reconstruct
    arms: dict[str, list[str]] = field(default_factory=dict)


def run_ablation(config_path: Path, train: str, held_out: str, out: Path) -> str:
    """Train every arm, or go on with it, and write results.json and table.md to ``out``.

    Args:
        train, held_out: shards.

    Returns:
        the table.
    """
    config = load_config(AblationConfig, config_path)
    phases = Phases(out / "phases", total=len(config.arms))
    reference = Reference(held_out, config.images)
    rows = {}
    for number, (title, overrides) in enumerate(config.arms.items()):
        experiment = load_config(TokenizerExperiment, config_path.parent / config.tokenizer, overrides)
        experiment.out = str(out / f"{number:02d}")
        experiment.data.train, experiment.data.validation = train, held_out
        settings = {key: value for key, value in as_dict(experiment).items() if key not in ("out", "data")}
        rows[title] = phases.run(
            title, [settings, vars(reference.description)], lambda e=experiment: _measure(e, reference)
        )
    write_atomically(out / "results.json", json.dumps(rows, indent=1) + "\n")
    table = "\n".join(render(rows)) + "\n"
    write_atomically(out / "table.md", table)
    return table


@torch.no_grad()
def _measure(experiment: TokenizerExperiment, reference: Reference) -> dict[str, Any]:
    with torch.enable_grad():
        trained = train_tokenizer(experiment)
    tokenizer = load_tokenizer(experiment.out)
    soft, dominant, grids = ReconstructionMetrics(), ReconstructionMetrics(), []
    has_codes = experiment.quantizer.name != "none"
    for batch in reference.batches():
        encoding = tokenizer.encode(to_float(batch.images))
        soft.update(batch.images, to_uint8(tokenizer.decode(encoding.z_q)))
        if has_codes:
            dominant.update(batch.images, to_uint8(tokenizer.decode_indices(encoding.indices)))
            grids.append(encoding.indices)
    last = read_metrics(Path(experiment.out))[-1]
    return {
        "mse_z_q": soft.compute().mse,
        "mse_dominant": dominant.compute().mse if has_codes else None,
        "perplexity": codebook_usage(grids, experiment.quantizer.codebook_size).perplexity if has_codes else None,
        **_of_latents(tokenizer, reference),
        "soft_over_hard_error": last["soft_error"] / last["hard_error"] if "soft_error" in last else None,
        "seconds_per_step": experiment.training.batch_size / _median_speed(Path(experiment.out)),
        "steps": trained.steps,
    }


def _median_speed(run: Path) -> float:
    """Images per second in the median logging window: what else the machine did for a while does not count."""
    return statistics.median(row["images_per_second"] for row in read_metrics(run))


def _of_latents(tokenizer: ImageTokenizer, reference: Reference) -> dict[str, float | None]:
    """How often the dominant code is the nearest, and its mean weight, over the first held-out images."""
    names = ("dominant_is_nearest", "dominant_weight")
    images = torch.cat([batch.images for batch in islice(reference.batches(), 4)])
    stats = tokenizer.quantizer(tokenizer.latents(to_float(images))).stats
    return {name: float(stats[name]) if name in stats else None for name in names}


def render(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The results as a Markdown table."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    head = ["arm", "MSE of z_q", "MSE of dominant codes", "perplexity", "dominant is nearest", "dominant weight"]
    return markdown_table(
        [*head, "soft / hard latent error", "ms per step"],
        [
            [
                title,
                show(row["mse_z_q"], ".5f"),
                show(row["mse_dominant"], ".5f"),
                show(row["perplexity"], ".0f"),
                show(row["dominant_is_nearest"], ".1%"),
                show(row["dominant_weight"], ".2f"),
                show(row["soft_over_hard_error"], ".2f"),
                show(1e3 * row["seconds_per_step"], ".0f"),
            ]
            for title, row in rows.items()
        ],
    )
