"""A prior divided among two processes trains as one that is not, and goes on from its checkpoint."""

import subprocess
from pathlib import Path

import pytest
import torch
from helpers import SEVERAL, launcher
from safetensors.torch import load_file
from test_prior import train_prior, write_stripes

from scq.engine.config import load_config
from scq.engine.errors import UserError
from scq.stage2_prior.prior_stage import PriorExperiment

PROGRAM = """
import sys
from test_prior import train_prior
from scq.engine.config import load_config
from scq.stage2_prior.prior_stage import PriorExperiment
train_prior(load_config(PriorExperiment, None, sys.argv[1:]))
"""
SETTINGS = ["architecture.width=32", "architecture.depth=2", "architecture.heads=2", "training.batch_size=16"]
SETTINGS += ["architecture.code_features=false", "training.precision=fp32", "training.images_every=0"]
SETTINGS += ["optimizer.schedule=constant", "training.accumulate=2", "training.checkpoint_every=4"]


def train(folder: Path, out: str, steps: int, *more: str) -> dict[str, dict[str, torch.Tensor]]:
    """Train in two processes; the newest checkpoint's weights and averages."""
    (folder / "program.py").write_text(PROGRAM)
    settings = [*SETTINGS, f"data.train={folder / 'tokens'}", f"out={folder / out}", f"training.steps={steps}", *more]
    environment = {**SEVERAL, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(
        [*launcher(2), str(folder / "program.py"), *settings],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    newest = sorted((folder / out / "checkpoints").glob("step_*"))[-1]
    return {name: load_file(newest / f"{name}.safetensors") for name in ("model", "ema")}


def test_a_divided_prior_trains_as_a_whole_one_and_goes_on(tmp_path: Path) -> None:
    write_stripes(tmp_path / "tokens")
    whole = train(tmp_path, "whole", 8)
    divided = train(tmp_path, "divided", 8, "shard=true")
    for name in ("model", "ema"):
        assert divided[name].keys() == whole[name].keys()
        for key, tensor in whole[name].items():
            torch.testing.assert_close(divided[name][key], tensor, rtol=1e-3, atol=1e-5, msg=f"{name} {key}")
    train(tmp_path, "halved", 4, "shard=true")
    resumed = train(tmp_path, "halved", 8, "shard=true")
    for name in ("model", "ema"):
        for key, tensor in divided[name].items():
            assert torch.equal(resumed[name][key], tensor), f"{name} {key}"


def test_one_process_has_nothing_to_divide(tmp_path: Path) -> None:
    write_stripes(tmp_path / "tokens")
    config = load_config(
        PriorExperiment, None, [*SETTINGS, f"data.train={tmp_path / 'tokens'}", f"out={tmp_path / 'run'}", "shard=true"]
    )
    with pytest.raises(UserError, match="among several processes"):
        train_prior(config)
