"""Long jobs as phases that are done once: what is finished is reused, what was interrupted goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import write_atomically
from engine.progress import say


class Phases:
    """The phases of one job, each remembered in ``folder/NAME.json`` with its settings, result and seconds.

    Args:
        total: how many phases the job has, for the person who waits.
    """

    def __init__(self, folder: Path, total: int):
        self.folder, self.total, self.number = folder, total, 0
        self.seconds: dict[str, float] = {}

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
                self.seconds[name] = saved["seconds"]
                return saved["result"]
        say(f"[{self.number}/{self.total}] {name}")
        started = time.monotonic()
        result = work()
        seconds = round(result.pop("seconds", time.monotonic() - started), 2)
        self.seconds[name] = seconds
        write_atomically(path, json.dumps({"settings": settings, "result": result, "seconds": seconds}, indent=1))
        return result
