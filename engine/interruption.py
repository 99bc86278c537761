"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C: what a process finishes and saves before it ends, and how it says so."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from scq.engine.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# A scheduler sends a signal to every process of a job, and the launcher among them passes it on: both are one request.
SECONDS_OF_ONE_REQUEST = 1.0


class Signals:
    """Within its block, the first signal stops the work in an orderly way, and a second one ends the process at once.

    Signals that the program handles itself or ignores (as under nohup) stay with it, and so do all of them outside of
    the main thread. A signal that came too late for the block is passed on when the block ends.

    Args:
        hold: True lets the block go on after the first signal; it asks `agreed`, saves and raises `interruption`. False
            raises at once.
        promise: what the first signal is answered with; empty for nothing.
    """

    def __init__(self, hold: bool, promise: str = ""):
        self.asked = 0  # the number of the first signal; 0 before
        self._at_once, self._promise = not hold, promise
        self._process, self._since = os.getpid(), 0.0
        self._before: dict[int, Any] = {}
        self._answer: Callable[[], int] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                ours = getattr(before, "__func__", None) is Signals._receive
                if ours or before in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._answer is not None:
            self._answer()
        for number, before in self._before.items():
            signal.signal(number, before)
        if kind is None and self.asked in self._before:
            os.kill(self._process, self.asked)

    def agreed(self) -> bool:
        """Whether a process of the job was asked to stop; every process must call this, and all get the same answer.

        With several processes, it is the answer to the call before: it was on its way meanwhile, so that nobody waits.
        """
        from scq.engine.processes import across_processes, start_maximum  # and torch, which not every command needs

        if not across_processes():
            return self.asked > 0
        answer, self._answer = self._answer, start_maximum(self.asked)
        found = 0 if answer is None else answer()
        self.asked = self.asked or found
        return found > 0

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let the first signal end what is in the block, which can be left at any moment.

        Raises:
            Interrupted, KeyboardInterrupt: a signal came, in the block or before it.
        """
        self._at_once = True
        try:
            if self.asked:
                raise self.interruption("")
            yield
        finally:
            self._at_once = False

    def interruption(self, done: str) -> BaseException:
        """What to raise after the first signal: KeyboardInterrupt after Ctrl-C, Interrupted after the others."""
        if self.asked == signal.SIGINT:
            return KeyboardInterrupt(done)
        return Interrupted(f"{signal.Signals(self.asked).name}: {done}")

    def _receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker, whose parent decides
            return
        if not self.asked:
            self.asked, self._since = number, time.monotonic()
            if not (self._at_once and number == signal.SIGINT):  # a KeyboardInterrupt says enough
                self._reply(signal.Signals(number).name)
            if self._at_once:
                raise self.interruption("stopped")
        elif time.monotonic() - self._since > SECONDS_OF_ONE_REQUEST:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._process, number)

    def _reply(self, name: str) -> None:
        # Not print: a signal may come while something is printed, and Python's files cannot be entered twice.
        try:
            os.write(2, f"\nscq: {name}: {self._promise}\n".encode() if self._promise else b"")
        except OSError:  # the terminal is gone (SIGHUP): nobody reads, and no later line may end what is to be saved
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in (1, 2):
                os.dup2(nowhere, descriptor)


def outlive_signals(_: object = None) -> None:
    """In a worker process: leave signals to the process that the work is for, because it still needs the worker.

    They may be sent to a whole group of processes. The first SIGTERM is ignored, the next one ends the worker: it comes
    from the parent, which does not need it any more.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
