"""How images are drawn, as the component of a diffusers pipeline that a scheduler is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin

from scq.engine.config import as_dict, load_config
from scq.sampling.samplers import MAY_TAKE_MORE_STEPS_THAN_TOKENS, SAMPLERS, SamplerSettings


@dataclass
class UnmaskingScheduler(SamplerSettings, SchedulerMixin, ConfigMixin):
    """The settings of a sampler, saved with a model as its defaults (``scheduler/scheduler_config.json``)."""

    sampler: str = "maskgit"  # one of sampling.samplers.SAMPLERS
    guidance_scale: float = 0.0  # for a class-conditional prior; 0 is the plain conditional
    guidance_schedule: str = "constant"  # constant | linear
    refine: bool = True  # give the convex detail back, where the model has a refiner
    refiner_steps: int = 8  # of a flow; >= 1

    def __post_init__(self) -> None:
        self.register_to_config(**asdict(self))

    def changed(self, **changes: float | str | None) -> UnmaskingScheduler:
        """A copy with other settings; those that are None stay as they are.

        Raises:
            ValueError: a setting does not exist or is out of its range.
        """
        known = [field.name for field in fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise ValueError(f"sampling has no setting {unknown[0]!r}; it has: {', '.join(known)}")
        settings = UnmaskingScheduler(**{**asdict(self), **{k: v for k, v in changes.items() if v is not None}})
        if settings.refiner_steps < 1:
            raise ValueError(f"refiner_steps={settings.refiner_steps} must be at least 1")
        if settings.sampler not in SAMPLERS:
            raise ValueError(f"sampler {settings.sampler!r} does not exist; choose {', '.join(SAMPLERS)}")
        settings.check()
        return settings

    def for_length(self, tokens: int, **changes: float | str | None) -> UnmaskingScheduler:
        """As `changed`, for grids of so many tokens: a default of more steps than a sampler can take there is lowered.

        Raises:
            ValueError: as `changed`; steps that ``changes`` asks for stay, and are the sampler's to refuse.
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
