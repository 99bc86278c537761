"""What is done about a checkpoint that cannot be written or read."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers import files_of_at_most, make_endless, make_pipe, within
from torch import nn

from scq.engine.checkpoint import Checkpoints
from scq.engine.errors import UserError


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", 2, {"model": nn.Linear(300, 300)}, {})


def test_a_full_disk_is_named_and_left_as_it_was(checkpoints: Checkpoints) -> None:
    checkpoints.save(1)
    refused = pytest.raises(UserError, match=r"step_00000002 cannot be written .* resumes from .*step_00000001")
    with files_of_at_most(100_000), refused:  # a third of what the weights need
        checkpoints.save(2)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_00000001"]
    assert checkpoints.restore()["step"] == 1


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_digests(checkpoint: Path) -> None:
    """Make a checkpoint one of those that were written before digests were."""
    state = json.loads((checkpoint / "state.json").read_text())
    state = {name: value for name, value in state.items() if name not in ("sha256", "signature")}
    (checkpoint / "state.json").write_text(json.dumps(state))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b""),
    "other": lambda path: path.write_bytes(b"not a checkpoint"),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "missing": lambda path: path.unlink(),
    "bit": flip_a_bit,
    "unreadable": lambda path: (path.unlink(), path.mkdir())[0],
    "pipe": make_pipe,
    "endless": make_endless,
}
FILES = ("model.safetensors", "ema.safetensors", "optimizers.pt", "state.json")


@pytest.fixture
def network() -> nn.Module:
    return nn.Linear(300, 300)


def opened(folder: Path, network: nn.Module) -> Checkpoints:
    modules = {"model": network, "ema": nn.Linear(2, 2)}
    return Checkpoints(folder / "checkpoints", 3, modules, {"model": torch.optim.Adam(network.parameters())})


def save_numbered(checkpoints: Checkpoints, network: nn.Module, steps: Sequence[int]) -> None:
    """Each with the step's number as its weights, and the older one with the better score."""
    for step in steps:
        nn.init.constant_(network.weight, step)
        checkpoints.save(step, score=float(step), seconds=1.5)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_stepped_over(
    damage: str, file: str, network: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = opened(tmp_path, network)
    save_numbered(checkpoints, network, (1, 2))
    DAMAGES[damage](checkpoints.folder / "step_00000002" / file)
    with within(10):
        assert checkpoints.restore()["step"] == 1
    assert (network.weight == 1).all()
    warnings = capsys.readouterr().err
    assert f"checkpoint {checkpoints.folder / 'step_00000002'} is damaged: " in warnings
    aside = checkpoints.folder / "damaged_step_00000002"
    assert f"set aside as {aside}; training goes on from step_00000001" in warnings


@pytest.mark.parametrize("damage", [each for each in DAMAGES if each != "bit"])
def test_so_is_one_that_is_older_than_digests(damage: str, network: nn.Module, tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, network)
    save_numbered(checkpoints, network, (1, 2, 3))
    for path, file in zip(checkpoints.all(), FILES, strict=False):
        without_digests(path)
        if path.name != "step_00000001":
            DAMAGES[damage](path / file)
    with within(10):
        assert checkpoints.restore()["step"] == 1
    assert (network.weight == 1).all()


def test_a_damaged_checkpoint_is_kept_and_counts_no_more(network: nn.Module, tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, network)
    save_numbered(checkpoints, network, (1, 2, 3))
    for step in (2, 3):
        flip_a_bit(checkpoints.folder / f"step_{step:08d}" / "optimizers.pt")
    assert checkpoints.restore()["step"] == 1
    save_numbered(checkpoints, network, (2, 3, 4, 5))  # trained again, saved and pruned as if nothing had been there
    assert [path.name[-1] for path in checkpoints.all()] == ["1", "3", "4", "5"], "the best one and the newest"
    assert checkpoints.restore()["step"] == 5
    assert len(list(checkpoints.folder.glob("damaged_step_*"))) == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_older_checkpoint_is_no_matter(damage: str, network: nn.Module, tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, network)
    save_numbered(checkpoints, network, (1, 2))
    DAMAGES[damage](checkpoints.folder / "step_00000001" / "state.json")
    save_numbered(checkpoints, network, (3,))
    assert checkpoints.best() == checkpoints.folder / "step_00000002"
    assert checkpoints.restore()["step"] == 3


def test_a_damaged_best_checkpoint_gives_way_to_the_next(
    network: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = opened(tmp_path, network)
    save_numbered(checkpoints, network, (1, 2, 3))
    flip_a_bit(checkpoints.folder / "step_00000001" / "ema.safetensors")
    assert checkpoints.best() == checkpoints.folder / "step_00000002"
    assert "step_00000001 is damaged: ema.safetensors" in capsys.readouterr().err


def test_where_every_checkpoint_is_damaged_nothing_starts_anew(network: nn.Module, tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, network)
    save_numbered(checkpoints, network, (1, 2))
    for path in checkpoints.all():
        flip_a_bit(path / "model.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint in .* is sound"):
        checkpoints.restore()
    assert len(list(checkpoints.folder.glob("step_*"))) == 2, "and both are where they were"


def test_another_architecture_is_no_damage(network: nn.Module, tmp_path: Path) -> None:
    save_numbered(opened(tmp_path, network), network, (1,))
    for steps in ("with digests", "without"):
        with pytest.raises(UserError, match="step_00000001 is sound, but does not fit this run"):
            opened(tmp_path, nn.Linear(300, 2)).restore()
        if steps == "with digests":
            without_digests(tmp_path / "checkpoints" / "step_00000001")
    assert (tmp_path / "checkpoints" / "step_00000001").is_dir()
