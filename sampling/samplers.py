"""Samplers: from masked places to a grid of codes. Pure functions; every random number belongs to one image.

All of them take the same arguments. Places of ``start`` that hold a code are fixed and never change; the others are
drawn. `SAMPLERS` names the samplers for the command line and the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from scq.engine.randomness import image_gumbel, image_uniform
from scq.stage2_prior.masking import mask_share

# Tokens (B, L) and how far the generation is, in [0, 1) -> logits (B, L, K).
Predict = Callable[[torch.Tensor, float], torch.Tensor]


class Step(NamedTuple):
    """What a sampler's callback sees after each step."""

    step: int  # 1 .. steps
    steps: int
    tokens: torch.Tensor  # (B, L) int64, the mask token where nothing is revealed yet


@dataclass
class SamplerSettings:
    """What every sampler is told."""

    steps: int = 12  # at least 1; of samplers that reveal for good, at most the number of tokens
    schedule: str = "cosine"  # how much is still masked after each step, see stage2_prior.masking.mask_share
    temperature: float = 1.0  # of the codes' distribution, > 0; below 1 sharpens it
    final_temperature: float | None = None  # temperature moves to this in a straight line; None: it stays
    top_k: int = 0  # draw among the likeliest codes only; 0: among all
    top_p: float = 1.0  # draw among the likeliest codes that together have this probability, in (0, 1]
    choice_temperature: float = 4.5  # maskgit: scale of the noise on confidences, annealed to 0; 4.5 is the original's
    remask: float = 0.1  # remask: the largest share of revealed tokens that one step may mask again, in [0, 1]

    def check(self, most_steps: int | None = None) -> None:
        """Raise ValueError naming the first setting that is out of its range."""
        for name, good, what in (
            ("steps", self.steps >= 1, "at least 1"),
            ("steps", most_steps is None or self.steps <= most_steps, f"at most {most_steps}, the number of tokens"),
            ("temperature", self.temperature > 0, "above 0"),
            ("final_temperature", self.final_temperature is None or self.final_temperature > 0, "above 0 or None"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("choice_temperature", self.choice_temperature >= 0, "at least 0"),
            ("remask", 0 <= self.remask <= 1, "in [0, 1]"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {what}")
        mask_share(torch.zeros(1), self.schedule)


def maskgit(
    predict: Predict,
    start: torch.Tensor,
    seeds: torch.Tensor,
    mask_token: int,
    grid: tuple[int, int],
    settings: SamplerSettings,
    callback: Callable[[Step], None] | None = None,
) -> torch.Tensor:
    """MaskGIT's parallel decoding (Chang et al., CVPR 2022, section 3.2): reveal the most confident tokens first.

    Each step draws a code for every masked place, then keeps those whose log-probability plus annealed Gumbel noise is
    highest, as many as the schedule asks for. A revealed token never changes.

    Args:
        predict: logits for every place, given codes and mask tokens.
        start: (B, L) int64, fixed codes, and the mask token where codes are to be drawn; L = h * w in row-major order.
        seeds: (B,) int64, one for each image: the same seed gives the same tokens in any batch.
        mask_token: the number that stands for 'not known yet'.
        grid: (h, w).
        settings: see SamplerSettings.
        callback: called after each step.

    Returns:
        (B, L) int64 codes.

    Raises:
        ValueError: a setting is out of range.
    """

    def priority(step: int, log_probability: torch.Tensor) -> torch.Tensor:
        noise = image_gumbel(seeds, start.shape[1], purpose=f"choice {step}")
        return log_probability + settings.choice_temperature * (1 - (step + 1) / settings.steps) * noise

    return _reveal(predict, start, seeds, mask_token, settings, priority, callback)


def halton(
    predict: Predict,
    start: torch.Tensor,
    seeds: torch.Tensor,
    mask_token: int,
    grid: tuple[int, int],
    settings: SamplerSettings,
    callback: Callable[[Step], None] | None = None,
) -> torch.Tensor:
    """Reveal places in the order of a Halton sequence (Besnier et al., arXiv 2503.17076): those of one step lie far
    apart and say little about each other. Arguments as for `maskgit`."""
    rank = halton_order(*grid).argsort().to(start.device)  # (L,)
    early = -rank.float().expand_as(start)
    return _reveal(predict, start, seeds, mask_token, settings, lambda step, _: early, callback)


def ancestral(
    predict: Predict,
    start: torch.Tensor,
    seeds: torch.Tensor,
    mask_token: int,
    grid: tuple[int, int],
    settings: SamplerSettings,
    callback: Callable[[Step], None] | None = None,
) -> torch.Tensor:
    """Reveal places in each image's own random order: the reverse process of an absorbing-state diffusion (Austin et
    al., arXiv 2107.03006). With a step for every token it draws from the network's any-order autoregressive model
    exactly. Arguments as for `maskgit`."""
    order = image_uniform(seeds, start.shape[1], purpose="order")
    return _reveal(predict, start, seeds, mask_token, settings, lambda step, _: order, callback)


def remask(
    predict: Predict,
    start: torch.Tensor,
    seeds: torch.Tensor,
    mask_token: int,
    grid: tuple[int, int],
    settings: SamplerSettings,
    callback: Callable[[Step], None] | None = None,
) -> torch.Tensor:
    """ReMDM with a capped rate (Wang et al., arXiv 2503.00307): a step may mask revealed tokens again, so
    that early mistakes can be mended. Arguments as for `maskgit`; ``settings.remask`` is the cap, and there may be more
    steps than tokens."""
    settings.check()
    tokens, drawable = start.clone(), start == mask_token
    for step in range(settings.steps):
        known = 1 - _share(step, settings)  # alpha_t, the share revealed before the step
        known_after = 1 - _share(step + 1, settings)  # alpha_s
        sigma = min(settings.remask, (1 - known_after) / known) if known > 0 else 0.0
        reveal = (known_after - (1 - sigma) * known) / (1 - known)
        drawn, _ = _draw(predict, tokens, seeds, step, settings)
        chance = image_uniform(seeds, start.shape[1], purpose=f"remask {step}")
        masked = tokens == mask_token
        # The last step reveals with probability one; rounding must not leave a place behind.
        shown = masked if step + 1 == settings.steps else masked & (chance < reveal)
        hidden = drawable & ~masked & (chance < sigma)
        tokens = torch.where(shown, drawn, torch.where(hidden, mask_token, tokens))
        if callback is not None:
            callback(Step(step + 1, settings.steps, tokens))
    return tokens


Sampler = Callable[..., torch.Tensor]
SAMPLERS: dict[str, Sampler] = {"maskgit": maskgit, "halton": halton, "ancestral": ancestral, "remask": remask}
MAY_TAKE_MORE_STEPS_THAN_TOKENS = frozenset(["remask"])


def guided(
    prior: Callable[..., torch.Tensor],
    labels: torch.Tensor | None,
    guidance_scale: float,
    no_class: int,
    schedule: str = "constant",
) -> Predict:
    """A prior as a function of tokens, guided towards its class (Ho and Salimans, arXiv 2207.12598).

    Args:
        prior: ``prior(tokens, labels) -> logits``.
        labels: (B,) int64 or None.
        guidance_scale: s in  (1 + s) * logits(class) - s * logits(no class);  0 is the plain conditional.
        no_class: the label that stands for 'no class'.
        schedule: ``constant``, or ``linear``: s grows from 0 with the progress of the generation.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in ("constant", "linear"):
        raise ValueError(f"guidance schedule {schedule!r} does not exist; choose constant or linear")
    if labels is None or guidance_scale == 0:
        return lambda tokens, progress: prior(tokens, labels)

    def predict(tokens: torch.Tensor, progress: float) -> torch.Tensor:
        scale = guidance_scale * (progress if schedule == "linear" else 1.0)
        both = prior(tokens.repeat(2, 1), torch.cat([labels, torch.full_like(labels, no_class)]))
        conditional, unconditional = both.float().chunk(2)
        return (1 + scale) * conditional - scale * unconditional

    return predict


def halton_order(height: int, width: int) -> torch.Tensor:
    """(height * width,) places in row-major numbers, in the order in which the Halton sequence of bases 2 and 3 first
    falls on them."""
    order: dict[int, None] = {}
    number = 0
    while len(order) < height * width:
        number += 1
        order[int(_halton(number, 2) * height) * width + int(_halton(number, 3) * width)] = None
    return torch.tensor(list(order))


def _halton(number: int, base: int) -> float:
    """The radical inverse: the digits of ``number`` in ``base``, mirrored at the point."""
    value, weight = 0.0, 1.0
    while number:
        weight /= base
        number, digit = divmod(number, base)
        value += weight * digit
    return value


def _reveal(
    predict: Predict,
    start: torch.Tensor,
    seeds: torch.Tensor,
    mask_token: int,
    settings: SamplerSettings,
    priority: Callable[[int, torch.Tensor], torch.Tensor],
    callback: Callable[[Step], None] | None,
) -> torch.Tensor:
    """Reveal masked places for good, in every step those with the highest priority(step, log-probability) (B, L)."""
    settings.check(start.shape[1])
    tokens = start.clone()
    drawable = (start == mask_token).sum(1)  # (B,)
    for step in range(settings.steps):
        drawn, log_probability = _draw(predict, tokens, seeds, step, settings)
        masked = tokens == mask_token
        left = masked.sum(1)
        # At least one token is revealed by every step while there are any, and all by the last. Rounding must not take
        # a whole number for the one below: as many steps as tokens reveal one each.
        share = (_share(step + 1, settings) * drawable.double() + 1e-9).floor().long()
        remain = torch.minimum(share, (left - 1).clamp_min(0))
        if step + 1 == settings.steps:
            remain = torch.zeros_like(remain)
        order = priority(step, log_probability).masked_fill(~masked, -math.inf).argsort(1, descending=True).argsort(1)
        tokens = torch.where(masked & (order < (left - remain)[:, None]), drawn, tokens)
        if callback is not None:
            callback(Step(step + 1, settings.steps, tokens))
    return tokens


def _share(step: int, settings: SamplerSettings) -> float:
    """The share of places still masked after ``step`` steps."""
    return mask_share(torch.tensor(step / settings.steps, dtype=torch.float64), settings.schedule).item()


def _draw(
    predict: Predict, tokens: torch.Tensor, seeds: torch.Tensor, step: int, settings: SamplerSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """A code for every place (B, L), and its log-probability (B, L)."""
    progress = step / settings.steps
    final = settings.temperature if settings.final_temperature is None else settings.final_temperature
    temperature = (1 - progress) * settings.temperature + progress * final
    log_probabilities = (predict(tokens, progress).float() / temperature).log_softmax(-1)  # (B, L, K)
    noise = image_gumbel(seeds, *log_probabilities.shape[1:], purpose=f"code {step}")
    drawn = (_likeliest(log_probabilities, settings) + noise).argmax(-1)
    # Of the whole distribution: among few codes that are left, every choice would look sure.
    return drawn, log_probabilities.gather(-1, drawn[..., None]).squeeze(-1)


def _likeliest(logits: torch.Tensor, settings: SamplerSettings) -> torch.Tensor:
    """Logits with -inf for codes that top_k or top_p leave out; at least one code stays."""
    if 0 < settings.top_k < logits.shape[-1]:
        least = logits.topk(settings.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if settings.top_p < 1:
        ordered, codes = logits.sort(dim=-1, descending=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= settings.top_p  # what lies before a code is already enough
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, codes, beyond), -math.inf)
    return logits
