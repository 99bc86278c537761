"""Users' pictures <-> a model's pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from scq.data.transforms import centre_box, to_rgb

Pictures = Image.Image | Sequence[Image.Image] | torch.Tensor
Output = list[Image.Image] | torch.Tensor | np.ndarray
OUTPUT_TYPES = ("pil", "pt", "np")


def to_pixels(pictures: Pictures, side: int) -> torch.Tensor:
    """Pictures -> uint8 (N, 3, side, side): upright, on white, cropped to their central square, and resized.

    A picture that was enlarged by a whole factor (see `enlarge`) gets its original pixels back.

    Args:
        pictures: one or several of any size and mode, or a uint8 tensor (N, 3, side, side), which stays as it is.

    Raises:
        ValueError: a tensor has another shape or type, there is no picture, or its samples have no stated range.
    """
    if isinstance(pictures, torch.Tensor):
        if pictures.dtype != torch.uint8 or pictures.shape[1:] != (3, side, side):
            raise ValueError(
                f"image tensors must be uint8 of shape (N, 3, {side}, {side}), not {pictures.dtype} of shape "
                f"{tuple(pictures.shape)}"
            )
        return pictures
    several = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    if not several:
        raise ValueError("no image was given")
    fitted = [_fitted(to_rgb(picture), side) for picture in several]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in fitted])).permute(0, 3, 1, 2).contiguous()


def to_mask(pictures: Pictures, side: int) -> torch.Tensor:
    """Masks -> bool (N, side, side), True where a pixel is lighter than middle grey and therefore to be redrawn.

    If a mask is larger, a single light pixel is enough, so that a thin stroke is not lost.

    Args:
        pictures: as for `to_pixels`; or a bool tensor (N, side, side), which stays as it is.

    Raises:
        ValueError: a tensor has another shape or type, or there is no mask.
    """
    if isinstance(pictures, torch.Tensor) and pictures.dtype == torch.bool:
        if pictures.shape[1:] != (side, side):
            raise ValueError(f"bool masks must have the shape (N, {side}, {side}), not {tuple(pictures.shape)}")
        return pictures
    if isinstance(pictures, torch.Tensor):
        return to_pixels(pictures, side).float().mean(1) > 127.5
    several = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    if not several:
        raise ValueError("no mask was given")
    upright = [ImageOps.exif_transpose(picture).convert("L") for picture in several]
    squares = [each.crop(centre_box(*each.size, min(each.size))) for each in upright]
    return torch.from_numpy(np.stack([resized_mask(np.asarray(each) > 127, (side, side)) for each in squares]))


def resized_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask (H, W) bool to ``size`` (height, width): True wherever any pixel that falls there is True."""
    for axis, (before, after) in enumerate(zip(mask.shape, size, strict=True)):
        # If a mask grows, several new pixels begin at the same old one, and reduceat takes that one for each.
        mask = np.logical_or.reduceat(mask, np.arange(after) * before // after, axis=axis)
    return mask


def to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """uint8 (N, 3, H, W) -> PIL."""
    return [Image.fromarray(each.permute(1, 2, 0).cpu().numpy()) for each in pixels]


def check_output_type(output_type: str) -> None:
    """Make sure that `as_output` knows a type.

    Raises:
        ValueError: it does not.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be {', '.join(OUTPUT_TYPES)}, not {output_type!r}")


def as_output(pixels: torch.Tensor, output_type: str) -> Output:
    """Convert images uint8 (N, 3, H, W) to the type that a caller asks for.

    Args:
        output_type: ``pil``, a list of pictures; ``pt``, the uint8 tensor itself; ``np``, as diffusers has it: float32
            (N, H, W, 3) in [0, 1].

    Raises:
        ValueError: the type is unknown.
    """
    check_output_type(output_type)
    if output_type == "np":
        return pixels.permute(0, 2, 3, 1).cpu().numpy().astype(np.float32) / 255
    return pixels if output_type == "pt" else to_pictures(pixels)


def enlarge(picture: Image.Image, side: int) -> Image.Image:
    """Enlarge to a width of at least ``side``, by a whole factor and without smoothing, so that pixels can be seen."""
    zoom = max(1, -(-side // picture.width))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    whole = min(picture.size) % side == 0
    return ImageOps.fit(picture, (side, side), Image.Resampling.BOX if whole else Image.Resampling.BICUBIC)
