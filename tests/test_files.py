"""What is written is on disk before it appears; and a model takes the place of a model, and of nothing else."""

import json
import os
import re
from pathlib import Path

import pytest
from helpers import REPOSITORY

from scq.engine.errors import UserError
from scq.engine.files import atomic_folder, atomic_write, replaced_model, write_file, write_json

OURS = {"Painter"}


def write(folder: Path, text: str) -> None:
    with replaced_model(folder, OURS) as fresh:
        (fresh / "config.json").write_text(json.dumps({"_class_name": "Painter", "text": text}))


def text(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["text"]


def test_a_new_model_replaces_the_old_one_whole(tmp_path: Path) -> None:
    model = tmp_path / "runs" / "model"
    write(model, "first")
    (model / "extra.json").write_text("{}")
    write(model, "second")
    assert text(model) == "second"
    assert [path.name for path in model.iterdir()] == ["config.json"]
    assert [path.name for path in model.parent.iterdir()] == ["model"], "nothing is left beside it"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "third")
    assert text(tmp_path / "empty") == "third"


def test_what_is_not_ours_is_refused_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, clone, other, project = (tmp_path / name for name in ("photos", "clone", "other", "project"))
    for folder in (photos, clone / ".git", other, project):
        folder.mkdir(parents=True)
    (photos / "beach.jpg").write_bytes(b"a")
    (clone / "config.json").write_text('{"_class_name": "Painter"}')  # a model, but with its history
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (project / "config.json").write_text("[1]")
    (tmp_path / "file").write_text("a")
    before = sorted(tmp_path.rglob("*"))
    for folder in (photos, clone, other, project, tmp_path / "file"):
        with pytest.raises(UserError, match=folder.name):
            write(folder, "lost")
    (project / "config.json").unlink()
    monkeypatch.chdir(project)
    for folder in (Path(), Path(".."), project):
        with pytest.raises(UserError, match="is or contains the current folder"):
            write(folder, "lost")
    assert sorted(tmp_path.rglob("*")) == [path for path in before if path != project / "config.json"]


def test_a_kill_never_leaves_none(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write(model, "first")

    def killed() -> None:
        with replaced_model(model, OURS) as fresh:
            assert text(model) == "first"
            (fresh / "config.json").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert text(model) == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    model.rename(tmp_path / ".model.old")  # as after a kill between the two renames
    with pytest.raises(KeyboardInterrupt):
        killed()
    assert text(model) == "first", "put back before anything else"


def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are synced to disk from here on, in order, and what is renamed into place."""
    events: list[str] = []
    sync, replace, rename = os.fsync, Path.replace, Path.rename

    def record_sync(descriptor: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", lambda self, to: events.append(f"rename {to.name}") or replace(self, to))
    monkeypatch.setattr(Path, "rename", lambda self, to: events.append(f"rename {to.name}") or rename(self, to))
    return events


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux which file a descriptor is of")
def test_a_file_is_on_disk_before_it_appears_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = synced(monkeypatch)
    write_file(tmp_path / "report.md", "text")
    assert [event.split(".tmp")[0] for event in events] == [
        "sync .report.md", "rename report.md", f"sync {tmp_path.name}",
    ]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux which file a descriptor is of")
def test_every_file_of_a_folder_is_on_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = synced(monkeypatch)
    with atomic_folder(tmp_path / "step_1") as fresh:
        (fresh / "prior").mkdir()
        (fresh / "prior" / "weights").write_bytes(b"a")
        (fresh / "state.json").write_text("{}")
    shown = events.index("rename step_1")
    assert {"sync weights", "sync state.json", "sync prior", "sync .step_1.tmp"} == set(events[:shown])
    assert events[shown + 1 :] == [f"sync {tmp_path.name}"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "numbers.json", {"a": 1})
    before = (tmp_path / "numbers.json").read_bytes()

    def fail() -> None:
        with atomic_write(tmp_path / "numbers.json") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "numbers.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]


def test_nobody_writes_past_this_module() -> None:
    """No renames elsewhere: a file that is renamed into place without being synced is lost in a power cut."""
    for room in ("engine", "data", "stage1_tokenizer", "stage2_prior", "sampling", "evaluation", "cli"):
        for path in (REPOSITORY / room).rglob("*.py"):
            if path != REPOSITORY / "engine" / "files.py":
                renames = r"os\.(?:replace|rename)\(|\.(?:rename|replace)\((?:self\.)?(?:path|final|target)"
                found = re.findall(renames, path.read_text())
                assert not found, f"{path} renames: {found}"
