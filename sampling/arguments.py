"""The arguments of a pipeline's call, checked and turned into tensors."""

from __future__ import annotations

import torch

from scq.sampling.editing import tokens_under, variation_mask

LARGEST_SEED = 2**63 - 1


def image_seeds(num_images: int, seed: int | None, generator: torch.Generator | None) -> torch.Tensor:
    """A seed for each image: ``seed`` + i, or drawn from the generator, or from torch's global one.

    Args:
        generator: on any device.

    Returns:
        (num_images,) int64 on the CPU.

    Raises:
        ValueError: both a seed and a generator are given, or the seeds do not fit into 64 bits.
    """
    if seed is None:
        device = "cpu" if generator is None else generator.device
        return torch.randint(2**31, (num_images,), generator=generator, device=device).cpu()
    if generator is not None:
        raise ValueError("give a seed or a generator, not both")
    if not -LARGEST_SEED <= seed <= LARGEST_SEED - num_images:
        raise ValueError(
            f"seed={seed} is out of range: the seeds of {num_images} images from it on must fit into 64 bits"
        )
    return torch.arange(seed, seed + num_images)


def image_labels(class_labels: list[int] | int | None, num_images: int, classes: int) -> torch.Tensor | None:
    """A class for each image.

    Args:
        classes: how many the prior has; 0 if it was trained without.

    Returns:
        (num_images,) int64; None if no labels are given.

    Raises:
        ValueError: the prior has no classes, there is not one label for each image, or a label is out of range.
    """
    if class_labels is None:
        return None
    if isinstance(class_labels, int):
        class_labels = [class_labels] * num_images
    if not classes:
        raise ValueError("class_labels were given, but this prior was trained without classes")
    if len(class_labels) != num_images:
        raise ValueError(f"{len(class_labels)} class_labels for {num_images} images; give one for each")
    bad = [label for label in class_labels if not 0 <= label < classes]
    if bad:
        raise ValueError(f"class label {bad[0]} is not one of the {classes} classes 0 .. {classes - 1}")
    return torch.tensor(class_labels)


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
        ValueError: there is neither one image or mask, nor one for each seed; or ``strength`` is out of range.
    """
    redrawn = variation_mask(seeds, tuple(codes.shape[1:]), strength) if mask is None else tokens_under(mask, factor)
    for name, count in (("init_image", len(codes)), ("mask_image", len(redrawn))):
        if count not in (1, len(seeds)):
            raise ValueError(f"{name} holds {count} images; give one, or one for each of {len(seeds)}")
    return torch.where(redrawn, mask_token, codes).expand(len(seeds), -1, -1)
