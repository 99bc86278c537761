"""Rows of images under their titles, for people to compare."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from scq.engine.files import atomic_write
from scq.engine.pictures import picture_grid

TITLE_HEIGHT = 28  # pixels


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    with atomic_write(path) as file:
        picture.save(file, format="PNG", optimize=True)


def stacked_rows(rows: list[tuple[str, torch.Tensor]]) -> Image.Image:
    """Rows of uint8 images (N, 3, H, W) below each other, each under its title."""
    sheets = [(title, picture_grid(images, columns=len(images))) for title, images in rows]
    height = sum(sheet.height + TITLE_HEIGHT for _, sheet in sheets)
    picture = Image.new("RGB", (max(sheet.width for _, sheet in sheets), height), "white")
    top = 0
    for title, sheet in sheets:
        write_title(picture, (0, top), title)
        picture.paste(sheet, (0, top + TITLE_HEIGHT))
        top += sheet.height + TITLE_HEIGHT
    return picture


def write_title(picture: Image.Image, corner: tuple[int, int], text: str) -> None:
    """Write a title into the picture, at the top left (x, y) of its TITLE_HEIGHT pixels."""
    left, top = corner
    ImageDraw.Draw(picture).text((left, top + 4), text, fill="black", font=ImageFont.load_default(size=16))
