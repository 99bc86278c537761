"""The project's own errors: mistakes that users can fix, numbers that are not finite, and interruptions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class UserError(ValueError):
    """A mistake that the user can fix: the message says what was wrong, with which value, and what to do.

    The command line prints it as one line and exits with code 2; everything else is a bug and keeps its traceback.
    """


class DataError(UserError):
    """A mistake in the data: a missing or damaged set, or settings that do not fit it."""


class BadImage(DataError):
    """An image that cannot be used: unreadable, truncated, or smaller than the crop. Packing skips it and names it."""


class Interrupted(SystemExit):
    """SIGTERM, SIGUSR1 or SIGHUP ended the work in an orderly way; the message says where it was saved.

    A program that does not catch it ends with code 75 (EX_TEMPFAIL), which asks a scheduler to start it again. After
    Ctrl-C, the same is a KeyboardInterrupt.
    """

    def __init__(self, message: str):
        super().__init__(os.EX_TEMPFAIL)
        self.message = message

    def __str__(self) -> str:
        return self.message


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message; its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class NotFiniteError(ValueError):
    """NaN or infinity where a finite number was needed; during training, it means divergence."""


def require_finite(name: str, value: Tensor) -> None:
    """Check that every entry of a tensor is finite; if so, this costs one reduction.

    Args:
        name: what the message calls the tensor.

    Raises:
        NotFiniteError: an entry is NaN or infinite; the message names the first one.
    """
    if bool(value.detach().sum().isfinite()):
        return
    bad = (~value.detach().isfinite()).nonzero()
    if len(bad):  # the sum of a finite tensor may still overflow
        where = tuple(bad[0].tolist())
        raise NotFiniteError(
            f"{name} has {len(bad)} entries that are not finite; the first is {name}{list(where)} = {value[where]}"
        )
