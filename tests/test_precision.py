"""bf16 training steps are near fp32's, in each stage."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_prior import stripes_config, stripes_tokenizer, write_stripes
from test_refiner import config as refiner_config
from test_refiner import tokenizer

from scq.data.stream import iterate_once
from scq.engine.accelerators import make_accelerator, resolve_precision
from scq.engine.config import CONFIG_ROOT, LoopConfig, load_config, save_config
from scq.engine.errors import UserError
from scq.engine.run import run
from scq.engine.tracking import read_metrics
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


@pytest.mark.parametrize(
    ("capabilities", "allowed", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, None, "bf16"),
        ({"amx_bf16": True, "avx512_bf16": True}, "AVX512_CORE_BF16", "fp32"),
        ({"amx_bf16": True, "avx512_bf16": True}, "AVX512_CORE_AMX", "bf16"),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "INTEL XEON"}, None, "fp32"),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, None, "bf16"),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, "AVX512_CORE", "fp32"),
        ({"amx_bf16": False, "avx512_bf16": False, "cpu_name": "AMD EPYC"}, None, "fp32"),
        ({}, None, "fp32"),
    ],
)
def test_auto_takes_what_is_faster_on_this_processor(
    capabilities: dict[str, bool], allowed: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX-512's bf16 but without AMX's tiles, a step takes a third longer than in float32 on Intel's processors.

    On AMD's (Zen 4) it takes 0.6 of float32's time.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)  # torch 2.8 has none
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if allowed is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed)
    assert resolve_precision("auto") == expected


@pytest.mark.parametrize("begun", ["bf16", "fp32"])
def test_a_run_keeps_its_precision_on_another_machine(
    begun: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, run_folder = write_stripes(tmp_path / "tokens"), tmp_path / "run"
    elsewhere = {"bf16": "fp32", "fp32": "bf16"}[begun]

    def train(steps: int, *settings: str) -> list[dict]:
        settings = ("training.precision=auto", *settings, f"training.steps={steps}")
        run(PriorStage(stripes_config(tokens, run_folder, *settings), stripes_tokenizer()))
        return read_metrics(run_folder)

    monkeypatch.setattr("scq.engine.accelerators._has_fast_bf16", lambda: begun == "bf16")
    train(2)
    assert f"precision: {begun}" in (run_folder / "config.yaml").read_text()
    monkeypatch.setattr("scq.engine.accelerators._has_fast_bf16", lambda: begun != "bf16")
    capsys.readouterr()
    train(4)
    assert f"begun in {begun}, which it keeps; a new one would take {elsewhere}" in " ".join(
        capsys.readouterr().err.split()
    )
    assert f"precision: {begun}" in (run_folder / "config.yaml").read_text()
    with pytest.raises(UserError, match=f"training.precision='{begun}', but this run asks for '{elsewhere}'"):
        train(6, f"training.precision={elsewhere}")


def test_a_run_of_before_precisions_were_recorded_goes_on(tmp_path: Path) -> None:
    tokens, run_folder = write_stripes(tmp_path / "tokens"), tmp_path / "run"
    config = stripes_config(tokens, run_folder, "training.precision=auto", "training.steps=2")
    run(PriorStage(config, stripes_tokenizer()))
    save_config(config, run_folder / "config.yaml")
    assert "precision: auto" in (run_folder / "config.yaml").read_text()
    assert run(PriorStage(replace(config, training=replace(config.training, steps=4)), stripes_tokenizer())).steps == 4


def test_nothing_in_the_environment_changes_a_gradient(
    emoji: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`accelerate launch` hands the answers to its own questionnaire over as variables."""
    plain = prior_terms(emoji, tmp_path / "plain", "fp32")
    asked = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_GRADIENT_CLIPPING": "0.001",
        "ACCELERATE_DOWNCAST_BF16": "true",
    }
    for variable, value in asked.items():
        monkeypatch.setenv(variable, value)
    capsys.readouterr()
    again = prior_terms(emoji, tmp_path / "again", "fp32")
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name
    said = " ".join(capsys.readouterr().err.split())
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 has no effect: training.accumulate decides" in said
    assert "ACCELERATE_MIXED_PRECISION=bf16 has no effect: training.precision decides" in said


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_another_engine_is_refused(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UserError, match=f"ACCELERATE_USE_{engine} is set"):
        make_accelerator(LoopConfig())
