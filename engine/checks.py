"""Parameters that come from a person, a page or a file, checked by name, kind and range, everywhere in the same way."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from scq.engine.errors import UserError

MOST_WORKERS = 1024  # processes that pack or read data


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """``value`` as an int.

    Args:
        name: what the message calls the parameter.
        value: an integer of Python, numpy or torch (0-dim), or a float without a fraction, as pages and JSON send them.
        least, most: the smallest and the largest value allowed; None for no limit.

    Raises:
        UserError: it is none of these (True and False are not either), or out of range.
    """
    number = _plain(value)
    whole = isinstance(number, Integral) or (isinstance(number, float) and number.is_integer())
    if isinstance(number, bool) or not whole or not _within(number, least, most):
        raise _refused(name, value, "a whole number", least=least, most=most)
    return int(number)


def finite_number(
    name: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """``value`` as a float.

    Args:
        name: what the message calls the parameter.
        value: a number of Python, numpy or torch (0-dim).
        least, most: the smallest and the largest value allowed; None for no limit.
        above, below: limits that are not allowed themselves.

    Raises:
        UserError: it is no number (True and False are not either), NaN, infinite, or out of range.
    """
    number = _plain(value)
    limits = {"least": least, "most": most, "above": above, "below": below}
    if isinstance(number, bool) or not isinstance(number, Real):
        raise _refused(name, value, "a finite number", **limits)
    try:
        number = float(number)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number) or not _within(number, least, most, above, below):
        raise _refused(name, value, "a finite number", **limits)
    return number


def yes_or_no(name: str, value: Any) -> bool:
    """``value`` as a bool.

    Raises:
        UserError: it is not True or False.
    """
    if not isinstance(_plain(value), bool):
        raise _refused(name, value, "True or False")
    return bool(value)


def one_of(name: str, value: Any, choices: Iterable[str]) -> str:
    """``value``, if it is one of the texts ``choices``.

    Raises:
        UserError: it is not.
    """
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise _refused(name, value, f"one of {', '.join(choices)}")
    return value


def shown(value: Any) -> str:
    """``value`` for a message: short, whatever it is."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() <= 64:
            return repr(x)
        return f"{'-' if x < 0 else ''}2**{x.bit_length() - 1} or beyond"  # Python does not write thousands of digits


_SHORT = _Short()


def _plain(value: Any) -> Any:
    """Scalars of numpy and 0-dim tensors as Python's numbers; everything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _within(
    number: Any,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> bool:
    return (
        (least is None or number >= least)
        and (most is None or number <= most)
        and (above is None or number > above)
        and (below is None or number < below)
    )


def _refused(
    name: str,
    value: Any,
    kind: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> UserError:
    limits = {"at least": least, "above": above, "at most": most, "below": below}
    wanted = " and ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)
    return UserError(f"{name}={shown(value)} must be {kind}{wanted and ', '}{wanted}")
