"""The pictures of a benchmark's report, first seeds only.

They are drawn from the results and from the arms' pictures in ``pictures/``, so that a benchmark may go on, and be
reported, on a machine that has neither the networks nor the logs of the arms that are finished.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

from scq.engine.files import atomic_write, make_folder
from scq.engine.pictures import picture_grid
from scq.evaluation.benchmark.results import ArmResult, Curve
from scq.evaluation.pictures import TITLE_HEIGHT, save_picture, stacked_rows, write_title
from scq.evaluation.reconstructions import rounded_bits

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHEETS_IN_A_ROW = 3
PICTURES = "pictures"  # folder of the arms' pictures, beside the report
REFINER_MARKERS = {"regression": "s", "flow": "D"}  # around the dot of the codes that were refined
_BESIDE = {"fontsize": 7, "loc": "upper left", "bbox_to_anchor": (1.02, 1.0)}  # a legend that hides nothing
Runs = dict[str, list[ArmResult]]  # by the arm's name, one for each seed


def save_images(path: Path, images: torch.Tensor) -> None:
    """Keep uint8 images (N, 3, H, W) for the report, as one PNG of H x (N W) pixels."""
    make_folder(path.parent)
    strip = images.cpu().permute(2, 0, 3, 1).flatten(1, 2)  # (H, N W, 3)
    save_picture(Image.fromarray(strip.numpy()), path)


def load_images(path: Path) -> torch.Tensor:
    """Square images (N, 3, H, H) uint8 that `save_images` kept."""
    with Image.open(path) as picture:
        strip = torch.from_numpy(np.array(picture))  # (H, N H, 3)
    return strip.unflatten(1, (-1, len(strip))).permute(1, 3, 0, 2).contiguous()


def curve(rows: list[dict[str, float]], terms: Sequence[str], points: int = 100) -> Curve:
    """Some terms of a training log, as columns of at most so many evenly spaced ones of its rows."""
    known = [row for row in rows if all(term in row for term in terms)]
    kept = known[:: max(1, -(-len(known) // points))]
    return {term: [row[term] for row in kept] for term in ("step", *terms)}


def draw_samples(out: Path, arms: Runs) -> Image.Image:
    """Samples of every arm and every way of decoding, not chosen: the first ones of the seed."""
    sheets = [
        (f"{arm}: {way}" if len(runs[0].samples) > 1 else f"{arm}: samples", sheet)
        for arm, runs in arms.items()
        for way in runs[0].samples
        for sheet in [picture_grid(load_images(out / PICTURES / arm / f"samples_{way}.png"), columns=8)]
    ]
    width, height = max(s.width for _, s in sheets) + 24, max(s.height for _, s in sheets) + TITLE_HEIGHT
    columns = min(SHEETS_IN_A_ROW, len(sheets))
    picture = Image.new("RGB", (columns * width - 24, math.ceil(len(sheets) / columns) * height), "white")
    for number, (title, sheet) in enumerate(sheets):
        left, top = number % columns * width, number // columns * height
        write_title(picture, (left, top), title)
        picture.paste(sheet, (left, top + TITLE_HEIGHT))
    return picture


def draw_reconstructions(out: Path, arms: Runs) -> Image.Image:
    """Held-out originals, then for each arm what z_q and what its codes alone decode to."""
    rows: list[tuple[str, torch.Tensor]] = []
    for arm, runs in arms.items():
        found = runs[0].reconstructions
        ways = 2 if "dominant" in found.ways else 1
        original, soft, *codes = load_images(out / PICTURES / arm / "reconstructions.png").chunk(1 + ways)
        if not rows:
            rows.append(("held-out originals", original))
        if not codes or torch.equal(soft, codes[0]):
            rows.append((f"{arm}: reconstructed", soft))
        else:
            rows += [(f"{arm}: from z_q", soft), (f"{arm}: from {found.codes}", codes[0])]
    return stacked_rows(rows)


def draw_neighbours(out: Path, arms: Runs) -> Image.Image | None:
    """Samples above the training images nearest to them; None where nobody looked."""
    rows: list[tuple[str, torch.Tensor]] = []
    for arm, runs in arms.items():
        for way in runs[0].samples:
            path = out / PICTURES / arm / f"neighbours_{way}.png"
            if path.is_file():
                drawn, nearest = load_images(path).chunk(2)
                rows += [(f"{arm}: {way}", drawn), ("nearest training images", nearest)]
    return stacked_rows(rows) if rows else None


def draw_curves(arms: Runs, path: Path) -> None:
    """Training curves of both stages, one line for each arm."""
    panels = [("l2", "tokenizer: mean squared error"), ("perplexity", "codebook perplexity")]
    panels += [("loss", "prior: masked cross-entropy")]
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 3.6))
    colours, shown = _colours(arms), {}
    for axis, (term, title) in zip(axes, panels, strict=True):
        for arm, (run, *_) in arms.items():
            trained = [run.tokenizer] if run.prior is None else [run.tokenizer, run.prior]
            for columns in (each.curve for each in trained if term in each.curve):
                [shown[arm]] = axis.plot(columns["step"], columns[term], color=colours[arm])
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[-1].legend(shown.values(), shown.keys(), **_BESIDE)
    _save(figure, path)


def draw_learning(arms: Runs, path: Path) -> None:
    """rFID of held-out images over CPU seconds of training, a line for each arm; no picture where nobody measured."""
    curves = {arm: learned for arm, (run, *_) in arms.items() if (learned := run.tokenizer.learned)}
    if not curves:
        return
    figure, axis = plt.subplots(figsize=(8.5, 4.2))
    colours = _colours(arms)
    for arm, learned in curves.items():
        axis.plot(learned["cpu_seconds"], learned["rfid"], "o-", color=colours[arm], label=arm)
    axis.set(xlabel="CPU seconds of training", ylabel="rFID")
    axis.set_xlim(left=0)
    axis.legend(**_BESIDE)
    axis.grid(alpha=0.3)
    _save(figure, path)


def draw_rates(arms: Runs, path: Path) -> None:
    """rFID over bits per image: hard codes at their fixed rate, soft latents at that of their rounded weights."""
    figure, axis = plt.subplots(figsize=(8.5, 4.2))
    colours = _colours(arms)
    for arm, (run, *_) in arms.items():
        found, colour = run.reconstructions, colours[arm]
        soft = [
            (each.bits_per_image, each.rfid)
            for name, each in found.ways.items()
            if rounded_bits(name) is not None and each.rfid is not None
        ]
        if found.codebook is not None and found.ways["dominant"].rfid is not None:
            bits = found.codebook.fixed_bits_per_image
            axis.plot(bits, found.ways["dominant"].rfid, "o", color=colour, label=f"{arm}: codes")
        if soft:
            points = zip(*sorted(soft), strict=True)
            axis.plot(*points, "^--", color=colour, label=f"{arm}: z_q, rounded weights")
        for way, decoded in run.samples.items():
            refined = decoded.reconstruction
            if found.codebook is not None and refined is not None and refined.rfid is not None:
                axis.plot(
                    found.codebook.fixed_bits_per_image, refined.rfid, REFINER_MARKERS[way], color=colour,
                    markerfacecolor="none", markersize=10, label=f"{arm}: codes, {way} refiner",
                )  # fmt: skip
    axis.set(xlabel="bits per image", ylabel="rFID")
    axis.legend(**_BESIDE)
    axis.grid(alpha=0.3)
    _save(figure, path)


def draw_sweep(arms: Runs, path: Path) -> None:
    """FID of samples over sampling steps, a line for all else equal; no picture where nobody measured."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for arm, runs in arms.items():
        for settings, swept in runs[0].sweep.items():
            named = dict(setting.split("=") for setting in settings.split())
            if steps := named.pop("steps", None):
                rest = " ".join(f"{key}={value}" for key, value in named.items())
                lines.setdefault(f"{arm}, {swept.way} {rest}".strip(), []).append((int(steps), swept.scores.fid))
    if not lines:
        return
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    for label, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    axis.set(xlabel="sampling steps", ylabel="FID of samples", xscale="log")
    measured = sorted({steps for points in lines.values() for steps, _ in points})
    axis.set_xticks(measured, [str(steps) for steps in measured])
    axis.minorticks_off()
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    _save(figure, path)


def _colours(arms: Runs) -> dict[str, Any]:
    """A colour for each arm, the same in every plot."""
    colours = plt.get_cmap("tab20")
    palette = [colours(number) for number in (*range(0, 20, 2), *range(1, 20, 2))]  # strong ones first
    return {arm: palette[number % len(palette)] for number, arm in enumerate(arms)}


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
