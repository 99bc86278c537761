"""What soft latents cost: their weights rounded to b bits, counted in bits, and decoded again.

Nobody has to send these; the numbers say at which rate z_q's quality could be had, so that it never stands beside hard
codes as if it cost the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scq.stage1_tokenizer.quantizers import Mixture, Quantizer


class RoundedMixture(NamedTuple):
    """Latents whose weights were rounded, and what they cost."""

    z_q: Tensor  # (B, F, h, w) float32, of the rounded weights
    bits: Tensor  # (B,) float64, what each image's latents cost


def round_mixture(quantizer: Quantizer, mixture: Mixture, weight_bits: int) -> RoundedMixture:
    """Weights as multiples of 2^-b that still sum to one, and the length of an enumerative code for them.

    A latent that mixes s codes of K costs log2 C(K, s) for which codes, log2 C(2^b - 1, s - 1) for which of the ways
    to divide 2^b units among them, and 2 floor(log2 s) + 1 for s itself (Elias' gamma code). An enumerative code is the
    index of an object among all of its kind (Cover, "Enumerative source encoding", 1973).

    Args:
        quantizer: whose codes are mixed.
        mixture: of latents (B, F, h, w).
        weight_bits: b in [1, 16]; one bit leaves two codes of half the weight each, at most.

    Raises:
        ValueError: weight_bits is out of range.
    """
    if not 1 <= weight_bits <= 16:
        raise ValueError(f"weight_bits={weight_bits} must be in 1 .. 16")
    units = 2**weight_bits
    exact = mixture.weights.double() * units  # (B, h, w, S)
    whole = exact.floor()
    # Largest remainders get the units that rounding down left over.
    left = (units - whole.sum(-1, keepdim=True)).round()  # (B, h, w, 1)
    rank = (exact - whole).argsort(-1, descending=True).argsort(-1)
    rounded = whole + (rank < left)  # (B, h, w, S), sums to 2^b
    codes = quantizer.lookup(mixture.support.flatten(2)).unflatten(3, mixture.support.shape[2:])  # (B, F, h, w, S)
    z_q = (codes * (rounded / units).unsqueeze(1).float()).sum(-1)  # (B, F, h, w)
    mixed = (rounded > 0).sum(-1)  # (B, h, w), s
    price = torch.tensor(
        [_price(quantizer.codebook_size, units, s) for s in range(1, int(mixed.max()) + 1)], dtype=torch.float64
    )
    bits = price.to(mixed.device)[mixed - 1]  # (B, h, w)
    return RoundedMixture(z_q, bits.sum((1, 2)))


def _price(codebook_size: int, units: int, mixed: int) -> float:
    return _log2_choose(codebook_size, mixed) + _log2_choose(units - 1, mixed - 1) + 2 * int(math.log2(mixed)) + 1


def _log2_choose(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
