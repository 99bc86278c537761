"""Long jobs as phases that are done once: what is finished is reused, what was interrupted goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scq.engine.files import write_file
from scq.engine.loop import resolve_precision
from scq.engine.progress import say


class Phases:
    """The phases of one job, each remembered in ``folder/NAME.json`` with its settings, result, seconds and machine.

    Args:
        total: how many phases the job has, for the person who waits.

    Attributes:
        seconds, machines: how long each phase took, and on what (`this_machine`): a job may go on elsewhere.
    """

    def __init__(self, folder: Path, total: int):
        self.folder, self.total, self.number = folder, total, 0
        self.seconds: dict[str, float] = {}
        self.machines: dict[str, str] = {}

    def run(self, name: str, settings: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of ``work``, or what an earlier run with equal settings left.

        Args:
            settings: everything the result depends on, as plain values.
            work: returns plain values; ``seconds`` among them replaces the measured time, for a phase that resumed.
        """
        self.number += 1
        path = self.folder / f"{name.replace(' ', '_')}.json"
        settings = json.loads(json.dumps(settings))
        if path.is_file():
            saved = json.loads(path.read_text())
            if saved["settings"] == settings:
                say(f"[{self.number}/{self.total}] {name}: done before ({saved['seconds']:.0f} s)")
                self.seconds[name], self.machines[name] = saved["seconds"], saved.get("machine", "not recorded")
                return saved["result"]
        say(f"[{self.number}/{self.total}] {name}")
        started = time.monotonic()
        result = work()
        seconds = round(result.pop("seconds", time.monotonic() - started), 2)
        self.seconds[name], self.machines[name] = seconds, this_machine()
        kept = {"settings": settings, "result": result, "seconds": seconds, "machine": self.machines[name]}
        write_file(path, json.dumps(kept, indent=1))
        return result


def this_machine() -> str:
    """What seconds are measured on, in words: the device, its threads, and what decides the numbers' precision."""
    threads = torch.get_num_threads()
    processor = f"{torch.cpu.get_capabilities()['cpu_name']}, {threads} thread{'s' if threads > 1 else ''}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
    precision = resolve_precision("auto").replace("no", "fp32")  # accelerate's word for it
    return f"{device}, torch {torch.__version__}, precision auto is {precision}"
