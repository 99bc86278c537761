"""Pictures of many images, for run folders and reports."""

from __future__ import annotations

import torch
from PIL import Image


def picture_grid(images: torch.Tensor, columns: int, gap: int = 2, smallest_side: int = 64) -> Image.Image:
    """Tile uint8 images (N, 3, H, W) row by row on white, small ones enlarged to whole pixels so that eyes can judge.

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
