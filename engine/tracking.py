"""The run folder: resolved config, metrics, pictures, checkpoints, and finally the model."""

from __future__ import annotations

import fcntl
import json
import uuid
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from scq.engine.checkpoint import whole_checkpoints
from scq.engine.config import as_dict, read_saved_config, save_config, saved_form
from scq.engine.errors import UserError, first_line
from scq.engine.files import (
    atomic_write,
    make_folder,
    named_when_full,
    open_plain,
    remove_leftovers,
    write_file,
    write_json,
)
from scq.engine.plain_json import read_json
from scq.engine.plain_yaml import leaves
from scq.engine.progress import say
from scq.engine.references import Referenced

# Settings that may differ between the run that wrote a folder and the one that resumes it. The paths of data and
# networks may change: when a checkpoint is restored, fingerprints show whether they are still the same.
_FREE_KEYS = frozenset(
    [
        "out",
        "tokenizer",
        "prior",
        "data.train",
        "data.validation",
        "data.workers",
        "data.cache",
        "data.max_bad",
        "training.steps",
        "training.log_every",
        "score.images",
        "score.inception_weights",
    ]
    + ["training.checkpoint_every", "training.keep_checkpoints", "training.images_every", "training.tracker"]
)
REFERENCES = "references.json"  # digests of what the config's references stood for


