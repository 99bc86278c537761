"""How many bits a prior needs for real tokens, with its weights read as an absorbing-state diffusion model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from scq.engine.randomness import image_uniform

_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, fill [0, 1) evenly


class LikelihoodBound(NamedTuple):
    """An upper bound on -log2 of the probability of an image's tokens, averaged over images."""

    bits_per_image: float
    error: float  # standard error of bits_per_image due to the random masks, not to the choice of images
    bits_per_token: float
    images: int
    passes: int


@torch.no_grad()
def likelihood_bound(
    predict: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    codes: torch.Tensor,
    mask_token: int,
    labels: torch.Tensor | None = None,
    passes: int = 4,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> LikelihoodBound:
    """The negative evidence lower bound of an absorbing-state diffusion, in bits.

    With m of L tokens masked at random, m uniform in 1 .. L, the bound is the expectation of L / m times the sum of
    -log2 p(code | visible tokens) over the masked ones (Hoogeboom et al., arXiv 2110.02037). It is the same for every
    noise schedule (Sahoo et al., arXiv 2406.07524), and equals what the any-order autoregressive model needs, averaged
    over orders.

    Args:
        predict: tokens (B, L) and labels (B,) or None -> logits (B, L, K).
        codes: (N, L) int64, held-out images.
        labels: (N,) int64 classes, for a class-conditional prior: the bound is then on p(codes | class).
        passes: over the images, each with its own masks; at least 2, to estimate the error.

    Returns:
        the bound, which is the same for any batch size, up to rounding.

    Raises:
        ValueError: there are fewer than two passes, or no images.
    """
    if passes < 2:
        raise ValueError(f"passes={passes} must be at least 2: the error is estimated from their differences")
    if not len(codes):
        raise ValueError("there are no images to measure")
    length = codes.shape[1]
    means = []
    for number in range(passes):
        offset = float(image_uniform(torch.tensor([number]), purpose="likelihood"))
        total = 0.0
        for first in range(0, len(codes), batch_size):
            truth = codes[first : first + batch_size].to(device)  # (B, L)
            keys = torch.arange(first, first + len(truth), device=device)
            # Spread evenly over 1 .. L across images, yet uniform for each image, because the offset is uniform.
            count = ((keys.double() * _GOLDEN + offset) % 1 * length).long() + 1  # (B,)
            order = image_uniform(keys, length, seed=number, purpose="likelihood")
            masked = order.argsort(1).argsort(1) < count[:, None]
            given = None if labels is None else labels[first : first + batch_size].to(device)
            logits = predict(torch.where(masked, mask_token, truth), given)
            bits = -logits.float().log_softmax(-1).gather(-1, truth[..., None]).squeeze(-1) / math.log(2)  # (B, L)
            total += float(((bits * masked).sum(1).double() * length / count).sum())
        means.append(total / len(codes))
    bits = statistics.fmean(means)
    error = statistics.stdev(means) / passes**0.5
    return LikelihoodBound(bits, error, bits / length, len(codes), passes)
