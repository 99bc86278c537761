"""What is written is on disk before it appears; and a model takes the place of a model, and of nothing else."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, make_endless, make_pipe, within
from safetensors.torch import save_file

from scq.engine.errors import UserError
from scq.engine.files import (
    atomic_write,
    expand_home,
    open_plain,
    read_plain,
    remove_leftovers,
    sha256_of,
    write_file,
    write_json,
)
from scq.engine.folders import atomic_folder, read_unmixed, refuse_to_replace, replaced_model
from scq.engine.plain_json import read_json
from scq.engine.plain_yaml import read_yaml

OURS = {"Painter"}


def write(folder: Path, text: str) -> None:
    with replaced_model(folder, OURS) as fresh:
        (fresh / "config.json").write_text(json.dumps({"_class_name": "Painter", "text": text}))


def text(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["text"]


def test_a_new_model_replaces_the_old_one_whole(tmp_path: Path) -> None:
    model = tmp_path / "runs" / "model"
    write(model, "first")
    for name in ("measured.json", "README.md", "diffusion_pytorch_model.safetensors", "refiner/config.json"):
        write_file(model / name, "of the first model")
    write(model, "second")
    assert text(model) == "second"
    assert [path.name for path in model.iterdir()] == ["config.json"]
    assert [path.name for path in model.parent.iterdir()] == ["model"], "nothing is left beside it"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "third")
    assert text(tmp_path / "empty") == "third"


@pytest.mark.parametrize("put", [make_pipe, make_endless])
@pytest.mark.parametrize(
    "read",
    [
        lambda path: sha256_of(path),
        lambda path: read_plain(path),
        lambda path: open_plain(path, "ab"),
        lambda path: read_json(path, "delete it"),
        lambda path: read_yaml(path, dict),
        lambda path: refuse_to_replace(path.parent, OURS),
    ],
)
def test_only_plain_files_are_read_and_nothing_is_waited_for(
    read: Callable[[Path], object], put: Callable[[Path], None], tmp_path: Path
) -> None:
    put(tmp_path / "config.json")
    with within(10), pytest.raises((OSError, UserError)):
        read(tmp_path / "config.json")


def test_a_folder_that_is_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to("model")
    with pytest.raises(UserError, match="model cannot be written"):
        write(tmp_path / "model", "lost")


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError) as refused:
        write_file(tmp_path / "file", "text")
    assert refused.value.filename == str(tmp_path / "file")
    with pytest.raises(FileNotFoundError) as refused, atomic_write(tmp_path / "missing" / "file"):
        pass
    assert refused.value.filename == str(tmp_path / "missing" / "file")


@pytest.mark.parametrize("path", ["~nobody-has-this-name", "~nobody-has-this-name/shards"])
def test_a_home_of_nobody_is_a_name_like_any_other(path: str) -> None:
    assert expand_home(path) == Path(path)
    assert expand_home("~/x") == Path("~/x").expanduser()


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


THE_USERS = {
    "notes.md": "mine", ".gitattributes": "mine", "lora.safetensors": "mine", "refiner/notes.txt": "mine",
    "figures/2026/loss.svg": "mine", "config.json.orig": "mine", "old/diffusion_pytorch_model.safetensors": "mine",
}  # fmt: skip


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_what_a_user_keeps_beside_a_model_stays(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:  # a file system without hard links
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    model = tmp_path / "model"
    write(model, "first")
    write_file(model / "refiner" / "config.json", "of the first model")
    for name, content in THE_USERS.items():
        write_file(model / name, content)
    (model / "link").symlink_to("figures")
    (model / "empty").mkdir()
    model.chmod(0o750)
    kept = (model / "notes.md").stat()
    for round in ("second", "third"):
        write(model, round)
    assert text(model) == "third"
    assert {name: (model / name).read_text() for name in THE_USERS} == THE_USERS
    assert not (model / "refiner" / "config.json").exists(), "the new model has no refiner"
    assert (model / "link").readlink() == Path("figures")
    assert (model / "empty").is_dir()
    assert model.stat().st_mode & 0o777 == 0o750
    assert (model / "notes.md").stat().st_mtime_ns == kept.st_mtime_ns
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left beside it"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_every_file_obeys_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with replaced_model(tmp_path / "model", OURS) as fresh:
            save_file({"a": torch.zeros(2)}, fresh / "weights.safetensors")  # writes with mode 0600
            (fresh / "prior").mkdir()
            save_file({"a": torch.zeros(2)}, fresh / "prior" / "weights.safetensors")
        write_json(tmp_path / "numbers.json", {})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


WRITER = """
import json, sys
from pathlib import Path
from scq.engine.folders import replaced_model