class RunFolder:
    """One training run on disk. Only the main process writes; before `begin`, it writes nothing but a lock.

    Raises:
        UserError: the folder holds checkpoints of a run with other settings, or another process is training in it.
    """

    def __init__(self, path: Path | str, config: Any, accelerator: Accelerator):
        self.path = Path(path)
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self._config = config
        self._refuse_other_settings()
        if self.is_main:
            self._lock()
        accelerator.wait_for_everyone()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and pass the values to the tracker, if one is on."""
        self._track(step, values)
        path = self.path / "metrics.jsonl"
        if self.is_main:
            with named_when_full(path), open_plain(path, "ab") as file:
                file.write(f"{json.dumps({'step': step, **values})}\n".encode())

    def log_more(self, step: int, values: dict[str, float]) -> None:
        """Add values to the line of a step that is logged already."""
        self._track(step, values)
        if self.is_main:
            self._rewrite([row | values if row["step"] == step else row for row in read_metrics(self.path)])

    def begin(self, step: int) -> None:
        """Save the config, and open the logs for the steps after ``step``.

        Lines that a killed run logged after that step are dropped, so that no step appears twice.
        """
        if self.is_main:
            make_folder(self.path / "images")
            for folder in (self.path, self.path / "images"):
                remove_leftovers(folder)
            save_config(self._config, self.path / "config.yaml")
            if digests := self._digests():
                write_json(self.path / REFERENCES, digests)
        if self.is_main and (self.path / "metrics.jsonl").is_file():
            self._rewrite([row for row in read_metrics(self.path) if row["step"] <= step])
        tracker = self._config.training.tracker
        if tracker == "tensorboard":
            # Set here because make_accelerator does not know the run folder. The project's name is a folder in it.
            self.accelerator.project_configuration.logging_dir = str(self.path)
            self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}})
        elif tracker == "wandb":
            self.accelerator.init_trackers("scq", init_kwargs={"wandb": self._wandb_settings()})

    def picture(self, name: str, image: Image.Image) -> None:
        """Save a picture as ``images/NAME.png``."""
        if self.is_main:
            with atomic_write(self.path / "images" / f"{name}.png") as file:
                image.save(file, format="PNG")

    def _track(self, step: int, values: dict[str, float]) -> None:
        try:
            self.accelerator.log(values, step=step)
        except OSError as error:  # of a tracker's own files
            raise UserError(
                f"training.tracker={self._config.training.tracker} cannot write to {self.path} ({first_line(error)}); "
                "make room, or set training.tracker=none, and run again"
            ) from error

    def _rewrite(self, rows: list[dict]) -> None:
        write_file(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def _wandb_settings(self) -> dict:
        """A name that people recognise, the resolved config, and an id under which a resumed run continues."""
        path = self.path / "wandb_id"
        if self.is_main and not path.is_file():
            write_file(path, uuid.uuid4().hex[:8])
        return {
            "dir": str(self.path),
            "name": "/".join(self.path.absolute().parts[-2:]),
            "config": saved_form(self._config),
            "id": path.read_text() if self.is_main else None,
            "resume": "allow",
        }

    def _lock(self) -> None:
        """Keep other processes from training in this folder until this one ends or has finished training."""
        make_folder(self.path)
        self._locked = open_plain(self.path / ".lock", "ab")
        try:
            # A POSIX record lock: unlike flock's, data workers that outlive a killed process do not hold it.
            fcntl.lockf(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"another process is training in {self.path}: wait for it, or choose another out=..."
            ) from error

    def _refuse_other_settings(self) -> None:
        saved = _saved_settings(self.path, type(self._config))
        if saved is None:
            if self.is_main and whole_checkpoints(self.path / "checkpoints"):
                say(f"warning: {self.path} lacks its config.yaml: its checkpoints may be of a run with other settings")
            return
        asked, used = dict(leaves(saved_form(self._config))), dict(leaves(as_dict(self._config)))
        if saved.get("training.precision") == "auto":  # older runs did not record which one that was
            saved["training.precision"] = asked["training.precision"]
        for key in sorted((saved.keys() | asked.keys()) - _FREE_KEYS):
            if saved.get(key) not in (asked.get(key), used.get(key)):
                raise UserError(
                    f"{self.path} holds a run with {key}={saved.get(key)!r}, but this run asks for {asked.get(key)!r}; "
                    "choose another out=... or delete that folder"
                )
        known, digests = _read_digests(self.path / REFERENCES), self._digests()
        for key in sorted(known.keys() & digests.keys()):
            if known[key] != digests[key] and saved.get(key) == asked.get(key):
                raise UserError(
                    f"{self.path} holds a run with {key}={saved[key]!r}, which stands for something else by now; "
                    "choose another out=... or delete that folder"
                )

    def _digests(self) -> dict[str, str]:
        """By its key, what says whether a reference still stands for the same, for settings that may not differ."""
        used = leaves(as_dict(self._config))
        return {key: text.digest for key, text in used if isinstance(text, Referenced) and key not in _FREE_KEYS}


def begun_precision(config: Any) -> str | None:
    """The precision of the run that ``config.out`` holds, bf16 or fp32; None without a run, or if it is not known."""
    saved = _saved_settings(Path(config.out), type(config))
    found = None if saved is None else saved.get("training.precision")
    return found if found in ("bf16", "fp32") else None


def _saved_settings(run: Path, schema: type) -> dict[str, Any] | None:
    """The flat settings of the run in a folder.

    None before its first checkpoint: there is nothing yet that other settings could contradict.
    """
    path = run / "config.yaml"
    if not path.is_file() or not whole_checkpoints(run / "checkpoints"):
        return None
    return dict(leaves(read_saved_config(schema, path)))


def read_metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl up to the first that is damaged, such as one that a kill cut short."""
    rows = []
    path = run / "metrics.jsonl"
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def _read_digests(path: Path) -> dict[str, str]:
    """What `RunFolder.begin` wrote of references; empty where there were none."""
    found = read_json(path, "delete it, and references are not compared") if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def checked_tracker(tracker: str) -> str | None:
    """Translate ``training.tracker`` for accelerate; ``none`` becomes None.

    Raises:
        UserError: the tracker is unknown, or not installed.
    """
    from accelerate.tracking import is_tensorboard_available, is_wandb_available

    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if tracker == "none":
        return None
    if tracker not in available:
        raise UserError(f"training.tracker is {tracker!r}; it must be none, tensorboard or wandb")
    if not available[tracker]():
        raise UserError(f"training.tracker={tracker} needs the logging extra: pip install 'scq[logging]'")
    return tracker
