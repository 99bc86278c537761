"""A model takes the place of a model, and of nothing else."""

import json
from pathlib import Path

import pytest

from scq.engine.errors import UserError
from scq.engine.files import replaced_model

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
        with pytest.raises(UserError, match="in which you are"):
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
