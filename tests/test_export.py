"""A model for sharing: half the bytes, almost the same images, and the one that comes with the package."""

from pathlib import Path

import pytest
import torch
from helpers import run_scq

from sampling import EMBEDDED, SoftConvexPipeline
from sampling.export import export_half


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_a_copy_in_half_precision_draws_the_same_images_but_for_rounding(tiny_run: Path, tmp_path: Path) -> None:
    whole = SoftConvexPipeline.from_pretrained(tiny_run / "model")
    tokens = whole(4, seed=0).tokens
    pixels = whole.decode_tokens(tokens)
    codebook = whole.tokenizer.codes()
    export_half(whole, tmp_path / "half")
    copy = SoftConvexPipeline.from_pretrained(tmp_path / "half")
    assert size(tmp_path / "half") < 0.62 * size(tiny_run / "model")
    assert torch.equal(copy.tokenizer.codes(), codebook)
    assert all(
        p.dtype == torch.float32 for part in (copy.tokenizer, copy.prior, copy.refiner) for p in part.parameters()
    )
    difference = copy.decode_tokens(tokens).int() - pixels.int()
    assert difference.abs().float().mean() < 0.5
    assert copy.measured == whole.measured


def test_export_from_the_command_line(tiny_run: Path, tmp_path: Path) -> None:
    result = run_scq("export", "--model", tiny_run / "model", "--out", tmp_path / "copy")
    assert result.returncode == 0, result.stderr
    assert "MB" in result.stdout
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "KID x 1000" in card
    assert "Twemoji" in card
    assert "CC-BY 4.0" in card


def test_the_model_that_comes_with_the_package_is_small_and_says_what_it_is() -> None:
    whole = sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file())
    assert whole <= 12e6
    pipeline = SoftConvexPipeline.from_pretrained(EMBEDDED)
    images = pipeline(8, seed=0, output_type="pt").images.float()
    assert images.std((1, 2, 3)).min() > 5, "no flat image among them"
    card = (EMBEDDED / "README.md").read_text()
    assert "CC-BY 4.0" in card
    assert f"{pipeline.measured['samples']['count']} samples" in card
    assert pipeline.measured["samples"]["kid"] == pytest.approx(0.15, abs=0.1)


def test_sampling_needs_no_model(tmp_path: Path) -> None:
    result = run_scq("sample", "--num", 2, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "000001.png"]
