"""Checkpoints that are complete or absent, and hold everything a run needs to resume bit for bit.

A checkpoint is a folder ``step_00001000`` with one safetensors file for every module (and ``ema``), the optimizers'
state, and ``state.json``, which knows the sha256 of the others and of itself. The learning rate, the data position and
all random numbers are pure functions of the step (:mod:`engine.schedules`, :mod:`data.stream`,
:mod:`engine.randomness`), so saving the step saves them too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from scq.engine.errors import UserError, first_line
from scq.engine.files import open_plain, read_plain, sha256_of
from scq.engine.folders import atomic_folder, remove_leftover_folders
from scq.engine.processes import gather_objects, rank_and_world_size
from scq.engine.progress import say
from scq.engine.sharding import is_sharded, load_optimizer_state, load_whole, optimizer_state, whole_state

STATE, DAMAGED = "state.json", "damaged_"  # the prefix of a checkpoint that was set aside


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing, cannot be read, or is not what was written; the message says which."""


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder`` that are complete by the look of them, newest last."""
    return sorted(path for path in folder.glob("step_*") if _state(path) is not None)


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

    def scored(self) -> list[Path]:
        """Those with a score, the lowest first, the oldest first among equals."""
        scores: dict[Path, float] = {}
        for path in self.all():
            score = (_state(path) or {}).get("score")
            if score is not None:
                scores[path] = score
        return sorted(scores, key=lambda path: scores[path])

    def best(self) -> Path | None:
        """The sound checkpoint with the lowest score; None if none has a score. Damaged ones are named in a warning."""
        for path in self.scored():
            try:
                check(path, ["ema"])
            except DamagedCheckpoint as error:
                say(f"warning: {error}; it had the best score, and the next best one takes its place")
            else:
                return path
        return None

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
                digests = {path.name: sha256_of(path) for path in sorted(fresh.iterdir())}
                signed = _signed({"step": step, "score": score, **state, "sha256": digests})
                (fresh / STATE).write_text(json.dumps(signed))
        except (OSError, RuntimeError, SafetensorError) as error:  # of Python, torch and safetensors
            raise UserError(
                f"checkpoint {final} cannot be written ({first_line(error)}); make room and run again: training "
                f"resumes from {self.latest() or 'the start'}"
            ) from error
        best = self.scored()[:1]
        for old in self.all()[: -self.keep]:
            if old not in best:
                shutil.rmtree(old)
        return final

    def _owner(self, optimizer: str) -> nn.Module:
        """The module that the optimizer of this name updates: the module of the same name, else the model."""
        return self.modules.get(optimizer, self.modules["model"])

    def restore(self) -> dict[str, Any]:
        """Load the newest sound checkpoint into the modules and optimizers; every process must call this.

        The main process chooses it for all. It sets newer ones that are damaged aside, as ``damaged_step_00001000``,
        which nothing reads or deletes, and names each in a warning.

        Returns:
            its ``state.json``; ``{"step": 0}`` if there is no checkpoint.

        Raises:
            UserError: every checkpoint is damaged, or the newest sound one belongs to another architecture.
        """
        path = self._newest_sound()
        if path is None:
            return {"step": 0}
        try:
            for name, module in self.modules.items():
                if is_sharded(module):
                    load_whole(module, load_file(path / f"{name}.safetensors"))
                else:
                    load_model(module, str(path / f"{name}.safetensors"))
            saved = _optimizers(path)
            for name, optimizer in self.optimizers.items():
                load_optimizer_state(self._owner(name), optimizer, saved[name])
        except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
            raise UserError(
                f"checkpoint {path} is sound, but does not fit this run ({first_line(error)}); train with the "
                "architecture that it was saved with, or choose another out=..."
            ) from error
        return _state(path) or {}

    def _newest_sound(self) -> Path | None:
        """The newest sound checkpoint, the same in every process; None if there is none at all."""
        chosen: Path | UserError | None = None
        if rank_and_world_size()[0] == 0:
            try:
                chosen = self._step_over_damage()
            except UserError as error:
                chosen = error
        chosen = gather_objects(chosen)[0]
        if isinstance(chosen, UserError):
            raise chosen
        return chosen

    def _step_over_damage(self) -> Path | None:
        remove_leftover_folders(self.folder)
        damaged: list[Path] = []
        for path in sorted(self.folder.glob("step_*"), reverse=True):
            try:
                check(path, self.modules)
            except DamagedCheckpoint as error:
                say(f"warning: {error}")
                damaged.append(path)
                continue
            for each in damaged:
                aside = each.with_name(f"{DAMAGED}{each.name}")
                shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
                each.rename(aside)
                say(f"warning: it is set aside as {aside}; training goes on from {path.name}")
            return path
        if damaged:
            raise UserError(
                f"no checkpoint in {self.folder} is sound, and a run that starts anew would replace them; restore them "
                "from a copy, or delete that folder to start anew"
            )
        return None


def check(checkpoint: Path, modules: Iterable[str] = ()) -> None:
    """Make sure that every file of a checkpoint is what was written.

    Args:
        modules: names of those that it must hold.

    Raises:
        DamagedCheckpoint: one is not.
    """
    state = _state(checkpoint)
    if state is None:
        raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: its {STATE} is missing, or not what was written")
    try:
        if "sha256" not in state:  # older than digests
            for file in (*(f"{name}.safetensors" for name in modules), "optimizers.pt"):
                open_plain(checkpoint / file).close()  # a pipe would be waited for
            for name in modules:
                load_file(checkpoint / f"{name}.safetensors")
            _optimizers(checkpoint)
        for name, digest in state.get("sha256", {}).items():
            if sha256_of(checkpoint / name) != digest:
                raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {name} is not what was written")
    except DamagedCheckpoint:
        raise
    except (OSError, EOFError, RuntimeError, KeyError, ValueError, SafetensorError, UnpicklingError) as error:
        raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {first_line(error)}") from error


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """The content of a checkpoint's state.json; None if there is none, or it is damaged."""
    try:
        state = json.loads(read_plain(checkpoint / STATE))
        step = int(checkpoint.name.removeprefix("step_"))
    except (OSError, ValueError, RecursionError):
        return None
    sound = isinstance(state, dict) and state.get("step") == step and state in (_signed(state), _unsigned(state))
    return state if sound else None


def _unsigned(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in ("sha256", "signature")}


def _signed(state: dict[str, Any]) -> dict[str, Any]:
    """A state with the sha256 of itself."""
    signed = {name: value for name, value in state.items() if name != "signature"}
    return {**signed, "signature": hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()}


def _optimizers(checkpoint: Path) -> dict[str, Any]:
    # weights_only: only tensors and plain containers are unpickled, nothing that could run code.
    return torch.load(checkpoint / "optimizers.pt", map_location="cpu", weights_only=True)
