"""Tokenizers that differ in one thing, trained alike, compared by reconstructions: ``scq benchmark tokenizers``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scq.engine.config import git_revision, load_config
from scq.engine.errors import UserError
from scq.evaluation.benchmark.arm import ArmPhases, Yardstick, tokenizer_phases
from scq.evaluation.benchmark.config import load_tokenizer_recipe
from scq.evaluation.benchmark.images import Images
from scq.evaluation.benchmark.phases import Job, Phase
from scq.evaluation.benchmark.plots import PICTURES
from scq.evaluation.benchmark.report import write_comparison
from scq.evaluation.benchmark.results import ArmResult, ComparisonResults, Floor, RealImages, save_results
from scq.evaluation.benchmark.work import ArmWork, Lpips
from scq.evaluation.metrics.inception import load_inception
from scq.evaluation.metrics.networks import FeatureNetwork
from scq.evaluation.samples import describe


@dataclass
class ComparisonConfig:
    """``arms`` maps a title to overrides of the ``tokenizer`` config, which lies beside this one."""

    title: str = ""
    tokenizer: str = ""
    shared: list[str] = field(default_factory=list)  # overrides of every arm, before its own
    images: int = 2000  # held-out images to reconstruct
    # FID of reconstructions, and of training images, which no decoder is asked to beat; the network takes about 15
    # images a second on two cores.
    rfid: bool = False
    # Held-out images on which every checkpoint's rFID is measured, of the first seed, for learning curves; 0: none.
    curve_images: int = 0
    # Soft latents of the first seed with weights of so many bits, and their rate.
    weight_bits: list[int] = field(default_factory=list)
    inception_weights: str = ""  # file of FID Inception weights; empty: the first one found
    lpips_weights: str = ""  # VGG16's weights for LPIPS, and for a loss that names none; empty leaves LPIPS out
    seeds: dict[str, int] = field(default_factory=dict)  # how many seeds an arm is trained with, if not one
    arms: dict[str, list[str]] = field(default_factory=dict)


def compare_tokenizers(
    config_path: Path, train: str, held_out: str, out: Path, overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> ComparisonResults:
    """Train every arm, or go on with it, and write results.json, report.md and pictures to ``out``.

    All of these are written anew after each arm and each seed. One seed of every arm comes before the second of any.

    Args:
        train, held_out: shards.
        overrides: of the comparison's config, ``key=value``.
        only: titles of the arms to work on, so that several processes or machines can share the work; empty for all.
            The others are shown as far as they are finished.

    Returns:
        what was found, of all arms as far as they are finished.

    Raises:
        UserError, DataError: a config, the shards, ``only`` or an earlier run in ``out`` does not fit.
    """
    config = load_config(ComparisonConfig, config_path, list(overrides))
    if not config.arms:
        raise UserError(f"{config_path} names no arms")
    if config.curve_images and not config.rfid:
        raise UserError("curve_images asks for the rFID of checkpoints: set rfid, too")
    if strange := [title for title in (*config.seeds, *only) if title not in config.arms]:
        raise UserError(f"{config_path} has no arm {strange[0]!r}, only {', '.join(config.arms)}")
    if strange := [title for title in config.arms if Path(title).name != title]:
        raise UserError(f"{config_path}: an arm's title names its folder, which {strange[0]!r} cannot")
    images = Images({"train": train, "test": held_out}, out / "features")
    return _list_phases(config, config_path.parent, out, images).run(out, only)


@dataclass(frozen=True)
class _Comparison:
    """Every phase: those that all arms need, the floor among them, and each arm's with each seed, in order."""

    config: ComparisonConfig
    network: FeatureNetwork | None
    real: Phase[RealImages]
    floor: Phase[Floor] | None
    curves: Phase[RealImages] | None
    arms: list[tuple[str, ArmPhases]]

    def common(self) -> list[Phase[Any]]:
        return [phase for phase in (self.real, self.floor, self.curves) if phase is not None]

    def run(self, out: Path, only: Sequence[str]) -> ComparisonResults:
        job = Job([*self.common(), *(phase for _, arm in self.arms for phase in arm.listed())], out / "phases")
        for phase in self.common():
            job.run(phase)
        chosen = [arm for title, arm in self.arms if not only or title in only]
        for arm in chosen[:-1]:
            self._finish(job, arm, out)
        return self._finish(job, chosen[-1], out)

    def _finish(self, job: Job, arm: ArmPhases, out: Path) -> ComparisonResults:
        for phase in arm.listed():
            job.run(phase)
        return self._write(job, out)

    def _write(self, job: Job, out: Path) -> ComparisonResults:
        arms: dict[str, list[ArmResult]] = {title: [] for title in self.config.arms}
        unfinished: set[str] = set()
        for title, arm in self.arms:  # another process may have finished more
            if title not in unfinished and all(job.reuse(phase) for phase in arm.listed()):
                arms[title].append(arm.result(job))
            else:
                unfinished.add(title)
        results = ComparisonResults(
            title=self.config.title or "Tokenizers compared",
            revision=git_revision(),
            reference=job.found(self.real).images,
            network=None if self.network is None else describe(self.network),
            arms=arms,
            floor=None if self.floor is None else job.found(self.floor),
            seconds=dict(job.seconds),
            machines=dict(job.machines),
        )
        save_results(results, out / "results.json")
        write_comparison(results, out)
        return results


def _list_phases(config: ComparisonConfig, beside: Path, out: Path, images: Images) -> _Comparison:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_inception(config.inception_weights or None, device) if config.rfid else None
    lpips = Lpips(config.lpips_weights, device) if config.lpips_weights else None
    described = {"shards": images.packed("test"), "count": config.images, "network": network}
    real = Phase("held-out images", images.describe, described, RealImages)
    yardstick, shards = Yardstick(real, network, lpips), images.packed("train")
    floor = curves = None
    if network is not None:
        compared = {"shards": shards, "real": real, "network": network}
        floor = Phase("training images", images.floor, compared, Floor)
    if config.curve_images:
        described = {**described, "count": config.curve_images}
        curves = Phase("held-out images of the curves", images.describe, described, RealImages)
    arms: list[tuple[str, ArmPhases]] = []
    for seed in range(max([1, *config.seeds.values()])):
        for title, changes in config.arms.items():
            if seed < config.seeds.get(title, 1):
                name = f"{title}_seed{seed}" if seed else title
                work = ArmWork(name, out / "arms" / name, out / PICTURES / name, images, device)
                changed = [*config.shared, *changes]
                recipe = load_tokenizer_recipe(beside / config.tokenizer, changed, config.lpips_weights, seed)
                first = (config.weight_bits, curves) if seed == 0 else ([], None)
                arms.append((title, tokenizer_phases(work, recipe, shards, yardstick, *first)))
    return _Comparison(config, network, real, floor, curves, arms)
