"""A benchmark's report: what is compared with what, at which rate, and what is said of it. No run is needed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY

from scq.engine.errors import UserError
from scq.engine.measurements import from_plain, to_plain
from scq.evaluation.benchmark import report
from scq.evaluation.benchmark.results import BenchmarkResults, ComparisonResults, load_results, save_results
from scq.evaluation.benchmark.tables import Seeds, comparison, verdict, widest_range

QUICKSTART = REPOSITORY / "docs" / "results" / "quickstart" / "metrics.json"


@pytest.fixture
def results() -> dict[str, Any]:
    """The kept quickstart's results with round numbers where a test looks, which a newer run does not move; and with
    refiners, rounded weights, an arm without quantizer, and two seeds of scq. As plain values, for tests to change."""
    results = json.loads(QUICKSTART.read_text())
    (scq,), (vqgan,) = results["arms"]["scq"], results["arms"]["vqgan"]
    for run, kid, fid, speed in ((scq, 0.145, 248.0, 300.0), (vqgan, 0.172, 260.0, 390.0)):
        run["samples"]["codes"]["scores"] |= {"kid": kid, "kid_error": 0.003, "fid": fid}
        run["tokenizer"]["images_per_second"] = speed
    ways = scq["reconstructions"]["ways"]
    ways["z_q"]["mse"], ways["dominant"]["mse"] = 0.016, 0.0175
    scq["reconstructions"]["dominant_weight"] = 0.81
    for each in vqgan["reconstructions"]["ways"].values():
        each["mse"] = 0.022
    for width, bits, mse in ((4, 600.0, 0.0161), (2, 400.0, 0.0169)):
        ways[f"z_q_{width}_bits"] = ways["z_q"] | {"bits_per_image": bits, "mse": mse}
    for kind, kid, fid in (("regression", 0.160, 200.0), ("flow", 0.178, 300.0)):
        counts = {"parameters": 10, "steps": 20, "images_seen": 30, "seconds": 1.0}
        scq["samples"][kind] = {
            "scores": scq["samples"]["codes"]["scores"] | {"kid": kid, "fid": fid},
            "refiner": {"kind": kind, "fingerprint": "ab", **counts},
            "reconstruction": ways["dominant"] | {"mse": 0.0166},
        }
    second = copy.deepcopy(scq)
    second["samples"]["codes"]["scores"]["fid"] += 2.0
    only_latents = {"soft": False, "ways": {"z_q": vqgan["reconstructions"]["ways"]["z_q"]}}
    ceiling = {"tokenizer": vqgan["tokenizer"], "reconstructions": only_latents}
    results["arms"] = {"scq": [scq, second], "vqgan": [vqgan], "none": [ceiling], "rvq2": []}
    return results


def render(results: dict[str, Any]) -> str:
    return report.render(from_plain(BenchmarkResults, results))


def summary_table(results: dict[str, Any]) -> list[str]:
    return report.summary_table(from_plain(BenchmarkResults, results))


def table(lines: list[str], head: str) -> list[dict[str, str]]:
    """The table whose first line starts with ``head``, as rows."""
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {head}"))
    rows = []
    for number in range(first + 2, len(lines)):
        if not lines[number].startswith("|"):
            break
        rows.append(dict(zip(cells[first], cells[number], strict=True)))
    return rows


def test_a_verdict_knows_seeds_and_errors() -> None:
    assert verdict(Seeds([10.0]), Seeds([12.0])) == "better"
    assert verdict(Seeds([12.0]), Seeds([10.0])) == "worse"
    assert verdict(Seeds([10.0]), Seeds([10.4])) == "tie"  # under 5%
    assert verdict(Seeds([10.0, 13.0]), Seeds([12.0])) == "tie"  # within the range of the seeds
    assert verdict(Seeds([10.0, 11.0]), Seeds([12.0, 14.0])) == "better"
    assert verdict(Seeds([10.0, 11.0]), Seeds([11.1, 14.0])) == "tie"  # apart, but by less than they range over
    assert verdict(Seeds([10.0], 0.9), Seeds([12.0], 0.5)) == "better"
    assert verdict(Seeds([10.0], 1.1), Seeds([12.0], 0.5)) == "tie"  # within an error to both sides
    assert verdict(Seeds([9.0, 10.0], 0.3), Seeds([11.0, 12.0], 0.3)) == "better"
    assert verdict(Seeds([9.0, 10.0], 0.6), Seeds([11.0, 12.0], 0.3)) == "tie"  # each seed has its error, too


def test_one_seed_is_taken_to_be_as_lucky_as_those_of_other_arms() -> None:
    several, single = Seeds([9.0, 11.0]), Seeds([20.0])
    assert widest_range([several, single, Seeds([1.0, 1.1])]) == pytest.approx(0.2)
    assert widest_range([single]) == 0
    assert single.range(0.2) == 4
    assert verdict(single, Seeds([23.0]), 0.0) == "better"
    assert verdict(single, Seeds([23.0]), 0.2) == "tie"


def test_a_comparison_is_a_share_and_a_verdict() -> None:
    assert comparison(Seeds([8.2]), Seeds([10.0])) == "0.82 (better)"
    assert comparison(Seeds([10.2]), Seeds([10.0])) == "1.02 (tie)"
    assert comparison(Seeds([1.0]), Seeds([-0.1])) == "- (worse)"


def test_fid_at_infinity_is_an_interval_around_all_seeds(results: dict[str, Any]) -> None:
    for run, (low, high) in zip(results["arms"]["scq"], [(190.0, 200.0), (195.0, 210.0)], strict=True):
        found = {"value": 0.0, "low": low, "high": high, "counts": [], "fids": []}
        run["samples"]["codes"]["scores"]["fid_infinity"] = found
    assert "| 190.0 - 210.0 |" in render(results)


def test_speeds_of_several_machines_are_not_to_be_compared(results: dict[str, Any]) -> None:
    assert "speeds compare within one only" not in render(results)
    results["machines"]["vqgan tokenizer"] = "another machine"
    assert "Tokenizers were trained on 2 machines" in render(results)


def test_every_way_of_decoding_stands_beside_every_other_arm(results: dict[str, Any]) -> None:
    lines = render(results).splitlines()
    kid = table(lines, "scq: KID")
    fid = table(lines, "scq: FID")
    assert [row["scq: KID beside that of"] for row in kid] == ["codes", "regression refiner", "flow refiner"]
    # 145, 160 and 178 against 172, each with an error of 3
    assert [row["vqgan"] for row in kid] == ["0.84 (better)", "0.93 (better)", "1.03 (tie)"]
    assert [row["vqgan"] for row in fid] == ["0.96 (tie)", "0.77 (better)", "1.15 (worse)"]
    results["arms"]["vq_plus"] = results["arms"]["vqgan"]
    assert list(table(render(results).splitlines(), "scq: FID")[0]) == ["scq: FID beside that of", "vqgan", "vq_plus"]
    del results["arms"]["vqgan"], results["arms"]["vq_plus"]
    assert "beside that of" not in render(results)


def test_soft_latents_have_rows_of_their_own_and_say_what_they_cost(results: dict[str, Any]) -> None:
    rows = table(render(results).splitlines(), "arm | decoded from")
    assert [(row["arm"], row["decoded from"], row["bits per image"], row["MSE"]) for row in rows] == [
        ("scq, 2 seeds", "dominant codes", "144", "0.01750"),
        ("scq, 2 seeds", "codes, regression refiner", "144", "0.01660"),
        ("scq, 2 seeds", "codes, flow refiner", "144", "0.01660"),
        ("scq, 2 seeds", "z_q, weights of 2 bits", "400", "0.01690"),
        ("scq, 2 seeds", "z_q, weights of 4 bits", "600", "0.01610"),
        ("scq, 2 seeds", "z_q", "continuous", "0.01600"),
        ("vqgan", "codes", "144", "0.02200"),
        ("none", "latents", "continuous", "0.02200"),
    ]
    for row in rows:  # an older version measured, which did not count what mixtures use
        assert (row["perplexity"] == "-") == (row["decoded from"] not in ("dominant codes", "codes")), row


def test_the_summary_names_the_rate_of_every_number(results: dict[str, Any]) -> None:
    rows = table(summary_table(results), "arm")
    assert list(rows[0]) == ["arm", "decoded from", "bits per image", "MSE", "rFID", "KID x 1000", "FID"]
    drawn = {row["decoded from"]: row["FID"] for row in rows if row["arm"].startswith("scq")}
    assert drawn == {
        "dominant codes": "249.0 (248.0 - 250.0)",
        "codes, regression refiner": "200.0",
        "codes, flow refiner": "300.0",
        **dict.fromkeys(("z_q, weights of 2 bits", "z_q, weights of 4 bits", "z_q"), "-"),  # a prior draws codes
    }
    assert next(row for row in rows if row["arm"] == "vqgan")["KID x 1000"] == "172.0 ± 3.0"


def test_a_comparison_of_tokenizers_has_the_same_rows(results: dict[str, Any]) -> None:
    arms = {
        name: [{"tokenizer": run["tokenizer"], "reconstructions": run["reconstructions"]} for run in runs]
        for name, runs in results["arms"].items()
    }
    shared = {name: results[name] for name in ("revision", "reference", "network", "seconds", "machines")}
    compared = from_plain(ComparisonResults, {"title": "Tokenizers", "arms": arms} | shared)
    lines = report.render_comparison(compared).splitlines()
    assert lines[0] == "# Tokenizers"
    short = table(report.summary_table(compared), "arm | decoded from")
    shown = ["arm", "decoded from", "bits per image", "MSE", "rFID", "codes used", "perplexity"]
    assert list(short[0]) == [*shown, "MSE of vq / MSE"], "no LPIPS there, and no arm without a quantizer"
    found = [row["decoded from"] for row in table(lines, "arm | decoded from")]
    assert found == ["dominant codes", "z_q, weights of 2 bits", "z_q, weights of 4 bits", "z_q", "codes", "latents"]
    training = {row["arm"]: row for row in table(lines, "arm | dominant is nearest")}
    assert training["scq, 2 seeds"]["dominant weight"].startswith("0.81")
    assert training["vqgan"] == {
        **dict.fromkeys(("dominant is nearest", "dominant weight", "soft / hard latent error"), "-"),
        "arm": "vqgan",
        "images/s": "390",
    }


def test_the_report_says_among_how_many_images_it_looked(results: dict[str, Any]) -> None:
    assert "Memorised" not in render(results)
    results["arms"]["scq"][0]["samples"]["codes"]["scores"]["nearest_training_distance"] = 1.0
    assert "nearest of the training images that were searched" in render(results)
    results["measure"] = {"neighbours": 5000}
    assert "nearest of 5,000 training images" in render(results)


def test_the_report_shows_fid_to_training_images_where_it_was_measured(results: dict[str, Any]) -> None:
    column = "FID to training images"
    assert column not in render(results)
    results["arms"]["scq"][0]["samples"]["codes"]["scores"]["fid_to_training"] = 12.34
    lines = [line for line in render(results).splitlines() if line.startswith("|")]
    head = next(number for number, line in enumerate(lines) if line.endswith(f"| {column} |"))
    assert [line.split("|")[-2].strip() for line in lines[head + 2 : head + 4]] == ["12.3", "-"]


def test_the_report_says_what_samples_are_measured_against(results: dict[str, Any]) -> None:
    assert "measured against" not in render(results)
    results["sample_reference"] = results["reference"] | {"split": "train", "count": 50000}
    assert "Samples are measured against 50,000 images of the split 'train'" in render(results)


def test_an_unmeasured_arm_is_left_out(results: dict[str, Any]) -> None:
    assert "rvq2" not in render(results) + "\n".join(summary_table(results))


def test_results_are_read_as_they_were_written(results: dict[str, Any], tmp_path: Path) -> None:
    whole = from_plain(BenchmarkResults, results)
    save_results(whole, tmp_path / "results.json")
    assert load_results(BenchmarkResults, tmp_path / "results.json") == whole
    kept = json.loads(QUICKSTART.read_text())
    assert to_plain(load_results(BenchmarkResults, QUICKSTART)) == kept, "the kept file is what would be written"


def test_a_field_of_another_shape_is_named(results: dict[str, Any], tmp_path: Path) -> None:
    del results["arms"]["scq"][1]["tokenizer"]["steps"]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(
        UserError, match=r"results\.json cannot be read: arms\.scq\.1\.tokenizer\.steps: Field required"
    ):
        load_results(BenchmarkResults, path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"results\.json is not valid JSON"):
        load_results(BenchmarkResults, path)
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read"):
        load_results(BenchmarkResults, tmp_path / "nowhere.json")


def test_keys_of_other_versions_are_left_alone(results: dict[str, Any]) -> None:
    results["arms"]["scq"][0]["tokenizer"]["colour"] = "blue"
    assert from_plain(BenchmarkResults, results).arms["scq"][0].tokenizer.steps > 0
