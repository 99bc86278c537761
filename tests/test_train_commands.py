"""Both stages from the command line, tokenizer to refiner: what each leaves in its run folder."""

import subprocess
from pathlib import Path

import pytest
from helpers import REPOSITORY, SEVERAL, launcher
from PIL import Image

from scq.cli.main import main
from scq.engine.tracking import read_metrics
from scq.sampling.pipeline import SoftConvexPipeline
from scq.stage2_prior.refiner import ConvexRefiner

CONFIGS = REPOSITORY / "configs"
TINY = ["training.batch_size=8", "training.log_every=1", "training.checkpoint_every=2", "training.precision=fp32"]
PRIOR = ["architecture.width=32", "architecture.depth=1", "architecture.heads=2", "training.steps=4"]
PRIOR += ["training.images_every=4", *TINY]
REFINER = ["architecture.width=16", "architecture.depth=1", "training.steps=4", "training.images_every=4", *TINY]
SHEET = (8 * 66 - 2, 4 * 66 - 2)  # 32 images in rows of eight, each 64 pixels wide and 2 apart


def scq(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def runs(emoji: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer's run, and its tokens of both splits."""
    folder = tmp_path_factory.mktemp("runs")
    config = CONFIGS / "quickstart" / "tokenizer_scq.yaml"
    small = ["architecture.channels=[8,16,32]", "quantizer.codebook_size=32", "training.steps=4", *TINY]
    scq("train", "tokenizer", "--config", config, f"out={folder}/tokenizer", f"data.train={emoji['train']}", *small)
    for split in ("train", "test"):
        scq("tokenize", "--model", folder / "tokenizer", "--data", emoji[split], "--out", folder / f"tokens_{split}")
    return folder


def prior_command(runs: Path, out: str, *more: str) -> list[str]:
    return [
        *("train", "prior", "--config", str(CONFIGS / "quickstart" / "prior.yaml"), f"out={runs / out}"),
        *(f"tokenizer={runs / 'tokenizer'}", f"data.train={runs / 'tokens_train'}"),
        *(f"data.validation={runs / 'tokens_test'}", *PRIOR, *more),
    ]


@pytest.fixture(scope="module")
def prior(runs: Path) -> Path:
    scq(*prior_command(runs, "prior"))
    return runs / "prior"


def test_a_prior_leaves_samples_and_its_last_and_best_models(prior: Path) -> None:
    assert Image.open(prior / "images" / "step_00000004.png").size == SHEET
    assert [row["step"] for row in read_metrics(prior) if "bits_per_token" in row] == [2, 4]
    for name in ("model", "best"):
        assert len(SoftConvexPipeline.from_pretrained(prior / name)(2, seed=0).images) == 2


def test_a_prior_divided_among_processes_leaves_the_same(runs: Path) -> None:
    def launch(*more: str) -> str:
        command = [*launcher(2), "-m", "scq", *prior_command(runs, "divided", "shard=true"), *more]
        result = subprocess.run(command, cwd=REPOSITORY, env=SEVERAL, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    estimated = launch("--dry-run")
    assert "4 steps of 8 images in 2 processes" in estimated
    assert not (runs / "divided").exists()
    launch()
    assert Image.open(runs / "divided" / "images" / "step_00000004.png").size == SHEET, "the main process draws all"
    assert SoftConvexPipeline.from_pretrained(runs / "divided" / "best").refiner is None


def test_a_refiner_leaves_its_last_and_best_models(
    runs: Path, prior: Path, emoji: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        *("train", "refiner", "--config", CONFIGS / "cifar10" / "refiner.yaml", f"tokenizer={runs / 'tokenizer'}"),
        *(f"data.train={emoji['train']}", f"data.validation={emoji['test']}", *REFINER),
    ]
    with_prior = [*command, f"out={runs / 'refiner'}", f"prior={prior}"]
    scq(*with_prior, "--dry-run")
    estimated = capsys.readouterr().out
    assert "frozen tokenizer" in estimated
    assert "frozen prior" in estimated
    assert "3,616 images, 452 steps per epoch" in estimated
    assert not (runs / "refiner").exists()
    scq(*with_prior)
    assert (runs / "refiner" / "images" / "step_00000004.png").is_file()
    for name in ("model", "best"):
        assert SoftConvexPipeline.from_pretrained(runs / "refiner" / name).refiner is not None
    scq(*command, f"out={runs / 'alone'}", "prior=", "resampled_share=0")
    for name in ("model", "best"):
        assert ConvexRefiner.from_pretrained(runs / "alone" / name).config.kind == "regression"
