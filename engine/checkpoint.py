"""Checkpoints that are complete or absent, and hold everything a run needs to resume bit for bit.

A checkpoint is a folder ``step_00001000`` with one safetensors file for every module (and ``ema``), the optimizers'
state, and ``state.json``. The learning rate, the data position and all random numbers are pure functions of the step
(:mod:`engine.schedules`, :mod:`data.stream`, :mod:`engine.randomness`), so saving the step saves them too.
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
        folder: where they are kept; created with the first one.
        keep: how many of the newest to keep; the one with the lowest score is kept as well.
        modules: what to save and restore, by name.
        optimizers: likewise.
    """

    def __init__(
        self, folder: Path, keep: int, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
    ):
        self.folder, self.keep, self.modules, self.optimizers = folder, max(1, keep), modules, optimizers

    def all(self) -> list[Path]:
        """The complete checkpoints, newest last."""
        return whole_checkpoints(self.folder)

    def latest(self) -> Path | None:
        """The newest checkpoint; None if there is none."""
        return self.all()[-1] if self.all() else None

    def best(self) -> Path | None:
        """The checkpoint with the lowest score, the oldest among equals; None if none has a score."""
        scores = {path: json.loads((path / "state.json").read_text()).get("score") for path in self.all()}
        scored = [path for path, score in scores.items() if score is not None]
        return min(scored, key=lambda path: scores[path]) if scored else None

    def save(self, step: int, *, write: bool = True, score: float | None = None, **state: float | dict) -> Path:
        """Write the state after ``step`` steps; the folder appears under its final name once it is complete.

        Args:
            write: True in the main process alone. Every process must call this, because a model may be sharded.
            score: of the averaged weights, lower is better; None if they were not scored.
            state: further entries of ``state.json``.

        Returns:
            the checkpoint's folder.

        Raises:
            UserError: the files cannot be written, for example because the disk is full.
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
        except (OSError, RuntimeError, SafetensorError) as error:  # of Python, torch and safetensors
            raise UserError(
                f"checkpoint {final} cannot be written ({_reason(error)}); make room and run again: training resumes "
                f"from {self.latest() or 'the start'}"
            ) from error
        best = self.best()
        for old in self.all()[: -self.keep]:
            if old != best:
                shutil.rmtree(old)
        return final

    def _owner(self, optimizer: str) -> nn.Module:
        """The module that the optimizer of this name updates: the module of the same name, else the model."""
        return self.modules.get(optimizer, self.modules["model"])

    def restore(self) -> dict:
        """Load the newest checkpoint into the modules and optimizers.

        Returns:
            its ``state.json``; ``{"step": 0}`` if there is no checkpoint.

        Raises:
            UserError: a file of the checkpoint is missing or damaged, or belongs to another architecture.
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
            # weights_only: only tensors and plain containers are unpickled, nothing that could run code.
            saved = torch.load(path / "optimizers.pt", map_location="cpu", weights_only=True)
            for name, optimizer in self.optimizers.items():
                load_optimizer_state(self._owner(name), optimizer, saved[name])
            return json.loads((path / "state.json").read_text())
        except (OSError, EOFError, RuntimeError, KeyError, ValueError, UnpicklingError, SafetensorError) as error:
            raise UserError(
                f"checkpoint {path} cannot be restored ({_reason(error)}); delete that folder to resume from the "
                "checkpoint before it"
            ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
