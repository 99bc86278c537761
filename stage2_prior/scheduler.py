"""The settings of a sampler, as the diffusers component that saves them with a model.

The samplers themselves, which fill in masked tokens with these settings, are in sampling.samplers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin

from scq.engine.checks import finite_number, one_of, whole_number, yes_or_no
from scq.engine.config import as_dict, load_config
from scq.engine.errors import UserError
from scq.stage2_prior.masking import SCHEDULES

SAMPLERS = ("maskgit", "halton", "ancestral", "remask")
MAY_TAKE_MORE_STEPS_THAN_TOKENS = frozenset(["remask"])  # the others reveal at least one token in each step, for good
GUIDANCE_SCHEDULES = ("constant", "linear")
MOST_STEPS = 10_000  # far more than help any sampler, and few enough that a model from others cannot draw for ever
LARGEST_TOP_K = 2**31 - 1
TEMPERATURES = (1e-6, 1e6)  # beyond, logits that are divided by it leave the range of float32


@dataclass
class UnmaskingScheduler(SchedulerMixin, ConfigMixin):
    """The settings of a sampler, saved with a model as its defaults (``scheduler/scheduler_config.json``)."""

    steps: int = 12  # 1 to 10000, and at most the number of tokens for every sampler but remask
    schedule: str = "cosine"  # how much is still masked after each step, see stage2_prior.masking.mask_share
    temperature: float = 1.0  # of the codes' distribution, 1e-6 to 1e6; below 1 sharpens it
    final_temperature: float | None = None  # temperature changes linearly to this; None: it stays as it is
    top_k: int = 0  # draw from this many of the likeliest codes; 0: from all
    top_p: float = 1.0  # draw from the likeliest codes that together have this probability, in (0, 1]
    choice_temperature: float = 4.5  # maskgit: scale of the noise on confidences, annealed to 0; 4.5 is the original's
    remask: float = 0.1  # remask: the largest share of revealed tokens that one step may mask again, in [0, 1]
    sampler: str = "maskgit"  # one of SAMPLERS
    guidance_scale: float = 0.0  # towards the class, for a class-conditional prior, 0 to 1000; 0 for no guidance
    guidance_schedule: str = "constant"  # constant | linear
    refine: bool = True  # restore the convex detail, if the model has a refiner
    refiner_steps: int = 8  # steps of a refiner that is a flow; 1 to 10000

    def __post_init__(self) -> None:
        self.check()
        self.register_to_config(**asdict(self))

    def check(self, tokens: int | None = None) -> None:
        """Make sure that every setting has its type and is in its range; numbers of numpy and torch become Python's.

        Args:
            tokens: tokens per image, the limit on the steps of every sampler but remask; None for no limit.

        Raises:
            UserError: names the first setting that is out of range.
        """
        self.sampler = one_of("sampler", self.sampler, SAMPLERS)
        self.schedule = one_of("schedule", self.schedule, SCHEDULES)
        self.guidance_schedule = one_of("guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)
        self.steps = whole_number("steps", self.steps, 1, MOST_STEPS)
        self.refiner_steps = whole_number("refiner_steps", self.refiner_steps, 1, MOST_STEPS)
        self.top_k = whole_number("top_k", self.top_k, 0, LARGEST_TOP_K)
        self.temperature = finite_number("temperature", self.temperature, *TEMPERATURES)
        if self.final_temperature is not None:
            self.final_temperature = finite_number("final_temperature", self.final_temperature, *TEMPERATURES)
        self.top_p = finite_number("top_p", self.top_p, above=0, most=1)
        self.choice_temperature = finite_number("choice_temperature", self.choice_temperature, 0, 1e6)
        self.remask = finite_number("remask", self.remask, 0, 1)
        self.guidance_scale = finite_number("guidance_scale", self.guidance_scale, 0, 1000)
        self.refine = yes_or_no("refine", self.refine)
        if tokens is not None and self.steps > tokens and self.sampler not in MAY_TAKE_MORE_STEPS_THAN_TOKENS:
            raise UserError(f"steps={self.steps} must be at most {tokens}, the number of tokens")

    def changed(self, **changes: float | str | None) -> UnmaskingScheduler:
        """A copy with some settings changed; those given as None stay as they are.

        Raises:
            UserError: a setting does not exist, or is out of range.
        """
        known = [field.name for field in fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise UserError(f"there is no sampling setting {unknown[0]!r}; choose from: {', '.join(known)}")
        return UnmaskingScheduler(**{**asdict(self), **{k: v for k, v in changes.items() if v is not None}})

    def for_length(self, tokens: int, **changes: float | str | None) -> UnmaskingScheduler:
        """As `changed`, for images of ``tokens`` tokens: lowers the default steps to as many as the sampler can take.

        Steps that ``changes`` asks for are kept; if they are too many, the sampler will refuse them.

        Raises:
            UserError: as `changed`.
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
