"""Masking of tokens: how many of them, and which. Pure functions of the numbers they are given."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

SCHEDULES = ("cosine", "uniform", "arccos", "exp")
_EXP_BASE = 64.0  # of the exponential schedule; MaskGIT uses the number of tokens, 64 on an 8x8 grid


def mask_share(progress: torch.Tensor, schedule: str = "cosine") -> torch.Tensor:
    """The share of tokens that is masked at ``progress``: it falls from 1 at progress 0 to 0 at progress 1.

    Training draws ``progress`` uniformly; sampling moves it from 0 to 1. Source: MaskGIT (Chang et al., CVPR 2022,
    section 3.3) for ``cosine``, ``uniform`` (a straight line) and ``exp`` (most tokens stay masked until late);
    ``arccos`` is the inverse function of ``cosine``.

    Args:
        progress: any shape, in [0, 1].
        schedule: one of SCHEDULES.

    Raises:
        ValueError: the schedule is unknown.
    """
    if schedule == "cosine":
        return torch.cos(progress * (math.pi / 2))
    if schedule == "uniform":
        return 1.0 - progress
    if schedule == "arccos":
        return torch.arccos(progress) / (math.pi / 2)
    if schedule == "exp":
        return (1.0 - _EXP_BASE ** (progress - 1.0)) / (1.0 - 1.0 / _EXP_BASE)
    raise ValueError(f"mask schedule {schedule!r} does not exist; choose one of {', '.join(SCHEDULES)}")


class Masked(NamedTuple):
    """Tokens of which some are masked."""

    tokens: torch.Tensor  # (B, L) int64, codes and the mask token
    mask: torch.Tensor  # (B, L) bool, True where masked


def mask_tokens(codes: torch.Tensor, mask_token: int, count: torch.Tensor, order: torch.Tensor) -> Masked:
    """Replace some of each image's codes with the mask token.

    Args:
        codes: (B, L) int64.
        count: (B,) how many of each image, see `masked_count`.
        order: (B, L) uniform; the tokens with the smallest numbers are masked.

    Returns:
        the tokens and where they are masked.
    """
    rank = order.argsort(1).argsort(1)  # (B, L), each token's rank in the image's own random order
    mask = rank < count[:, None]
    return Masked(torch.where(mask, mask_token, codes), mask)


def masked_count(progress: torch.Tensor, length: int, schedule: str = "cosine") -> torch.Tensor:
    """How many of an image's ``length`` tokens are masked at ``progress`` (B,): whole numbers (B,) in 1 .. length.

    Training draws ``progress`` uniformly from [0, 1): how far along the simulated generation of each image is.
    """
    return (mask_share(progress, schedule) * length).ceil().clamp(1, length)


def loss_weight(hidden: torch.Tensor, length: int, weighting: str = "tokens") -> torch.Tensor:
    """For each image, the weight (B,) of a masked token's cross-entropy in the mean over a batch.

    Args:
        hidden: (B,) masked tokens of each image, >= 1.
        length: L, tokens of an image.
        weighting: ``tokens`` weights every masked token equally (MaskGIT, eq. 1), ``images`` every image. With
            ``images`` and the ``uniform`` schedule, training minimises exactly the bound of stage2_prior.likelihood,
            apart from label smoothing and corruption.

    Raises:
        ValueError: the weighting is unknown.
    """
    if weighting == "tokens":
        return torch.ones_like(hidden, dtype=torch.float32)
    if weighting == "images":
        return length / hidden.float()
    raise ValueError(f"loss weighting {weighting!r} does not exist; choose tokens or images")
