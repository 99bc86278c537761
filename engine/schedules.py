"""Schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from scq.engine.errors import UserError


def learning_rate_share(step: int, total: int, warmup: int, schedule: str, final_share: float) -> float:
    """The share of the base learning rate at ``step``: a linear warm-up, then constant or a half cosine.

    Args:
        step: the step about to be taken, 0 <= step < total.
        total: steps of the whole run.
        warmup: steps of the warm-up; 0 for none.
        schedule: ``constant`` or ``cosine``.
        final_share: where the cosine ends, in [0, 1].

    Raises:
        UserError: the schedule is unknown.
    """
    if schedule not in ("constant", "cosine"):
        raise UserError(f"optimizer.schedule is {schedule!r}; it must be 'constant' or 'cosine'")
    ramp = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    if schedule == "constant":
        return ramp
    progress = min(1.0, max(0.0, (step - warmup) / max(1, total - warmup)))
    return ramp * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress)))


def linear_ramp(step: int, start: int, length: int) -> float:
    """0 before ``start``, then a linear rise to 1 over ``length`` steps."""
    if step < start:
        return 0.0
    return min(1.0, (step - start + 1) / length) if length > 0 else 1.0
