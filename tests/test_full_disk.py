"""A full disk is one line for the user, and what was there before stays. (Of checkpoints: test_checkpoint.py.)"""

import errno
import os
from pathlib import Path

import pytest
import torch
from helpers import files_of_at_most
from test_prior import stripes_config, train_prior, write_stripes
from test_refiner import tokenizer

from scq.cli.main import main
from scq.engine.errors import UserError
from scq.engine.tracking import read_metrics
from scq.sampling.export import export_half
from scq.sampling.pipeline import SoftConvexPipeline
from scq.stage1_tokenizer.model_folder import load_tokenizer, save_network
from scq.stage2_prior.transformer import MaskedTransformer

SETTINGS = ["training.steps=4", "training.checkpoint_every=2", "training.log_every=1", "training.images_every=2"]


def test_a_model_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    coder = tokenizer()
    pipeline = SoftConvexPipeline(coder, MaskedTransformer(32, coder.grid, width=64, depth=2, heads=2))
    saves = {
        "pipeline": pipeline.save_pretrained,
        "half": lambda folder: export_half(pipeline, folder),
        "network": lambda folder: save_network(coder, folder),
    }
    for name, save in saves.items():
        folder = tmp_path / name
        refused = pytest.raises(UserError, match=f"{name} cannot be written .*: nothing was left there; make room")
        with files_of_at_most(4_000), refused:
            save(folder)
        assert not any(tmp_path.glob(f"*{name}*")), "not even a temporary folder"
        save(folder)
        (folder / "notes.md").write_text("mine")
        refused = pytest.raises(UserError, match=f"{name} cannot be written .*: the model that was there is untouched")
        with files_of_at_most(4_000), refused:
            save(folder)
        assert (folder / "notes.md").read_text() == "mine"
        assert torch.equal(load_tokenizer(folder).codes(), coder.codes())


def test_a_log_that_does_not_fit_is_named_and_goes_on(tmp_path: Path) -> None:
    tokens = write_stripes(tmp_path / "tokens")
    config = stripes_config(tokens, tmp_path / "run", *SETTINGS)
    train_prior(config)
    config = stripes_config(tokens, tmp_path / "run", *SETTINGS, "training.steps=6")
    size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
    with files_of_at_most(size + 20), pytest.raises(OSError, match=r"metrics\.jsonl") as raised:
        train_prior(config)
    assert raised.value.errno == errno.EFBIG
    assert len(read_metrics(tmp_path / "run")) == 4, "the line that was cut short does not count"
    train_prior(config)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_tracker_that_cannot_write_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("accelerate.Accelerator.log", full)
    tokens = write_stripes(tmp_path / "tokens")
    with pytest.raises(UserError, match=rf"cannot write to {tmp_path / 'run'} \(.*{os.strerror(number)}\); make room"):
        train_prior(stripes_config(tokens, tmp_path / "run", *SETTINGS))


def test_the_command_line_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with files_of_at_most(100):
        assert main(["sample", "--num", "1", "--steps", "1", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == f"scq: {tmp_path / '000000.png'}: File too large; make room, and run the same command again"
    assert not any(tmp_path.iterdir())
