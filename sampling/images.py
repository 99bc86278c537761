"""Users' pictures <-> a model's pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from scq.data.transforms import centre_box, to_rgb
from scq.engine.checks import one_of, shown
from scq.engine.errors import UserError

Picture = Image.Image | np.ndarray | torch.Tensor
Pictures = Picture | Sequence[Picture]
Output = list[Image.Image] | torch.Tensor | np.ndarray
OUTPUT_TYPES = ("pil", "pt", "np")
CHANNELS = (1, 3, 4)  # grey, RGB, and RGB with opacity


def to_pixels(pictures: Pictures, side: int) -> torch.Tensor:
    """Pictures -> uint8 (N, 3, side, side): upright, on white, cropped to their central square, and resized.

    A picture that was enlarged by a whole factor (see `enlarge`) gets its original pixels back.

    Args:
        pictures: one or several of any size: pictures of Pillow; arrays (H, W), (H, W, C) or (N, H, W, C); tensors
            (H, W), (C, H, W) or (N, C, H, W). Their values are uint8, or floats in [0, 1] as diffusers has them; C is
            one of CHANNELS. A uint8 tensor (N, 3, side, side) keeps its pixels.

    Raises:
        UserError: something is not such a picture, there is none, or its samples have no stated range.
    """
    if isinstance(pictures, torch.Tensor) and pictures.dtype == torch.uint8 and pictures.shape[1:] == (3, side, side):
        if not len(pictures):
            raise UserError("no image was given")
        return pictures.cpu()
    fitted = [_fitted(to_rgb(each), side) for each in _pictures(pictures, "image")]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in fitted])).permute(0, 3, 1, 2).contiguous()


def to_mask(pictures: Pictures, side: int) -> torch.Tensor:
    """Masks -> bool (N, side, side), True where a pixel is lighter than middle grey and therefore to be redrawn.

    If a mask is larger, a single light pixel is enough, so that a thin stroke is not lost.

    Args:
        pictures: as for `to_pixels`; several masks may also be (N, H, W). Floats are in [0, 1], and 0.5 is light, as
            in diffusers. Where the lightest value of a mask is 1, it is light whatever the type.

    Raises:
        UserError: something is not such a mask, or there is none.
    """
    grey = [_upright_grey(each) for each in _pictures(pictures, "mask")]
    squares = [each.crop(centre_box(*each.size, min(each.size))) for each in grey]
    return torch.from_numpy(np.stack([resized_mask(np.asarray(each) > 127, (side, side)) for each in squares]))


def _pictures(pictures: Any, kind: str) -> list[Image.Image]:
    """One or several pictures or masks, each as one of Pillow; see `to_pixels` and `to_mask` for what they may be.

    Args:
        kind: "image" or "mask".
    """
    if isinstance(pictures, Image.Image):
        return [pictures]
    if isinstance(pictures, torch.Tensor | np.ndarray):
        return [_from_array(each, kind) for each in _single(pictures, kind)]
    if not isinstance(pictures, Sequence) or isinstance(pictures, str | bytes):
        raise UserError(f"{kind}={shown(pictures)} must be a picture of Pillow, an array, a tensor, or a list of those")
    if not pictures:
        raise UserError(f"no {kind} was given")
    return [picture for each in pictures for picture in _pictures(each, kind)]


def _single(values: torch.Tensor | np.ndarray, kind: str) -> list[np.ndarray]:
    """An array or tensor of one or several pictures -> arrays (H, W) or (H, W, C)."""
    found, ndim = f"{values.dtype} of shape {tuple(values.shape)}", values.ndim
    # Three axes of a tensor are an image's channels or several masks, as in diffusers; an array's shape tells.
    channels = ndim == 4 or (ndim == 3 and kind == "image")
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        array = (values.float() if values.is_floating_point() else values).numpy()
        array = np.moveaxis(array, -3, -1) if channels else array
    else:
        array, channels = values, channels or (ndim == 3 and values.shape[-1] in CHANNELS)
    several = ndim == 4 or (ndim == 3 and not channels)
    if several and not len(array):
        raise UserError(f"no {kind} was given")
    if ndim not in (2, 3, 4) or 0 in array.shape or (channels and array.shape[-1] not in CHANNELS):
        raise UserError(
            f"{kind} is {found}; an array must be (H, W), (H, W, C) or (N, H, W, C), a tensor (H, W), (C, H, W) or "
            "(N, C, H, W), with 1, 3 or 4 channels C"
        )
    return list(array) if several else [array]


def _from_array(values: np.ndarray, kind: str) -> Image.Image:
    """An array (H, W) or (H, W, C) -> a picture of Pillow with 8 bits a channel."""
    if values.dtype.kind == "f":
        if not ((values >= 0) & (values <= 1)).all():  # nor NaN
            raise UserError(
                f"{kind} holds floats from {values.min()} to {values.max()}; floats must be in [0, 1], and pixels from "
                "0 to 255 must be uint8"
            )
        values = (values * 255).round().astype(np.uint8)
    elif kind == "mask" and values.dtype.kind in "biu":
        values = values.astype(np.uint8) * 255 if values.max() <= 1 else values.clip(0, 255).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise UserError(f"{kind} is {values.dtype}; it must be uint8, or floats in [0, 1]")
    return Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)


def _upright_grey(mask: Image.Image) -> Image.Image:
    """A mask of Pillow, upright, in 8-bit grey."""
    mask = ImageOps.exif_transpose(mask)
    if mask.mode == "F":
        mask = _from_array(np.asarray(mask), "mask")
    lightest = np.asarray(mask).max() if mask.mode == "L" or mask.mode.startswith("I") else None
    if lightest == 1:
        return _from_array(np.asarray(mask), "mask")
    return (to_rgb(mask) if mask.mode.startswith("I") else mask).convert("L")


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
        UserError: it does not.
    """
    one_of("output_type", output_type, OUTPUT_TYPES)


def as_output(pixels: torch.Tensor, output_type: str) -> Output:
    """Convert images uint8 (N, 3, H, W) to the type that a caller asks for.

    Args:
        output_type: ``pil``, a list of pictures; ``pt``, the uint8 tensor itself; ``np``, as diffusers has it: float32
            (N, H, W, 3) in [0, 1].

    Raises:
        UserError: the type is unknown.
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
