"""Tokenizers that differ in one thing, trained alike, compared by reconstructions: ``scq benchmark tokenizers``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scq.engine.config import load_config
from scq.engine.errors import UserError
from scq.engine.files import write_file
from scq.evaluation.benchmark.arm import ArmPhases, Yardstick, tokenizer_phases
from scq.evaluation.benchmark.config import Recipe
from scq.evaluation.benchmark.decoded import reconstruction_table, training_table
from scq.evaluation.benchmark.images import Images
from scq.evaluation.benchmark.phases import Job, Phase
from scq.evaluation.benchmark.plots import PICTURES, draw_learning, draw_reconstructions
from scq.evaluation.benchmark.results import ArmResult, ComparisonResults, Floor, RealImages, save_results
from scq.evaluation.benchmark.work import ArmWork, Lpips
from scq.evaluation.metrics.inception import load_inception
from scq.evaluation.pictures import save_picture
from scq.stage1_tokenizer.stage import TokenizerExperiment


@dataclass
class ComparisonConfig:
    """``arms`` maps a title to overrides of the ``tokenizer`` config, which lies beside this one."""

    tokenizer: str = ""
    images: int = 2000  # held-out images to reconstruct
    # FID of reconstructions, and of training images, which no decoder is asked to beat; the network takes about 15
    # images a second on two cores.
    rfid: bool = False
    curve_images: int = 0  # held-out images on which every checkpoint's rFID is measured, for learning curves; 0: none
    # Soft latents of the first seed with weights of so many bits, and their rate.
    weight_bits: list[int] = field(default_factory=list)
    inception_weights: str = ""  # file of FID Inception weights; empty: the first one found
    lpips_weights: str = ""  # VGG16's weights for LPIPS; empty leaves LPIPS out
    seeds: dict[str, int] = field(default_factory=dict)  # how many seeds an arm is trained with, if not one
    arms: dict[str, list[str]] = field(default_factory=dict)


def compare_tokenizers(config_path: Path, train: str, held_out: str, out: Path, overrides: Sequence[str] = ()) -> str:
    """Train every arm, or go on with it, and write results.json, table.md and pictures to ``out``.

    Args:
        train, held_out: shards.
        overrides: of the comparison's config, ``key=value``.

    Returns:
        the table.

    Raises:
        UserError, DataError: a config, the shards or an earlier run in ``out`` does not fit.
    """
    config = load_config(ComparisonConfig, config_path, list(overrides))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.curve_images and not config.rfid:
        raise UserError("curve_images asks for the rFID of checkpoints: set rfid, too")
    network = load_inception(config.inception_weights or None, device) if config.rfid else None
    lpips = Lpips(config.lpips_weights, device) if config.lpips_weights else None
    images = Images({"train": train, "test": held_out}, out / "features")
    described = {"shards": images.packed("test"), "count": config.images, "network": network}
    real = Phase("held-out images", images.describe, described, RealImages)
    yardstick, shards = Yardstick(real, network, lpips), images.packed("train")
    common: list[Phase[Any]] = [real]
    floor = scored = None
    if network is not None:
        compared = {"shards": shards, "real": real, "network": network}
        floor = Phase("training images", images.floor, compared, Floor)
        common.append(floor)
    if config.curve_images:
        described = {**described, "count": config.curve_images}
        scored = Phase("held-out images of the curves", images.describe, described, RealImages)
        common.append(scored)
    listed: list[tuple[str, ArmPhases]] = []
    for number, (title, changes) in enumerate(config.arms.items()):
        experiment = load_config(TokenizerExperiment, config_path.parent / config.tokenizer, changes)
        for seed in range(config.seeds.get(title, 1)):
            name = f"{number:02d}_{seed}"
            work = ArmWork(f"{name} {title}", out / name, out / PICTURES / name, images, device)
            bits = config.weight_bits if seed == 0 else []
            recipe = Recipe(experiment).shifted(seed)
            listed.append((title, tokenizer_phases(work, recipe, shards, yardstick, bits, scored)))
    job = Job([*common, *(phase for _, arm in listed for phase in arm.listed())], out / "phases")
    for phase in common:
        job.run(phase)
    arms: dict[str, list[ArmResult]] = {title: [] for title in config.arms}
    for title, arm in listed:
        for phase in arm.listed():
            job.run(phase)
        arms[title].append(arm.result(job))
    results = ComparisonResults(arms, None if floor is None else job.found(floor))
    save_results(results, out / "results.json")
    table = "\n".join(render(results)) + "\n"
    write_file(out / "table.md", table)
    firsts = {f"{number:02d}_0": arms[title] for number, title in enumerate(config.arms)}
    titles = dict(zip(firsts, config.arms, strict=True))
    save_picture(draw_reconstructions(out, firsts, titles), out / "reconstructions.png")
    draw_learning(arms, out / "learning.png")
    return table


def render(results: ComparisonResults) -> list[str]:
    """The results as Markdown tables; of several seeds the mean, and the range in brackets."""
    arms = {title: runs for title, runs in results.arms.items() if runs}
    return [*reconstruction_table(arms, results.floor), "", *training_table(arms)]
