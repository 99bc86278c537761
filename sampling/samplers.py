"""Samplers: from masked tokens to grids of codes. Pure functions; every random number belongs to one image.

They all have the same signature, see `Sampler`. Tokens of ``start`` that hold a code never change; the masked ones are
drawn. `SAMPLERS` names the samplers for the command line and the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import torch

from scq.engine.checks import one_of
from scq.engine.randomness import image_gumbel, image_uniform
from scq.stage2_prior.masking import mask_share
from scq.stage2_prior.scheduler import GUIDANCE_SCHEDULES, UnmaskingScheduler


class Predict(Protocol):
    """What a sampler needs of a prior.

    Attributes:
        mask_token: the number that stands for 'not known yet'.
    """

    mask_token: int

    def __call__(self, tokens: torch.Tensor, progress: float) -> torch.Tensor:
        """Tokens (B, L) int64 and how far the generation is, in [0, 1) -> logits (B, L, K)."""
        ...


class Step(NamedTuple):
    """What a sampler's callback sees after each step."""

    step: int  # 1 .. steps
    steps: int
    tokens: torch.Tensor  # (B, h, w) int64, the mask token where nothing is revealed yet


Callback = Callable[[Step], None]


class Sampler(Protocol):
    """The signature of every sampler."""

    def __call__(
        self,
        predict: Predict,
        start: torch.Tensor,
        seeds: torch.Tensor,
        settings: UnmaskingScheduler,
        callback: Callback | None = None,
    ) -> torch.Tensor:
        """Draw the masked tokens.

        Args:
            predict: logits for every token, given codes and mask tokens.
            start: (B, h, w) int64, fixed codes, and the mask token where codes are to be drawn.
            seeds: (B,) int64, one for each image: the same seed gives the same codes in any batch.
            settings: a sampler reads those that concern it.
            callback: called after each step.

        Returns:
            (B, h, w) int64 codes.

        Raises:
            ValueError: a setting is out of range.
        """
        ...


# The order in which tokens are revealed: (step, log-probability of the drawn codes (B, L), grid (h, w), seeds (B,),
# settings) -> priorities (B, L), the highest first.
Priority = Callable[[int, torch.Tensor, tuple[int, int], torch.Tensor, UnmaskingScheduler], torch.Tensor]


def revealing(priority: Priority) -> Sampler:
    """A sampler that reveals tokens for good, in each step as many as the schedule asks for.

    Each step draws a code for every masked token, and reveals those with the highest priority.
    """

    def sample(
        predict: Predict,
        start: torch.Tensor,
        seeds: torch.Tensor,
        settings: UnmaskingScheduler,
        callback: Callback | None = None,
    ) -> torch.Tensor:
        grid, tokens = (start.shape[1], start.shape[2]), start.flatten(1)  # (B, L)
        settings.check(tokens.shape[1])
        drawable = (tokens == predict.mask_token).sum(1)  # (B,)
        for step in range(settings.steps):
            drawn, log_probability = _draw(predict, tokens, seeds, step, settings)
            masked = tokens == predict.mask_token
            left = masked.sum(1)
            # Each step reveals at least one token while any is masked, and the last one reveals all. 1e-9 keeps
            # rounding from turning a whole number into the one below: with as many steps as tokens, each reveals one.
            share = (_masked_share(step + 1, settings) * drawable.double() + 1e-9).floor().long()
            remain = torch.minimum(share, (left - 1).clamp_min(0))
            if step + 1 == settings.steps:
                remain = torch.zeros_like(remain)
            order = priority(step, log_probability, grid, seeds, settings)
            rank = order.masked_fill(~masked, -math.inf).argsort(1, descending=True).argsort(1)
            tokens = torch.where(masked & (rank < (left - remain)[:, None]), drawn, tokens)
            if callback is not None:
                callback(Step(step + 1, settings.steps, tokens.view_as(start)))
        return tokens.view_as(start)

    return sample


def noisy_confidence(
    step: int, log_probability: torch.Tensor, grid: tuple[int, int], seeds: torch.Tensor, settings: UnmaskingScheduler
) -> torch.Tensor:
    """MaskGIT's order (Chang et al., CVPR 2022, section 3.2): the most confident tokens first, by log-probability plus
    Gumbel noise that fades to zero."""
    noise = image_gumbel(seeds, log_probability.shape[1], purpose=f"choice {step}")
    return log_probability + settings.choice_temperature * (1 - (step + 1) / settings.steps) * noise


def halton_rank(
    step: int, log_probability: torch.Tensor, grid: tuple[int, int], seeds: torch.Tensor, settings: UnmaskingScheduler
) -> torch.Tensor:
    """The order of a Halton sequence (Besnier et al., arXiv 2503.17076): the tokens of a step are far apart, and so say
    little about each other."""
    rank = _halton_rank(*grid, log_probability.device)
    return -rank.float().expand_as(log_probability)


def random_order(
    step: int, log_probability: torch.Tensor, grid: tuple[int, int], seeds: torch.Tensor, settings: UnmaskingScheduler
) -> torch.Tensor:
    """Each image's own random order: the reverse process of an absorbing-state diffusion (Austin et al., arXiv
    2107.03006). With one step per token, it samples exactly from the network's any-order autoregressive model."""
    return image_uniform(seeds, log_probability.shape[1], purpose="order")


