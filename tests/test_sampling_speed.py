"""`scq benchmark sampling` measures what it says, on the real pipeline."""

import json
from pathlib import Path

import pytest
from helpers import run_scq


def test_the_table_has_shares_that_add_up(tiny_run: Path, tmp_path: Path) -> None:
    result = run_scq(
        *("benchmark", "sampling", "--model", tiny_run / "model", "--steps", 2, "--steps", 8),
        *("--num", 16, "--repeats", 2, "--precision", "bf16", "--out", tmp_path / "speed.json"),
    )
    assert result.returncode == 0, result.stderr
    few, many = json.loads((tmp_path / "speed.json").read_text())
    assert (few["steps"], many["steps"]) == (2, 8)
    assert few["precision"] == "bfloat16"
    for row in (few, many):
        shares = row["share_of_prior"] + row["share_of_refiner"] + row["share_of_decoder"]
        assert shares == pytest.approx(1, abs=0.35)
        assert row["ratio_low"] <= row["ratio_to_plain_loop"] <= row["ratio_high"]
    assert few["share_of_prior"] < many["share_of_prior"], "the prior is called more often"
    assert "| 8 |" in result.stdout
