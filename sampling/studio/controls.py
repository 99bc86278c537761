"""Gradio's controls, whose values are checked as every other parameter: by `checks`, under the control's label.

Gradio's own ones let through what is no number, and lists of choices where one is asked for.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from scq.engine.checks import finite_number, one_of, whole_number, yes_or_no


class Slider(gr.Slider):
    """gr.Slider for numbers from ``minimum`` to ``maximum``; whole ones, if ``step`` is whole."""

    is_template = True  # tells gradio to show it on the page like its parent class

    def preprocess(self, payload: Any) -> float:
        check = whole_number if float(self.step).is_integer() else finite_number
        return check(self.label, payload, self.minimum, self.maximum)


class WholeNumber(gr.Number):
    """gr.Number for whole numbers from ``minimum`` to ``maximum``."""

    is_template = True

    def preprocess(self, payload: Any) -> int:
        return whole_number(self.label, payload, self.minimum, self.maximum)


class Dropdown(gr.Dropdown):
    """gr.Dropdown for one of its choices, which are texts."""

    is_template = True

    def preprocess(self, payload: Any) -> str:
        return one_of(self.label, payload, [value for _, value in self.choices])


class Radio(gr.Radio):
    """gr.Radio for one of its choices, which are texts."""

    is_template = True

    def preprocess(self, payload: Any) -> str:
        return one_of(self.label, payload, [value for _, value in self.choices])


class Checkbox(gr.Checkbox):
    """gr.Checkbox for True or False."""

    is_template = True

    def preprocess(self, payload: Any) -> bool:
        return yes_or_no(self.label, payload)
