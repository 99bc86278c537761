"""The whole main job, tiny: every phase runs, its results are whole, and a second run repeats nothing."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, SEVERAL, launcher, run_scq, write_tiny_benchmark
from PIL import Image

from scq.data.stream import ImageStream
from scq.data.tokens import TokenDataset
from scq.engine.errors import UserError
from scq.evaluation.benchmark.config import ArmConfig
from scq.evaluation.benchmark.results import BenchmarkResults, load_results
from scq.evaluation.benchmark.run import run_benchmark
from scq.evaluation.reference import Reference
from scq.sampling.pipeline import SoftConvexPipeline


def kept(run: Path) -> BenchmarkResults:
    return load_results(BenchmarkResults, run / "results.json")


def test_every_number_is_there(tiny_run: Path) -> None:
    results = kept(tiny_run)
    assert list(results.arms) == ["scq", "vqgan"]
    assert results.reference.split == "test"
    for (arm,) in results.arms.values():
        assert next(iter(arm.samples)) == "codes"
        for found in arm.samples.values():
            assert found.scores.count == 24
            assert found.scores.fid_biased
            assert found.scores.seconds_of is not None
            assert found.scores.nearest_training_among == 40
            assert found.scores.fid_to_training > 0
        for source in ("z_q", "dominant"):
            found = arm.reconstructions.ways[source]
            assert found.count == 24
            assert None not in (found.rfid, found.rkid)
        assert arm.tokens.usage.images > arm.held_out_usage.images > 0
        assert 1 <= arm.tokens.usage.perplexity <= 64
        assert arm.likelihood.images == 24
    # Only the soft quantizer hands its decoder more than codes.
    vqgan, scq = (results.arms[name][0].reconstructions for name in ("vqgan", "scq"))
    assert (vqgan.soft, scq.soft) == (False, True)
    assert vqgan.ways["z_q"] == vqgan.ways["dominant"]
    assert scq.ways["z_q"].mse != scq.ways["dominant"].mse
    assert results.seconds_in_all == pytest.approx(sum(results.seconds.values()), abs=0.1)


def test_the_report_shows_its_pictures(tiny_run: Path) -> None:
    report = (tiny_run / "report.md").read_text()
    for picture in ("samples", "reconstructions", "curves", "rates", "sweep", "neighbours"):
        picture = f"{picture}.png"
        assert f"({picture})" in report
        with Image.open(tiny_run / picture) as image:
            assert min(image.size) > 60
    assert "biased" in report
    assert not re.search(r"\bnan\b", report)


def test_a_second_run_reuses_every_phase(tiny_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = kept(tiny_run)
    run_benchmark(tiny_run.parent / "benchmark.yaml", tiny_run)
    assert capfd.readouterr().err.count("done before") == len(before.seconds) == 25
    assert kept(tiny_run) == before


def test_a_run_folder_may_move(tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_run, moved)
    shutil.rmtree(moved / "phases")  # every phase runs again, from what its folder holds
    results = run_benchmark(write_tiny_benchmark(tmp_path), moved)
    assert "done before" not in capfd.readouterr().err
    before = kept(tiny_run)
    for name, (arm,) in results.arms.items():
        known = before.arms[name][0]
        assert arm.tokenizer.fingerprint == known.tokenizer.fingerprint
        for way, found in arm.samples.items():
            assert found.scores.kid == pytest.approx(known.samples[way].scores.kid, rel=1e-4)


def test_the_exported_model_is_the_first_arms(tiny_run: Path) -> None:
    pipeline = SoftConvexPipeline.from_pretrained(tiny_run / "model")
    assert pipeline.tokenizer.config.quantizer_name == "scq"
    assert pipeline.refiner is not None
    assert pipeline(num_images=2, output_type="pt").images.shape == (2, 3, 32, 32)


def test_evaluate_gives_the_benchmarks_numbers(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    result = run_scq(
        *("evaluate", "--model", tiny_run / "model", "--data", tiny_run / "shards" / "test", "--out", out),
        *("--num-real", 24, "--cache", tmp_path / "reference.safetensors"),
    )
    assert result.returncode == 0, result.stderr
    evaluated = json.loads(out.read_text())
    (measured,) = kept(tiny_run).arms["scq"]
    for way in ("z_q", "dominant"):
        known = measured.reconstructions.ways[way].mse
        assert evaluated["reconstruction"][way]["mse"] == pytest.approx(known, rel=1e-4)
    refined = measured.samples["regression"]
    assert evaluated["reconstruction"]["refined"]["mse"] == pytest.approx(refined.reconstruction.mse, rel=1e-4)
    assert evaluated["samples"]["kid"] == pytest.approx(refined.scores.kid, rel=1e-3)


@pytest.mark.slow  # the gathering of features and counts is tested with two processes in test_metrics.py
def test_two_processes_evaluate_as_one(tiny_run: Path, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        result = subprocess.run(
            [*launcher(processes), "-m", "scq", "evaluate", "--model", str(tiny_run / "model")]
            + ["--data", str(tiny_run / "shards" / "test"), "--num-real", "27", "--num-samples", "19"]
            + ["--weight-bits", "3", "--out", str(out)],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=SEVERAL,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
        assert ("2 processes share the work" in result.stderr) == (processes == 2)
        found.append(json.loads(out.read_text()))
    one, two = found
    for section in ("reconstruction", "codebook", "samples"):
        assert flat(two[section]) == pytest.approx(flat(one[section]), rel=1e-6, abs=1e-6), section


def test_two_processes_tokenize_as_one(tiny_run: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [*launcher(2), "-m", "scq", "tokenize", "--model", str(tiny_run / "arms" / "scq" / "tokenizer")]
        + ["--data", str(tiny_run / "shards" / "train"), "--out", str(tmp_path / "tokens")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=SEVERAL,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = TokenDataset(tiny_run / "arms" / "scq" / "tokens"), TokenDataset(tmp_path / "tokens")
    assert len(two.manifest["shards"]) == 2 * len(one.manifest["shards"]), "each process wrote its half"
    images = np.arange(len(one))
    codes = [tokens.read(images, np.zeros_like(images)) for tokens in (one, two)]
    assert (codes[0] == codes[1]).double().mean() > 0.999, "but for a latent between two codes"


def flat(tree: dict, prefix: str = "") -> dict[str, float]:
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            found[prefix + key] = float(value)
    return found


def test_a_reference_is_a_fixed_part_of_its_split(emoji: dict[str, Path]) -> None:
    first = torch.cat([batch.images for batch in Reference(emoji["test"], 50, batch_size=16).batches()])
    second = torch.cat([batch.images for batch in Reference(emoji["test"], 50, batch_size=7).batches()])
    assert len(first) == 50
    assert torch.equal(first, second)
    with pytest.raises(UserError, match="99999"):
        Reference(emoji["test"], 99999)
    whole = Reference(emoji["test"])
    assert whole.count == ImageStream(emoji["test"], batch_size=1).num_images
    positions = torch.cat([batch.positions for batch in whole.batches()])
    assert torch.equal(positions.sort().values, torch.arange(whole.count))


def test_results_of_other_weights_are_not_reused(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A refiner trained with another setting changes no number of steps, and yet everything that it decoded."""
    again = tmp_path / "again"
    shutil.copytree(tiny_run, again)
    shutil.rmtree(again / "arms" / "scq" / "refiner_regression")
    config = write_tiny_benchmark(tmp_path)
    (tmp_path / "refiner.yaml").write_text((tmp_path / "refiner.yaml").read_text().replace("0.3", "0.2"))
    results = run_benchmark(config, again)
    fresh = re.findall(r"\] (scq[^:\n]*)$", capfd.readouterr().err, re.M)
    assert fresh == [
        *("scq regression refiner", "scq regression reconstructions", "scq regression samples"),
        *("scq steps=2", "scq steps=4 sampler=halton"),
    ]
    before, after = kept(tiny_run).arms["scq"][0].samples, results.arms["scq"][0].samples
    assert after["codes"] == before["codes"]
    assert after["regression"].refiner.fingerprint != before["regression"].refiner.fingerprint


