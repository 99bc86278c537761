"""`scq benchmark tokenizers`: arms trained and measured once, and the table says of what."""

from pathlib import Path

import pytest
from helpers import REPOSITORY

from scq.evaluation.benchmark.results import ComparisonResults, load_results
from scq.evaluation.benchmark.tokenizers import compare_tokenizers

QUICKSTART = REPOSITORY / "configs" / "quickstart" / "tokenizer_scq.yaml"


def test_finished_arms_are_reused(emoji: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.yaml").write_text(
        f"base: {QUICKSTART}\ntraining: {{steps: 4, checkpoint_every: 4, log_every: 2, batch_size: 8}}\n"
        "quantizer: {codebook_size: 32}\narchitecture: {channels: [8, 16, 32]}\n"
    )
    config = tmp_path / "comparison.yaml"
    config.write_text(
        "{tokenizer: tokenizer.yaml, images: 16, arms: {soft: [], hard: [quantizer.name=vq]}, seeds: {hard: 2}}"
    )
    out = tmp_path / "out"
    table = compare_tokenizers(config, str(emoji["train"]), str(emoji["test"]), out)
    assert "| soft | dominant codes |" in table
    assert "| hard, 2 seeds | codes |" in table
    results = load_results(ComparisonResults, out / "results.json")
    soft, hard = results.arms["soft"][0], results.arms["hard"]
    assert [run.tokenizer.seed for run in hard] == [soft.tokenizer.seed, soft.tokenizer.seed + 1]
    assert soft.reconstructions.ways["z_q"].count == 16
    assert soft.reconstructions.ways["z_q"].rfid is None, "no network was asked for"
    capfd.readouterr()
    assert compare_tokenizers(config, str(emoji["train"]), str(emoji["test"]), out) == table
    assert capfd.readouterr().err.count("done before") == 7
    assert (out / "table.md").read_text() == table
