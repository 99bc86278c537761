"""Checkpoints that are whole or absent, and hold everything a run needs to go on bit for bit.

A checkpoint is a folder ``step_00001000`` with one safetensors file for every module (and ``ema``), the optimizers'
state, and ``state.json``. The learning rate, the data position and all random numbers are pure functions of the step
(:mod:`engine.schedules`, :mod:`data.stream`, :mod:`engine.randomness`), so the step is all there is to save of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from scq.engine.errors import UserError
from scq.engine.files import atomic_folder
from scq.engine.sharding import is_sharded, load_optimizer_state, load_whole, optimizer_state, whole_state


def whole_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, newest last."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


class Checkpoints:
    """The checkpoints of one run, newest last.

    Args:
        folder: where they live; made when the first one is written.
        keep: how many of the newest to keep; the one with the lowest score stays as well.
        modules: what to save and restore, by name.
        optimizers: likewise.
    """

    def __init__(
        self, folder: Path, keep: int, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
    ):
        self.folder, self.keep, self.modules, self.optimizers = folder, max(1, keep), modules, optimizers

    def all(self) -> list[Path]:
        return whole_checkpoints(self.folder)

    def latest(self) -> Path | None:
        return self.all()[-1] if self.all() else None

    def best(self) -> Path | None:
        """The checkpoint with the lowest score, the first of them; None where none has a score."""
        scores = {path: json.loads((path / "state.json").read_text()).get("score") for path in self.all()}
        scored = [path for path, score in scores.items() if score is not None]
        return min(scored, key=scores.get) if scored else None

    def save(self, step: int, *, write: bool = True, score: float | None = None, **state: float | dict) -> Path:
        """Write the state after ``step`` steps; the folder appears under its final name when it is complete.

        Every process must call it, and the main one alone has ``write``: a model may be divided among them.

        Raises:
            UserError: the disk is full, or not writable.
        """
        final = self.folder / f"step_{step:08d}"
        divided = {name: whole_state(module) for name, module in self.modules.items() if is_sharded(module)}
        optimizers = {name: optimizer_state(self._owner(name), o) for name, o in self.optimizers.items()}
        if not write:
            return final
        try:
            with atomic_folder(final) as fresh:
                for name, module in self.modules.items():
                    path = fresh / f"{name}.safetensors"
                    if name in divided:
                        save_file({key: t.contiguous() for key, t in divided[name].items()}, path)
                    else:
                        save_model(module, str(path))
                torch.save(optimizers, fresh / "optimizers.pt")
                (fresh / "state.json").write_text(json.dumps({"step": step, "score": score, **state}))
        except (OSError, RuntimeError, SafetensorError) as error:  # Python's, torch's, and safetensors'
            raise UserError(
                f"checkpoint {final} cannot be written ({_reason(error)}); when there is room, run again: training "
                f"goes on from {self.latest() or 'its start'}"
            ) from error
        best = self.best()
        for old in self.all()[: -self.keep]:
            if old != best:
                shutil.rmtree(old)
        return final

    def _owner(self, optimizer: str) -> nn.Module:
        """The module that an optimizer of this name moves: its namesake, else the model."""
        return self.modules.get(optimizer, self.modules["model"])

    def restore(self) -> dict:
        """Load the newest checkpoint into the modules and optimizers; ``{"step": 0}`` where there is none.

        Raises:
            UserError: a file of the checkpoint is missing, damaged, or of another architecture.
        """
        path = self.latest()
        if path is None:
            return {"step": 0}
        try:
            for name, module in self.modules.items():
                if is_sharded(module):
                    load_whole(module, load_file(path / f"{name}.safetensors"))
                else:
                    load_model(module, str(path / f"{name}.safetensors"))
            # weights_only: tensors and plain containers, nothing that could run code is unpickled.
            saved = torch.load(path / "optimizers.pt", map_location="cpu", weights_only=True)
            for name, optimizer in self.optimizers.items():
                load_optimizer_state(self._owner(name), optimizer, saved[name])
            return json.loads((path / "state.json").read_text())
        except (OSError, EOFError, RuntimeError, KeyError, ValueError, UnpicklingError, SafetensorError) as error:
            raise UserError(
                f"checkpoint {path} cannot be restored ({_reason(error)}); delete that folder to go on from the one "
                "before it"
            ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
