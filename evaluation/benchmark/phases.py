"""Long jobs as phases that are done once: what is finished is reused, what was interrupted goes on.

A phase is a name, its inputs, and the work that makes a result of them. Two rules make a stale result impossible. What
identifies a phase is a function of its inputs and of nothing else. And the work is called with those inputs and with
nothing else, so that what was not named cannot be used.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from scq.engine.accelerators import cpu_capabilities, resolve_precision
from scq.engine.files import write_json
from scq.engine.measurements import from_plain, to_plain
from scq.engine.plain_json import read_json
from scq.engine.progress import say
from scq.engine.references import Referenced

Result = TypeVar("Result")
_ADVICE = "delete it to run the phase again"


@dataclass(frozen=True, eq=False)
class Phase(Generic[Result]):
    """One part of a job.

    Attributes:
        name: for people, and for the file that remembers it.
        work: called with the inputs by name, every phase among them replaced by its result.
        inputs: everything that the result depends on. An input is a plain value, a dataclass, another phase, or
            anything with an ``identity`` or a ``fingerprint`` (see `identity`).
        result: the dataclass that ``work`` returns. Where it has ``seconds``, these replace the measured time, for a
            training that was interrupted.
    """

    name: str
    work: Callable[..., Result]
    inputs: Mapping[str, Any]
    result: type[Result]

    @property
    def earlier(self) -> list[Phase[Any]]:
        """The phases among its inputs."""
        return [value for value in self.inputs.values() if isinstance(value, Phase)]


def identity(value: Any, results: Mapping[str, Any]) -> Any:
    """What an input stands for, as plain values.

    - A phase stands for its result.
    - What has a ``fingerprint``, as results with weights do and feature networks, stands for that.
    - What has an ``identity`` stands for that: a config, for what is left of it without the folders of this disk.
    - A dataclass stands for its fields, and everything else for itself.

    Args:
        results: of the phases that are done, by name.
    """
    if isinstance(value, Phase):
        return identity(results[value.name], results)
    if hasattr(value, "fingerprint"):
        return value.fingerprint
    if hasattr(value, "identity"):
        return identity(value.identity, results)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(_shareable(value)))


def _shareable(value: Any) -> Any:
    """A value in which a reference's text is replaced by the reference, and by what says that it stood for this."""
    if isinstance(value, Referenced):
        return f"{value.reference} ({value.digest[:16]})"
    if isinstance(value, Mapping):
        return {key: _shareable(each) for key, each in value.items()}
    return [_shareable(each) for each in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class _Kept:
    """What a phase's file remembers; files of older versions have no inputs, so that their phases run again."""

    inputs: dict[str, Any] | None = None
    result: Any = None
    seconds: float = 0.0
    machine: str = ""


def _read_kept(path: Path) -> _Kept | None:
    return from_plain(_Kept, read_json(path, _ADVICE), f"{path} ({_ADVICE})") if path.is_file() else None


class Job:
    """Phases in the order in which they run.

    Args:
        phases: all of them, each after those among its inputs.
        folder: where each is remembered, in ``NAME.json``: its inputs, result, seconds and machine.

    Attributes:
        results: of the phases that are done, by name.
        seconds, machines: how long each took, and on what (`this_machine`): a job may go on elsewhere.

    Raises:
        ValueError: two phases have one name, or one comes before an input of its.
    """

    def __init__(self, phases: Sequence[Phase[Any]], folder: Path):
        self.phases, self.folder = list(phases), folder
        self.results: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.machines: dict[str, str] = {}
        names: set[str] = set()
        for phase in self.phases:
            if phase.name in names or not names.issuperset(each.name for each in phase.earlier):
                raise ValueError(f"phase {phase.name!r} comes twice, or before one of its inputs")
            names.add(phase.name)

    def run(self, phase: Phase[Result]) -> Result:
        """The result of a phase: of its work now, or of an earlier run with the same inputs.

        Raises:
            UserError: the file of an earlier run is damaged, or holds a result of another shape.
        """
        title = f"[{self.phases.index(phase) + 1}/{len(self.phases)}] {phase.name}"
        if self.reuse(phase):
            say(f"{title}: done before ({self.seconds[phase.name]:.0f} s)")
        else:
            say(title)
            inputs = self._identities(phase)
            result, seconds, machine = self._work(phase)
            write_json(self._file(phase), dataclasses.asdict(_Kept(inputs, to_plain(result), seconds, machine)))
            self._finished(phase, result, seconds, machine)
        return self.found(phase)

    def reuse(self, phase: Phase[Any]) -> bool:
        """Whether the phase is done: in this job, or in an earlier run with the same inputs, whose result is taken.

        Raises:
            UserError: as for `run`.
        """
        if phase.name in self.results:
            return True
        path = self._file(phase)
        saved = _read_kept(path)
        if saved is None or saved.inputs != self._identities(phase):
            return False
        self._finished(
            phase, from_plain(phase.result, saved.result, f"{path} ({_ADVICE})"), saved.seconds, saved.machine
        )
        return True

    def supply(self, phase: Phase[Result], result: Result) -> None:
        """Remember the result of a phase whose work was done without it, for a job that goes on elsewhere."""
        kept = _Kept(self._identities(phase), to_plain(result), 0.0, this_machine())
        write_json(self._file(phase), dataclasses.asdict(kept))

    def _identities(self, phase: Phase[Any]) -> dict[str, Any]:
        return {name: identity(value, self.results) for name, value in phase.inputs.items()}

    def _finished(self, phase: Phase[Any], result: Any, seconds: float, machine: str) -> None:
        self.results[phase.name], self.seconds[phase.name], self.machines[phase.name] = result, seconds, machine

    def _file(self, phase: Phase[Any]) -> Path:
        return self.folder / f"{phase.name.replace(' ', '_')}.json"

    def found(self, phase: Phase[Result]) -> Result:
        """The result of a phase that ran.

        Raises:
            KeyError: it did not run yet.
        """
        return self.results[phase.name]

    def _work(self, phase: Phase[Result]) -> tuple[Result, float, str]:
        given = {
            name: self.results[value.name] if isinstance(value, Phase) else value
            for name, value in phase.inputs.items()
        }
        started = time.monotonic()
        result = phase.work(**given)
        return result, round(getattr(result, "seconds", time.monotonic() - started), 2), this_machine()


def this_machine() -> str:
    """What seconds are measured on, in words: the device, its threads, and what decides the numbers' precision."""
    threads = torch.get_num_threads()
    processor = f"{cpu_capabilities().get('cpu_name', 'CPU')}, {threads} thread{'s' if threads > 1 else ''}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
    precision = resolve_precision("auto").replace("no", "fp32")  # accelerate's word for it
    return f"{device}, torch {torch.__version__}, precision auto is {precision}"
