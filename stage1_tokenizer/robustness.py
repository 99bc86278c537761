"""Token perturbation: it prepares a decoder for a prior's tokens, which an encoder would not always have chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scq.engine.config import Ranges
from scq.engine.errors import UserError
from scq.stage1_tokenizer.quantizers import Quantized, Quantizer
from scq.stage1_tokenizer.solver.codebook import may_wait


@dataclass
class RobustnessConfig:
    """Token perturbation after RobustTok (Qiu et al., arXiv 2503.08354), annealed over training.

    It differs from the paper: every image is perturbed, not only a part of each batch. A swapped token takes a
    neighbour of its code, not of its latent, and never keeps the code. Gradients go to z_q.
    """

    swapped_share: float = 0.0  # share of tokens that are decoded from a neighbour of their code; 0 for none
    neighbours: int = 8  # how many nearest codes a token may be swapped for
    final_share: float = 0.0  # swapped_share changes linearly to this
    steps: int = 0  # steps that the change takes; 0 keeps swapped_share throughout

    def ranges(self) -> Ranges:
        return [("steps", self.steps >= 0, "at least 0")]


class NeighbourSwap(NamedTuple):
    """Which tokens are swapped, and for which neighbour."""

    share: float  # in [0, 1]
    neighbours: int
    noise: Tensor  # (B, 2, h, w) uniform in [0, 1): decides which tokens are swapped, and for which neighbours


def swapped_share(step: int, config: RobustnessConfig) -> float:
    """The share of tokens to swap at ``step``.

    Raises:
        UserError: a share is outside [0, 1], or ``neighbours`` is below 1.
    """
    for name in ("swapped_share", "final_share"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"robustness.{name} is {getattr(config, name)}; it must be in [0, 1]")
    if config.neighbours < 1:
        raise UserError(f"robustness.neighbours is {config.neighbours}; it must be at least 1")
    if config.steps <= 0:
        return config.swapped_share
    progress = min(1.0, step / config.steps)
    return (1 - progress) * config.swapped_share + progress * config.final_share


def swap_for_neighbours(quantized: Quantized, quantizer: Quantizer, swap: NeighbourSwap) -> Tensor:
    """z_q (B, F, h, w) with a share of its tokens replaced by codes near their dominant codes.

    Gradients go straight through to z_q: the encoder is not trained to follow the swap.
    """
    chance, choice = swap.noise.unbind(1)  # (B, h, w)
    chosen = chance < swap.share
    if not quantizer.has_codes or quantizer.codebook_size < 2:
        return quantized.z_q
    near = nearest_codes(quantizer, quantized.indices.flatten(), swap.neighbours)  # (B h w, neighbours)
    nth = (choice * near.shape[1]).long()  # (B, h, w)
    other = near.gather(1, nth.view(-1, 1)).view_as(nth)
    # Detached, not under no_grad: by that a lookup would know that it is no training step, and may read indices back.
    difference = (quantizer.lookup(torch.where(chosen, other, quantized.indices)) - quantized.z_q).detach()
    return quantized.z_q + torch.where(chosen.unsqueeze(1), difference, 0.0)


def nearest_codes(quantizer: Quantizer, indices: Tensor, count: int) -> Tensor:
    """The ``count`` codes (n, count) nearest to each of the codes ``indices`` (n,), without the code itself.

    There are fewer than ``count`` if the codebook is too small.
    """
    size = quantizer.codebook_size
    every = torch.arange(size, device=indices.device)
    codes = quantizer.lookup(every.view(1, 1, size))[0, :, 0].t().detach()  # (K, F)
    # A GPU does not know without waiting which codes are asked for, and soon has the neighbours of all.
    asked, back = indices.unique(return_inverse=True) if may_wait(codes) else (every, indices)
    found = []
    for part in asked.split(max(1, (1 << 24) // size)):  # a block of distances at a time
        distance = torch.cdist(codes[part], codes)
        distance.scatter_(1, part.unsqueeze(1), torch.inf)
        found.append(distance.topk(min(count, size - 1), largest=False).indices)
    return torch.cat(found)[back]
