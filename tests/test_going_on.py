"""Exact resume where something beside weights has a state: training 2N steps is N, and N more from the checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_prior import stripes_config, train_prior, write_stripes
from test_refiner import config as refiner_config
from test_refiner import tokenizer, train_refiner

from scq.engine.config import CONFIG_ROOT, load_config
from scq.engine.run import run
from scq.stage1_tokenizer.stage import TokenizerExperiment, TokenizerStage
from scq.stage2_prior.transformer import MaskedTransformer

STEPS = 5


def same_after_resume(train: Callable[[Path, int], object], folder: Path) -> dict[str, torch.Tensor]:
    """Compare both ways, and return the weights."""
    train(folder / "whole", 2 * STEPS)
    train(folder / "parts", STEPS)
    train(folder / "parts", 2 * STEPS)
    newest = f"checkpoints/step_{2 * STEPS:08d}"
    for name in ("model", "ema"):
        whole, parts = (load_file(folder / out / newest / f"{name}.safetensors") for out in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        for key, tensor in whole.items():
            assert torch.equal(tensor, parts[key]), f"{name}: {key}"
    begun = load_file(folder / "parts" / f"checkpoints/step_{STEPS:08d}/model.safetensors")
    assert any(not torch.equal(tensor, parts[key]) for key, tensor in begun.items())
    return parts


@pytest.mark.parametrize("quantizer", ["vq_ema", "rvq2", "scq"])
def test_a_tokenizer(quantizer: str, emoji: dict[str, Path], tmp_path: Path) -> None:
    def train(out: Path, steps: int) -> None:
        path = CONFIG_ROOT / "quickstart" / "tokenizer_scq.yaml"
        settings = [f"out={out}", f"data.train={emoji['train']}", f"training.steps={steps}", "training.batch_size=8"]
        settings += [f"quantizer.name={quantizer}", "quantizer.codebook_size=64", "architecture.channels=[8,16]"]
        settings += ["training.images_every=0", "training.precision=fp32", "optimizer.schedule=constant"]
        settings += ["training.accumulate=2", f"training.checkpoint_every={STEPS}"]
        run(TokenizerStage(load_config(TokenizerExperiment, path, settings)))

    weights = same_after_resume(train, tmp_path)
    if quantizer == "scq":
        assert weights["quantizer.steps"] == 2 * STEPS, "steps of the optimizer, not its parts"


def test_a_prior_with_dropout(tmp_path: Path) -> None:
    tokens = write_stripes(tmp_path / "tokens", classes=3)

    def train(out: Path, steps: int) -> None:
        settings = [f"training.steps={steps}", f"training.checkpoint_every={STEPS}", "architecture.dropout=0.3"]
        settings += ["architecture.class_conditional=true", "masking.corrupted_share=0.1", "training.accumulate=2"]
        train_prior(stripes_config(tokens, out, "optimizer.schedule=constant", *settings))

    same_after_resume(train, tmp_path)


@pytest.mark.parametrize("kind", ["regression", "flow"])
def test_a_refiner_on_resampled_codes(kind: str, emoji: dict[str, Path], tmp_path: Path) -> None:
    model = tokenizer()
    torch.manual_seed(0)
    prior = MaskedTransformer(32, model.grid, width=16, depth=1, heads=2)

    def train(out: Path, steps: int) -> None:
        settings = [f"training.steps={steps}", f"training.checkpoint_every={STEPS}", f"architecture.kind={kind}"]
        settings += ["resampled_share=0.5", "optimizer.schedule=constant", "training.images_every=0"]
        train_refiner(refiner_config(emoji, out, *settings), model, prior)

    same_after_resume(train, tmp_path)
