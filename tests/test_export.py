"""A model for sharing: half the bytes, almost the same images, and the one that comes with the package."""

from pathlib import Path

import pytest
import torch
from helpers import run_scq

from scq.cli.main import main
from scq.engine.errors import UserError
from scq.sampling.export import export_half
from scq.sampling.pipeline import EMBEDDED, SoftConvexPipeline
from scq.stage2_prior.model_card import model_card


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
    result = run_scq("export", "--model", tiny_run / "model", "--out", tmp_path / "copy", "--license", "cc-by-4.0")
    assert result.returncode == 0, result.stderr
    assert "MB" in result.stdout
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "KID x 1000" in card
    assert "Twemoji" in card
    assert "CC-BY 4.0" in card
    assert "license: cc-by-4.0" in card
    SoftConvexPipeline.from_pretrained(tmp_path / "copy").save_pretrained(tmp_path / "copy")  # a model replaces a model
    assert "license: cc-by-4.0" in (tmp_path / "copy" / "README.md").read_text()


def test_training_from_the_command_line_writes_its_facts_into_the_card(tiny_run: Path, tmp_path: Path) -> None:
    arm, shards = tiny_run / "arms" / "scq", tiny_run / "shards"
    short = ["training.steps=2", "training.batch_size=8", "training.images_every=0", "training.precision=fp32"]
    for stage, data, width, more in (
        ("prior", arm / "tokens", "width=24", ["architecture.heads=2"]),
        ("refiner", shards / "train", "width=16", [f"prior={tmp_path / 'prior'}"]),
    ):
        asked = [f"out={tmp_path / stage}", f"tokenizer={arm / 'tokenizer'}", f"data.train={data}", *short, *more]
        asked += [f"architecture.{width}", "architecture.depth=1"]
        config = tmp_path / f"{stage}.yaml"
        config.write_text("{}\n")
        assert main(["train", stage, "--config", str(config), *asked]) == 0
    card = (tmp_path / "refiner" / "model" / "README.md").read_text()
    assert "- dataset: emoji" in card
    assert "- tokenizer: 12 steps, 192 images seen" in card
    assert "- prior: 2 steps, 16 images seen" in card
    assert "- refiner: 2 steps, 16 images seen" in card
    assert "license: cc-by-4.0" in card


def test_nothing_but_a_model_is_replaced(tiny_run: Path, tmp_path: Path) -> None:
    pipeline = SoftConvexPipeline.from_pretrained(tiny_run / "model")
    (tmp_path / "beach.jpg").write_bytes(b"a")
    for save in (pipeline.save_pretrained, lambda folder: export_half(pipeline, folder)):
        with pytest.raises(UserError, match="holds something other than a model"):
            save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["beach.jpg"]
    result = run_scq("export", "--model", tiny_run / "model", "--out", ".")
    assert result.returncode == 2
    assert "is or contains the current folder" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_model_that_comes_with_the_package_is_small_and_says_what_it_is() -> None:
    whole = sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file())
    assert whole <= 12e6
    pipeline = SoftConvexPipeline.from_pretrained(EMBEDDED)
    images = pipeline(8, seed=0, output_type="pt").images.float()
    assert images.std((1, 2, 3)).min() > 5, "no flat image among them"
    card = (EMBEDDED / "README.md").read_text()
    assert "CC-BY 4.0" in card
    assert f"{pipeline.measured.samples.count} samples" in card
    assert card == model_card(pipeline.as_model(), pipeline.measured), "the card is what this model's facts make of it"
    assert "prior: 350 steps" in card
    assert pipeline.measured.samples.kid == pytest.approx(0.15, abs=0.1)


def test_sampling_needs_no_model(tmp_path: Path) -> None:
    result = run_scq("sample", "--num", 2, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "000001.png"]
    rounded = run_scq("sample", "--num", 1, "--out", tmp_path / "rounded", "--precision", "bf16")
    assert rounded.returncode == 0, rounded.stderr
    assert (tmp_path / "rounded" / "000000.png").read_bytes() != (tmp_path / "000000.png").read_bytes()
