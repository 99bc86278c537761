"""Samplers: from nothing to a grid of codes. Pure functions; every random number belongs to one image."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.randomness import image_gumbel
from stage2_prior.masking import mask_share

Predict = Callable[[torch.Tensor], torch.Tensor]  # tokens (B, L) -> logits (B, L, K)


class Step(NamedTuple):
    """What a sampler's callback sees after each step."""

    step: int  # 1 .. steps
    steps: int
    tokens: torch.Tensor  # (B, L) int64, the mask token where nothing is revealed yet


def maskgit(
    predict: Predict,
    seeds: torch.Tensor,
    length: int,
    mask_token: int,
    *,
    steps: int = 12,
    temperature: float = 1.0,
    choice_temperature: float = 4.5,
    schedule: str = "cosine",
    callback: Callable[[Step], None] | None = None,
) -> torch.Tensor:
    """MaskGIT's parallel decoding (Chang et al., CVPR 2022, section 3.2): reveal the most confident tokens first.

    Each step draws a code for every masked place, then keeps those whose log-probability plus annealed Gumbel noise is
    highest, as many as the mask schedule asks for. A revealed token never changes.

    Args:
        predict: logits for every place, given codes and mask tokens.
        seeds: (B,) int64, one for each image: the same seed gives the same tokens in any batch.
        length: tokens of an image.
        mask_token: the number that stands for 'not known yet'.
        steps: 1 .. length.
        temperature: of the codes' distribution, > 0; below 1 sharpens it.
        choice_temperature: scale of the noise on the confidences, annealed linearly to 0; 0 is greedy. 4.5 is the
            original's default.
        schedule: see stage2_prior.masking.mask_share.
        callback: called after each step.

    Returns:
        (B, L) int64 codes.

    Raises:
        ValueError: steps or a temperature is out of range.
    """
    if not 1 <= steps <= length:
        raise ValueError(f"steps={steps} must lie in 1 .. {length}, the number of tokens")
    if temperature <= 0 or choice_temperature < 0:
        raise ValueError(f"temperature={temperature} must be > 0, choice_temperature={choice_temperature} >= 0")
    device = seeds.device
    tokens = torch.full((len(seeds), length), mask_token, dtype=torch.int64, device=device)
    for step in range(steps):
        logits = predict(tokens).float() / temperature  # (B, L, K)
        log_probabilities = logits.log_softmax(-1)
        noise = image_gumbel(seeds, length, logits.shape[-1], purpose=f"code {step}")
        drawn = (log_probabilities + noise).argmax(-1)  # (B, L)
        confidence = log_probabilities.gather(-1, drawn[..., None]).squeeze(-1)
        progress = (step + 1) / steps
        confidence = confidence + choice_temperature * (1 - progress) * image_gumbel(
            seeds, length, purpose=f"choice {step}"
        )
        masked = tokens == mask_token
        confidence = confidence.masked_fill(~masked, float("inf"))  # what is revealed stays revealed
        share = mask_share(torch.tensor(progress, dtype=torch.float64), schedule).item()
        # At least one token is revealed by every step, and all by the last.
        remain = min(int(share * length), length - step - 1) if step + 1 < steps else 0
        rank = confidence.argsort(1, descending=True).argsort(1)
        tokens = torch.where(masked & (rank < length - remain), drawn, tokens)
        if callback is not None:
            callback(Step(step + 1, steps, tokens))
    return tokens


def guided(
    prior: Callable[..., torch.Tensor], labels: torch.Tensor | None, guidance_scale: float, no_class: int
) -> Predict:
    """A prior as a function of tokens alone, guided towards its class (Ho and Salimans, 2022).

    Args:
        prior: ``prior(tokens, labels) -> logits``.
        labels: (B,) int64 or None.
        guidance_scale: s in  (1 + s) * logits(class) - s * logits(no class);  0 is the plain conditional.
        no_class: the label that stands for 'no class'.
    """
    if labels is None or guidance_scale == 0:
        return lambda tokens: prior(tokens, labels)

    def predict(tokens: torch.Tensor) -> torch.Tensor:
        both = prior(tokens.repeat(2, 1), torch.cat([labels, torch.full_like(labels, no_class)]))
        conditional, unconditional = both.float().chunk(2)
        return (1 + guidance_scale) * conditional - guidance_scale * unconditional

    return predict
