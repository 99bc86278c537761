"""Masking of tokens: how much at a time, and which. Pure functions of the numbers they are given."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


def mask_share(progress: torch.Tensor, schedule: str = "cosine") -> torch.Tensor:
    """The share of tokens that is masked at ``progress`` through the generation, from 1 at 0 down to 0 at 1.

    Training draws ``progress`` uniformly; sampling walks it from 0 to 1. Source: MaskGIT (Chang et al., CVPR 2022,
    section 3.3) for ``cosine`` and ``linear``; ``arccos`` is the inverse of cosine mirrored, concave to convex.

    Args:
        progress: any shape, in [0, 1].
        schedule: cosine | linear | arccos.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule == "cosine":
        return torch.cos(progress * (math.pi / 2))
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "arccos":
        return torch.arccos(progress) / (math.pi / 2)
    raise ValueError(f"mask schedule {schedule!r} does not exist; choose cosine, linear or arccos")


class Masked(NamedTuple):
    tokens: torch.Tensor  # (B, L) int64, codes and the mask token
    mask: torch.Tensor  # (B, L) bool, True where masked


def mask_tokens(
    codes: torch.Tensor, mask_token: int, progress: torch.Tensor, order: torch.Tensor, schedule: str = "cosine"
) -> Masked:
    """Replace a share of each image's codes by the mask token.

    Args:
        codes: (B, L) int64.
        progress: (B,) uniform in [0, 1); how far each image's imagined generation is.
        order: (B, L) uniform; the tokens with the smallest numbers are masked.
        schedule: see :func:`mask_share`.

    Returns:
        at least one masked token for every image.
    """
    length = codes.shape[1]
    count = (mask_share(progress, schedule) * length).ceil().clamp(1, length)  # (B,)
    rank = order.argsort(1).argsort(1)  # (B, L), each token's place in the image's own random order
    mask = rank < count[:, None]
    return Masked(torch.where(mask, mask_token, codes), mask)
