"""Weights that others have trained: a state dict of finite floating tensors, or one line that says what it is."""

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from scq.engine.errors import UserError
from scq.engine.weights import read_weights

GOOD = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(3).half(), "a.num_batches_tracked": torch.tensor(7)}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_sound_weights_are_read_from_both_formats(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w.{suffix}"
    save_file(GOOD, path) if suffix == "safetensors" else torch.save(GOOD, path)
    read = read_weights(path, "these weights")
    assert read.keys() == GOOD.keys()
    assert all(torch.equal(tensor, GOOD[name]) for name, tensor in read.items())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.tensor([0.0, torch.nan]), r"w\.pth are damaged: .*1 entries that are not finite"),
        (torch.tensor([torch.inf]).half(), "not finite"),
        (torch.ones(2, dtype=torch.int8), "b is torch.int8, not floating"),
        (torch.ones(2, dtype=torch.complex64), "b is torch.complex64"),
        (torch.ones(2).to(torch.float8_e4m3fn), "b is torch.float8"),
        (torch.ones(1).expand(10**13), "claims a size of"),
        (torch.ones(2, 2).to_sparse(), "claims a size of|cannot be read"),
        ("text", "not a state dict"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_unsound_weights_are_named_before_they_take_memory(wrong: Tensor | str, said: str, tmp_path: Path) -> None:
    torch.save({**GOOD, "b": wrong}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=said) as raised:
        read_weights(tmp_path / "w.pth", "these weights")
    assert "\n" not in str(raised.value)


def test_names_are_text(tmp_path: Path) -> None:
    torch.save({0: torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="not a state dict"):
        read_weights(tmp_path / "w.pth", "these weights")


def test_a_compressed_file_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000, 1000)}, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as stored,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in stored.namelist():
            small.writestr(name, stored.read(name))
    with pytest.raises(UserError, match=r"small\.pth cannot be read as a state dict: it is compressed"):
        read_weights(tmp_path / "small.pth", "these weights")


@pytest.mark.parametrize("kept", [0, 1, 50, -1])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncated_weights_are_named(suffix: str, kept: int, tmp_path: Path) -> None:
    path = tmp_path / f"w.{suffix}"
    save_file(GOOD, path) if suffix == "safetensors" else torch.save(GOOD, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="cannot be read as a state dict") as raised:
        read_weights(path, "these weights")
    assert "\n" not in str(raised.value)
