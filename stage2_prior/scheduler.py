"""The settings of a sampler, as the diffusers component that saves them with a model.

The samplers themselves, which fill in masked tokens with these settings, are in sampling.samplers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin

from scq.engine.config import as_dict, load_config
from scq.stage2_prior.masking import mask_share

SAMPLERS = ("maskgit", "halton", "ancestral", "remask")
MAY_TAKE_MORE_STEPS_THAN_TOKENS = frozenset(["remask"])  # the others reveal at least one token in each step, for good


@dataclass
class UnmaskingScheduler(SchedulerMixin, ConfigMixin):
    """The settings of a sampler, saved with a model as its defaults (``scheduler/scheduler_config.json``)."""

    steps: int = 12  # at least 1, and at most the number of tokens for every sampler but remask
    schedule: str = "cosine"  # how much is still masked after each step, see stage2_prior.masking.mask_share
    temperature: float = 1.0  # of the codes' distribution, > 0; below 1 sharpens it
    final_temperature: float | None = None  # temperature changes linearly to this; None: it stays as it is
    top_k: int = 0  # draw from this many of the likeliest codes; 0: from all
    top_p: float = 1.0  # draw from the likeliest codes that together have this probability, in (0, 1]
    choice_temperature: float = 4.5  # maskgit: scale of the noise on confidences, annealed to 0; 4.5 is the original's
    remask: float = 0.1  # remask: the largest share of revealed tokens that one step may mask again, in [0, 1]
    sampler: str = "maskgit"  # one of SAMPLERS
    guidance_scale: float = 0.0  # towards the class, for a class-conditional prior; 0 for no guidance
    guidance_schedule: str = "constant"  # constant | linear
    refine: bool = True  # restore the convex detail, if the model has a refiner
    refiner_steps: int = 8  # steps of a refiner that is a flow; >= 1

    def __post_init__(self) -> None:
        self.register_to_config(**asdict(self))

    def check(self, tokens: int | None = None) -> None:
        """Make sure that every setting is in its range.

        Args:
            tokens: tokens per image, the limit on the steps of every sampler but remask; None for no limit.

        Raises:
            ValueError: names the first setting that is out of range.
        """
        most = None if self.sampler in MAY_TAKE_MORE_STEPS_THAN_TOKENS else tokens
        for name, good, what in (
            ("sampler", self.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
            ("steps", self.steps >= 1, "at least 1"),
            ("steps", most is None or self.steps <= most, f"at most {most}, the number of tokens"),
            ("temperature", self.temperature > 0, "above 0"),
            ("final_temperature", self.final_temperature is None or self.final_temperature > 0, "above 0 or None"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("choice_temperature", self.choice_temperature >= 0, "at least 0"),
            ("remask", 0 <= self.remask <= 1, "in [0, 1]"),
            ("refiner_steps", self.refiner_steps >= 1, "at least 1"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {what}")
        mask_share(torch.zeros(1), self.schedule)

    def changed(self, **changes: float | str | None) -> UnmaskingScheduler:
        """A copy with some settings changed; those given as None stay as they are.

        Raises:
            ValueError: a setting does not exist, or is out of range.
        """
        known = [field.name for field in fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise ValueError(f"there is no sampling setting {unknown[0]!r}; choose from: {', '.join(known)}")
        settings = UnmaskingScheduler(**{**asdict(self), **{k: v for k, v in changes.items() if v is not None}})
        settings.check()
        return settings

    def for_length(self, tokens: int, **changes: float | str | None) -> UnmaskingScheduler:
        """As `changed`, for images of ``tokens`` tokens: lowers the default steps to as many as the sampler can take.

        Steps that ``changes`` asks for are kept; if they are too many, the sampler will refuse them.

        Raises:
            ValueError: as `changed`.
        """
        settings = self.changed(**changes)
        if changes.get("steps") is None and settings.sampler not in MAY_TAKE_MORE_STEPS_THAN_TOKENS:
            settings = settings.changed(steps=min(settings.steps, tokens))
        return settings


def parse_settings(texts: list[str]) -> dict[str, float | str | None]:
    """``["steps=8", "sampler=halton"]`` -> those settings, with their types.

    Raises:
        UserError: a setting does not exist or has the wrong type.
    """
    settings = as_dict(load_config(UnmaskingScheduler, None, texts))
    return {name: settings[name] for name in (text.partition("=")[0] for text in texts)}
