"""The arguments of a pipeline's call, checked and turned into tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from scq.engine.checks import shown, whole_number
from scq.engine.errors import UserError, require_finite
from scq.sampling.editing import tokens_under, variation_mask

LARGEST_SEED = 2**63 - 1
MOST_IMAGES = 2**20  # of one call, which holds all of them in memory

Generators = torch.Generator | Sequence[torch.Generator]
Labels = int | Sequence[int] | torch.Tensor | np.ndarray


def image_seeds(num_images: int, seed: int | None, generator: Generators | None) -> torch.Tensor:
    """A seed for each image: ``seed`` + i, or drawn from the generator, or from torch's global one.

    Args:
        generator: on any device; or a list of them, one for each image.

    Returns:
        (num_images,) int64 on the CPU.

    Raises:
        UserError: both a seed and a generator are given, the seeds do not fit into 64 bits, or there is not one
            generator for each image.
    """
    if seed is not None:
        if generator is not None:
            raise UserError("give a seed or a generator, not both")
        # Of all images together: the last one's seed must fit into 64 bits, too.
        seed = whole_number("seed", seed, -LARGEST_SEED, LARGEST_SEED - num_images)
        return torch.arange(seed, seed + num_images)
    if generator is None or isinstance(generator, torch.Generator):
        return _drawn_seeds(num_images, generator)
    generators = list(generator) if isinstance(generator, Iterable) else [generator]
    if not all(isinstance(each, torch.Generator) for each in generators):
        raise UserError(f"generator={shown(generator)} must be a torch.Generator, or a list of one for each image")
    if len(generators) != num_images:
        raise UserError(f"generator holds {len(generators)} generators for {num_images} images; give one for each")
    return torch.cat([_drawn_seeds(1, each) for each in generators])


def _drawn_seeds(count: int, generator: torch.Generator | None) -> torch.Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**31, (count,), generator=generator, device=device).cpu()


def image_labels(class_labels: Labels | None, num_images: int, classes: int) -> torch.Tensor | None:
    """A class for each image.

    Args:
        class_labels: one for each image, or one for all.
        classes: how many the prior has; 0 if it was trained without.

    Returns:
        (num_images,) int64; None if no labels are given.

    Raises:
        UserError: the prior has no classes, there is not one label for each image, or a label is out of range.
    """
    if class_labels is None:
        return None
    if not classes:
        raise UserError("class_labels were given, but this prior was trained without classes")
    if isinstance(class_labels, torch.Tensor | np.ndarray):
        class_labels = class_labels.tolist()
    several = list(class_labels) if isinstance(class_labels, Sequence) else [class_labels] * num_images
    if len(several) != num_images:
        raise UserError(f"{len(several)} class_labels for {num_images} images; give one for each")
    return torch.tensor([whole_number("class_labels", label, 0, classes - 1) for label in several])


def checked_tokens(name: str, tokens: torch.Tensor, most: int, count: int | None = None) -> torch.Tensor:
    """Grids of codes (B, h, w) as int64, if they are whole numbers from 0 to ``most``.

    Args:
        name: what messages call them.
        count: how many grids there must be; None for any number.

    Raises:
        UserError: the shape, the type or a value is another.
    """
    if isinstance(tokens, np.ndarray):
        tokens = torch.from_numpy(tokens)
    if not isinstance(tokens, torch.Tensor):
        raise UserError(f"{name} must be a tensor (B, h, w) of codes, not {type(tokens).__name__}")
    if tokens.dim() != 3 or 0 in tokens.shape or (count is not None and len(tokens) != count):
        wanted = "(B, h, w)" if count is None else f"({count}, h, w), a grid for each image"
        raise UserError(f"{name} must be {wanted}, not {tuple(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise UserError(f"{name} must hold codes, which are whole numbers, not {tokens.dtype}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > most:
        raise UserError(f"{name} must hold codes from 0 to {most}, not {low} to {high}")
    return tokens.long()


def checked_latents(z_q: torch.Tensor, dim: int) -> torch.Tensor:
    """Latents (B, F, h, w), if they are floating and finite and F is ``dim``.

    Raises:
        UserError: the shape, the type or a value is another.
    """
    if not isinstance(z_q, torch.Tensor) or not z_q.is_floating_point() or z_q.dim() != 4 or z_q.shape[1] != dim:
        found = f"{z_q.dtype} {tuple(z_q.shape)}" if isinstance(z_q, torch.Tensor) else type(z_q).__name__
        raise UserError(f"latents must be a floating tensor (B, {dim}, h, w), not {found}")
    if 0 in z_q.shape:
        raise UserError(f"latents are empty: their shape is {tuple(z_q.shape)}")
    require_finite("latents", z_q)
    return z_q


def codes_to_start_from(
    codes: torch.Tensor, mask: torch.Tensor | None, strength: float, seeds: torch.Tensor, mask_token: int, factor: int
) -> torch.Tensor:
    """Codes (num_images, h, w) to start from, with the mask token where they are to be redrawn.

    Args:
        codes: (1 or num_images, h, w) int64.
        mask: (1 or num_images, H, W) bool, the pixels to redraw; None for a random share of the tokens.
        strength: that share, in [0, 1].
        seeds: (num_images,) int64.
        factor: pixels along the side of a token.

    Raises:
        UserError: there is neither one image or mask, nor one for each seed; or ``strength`` is out of range.
    """
    redrawn = variation_mask(seeds, tuple(codes.shape[1:]), strength) if mask is None else tokens_under(mask, factor)
    for name, count in (("init_image", len(codes)), ("mask_image", len(redrawn))):
        if count not in (1, len(seeds)):
            raise UserError(f"{name} holds {count} images; give one, or one for each of {len(seeds)}")
    return torch.where(redrawn, mask_token, codes).expand(len(seeds), -1, -1)