def remask(
    predict: Predict,
    start: torch.Tensor,
    seeds: torch.Tensor,
    settings: UnmaskingScheduler,
    callback: Callback | None = None,
) -> torch.Tensor:
    """ReMDM with a capped rate (Wang et al., arXiv 2503.00307): a step may mask revealed tokens again, so that early
    mistakes can be corrected. ``settings.remask`` is the cap, and there may be more steps than tokens."""
    settings.check()
    tokens, mask_token = start.flatten(1), predict.mask_token  # (B, L)
    drawable = tokens == mask_token
    for step in range(settings.steps):
        known = 1 - _masked_share(step, settings)  # alpha_t, the share revealed before the step
        known_after = 1 - _masked_share(step + 1, settings)  # alpha_s
        sigma = min(settings.remask, (1 - known_after) / known) if known > 0 else 0.0
        reveal = (known_after - (1 - sigma) * known) / (1 - known)
        drawn, _ = _draw(predict, tokens, seeds, step, settings)
        chance = image_uniform(seeds, tokens.shape[1], purpose=f"remask {step}")
        masked = tokens == mask_token
        # The last step reveals with probability one; rounding must not leave a token behind.
        shown = masked if step + 1 == settings.steps else masked & (chance < reveal)
        hidden = drawable & ~masked & (chance < sigma)
        tokens = torch.where(shown, drawn, torch.where(hidden, mask_token, tokens))
        if callback is not None:
            callback(Step(step + 1, settings.steps, tokens.view_as(start)))
    return tokens.view_as(start)


# By the names in stage2_prior.scheduler.SAMPLERS.
SAMPLERS: dict[str, Sampler] = {
    "maskgit": revealing(noisy_confidence),
    "halton": revealing(halton_rank),
    "ancestral": revealing(random_order),
    "remask": remask,
}


@dataclass
class GuidedPrior:
    """A prior as samplers call it, guided towards a class (Ho and Salimans, arXiv 2207.12598).

    Args:
        network: ``network(tokens, labels) -> logits``.
        labels: (B,) int64; None for no class.
        no_class: the label that stands for 'no class'.
        guidance_scale: s in (1 + s) * logits(class) - s * logits(no class); 0 for no guidance.
        guidance_schedule: ``constant``, or ``linear``: s grows from 0 with the progress of the generation.

    Raises:
        UserError: the schedule is unknown.
    """

    network: Callable[..., torch.Tensor]
    mask_token: int
    labels: torch.Tensor | None = None
    no_class: int = 0
    guidance_scale: float = 0.0
    guidance_schedule: str = "constant"

    def __post_init__(self) -> None:
        one_of("guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)

    def __call__(self, tokens: torch.Tensor, progress: float) -> torch.Tensor:
        if self.labels is None or self.guidance_scale == 0:
            return self.network(tokens, self.labels)
        scale = self.guidance_scale * (progress if self.guidance_schedule == "linear" else 1.0)
        labels = torch.cat([self.labels, torch.full_like(self.labels, self.no_class)])
        conditional, unconditional = self.network(tokens.repeat(2, 1), labels).float().chunk(2)
        return (1 + scale) * conditional - scale * unconditional


@cache
def halton_order(height: int, width: int) -> torch.Tensor:
    """The row-major numbers (height * width,) of positions, in the order in which the Halton sequence of bases 2 and 3
    first reaches them."""
    order: dict[int, None] = {}
    number = 0
    while len(order) < height * width:
        number += 1
        order[int(_halton(number, 2) * height) * width + int(_halton(number, 3) * width)] = None
    return torch.tensor(list(order))


@cache
def _halton_rank(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Each position's place (height * width,) in `halton_order`, kept on the device: no step need send it there."""
    return halton_order(height, width).argsort().to(device)


def _halton(number: int, base: int) -> float:
    """The radical inverse: the digits of ``number`` in ``base``, mirrored at the radix point."""
    value, weight = 0.0, 1.0
    while number:
        weight /= base
        number, digit = divmod(number, base)
        value += weight * digit
    return value


def _masked_share(step: int, settings: UnmaskingScheduler) -> float:
    """The share of tokens still masked after ``step`` steps."""
    return mask_share(torch.tensor(step / settings.steps, dtype=torch.float64), settings.schedule).item()


def _draw(
    predict: Predict, tokens: torch.Tensor, seeds: torch.Tensor, step: int, settings: UnmaskingScheduler
) -> tuple[torch.Tensor, torch.Tensor]:
    """A code for every token (B, L), and its log-probability (B, L)."""
    progress = step / settings.steps
    final = settings.temperature if settings.final_temperature is None else settings.final_temperature
    temperature = (1 - progress) * settings.temperature + progress * final
    log_probabilities = (predict(tokens, progress).float() / temperature).log_softmax(-1)  # (B, L, K)
    noise = image_gumbel(seeds, *log_probabilities.shape[1:], purpose=f"code {step}")
    drawn = (_likeliest(log_probabilities, settings) + noise).argmax(-1)
    # Of the whole distribution: if top_k or top_p leaves few codes, every choice among them would look confident.
    return drawn, log_probabilities.gather(-1, drawn[..., None]).squeeze(-1)


def _likeliest(logits: torch.Tensor, settings: UnmaskingScheduler) -> torch.Tensor:
    """Logits with -inf for codes that top_k or top_p leave out; at least one code stays."""
    if 0 < settings.top_k < logits.shape[-1]:
        least = logits.topk(settings.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if settings.top_p < 1:
        ordered, codes = logits.sort(dim=-1, descending=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= settings.top_p  # the codes before this one are already enough
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, codes, beyond), -math.inf)
    return logits
