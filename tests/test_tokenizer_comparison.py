"""`scq benchmark tokenizers`: arms trained and measured once, and the table says of what."""

from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY

from scq.engine.errors import UserError
from scq.evaluation.benchmark import tokenizers
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
        "{title: Two quantizers, tokenizer: tokenizer.yaml, images: 16, arms: {soft: [], hard: [quantizer.name=vq]},"
        "seeds: {hard: 2}}"
    )
    out = tmp_path / "out"
    results = compare_tokenizers(config, str(emoji["train"]), str(emoji["test"]), out)
    report = (out / "report.md").read_text()
    assert report.startswith("# Two quantizers\n\nReference: 16 emoji images")
    assert "| soft | dominant codes |" in report
    assert "| hard, 2 seeds | codes |" in report
    assert load_results(ComparisonResults, out / "results.json") == results
    soft, hard = results.arms["soft"][0], results.arms["hard"]
    assert [run.tokenizer.seed for run in hard] == [soft.tokenizer.seed, soft.tokenizer.seed + 1]
    assert soft.reconstructions.ways["z_q"].count == 16
    assert soft.reconstructions.ways["z_q"].rfid is None, "no network was asked for"
    capfd.readouterr()
    assert compare_tokenizers(config, str(emoji["train"]), str(emoji["test"]), out) == results
    assert capfd.readouterr().err.count("done before") == 7
    assert (out / "report.md").read_text() == report


def test_processes_share_the_arms(emoji: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.yaml").write_text(
        f"base: {QUICKSTART}\ntraining: {{steps: 2, checkpoint_every: 2, log_every: 1, batch_size: 8}}\n"
        "quantizer: {codebook_size: 32}\narchitecture: {channels: [8, 16, 32]}\n"
    )
    config = tmp_path / "comparison.yaml"
    config.write_text(
        "{tokenizer: tokenizer.yaml, images: 16, shared: [quantizer.codebook_size=16, training.seed=5],"
        "arms: {soft: [], hard: [quantizer.name=vq, training.seed=9]}, seeds: {soft: 2}}"
    )
    out = tmp_path / "out"

    def compare(*only: str) -> dict[str, list[int]]:
        compare_tokenizers(config, str(emoji["train"]), str(emoji["test"]), out, only=only)
        arms = load_results(ComparisonResults, out / "results.json").arms
        return {title: [run.tokenizer.seed for run in runs] for title, runs in arms.items()}

    assert compare("hard") == {"soft": [], "hard": [9]}
    assert "soft" not in (out / "report.md").read_text()
    assert compare("soft") == {"soft": [5, 6], "hard": [9]}, "an arm's own overrides come after those of all"
    report = (out / "report.md").read_text()
    assert report.index("| soft, 2 seeds |") < report.index("| hard |"), "as the config has them"
    usage = load_results(ComparisonResults, out / "results.json").arms["soft"][0].reconstructions.codebook
    assert usage.fixed_bits_per_image == 4 * usage.tokens / usage.images, "of 16 codes, as all arms have"
    with pytest.raises(UserError, match="no arm 'vq', only soft, hard"):
        compare("vq")


class Thumbnails(torch.nn.Module):
    """Stands for the FID network: an image's features are its pixels, four to a side."""

    num_features, description, protocol, fingerprint = 48, "thumbnails", "none", "4" * 64

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


def test_a_table_has_its_floor_and_what_each_arm_closes(
    emoji: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "load_inception", lambda *_: Thumbnails())
    (tmp_path / "tokenizer.yaml").write_text(
        f"base: {QUICKSTART}\ntraining: {{steps: 30, checkpoint_every: 10, log_every: 10, batch_size: 16}}\n"
        "quantizer: {codebook_size: 32}\narchitecture: {channels: [8, 16, 32]}\nloss: {adversarial: 0.0}\n"
    )
    config = tmp_path / "comparison.yaml"
    config.write_text(
        "{tokenizer: tokenizer.yaml, images: 64, rfid: true, curve_images: 32, weight_bits: [4],"
        "arms: {none: [quantizer.name=none], hard: [quantizer.name=vq], soft: [],"
        "deep: [quantizer.name=rvq, quantizer.options.levels=3]}}"
    )
    out = tmp_path / "out"
    results = compare_tokenizers(config, str(emoji["train"]), str(emoji["test"]), out)
    report = (out / "report.md").read_text().splitlines()
    table = report[next(number for number, line in enumerate(report) if line.startswith("| arm")) :]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[: table.index("")]]
    head, first = rows[0], rows[2]
    assert first[0] == "64 training images"
    assert first[head.index("rFID")] == f"{results.floor.rfid:.1f}"
    bits = {row[0]: row[head.index("bits per image")] for row in rows[2:]}
    assert (bits["none"], float(bits["deep"])) == ("continuous", 3 * float(bits["hard"]))
    closed = {row[0]: row[head.index("closed, MSE")] for row in rows[2:]}
    assert (closed["64 training images"], closed["hard"], closed["none"]) == ("-", "0%", "100%")
    ways = results.arms["soft"][0].reconstructions.ways
    none, hard = (results.arms[name][0].reconstructions.ways["z_q"].mse for name in ("none", "hard"))
    assert closed["soft"] == f"{(hard - ways['z_q'].mse) / (hard - none):.0%}", "z_q comes last"
    assert ways["z_q_4_bits"].bits_per_image > 0
    times = {row[0]: row[head.index("MSE of vq / MSE")] for row in rows[2:]}
    assert (times["64 training images"], times["hard"], times["none"]) == ("-", "1.00", f"{hard / none:.2f}")
    usage = {row[1]: row[head.index("perplexity")] for row in rows[2:] if row[0] == "soft"}
    mixed = results.arms["soft"][0].reconstructions.mixed
    assert usage["z_q"] == f"{mixed.perplexity:.0f}", "of the mean weights"
    assert 1 < mixed.perplexity <= 32
    assert results.arms["hard"][0].reconstructions.mixed is None
    learned = results.arms["hard"][0].tokenizer.learned
    assert learned["step"] == [10, 20, 30]
    assert sorted(learned["cpu_seconds"]) == learned["cpu_seconds"]
    assert 0 < learned["cpu_seconds"][0] < learned["cpu_seconds"][-1] <= results.arms["hard"][0].tokenizer.cpu_seconds
    assert all(rfid > 0 for rfid in learned["rfid"])
    for picture in ("learning", "reconstructions"):
        assert f"({picture}.png)" in "\n".join(report)
        assert (out / f"{picture}.png").is_file()


def test_learning_curves_need_a_network(emoji: dict[str, Path], tmp_path: Path) -> None:
    config = tmp_path / "comparison.yaml"
    config.write_text(f"{{tokenizer: {QUICKSTART}, curve_images: 32, arms: {{soft: []}}}}")
    with pytest.raises(UserError, match="set rfid, too"):
        compare_tokenizers(config, str(emoji["train"]), str(emoji["test"]), tmp_path / "out")
