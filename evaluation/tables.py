"""Numbers as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def markdown_table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """A table as lines of Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def spread(values: Sequence[float | None], form: str) -> str:
    """The mean of several seeds, and their range in brackets where they differ; a dash where there is nothing."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    mean, low, high = (format(value, form) for value in (statistics.fmean(there), min(there), max(there)))
    return mean if low == high else f"{mean} ({low} - {high})"


def look(row: Any, *way: str) -> Any:
    """``row[way[0]][way[1]]...``, None where it ends."""
    for key in way:
        row = None if row is None else row.get(key)
    return row


def verdict(ours: Sequence[float], theirs: Sequence[float], our_error: float = 0.0, their_error: float = 0.0) -> str:
    """better, worse or tie, lower numbers being better.

    A tie is a difference of the means under 5%, or one within the range of either's seeds. Where there is one seed, the
    error of its number stands for their range; so two single seeds tie within the sum of both errors.

    Args:
        our_error, their_error: used where there is one seed.
    """
    mine, other = statistics.fmean(ours), statistics.fmean(theirs)
    (low, high), (their_low, their_high) = _range(ours, our_error), _range(theirs, their_error)
    overlap = low <= their_high and their_low <= high
    if overlap or abs(mine - other) < 0.05 * max(abs(mine), abs(other)):
        return "tie"
    return "better" if mine < other else "worse"


def _range(values: Sequence[float], error: float) -> tuple[float, float]:
    return (values[0] - error, values[0] + error) if len(values) == 1 else (min(values), max(values))


def comparison(ours: Sequence[float], theirs: Sequence[float], our_error: float = 0.0, their_error: float = 0.0) -> str:
    """Our mean as a share of theirs, and the `verdict`: "0.82 (better)"."""
    mine, other = statistics.fmean(ours), statistics.fmean(theirs)
    share = f"{mine / other:.2f}" if other > 0 else "-"  # KID is unbiased, so that it may come out below zero
    return f"{share} ({verdict(ours, theirs, our_error, their_error)})"
