"""Compiled training, where there is a compiler."""

import shutil

import pytest
import torch

from scq.engine.accelerators import make_accelerator
from scq.engine.config import CONFIG_ROOT, load_config
from scq.stage1_tokenizer.stage import TokenizerExperiment, TokenizerTask

TINY = [
    "architecture.channels=[8]", "architecture.image_size=8", "architecture.patch_size=2",
    "quantizer.codebook_size=16", "quantizer.options.dominant_dropout=0", "training.precision=fp32",
    "loss.adversarial=0.5", "loss.adversarial_start=1", "loss.adversarial_ramp=0", "loss.discriminator_lead=0",
    "loss.discriminator_channels=8", "loss.discriminator_layers=1", "optimizer.learning_rate=1e-4",
    "robustness.swapped_share=0.5",
]  # fmt: skip


def steps(compiled: bool) -> list[dict[str, torch.Tensor]]:
    """Two steps, the second one with the adversarial loss."""
    path = CONFIG_ROOT / "quickstart" / "tokenizer_scq.yaml"
    config = load_config(TokenizerExperiment, path, [*TINY, f"training.compile={str(compiled).lower()}"])
    task = TokenizerTask(config, make_accelerator(config.training), torch.zeros(1))
    pixels = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = type("Batch", (), {"images": pixels, "positions": torch.arange(8)})
    return [task.training_step(batch, step) for step in range(2)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_a_compiled_step_with_the_adaptive_weight_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adaptive weight walks the compiled backward graph more than once, after steps that walked it once."""
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", True)  # torch's default, here and afterwards
    plain_steps = steps(False)
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled_steps = steps(True)
    for plain, compiled in zip(plain_steps, compiled_steps, strict=True):
        assert plain.keys() == compiled.keys()
        for name, value in plain.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert {"adversarial", "adaptive_weight"} <= compiled.keys()
