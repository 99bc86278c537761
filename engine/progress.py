"""Progress that a person can read: live bars on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0
console = Console(stderr=True, highlight=False)


class Report(Protocol):
    """Takes how much is done, out of how much, and optionally a short text."""

    def __call__(self, done: int, total: int, info: str = "") -> None: ...


class Bar:
    """The progress of one task: call it with (done, total) and optionally a short text, which stays until the next."""

    def __init__(self, title: str, progress: Progress | None):
        self.title = title
        self.progress = progress
        self.task = progress.add_task(title, total=None, info="") if progress else None
        self.last_line = time.monotonic()
        self.first: tuple[float, int] | None = None  # when the first report came, and how much was done by then
        self.info = ""

    def __call__(self, done: int, total: int, info: str = "") -> None:
        self.info = info or self.info
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done, total=total, info=self.info)
            return
        now = time.monotonic()
        if self.first is None:
            self.first = now, done
        if now - self.last_line < SECONDS_BETWEEN_LINES and done < total:
            return
        self.last_line = now
        started, done_before = self.first
        # The pace needs two reports: what was done before the first may be an earlier run's work, or start-up.
        left = f", {(now - started) / (done - done_before) * (total - done):.0f} s left" if done > done_before else ""
        print(f"{self.title}: {done}/{total}{left} {self.info}".rstrip(), file=sys.stderr, flush=True)


@contextmanager
def progress_bar(title: str, quiet: bool = False) -> Iterator[Report]:
    """A progress bar for the body of the ``with`` statement; ``quiet`` in every process but the main one."""
    if quiet:
        yield lambda done, total, info="": None
        return
    if not console.is_terminal:
        yield Bar(title, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}", style="dim"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(title, progress)


def say(text: str) -> None:
    """Print a line for the user on standard error; standard output is kept for results."""
    console.print(text, markup=False, soft_wrap=True)
