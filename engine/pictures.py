"""Grids of images and training curves, for run folders and reports."""

from __future__ import annotations

import math
from io import BytesIO

import torch
from matplotlib.figure import Figure
from PIL import Image

_NOT_PLOTTED = frozenset(["step", "learning_rate", "data_wait_share"])


def picture_grid(images: torch.Tensor, columns: int, gap: int = 2, smallest_side: int = 64) -> Image.Image:
    """Tile uint8 images (N, 3, H, W) row by row on white; small ones are enlarged by a whole factor to be easy to see.

    Args:
        gap: pixels between tiles.

    Returns:
        an RGB picture; each tile is at least ``smallest_side`` pixels wide.
    """
    zoom = max(1, -(-smallest_side // images.shape[-1]))
    images = images.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    _, _, height, width = images.shape
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        tile = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        sheet.paste(tile, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def curves(rows: list[dict[str, float]], columns: int = 4) -> Image.Image:
    """Plot every logged term against the step, each in a small plot of its own.

    Args:
        rows: of metrics.jsonl; a term may be missing from some.
    """
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in _NOT_PLOTTED]
    lines = max(1, math.ceil(len(names) / columns))
    figure = Figure(figsize=(3.2 * columns, 2.2 * lines), layout="constrained")
    for name, axes in zip(names, figure.subplots(lines, columns, squeeze=False).flat, strict=False):
        there = [row for row in rows if name in row]
        axes.plot([row["step"] for row in there], [row[name] for row in there], linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in figure.axes[len(names) :]:
        axes.remove()
    file = BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return Image.open(file).convert("RGB")