for number in range(int(sys.argv[2])):
    with replaced_model(sys.argv[1], {"Painter"}) as fresh:
        (fresh / "config.json").write_text(json.dumps({"_class_name": "Painter", "number": number, "by": sys.argv[3]}))
        (fresh / "prior").mkdir()
        (fresh / "prior" / "config.json").write_text(json.dumps({"number": number, "by": sys.argv[3]}))
"""


def writer(model: Path, times: int, name: str = "") -> subprocess.Popen:
    """A process that writes a model of two files, which hold the same number, so many times."""
    return subprocess.Popen([sys.executable, "-c", WRITER, str(model), str(times), name], cwd=REPOSITORY)


def numbers(model: Path) -> list[dict]:
    return [json.loads((model / name).read_text()) for name in ("config.json", "prior/config.json")]


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="folders cannot be exchanged elsewhere")
def test_a_reader_finds_the_old_model_or_the_new_one_at_any_moment(tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert writer(model, 1).wait() == 0
    write_file(model / "notes.md", "mine")
    process, seen = writer(model, 150), set()
    while process.poll() is None:
        config = json.loads((model / "config.json").read_text())
        assert (model / "notes.md").read_text() == "mine"
        one, other = read_unmixed(model, lambda: numbers(model))
        assert one["number"] == other["number"], "a model of two files is read whole"
        seen |= {config["number"], one["number"]}
    assert process.returncode == 0
    assert len(seen) > 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_of_two_writers_the_last_wins_and_neither_fails(tmp_path: Path) -> None:
    model = tmp_path / "model"
    both = [writer(model, 60, name) for name in ("a", "b")]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    one, other = numbers(model)
    assert (one["number"], one["by"]) == (other["number"], other["by"])
    assert one["number"] == 59
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_reader_gives_up_on_a_folder_that_never_rests(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write(model, "first")
    with pytest.raises(UserError, match="was replaced each of the 20 times"):
        read_unmixed(model, lambda: write(model, "again"))
    with pytest.raises(ZeroDivisionError):
        read_unmixed(model, lambda: 1 // 0)
    assert read_unmixed(tmp_path / "none", lambda: "asked anyway") == "asked anyway"


def test_without_exchange_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scq.engine.folders._exchange", lambda *_: False)
    model = tmp_path / "model"
    for round in ("first", "second"):
        write(model, round)
        write_file(model / "notes.md", "mine")
    write(model, "third")
    assert text(model) == "third"
    assert (model / "notes.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_killed_processes_left_is_deleted_but_not_what_lives(tmp_path: Path) -> None:
    for name in (".model.tmp0", ".model.tmp1", ".other.tmp2", "..model.tmp0.tmp3"):
        (tmp_path / name).mkdir()
    for name in (".model.tmp0", ".other.tmp2", "..model.tmp0.tmp3"):
        os.utime(tmp_path / name, (0, 0))
    with atomic_folder(tmp_path / "model") as living:
        os.utime(living, (0, 0))
        write(tmp_path / "model", "meanwhile")
        assert living.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.tmp1", ".other.tmp2", "model"]


def test_files_that_killed_processes_left_are_deleted_but_not_what_is_being_written(tmp_path: Path) -> None:
    others = [".notes.tmp", ".notes.tmp.txt", ".page.tmpl", "2.png"]
    for name in (".0.png.tmp7", ".1.png.tmp8", *others):
        (tmp_path / name).write_text("half")
    (tmp_path / ".model.tmp9").mkdir()
    for name in (".0.png.tmp7", *others):
        os.utime(tmp_path / name, (0, 0))
    remove_leftovers(tmp_path, of_others=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".1.png.tmp8", ".model.tmp9", *others])
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".model.tmp9", *others])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_leaves_the_old_model_and_says_so(number: int, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write(model, "first")
    write_file(model / "notes.md", "mine")

    def fill() -> None:
        with replaced_model(model, OURS) as fresh:
            (fresh / "config.json").write_text("half")
            raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=rf"{model} cannot be written \(.*{os.strerror(number)}\): the model that was"):
        fill()
    assert text(model) == "first"
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "notes.md"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(OSError, match=r"report\.md"), atomic_write(tmp_path / "report.md"):
        raise OSError(number, os.strerror(number))


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
    before = {event.split(".tmp")[0] for event in events[:shown]}
    assert before == {"sync weights", "sync state.json", "sync prior", "sync .step_1"}
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
            if path.parent.name != "engine" or path.name not in ("files.py", "folders.py"):
                renames = r"os\.(?:replace|rename)\(|\.(?:rename|replace)\((?:self\.)?(?:path|final|target)"
                # A bundle's script has the same function, which tests/test_durability.py sees to.
                text = re.sub(r"\ndef atomic_write\(.*?(?=\n\n\n)", "", path.read_text(), flags=re.DOTALL)
                found = re.findall(renames, text)
                assert not found, f"{path} renames: {found}"
