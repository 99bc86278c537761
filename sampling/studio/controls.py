"""Controls for numbers that are checked as every other parameter, and messages for users' mistakes.

Gradio's own controls end in a traceback on what is no number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from scq.engine.checks import finite_number, whole_number


@contextmanager
def mistakes_shown() -> Iterator[None]:
    """Show a ValueError in the block as a message on the page; the server's log gets no traceback of it."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


class Slider(gr.Slider):
    """gr.Slider for numbers from ``minimum`` to ``maximum``; whole ones, if ``step`` is whole."""

    is_template = True  # tells gradio to show it on the page like its parent class

    def preprocess(self, payload: Any) -> float:
        check = whole_number if float(self.step).is_integer() else finite_number
        with mistakes_shown():
            return check(self.label, payload, self.minimum, self.maximum)


class WholeNumber(gr.Number):
    """gr.Number for whole numbers from ``minimum`` to ``maximum``."""

    is_template = True

    def preprocess(self, payload: Any) -> int:
        with mistakes_shown():
            return whole_number(self.label, payload, self.minimum, self.maximum)
