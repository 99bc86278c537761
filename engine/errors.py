"""The errors that the project tells apart: mistakes of the person at the keyboard, and numbers gone astray."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class UserError(ValueError):
    """A mistake that the user can mend: the message names what was wrong, with which value, and what to do.

    The command line prints it as one line and exits with code 2; everything else is a bug and keeps its traceback.
    """


class DataError(UserError):
    """A mistake in the data: a missing or damaged set, or settings that do not fit it."""


class BadImage(DataError):
    """One image that cannot be used: unreadable, truncated, or smaller than the crop. Packing skips and names it."""


class NotFiniteError(ValueError):
    """NaN or infinity where a number was needed; in training, the sign of a divergence."""


def require_finite(name: str, value: Tensor) -> None:
    """Check that every entry of a tensor is finite; one reduction where all is well.

    Raises:
        NotFiniteError: names the first entry that is NaN or infinite.
    """
    if bool(value.detach().sum().isfinite()):
        return
    bad = (~value.detach().isfinite()).nonzero()
    if len(bad):  # the sum of a finite tensor may still overflow
        where = tuple(bad[0].tolist())
        raise NotFiniteError(
            f"{name} has {len(bad)} entries that are not finite; the first is {name}{list(where)} = {value[where]}"
        )
