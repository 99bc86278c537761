"""Folders of saved models that are written whole, and replaced without losing what is not ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from scq.engine.errors import UserError

_INDEXES = ("model_index.json", "config.json")  # where diffusers writes the class of what a folder holds


@contextmanager
def replaced_model(folder: Path | str, classes: Collection[str]) -> Iterator[Path]:
    """A fresh folder to fill, which takes the place of ``folder`` when the block ends well.

    At any moment a reader finds the old model or the whole new one; one that a kill left set aside is put back first.

    Args:
        classes: names of diffusers' classes whose saved models may be replaced.

    Raises:
        UserError: see `refuse_to_replace`.
    """
    folder = Path(folder).resolve()
    refuse_to_replace(folder, classes)
    fresh, aside = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    if aside.is_dir() and not folder.exists():
        aside.rename(folder)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    fresh.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def refuse_to_replace(folder: Path | str, classes: Collection[str]) -> None:
    """Make sure that a model may be written to ``folder``.

    Raises:
        UserError: it is a file, the current folder or one around it, or holds anything but a model of one of
            ``classes``.
    """
    folder = Path(folder).resolve()
    if Path.cwd().resolve().is_relative_to(folder):
        raise UserError(f"a model cannot take the place of {folder}, in which you are; name a folder of its own")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; a model needs a folder of its own")
    if any(folder.iterdir()) and (_class_in(folder) not in classes or (folder / ".git").exists()):
        raise UserError(f"{folder} holds other things than a model, which would be lost; name a folder of its own")


def _class_in(folder: Path) -> str | None:
    """The diffusers class that was saved in a folder."""
    for index in _INDEXES:
        try:
            return json.loads((folder / index).read_text())["_class_name"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