def test_one_seed_of_every_arm_comes_before_the_second_of_any(tmp_path: Path, tiny_run: Path) -> None:
    """Whoever stops early has a whole comparison, already written down."""
    out = tmp_path / "run"
    shutil.copytree(tiny_run, out)
    config = write_tiny_benchmark(tmp_path)
    config.write_text(config.read_text().replace("refiners: [regression]", "refiners: [regression, flow], seeds: 2"))
    results = run_benchmark(config, out)
    order = [name for name in results.seconds if name.endswith("tokenizer")]
    assert order == ["scq tokenizer", "vqgan tokenizer", "scq_seed1 tokenizer"]
    assert [len(runs) for runs in results.arms.values()] == [2, 1]
    assert "2 seeds" in (out / "report.md").read_text()
    first, second = results.arms["scq"]
    assert list(first.samples) == ["codes", "regression", "flow"]
    assert list(second.samples) == ["codes", "regression"], "what is beside the main comparison has one seed"
    assert "z_q_2_bits" in first.reconstructions.ways
    assert "z_q_2_bits" not in second.reconstructions.ways


def test_refiners_may_be_trained_with_fewer_seeds() -> None:
    kinds = ["regression", "flow"]
    every, fewer = ArmConfig(refiners=kinds, seeds=3), ArmConfig(refiners=kinds, seeds=3, refiner_seeds=2)
    assert [every.refiners_of(seed) for seed in range(3)] == [kinds, kinds[:1], kinds[:1]]
    assert [fewer.refiners_of(seed) for seed in range(3)] == [kinds, kinds[:1], []]


def test_an_arm_that_cannot_be_exported_does_not_come_first(tmp_path: Path, tiny_run: Path) -> None:
    config = write_tiny_benchmark(tmp_path)
    config.write_text(config.read_text().replace("refiners: [regression]", "prior: false"))
    with pytest.raises(UserError, match=r"the first arm of .* needs a prior"):
        run_benchmark(config, tmp_path / "run")


def test_a_benchmark_goes_on_where_only_its_phases_and_pictures_are(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is kept under docs/results is enough to add arms to, on another machine."""
    out = tmp_path / "run"
    for folder in ("phases", "pictures"):
        shutil.copytree(tiny_run / folder, out / folder)
    config = write_tiny_benchmark(tmp_path)
    config.write_text(
        config.read_text().replace(
            "sweep: true}}",
            "sweep: true}, none: {tokenizer: tokenizer_vqgan.yaml, overrides: [quantizer.name=none], prior: false}}",
        )
    )
    shutil.copytree(tiny_run / "shards", out / "shards")
    results = run_benchmark(config, out)
    fresh = re.findall(r"\] ([^:\n]*)$", capfd.readouterr().err, re.M)
    assert fresh == ["none tokenizer", "none reconstructions"]
    assert list(results.arms) == ["scq", "vqgan", "none"]
    assert results.arms["scq"] == kept(tiny_run).arms["scq"]
    assert results.machines["scq prior"] == kept(tiny_run).machines["scq prior"]
    assert (out / "samples.png").read_bytes() == (tiny_run / "samples.png").read_bytes()
    assert not (out / "model").exists()
