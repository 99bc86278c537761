"""Numbers as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


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


class Seeds(NamedTuple):
    """One number of an arm: what each seed gave, and how far it may be off in each direction."""

    values: Sequence[float]
    error: float = 0.0

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    def range(self, assumed: float = 0.0) -> float:
        """From the lowest to the highest seed, with the error to both sides; of one seed ``assumed`` times its mean."""
        between = max(self.values) - min(self.values) if len(self.values) > 1 else assumed * abs(self.mean)
        return between + 2 * self.error


def widest_range(arms: Iterable[Seeds]) -> float:
    """The widest range between seeds, as a share of the mean, of the arms that have several; 0 where none has."""
    several = [each for each in arms if len(each.values) > 1]
    return max(((max(each.values) - min(each.values)) / abs(each.mean) for each in several), default=0.0)


def verdict(ours: Seeds, theirs: Seeds, assumed: float = 0.0) -> str:
    """better, worse or tie, lower numbers being better.

    A tie is a difference of the means under 5%, or no larger than the wider of both ranges.

    Args:
        assumed: what an arm of one seed is taken to range over, as a share of its mean: nobody knows how lucky its
            seed was, so the `widest_range` of arms that have several stands in.
    """
    apart = abs(ours.mean - theirs.mean)
    if apart < 0.05 * max(abs(ours.mean), abs(theirs.mean)) or apart <= max(ours.range(assumed), theirs.range(assumed)):
        return "tie"
    return "better" if ours.mean < theirs.mean else "worse"


def comparison(ours: Seeds, theirs: Seeds, assumed: float = 0.0) -> str:
    """Our mean as a share of theirs, and the `verdict`: "0.82 (better)"."""
    # KID is unbiased, so that it may come out below zero.
    share = f"{ours.mean / theirs.mean:.2f}" if theirs.mean > 0 else "-"
    return f"{share} ({verdict(ours, theirs, assumed)})"
