"""The speed benchmark runs and says what it measured; how fast anything is, no test asks."""

import json

import pytest
import torch

from scq.evaluation.speed.quantizers import BASELINE, benchmark_speed, trained_like


def test_speed_benchmark_measures_every_arm(tmp_path):
    lines = []
    threads = torch.get_num_threads()
    result = benchmark_speed(tmp_path, cells=((256, 4, 32), (128, 8, 64)), repeats=2, threads=1, echo=lines.append)
    assert torch.get_num_threads() == threads
    assert json.loads((tmp_path / "speed.json").read_text()) == result
    assert (tmp_path / "speed.png").stat().st_size > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.png"]
    arms = {row["arm"] for row in result["rows"]}
    assert {BASELINE, "vector-quantize-pytorch", "SCQ exact", "SCQ local", "SCQ relaxed"} <= arms
    assert len(result["rows"]) == 2 * len(arms) == len(lines) - 1
    for row in result["rows"]:
        assert 0 < row["low_s"] <= row["median_s"] <= row["high_s"]
        assert row["ratio"] > 0
        # plain VQ holds at least its (N, K) block of distances
        assert row["peak_mb"] * 2**20 >= (row["n"] * row["k"] * 4 if row["arm"] == BASELINE else 1)
    assert all(row["ratio"] == 1 for row in result["rows"] if row["arm"] == BASELINE)


def test_latents_and_codes_look_trained():
    z, codes = trained_like(500, 4, 32)
    hard = torch.cdist(z, codes).square().amin(1).mean()
    random_codes = z[torch.randperm(500, generator=torch.Generator().manual_seed(0))[:32]]
    assert hard < torch.cdist(z, random_codes).square().amin(1).mean()


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="cells must be"):
        benchmark_speed(cells=((0, 4, 32),))
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        benchmark_speed(cells=((8, 4, 32),), repeats=0)
