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
    """The mean of several seeds, and their range in brackets; a dash where there is nothing."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    mean = format(statistics.fmean(there), form)
    return mean if len(there) == 1 else f"{mean} ({format(min(there), form)} - {format(max(there), form)})"


def look(row: Any, *way: str) -> Any:
    """``row[way[0]][way[1]]...``, None where it ends."""
    for key in way:
        row = None if row is None else row.get(key)
    return row


def verdict(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """better, worse or tie, lower numbers being better.

    A tie is a difference of the means under 5%, or one within the range of either's seeds.
    """
    mine, other = statistics.fmean(ours), statistics.fmean(theirs)
    overlap = min(ours) <= max(theirs) and min(theirs) <= max(ours)
    if overlap or abs(mine - other) < 0.05 * max(abs(mine), abs(other)):
        return "tie"
    return "better" if mine < other else "worse"
