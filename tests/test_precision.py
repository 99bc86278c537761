"""bf16 training steps are near fp32's, in each stage."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_prior import stripes_config, stripes_tokenizer, write_stripes
from test_refiner import config as refiner_config
from test_refiner import tokenizer

from scq.data.stream import iterate_once
from scq.engine.accelerators import make_accelerator, resolve_precision
from scq.engine.config import CONFIG_ROOT, load_config
from scq.engine.errors import UserError
from scq.stage1_tokenizer.stage import TokenizerExperiment, TokenizerTask
from scq.stage2_prior.prior_stage import PriorStage
from scq.stage2_prior.refiner_stage import RefinerTask


def tokenizer_terms(emoji: dict[str, Path], folder: Path, precision: str) -> dict[str, torch.Tensor]:
    path = CONFIG_ROOT / "quickstart" / "tokenizer_scq.yaml"
    settings = ["loss.adversarial=0.5", "loss.adversarial_start=0", "loss.adversarial_ramp=0", "loss.lecam=0.1"]
    settings += ["loss.discriminator_channels=8", "loss.discriminator_lead=0", f"training.precision={precision}"]
    config = load_config(TokenizerExperiment, path, ["architecture.channels=[8,16]", *settings])
    task = TokenizerTask(config, make_accelerator(config.training), torch.zeros(1))
    return task.training_step(next(iterate_once(emoji["train"], 16)), 0)


def prior_terms(emoji: dict[str, Path], folder: Path, precision: str) -> dict[str, torch.Tensor]:
    tokens = folder / precision
    config = stripes_config(write_stripes(tokens), folder / "run", f"training.precision={precision}")
    accelerator = make_accelerator(config.training)
    stage = PriorStage(config, stripes_tokenizer())
    batch = next(iter(stage.open_stream(accelerator)))
    return stage.build(accelerator).training_step(batch, 0)


def refiner_terms(emoji: dict[str, Path], folder: Path, precision: str) -> dict[str, torch.Tensor]:
    config = refiner_config(emoji, folder / "run", f"training.precision={precision}", "architecture.kind=flow")
    batch = next(iterate_once(emoji["train"], 16))
    task = RefinerTask(config, make_accelerator(config.training), tokenizer(), None, batch.images, batch.images)
    return task.training_step(batch, 0)


@pytest.mark.parametrize("terms_of", [tokenizer_terms, prior_terms, refiner_terms])
def test_bf16_is_near_fp32(terms_of: Callable, emoji: dict[str, Path], tmp_path: Path) -> None:
    full, half = (terms_of(emoji, tmp_path, precision) for precision in ("fp32", "bf16"))
    assert full.keys() == half.keys()
    assert all(value.isfinite() for value in half.values())
    assert float(half["loss"]) == pytest.approx(float(full["loss"]), rel=0.03)
    assert float(half["gradient_norm"]) == pytest.approx(float(full["gradient_norm"]), rel=0.1)
    assert float(half["gradient_norm"]) != float(full["gradient_norm"]), "it was computed in another precision"


def test_fp16_is_refused() -> None:
    with pytest.raises(UserError, match="precision is 'fp16'; it must be auto, fp32 or bf16"):
        resolve_precision("fp16")
