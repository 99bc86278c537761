"""A benchmark goes on with stages that several processes trained beforehand, as docs/benchmark.md does for LSUN."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import REPOSITORY, SEVERAL, launcher, write_tiny_benchmark

from scq.engine.tracking import read_metrics
from scq.evaluation.benchmark.results import BenchmarkResults, load_results
from scq.evaluation.benchmark.run import run_benchmark
from scq.stage1_tokenizer.model_folder import load_tokenizer


@pytest.mark.slow
def test_stages_that_two_processes_trained_are_reused(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(tiny_run, out)
    for known in (out / "phases").glob("scq*"):
        known.unlink()
    arm = out / "arms" / "scq"
    shutil.rmtree(arm)
    config, shards = write_tiny_benchmark(tmp_path), out / "shards"
    images = [f"data.train={shards / 'train'}", f"data.validation={shards / 'test'}"]
    stages = [
        ["train", "tokenizer", "--config", tmp_path / "tokenizer_scq.yaml", f"out={arm / 'tokenizer'}", *images],
        ["tokenize", "--model", arm / "tokenizer", "--data", shards / "train", "--out", arm / "tokens"],
        ["train", "prior", "--config", tmp_path / "prior.yaml", f"out={arm / 'prior'}"]
        + [f"tokenizer={arm / 'tokenizer'}", f"data.train={arm / 'tokens'}"],
        ["train", "refiner", "--config", tmp_path / "refiner.yaml", "architecture.kind=regression"]
        + [f"out={arm / 'refiner_regression'}", f"tokenizer={arm / 'tokenizer'}", f"prior={arm / 'prior'}", *images],
    ]
    for stage in stages:
        result = subprocess.run(
            [*launcher(2), "-m", "scq", *map(str, stage)],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=SEVERAL,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
    folders = [arm / name for name in ("tokenizer", "prior", "refiner_regression")]
    logs = [read_metrics(folder) for folder in folders]
    assert all(logs)
    fingerprint = load_tokenizer(arm / "tokenizer").fingerprint()
    before = load_results(BenchmarkResults, tiny_run / "results.json").arms["scq"][0]

    results = run_benchmark(config, out)
    assert [read_metrics(folder) for folder in folders] == logs, "a stage was trained again"
    assert "scq tokenizer" in re.findall(r"\] (scq[^:\n]*)$", capfd.readouterr().err, re.M)
    found = results.arms["scq"][0]
    assert found.tokenizer.fingerprint == fingerprint
    assert found.tokens.usage.images == before.tokens.usage.images
    assert found.samples["regression"].scores.count == 24
    mse = [each.reconstructions.ways["z_q"].mse for each in (found, before)]
    assert mse[0] == pytest.approx(mse[1], rel=0.05)
