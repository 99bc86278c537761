"""The command line: good help, one line for a mistake, the same images for the same seed."""

import argparse
import hashlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import gradio
import pytest
from helpers import REPOSITORY, run_scq
from PIL import Image

from scq.cli.main import build_parser, main
from scq.engine.errors import UserError
from scq.sampling.app import serve

COMMANDS = [
    ["quickstart"], ["data"], ["data", "pack"], ["data", "check"], ["data", "preview"], ["train"],
    ["train", "tokenizer"], ["train", "prior"], ["train", "refiner"], ["tokenize"], ["sample"], ["evaluate"], ["app"],
    ["export"], ["benchmark"],
    *(["benchmark", subject] for subject in ("data", "speed", "step", "tokenizers", "quality", "sampling")),
    *(["benchmark", subject] for subject in ("plan", "bundle", "collect")),
]  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: scq {' '.join(command)}" in text
    assert len(text.splitlines()) > 5


def test_help_opens_quickly_and_names_every_command() -> None:
    result = run_scq("--help", timeout=20)
    assert result.returncode == 0
    for command, *_ in COMMANDS:
        assert re.search(rf"^    {command}\s", result.stdout, re.M)


def test_no_command_is_missing_from_these_tests() -> None:
    def commands(parser: argparse.ArgumentParser, path: list[str]) -> Iterator[list[str]]:
        for action in parser._subparsers._group_actions if parser._subparsers else ():
            for name, each in action.choices.items():
                yield [*path, name]
                yield from commands(each, [*path, name])

    assert sorted(commands(build_parser(), [])) == sorted(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["data", "pack", "no-such-folder", "OUT", "--format", "folder", "--size", "32"], "no-such-folder"),
        (["data", "pack", "twemoji", "OUT", "--format", "emojis", "--size", "32"], "emojis"),
        (["data", "pack", "twemoji", "OUT", "--format", "emoji", "--size", "big"], "big"),
        (["data", "pack", "twemoji", "OUT", "--format", "emoji", "--size", "400", "--crop", "lsun-ldm"], "400"),
        (["data", "check", "no-such-shards"], "no-such-shards"),
        (["train", "tokenizer", "--config", "no-such.yaml"], "no-such.yaml"),
        (["train", "tokenizer", "--config", "configs/quickstart/tokenizer_scq.yaml", "out=OUT"], "shards"),
        (["train", "tokenizer", "--config", "configs/gtsrb/tokenizer_scq.yaml", "training.step=3"], "training.step"),
        (["train", "prior", "--config", "configs/quickstart/prior.yaml", "out=OUT"], "tokenizer"),
        (["tokenize", "--model", "no-such-model", "--data", "x", "--out", "OUT"], "no-such-model"),
        (["sample", "--model", "no-such-model", "--out", "OUT"], "no-such-model"),
        (["sample", "--model", "x", "--out", "OUT", "--num", "0"], "--num"),
        (["sample", "--model", "x", "--out", "OUT", "--num", "9" * 25], "--num"),
        (["evaluate", "--model", "x", "--data", "no-such-shards", "--out", "OUT"], "no-such-shards"),
        (["app", "--model", "no-such-model"], "no-such-model"),
        (["benchmark", "plan", "--config", "no-such.yaml", "--out", "OUT", "--seconds", "0"], "--seconds"),
        (["benchmark", "bundle", "--config", "no-such.yaml", "--out", "OUT", "--packages", "no-such-list"], "no-such"),
        (["benchmark", "collect", "no-such-folder", "--out", "OUT"], "no-such-folder"),
        (["paint"], "paint"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments: list[str], named: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_scq(*(argument.replace("OUT", str(out)) for argument in arguments))
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("scq: ")]
    assert len(lines) == 1
    assert named in lines[0]
    assert "Traceback" not in result.stderr
    assert not list(out.rglob("manifest.json")) if out.exists() else True


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["app", "--port", "99999"], "99999"),
        (["sample", "--seed", "9223372036854775807", "--out", "OUT"], "9223372036854775807"),
        (["sample", "--model", "runs/no-such-run", "--out", "OUT"], "no model in runs/no-such-run"),
        (["evaluate", "--model", "MODEL", "--data", "SHARDS", "--out", "OUT/e.json", "--num-real", "-5"], "-5"),
        (["evaluate", "--model", "MODEL", "--data", "SHARDS", "--out", "FILE/e.json"], "FILE"),
        (["evaluate", "--model", "TOKENIZER", "--data", "SHARDS", "--out", "OUT/e.json", "--card"], "--card"),
        (["train", "tokenizer", "--config", "CONFIG", "out=${foo}"], "foo"),
        (["train", "tokenizer", "--config", "CONFIG", "out=OUT", "training.log_every=0"], "training.log_every"),
        (["train", "tokenizer", "--config", "CONFIG", "out=OUT", "optimizer.betas=[0.9]"], "optimizer.betas"),
        (["train", "tokenizer", "--config", "CONFIG", "data.train=SHARDS", "out=FILE/run"], "FILE"),
        (["tokenize", "--model", "TOKENIZER", "--data", "SHARDS", "--out", "FILE/tokens"], "FILE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_mistake_is_one_line_before_any_work(
    arguments: list[str], named: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As above, in this process; nothing is measured or written."""
    (tmp_path / "file").write_text("no folder")
    places = {
        "MODEL": tiny_run / "model", "TOKENIZER": tiny_run / "arms" / "scq" / "tokenizer" / "model",
        "SHARDS": tiny_run / "shards" / "test", "CONFIG": "configs/quickstart/tokenizer_scq.yaml",
        "OUT": tmp_path / "out", "FILE": tmp_path / "file",
    }  # fmt: skip
    for word, place in places.items():
        arguments = [argument.replace(word, str(place)) for argument in arguments]
        named = named.replace(word, str(place))
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scq: ")]
    assert named in line
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_an_address_that_nobody_can_listen_at_says_why() -> None:
    with socket.socket() as taken, gradio.Blocks() as page:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for host, asked, words in (
            ("127.0.0.1", port, f"port {port} of 127.0.0.1 is not free"),
            ("192.0.2.7", 7860, "--host 192.0.2.7 is not an address of this machine"),
            ("no host", 7860, "--host no host is neither an address nor"),
        ):
            with pytest.raises(UserError, match=words):
                serve(page, host, asked, block=False)


def test_debug_shows_the_traceback() -> None:
    result = run_scq("data", "check", "no-such-shards", "--debug")
    assert "Traceback" in result.stderr


def test_the_same_seed_gives_the_same_files_in_any_batch(tiny_run: Path, tmp_path: Path) -> None:
    def sample(name: str, *more: object) -> dict[str, str]:
        out = tmp_path / name
        result = run_scq("sample", "--model", tiny_run / "model", "--num", 10, "--seed", 5, "--out", out, *more)
        assert result.returncode == 0, result.stderr
        return digests(out)

    once, again, other_batch = sample("once"), sample("again"), sample("other_batch", "--batch-size", 3)
    assert list(once) == [f"{seed:06d}.png" for seed in range(5, 15)]
    assert once == again == other_batch
    assert len(set(once.values())) > 5


def test_sampling_settings_out_of_range_are_named(tiny_run: Path, tmp_path: Path) -> None:
    result = run_scq("sample", "--model", tiny_run / "model", "--out", tmp_path, "--steps", 65)
    assert result.returncode == 2
    assert "65" in result.stderr
    result = run_scq("sample", "--model", tiny_run / "model", "--out", tmp_path, "--class", 3)
    assert result.returncode == 2
    assert "class" in result.stderr


def scq_prints_to(command: list[object], output: int | IO[str], **environment: str) -> subprocess.CompletedProcess:
    """Run the command line with its output going somewhere, written at its end as usual."""
    environment = {"PYTHONUNBUFFERED": "", **environment}
    return subprocess.run(
        [sys.executable, "-m", "scq", *map(os.fsencode, map(str, command))], cwd=REPOSITORY, stdout=output,
        stderr=subprocess.PIPE, env={**os.environ, **environment}, timeout=100,
    )  # fmt: skip


def test_a_name_that_the_output_cannot_encode_ends_nothing(tmp_path: Path) -> None:
    photos = tmp_path / os.fsdecode(b"photos \xe9\xf6")  # Latin-1, which is no UTF-8
    photos.mkdir()
    Image.linear_gradient("L").save(photos / os.fsdecode(b"\xff \xe2\x82\xac.png"))
    for encoding, shards in (("ascii", "日本"), ("utf-8", os.fsdecode(b"\xfc"))):
        command = ["data", "pack", photos, tmp_path / shards, "--format", "folder", "--size", 32]
        done = scq_prints_to(command, subprocess.PIPE, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, b"pack: 1/1\n")
        assert b"1 images in 1 shards" in done.stdout
        assert (tmp_path / shards / "manifest.json").is_file()


def test_output_that_nobody_takes_ends_in_no_traceback(emoji: dict[str, Path]) -> None:
    for command, code, unbuffered in (
        (["data", "check", emoji["test"]], 141, ""),
        (["data", "check", emoji["test"]], 141, "1"),
        (["--help"], 0, ""),
    ):
        reader, writer = os.pipe()
        os.close(reader)
        done = scq_prints_to(command, writer, PYTHONUNBUFFERED=unbuffered)
        os.close(writer)
        assert (done.returncode, done.stderr) == (code, b"")
    with Path("/dev/full").open("w") as full:
        done = scq_prints_to(["data", "check", emoji["test"]], full)
    assert done.returncode == 2
    assert re.fullmatch(rb"scq: No space left on device; make room, and run the same command again\n", done.stderr)


def test_a_killed_loader_worker_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fail(out: str) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")

    monkeypatch.setattr("scq.data.check.check", fail)
    assert main(["data", "check", "shards"]) == 2
    assert re.fullmatch("scq: a process that reads data was killed; .*data.workers\n", capsys.readouterr().err)


def test_packing_ordinary_photos_from_the_command_line(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name, size in (("beach/a.jpg", (90, 60)), ("beach/b.png", (64, 64)), ("town/c.webp", (50, 120))):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize(size).convert("RGB").save(photos / name)
    (photos / "town" / "notes.txt").write_text("not an image")
    packed = run_scq("data", "pack", photos, tmp_path / "shards", "--format", "folder", "--size", 32)
    assert packed.returncode == 0, packed.stderr
    assert "3 images in 1 shards" in packed.stdout
    assert run_scq("data", "check", tmp_path / "shards").returncode == 0
    assert run_scq("data", "preview", tmp_path / "shards", tmp_path / "sheet.png").returncode == 0
    assert Image.open(tmp_path / "sheet.png").size[0] >= 32
    tar = next((tmp_path / "shards").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-600])
    damaged = run_scq("data", "check", tmp_path / "shards")
    assert damaged.returncode == 2
    assert tar.name in damaged.stdout
