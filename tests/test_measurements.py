"""What was measured goes to JSON and comes back, old files load, and what does not fit is named."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY

from scq.engine.errors import UserError
from scq.engine.measurements import Measured, Reconstruction, SampleScores, TrainedFor, from_plain, to_plain

EMBEDDED = REPOSITORY / "sampling" / "pretrained" / "measured.json"
SAMPLES = {
    **{"count": 393, "fid": 247.7, "fid_biased": True, "fid_note": "biased", "kid": 0.145, "kid_error": 0.0036},
    **{"kid_subsets": 100, "kid_subset_size": 196, "precision": 0.0, "recall": 0.02},
}


def without_none(tree: Any) -> Any:
    return (
        {key: without_none(each) for key, each in tree.items() if each is not None} if isinstance(tree, dict) else tree
    )


def test_the_packages_model_is_read_whole() -> None:
    plain = json.loads(EMBEDDED.read_text())
    measured = from_plain(Measured, plain)
    assert measured.training.prior == TrainedFor(steps=350, images_seen=89600)
    assert measured.reconstruction["z_q"].mse < measured.reconstruction["dominant"].mse
    assert measured.sample_reference is None
    written = to_plain(measured)
    assert {key: written[key] for key in plain} == without_none(plain)
    assert from_plain(Measured, json.loads(json.dumps(written))) == measured


@pytest.mark.parametrize(
    "plain",
    [
        {},  # a model that nobody measured
        {"training": {"dataset": "emoji"}, "license": "mit"},
        # What a benchmark wrote of a model with a refiner, and `scq evaluate` of a tokenizer, in older versions.
        {"samples": {**SAMPLES, "refiner": {"steps": 3}, "reconstruction": {"mse": 0.1}}, "model": "runs/x"},
        {"reconstruction": {"z_q": {"mse": 0.1, "psnr": 10, "ssim": 0.9, "count": 3, "lpips": None}}, "seconds": {}},
    ],
)
def test_files_of_other_versions_load(plain: dict[str, Any]) -> None:
    measured = from_plain(Measured, plain)
    assert measured.license == plain.get("license")
    assert (measured.samples is not None) == ("samples" in plain)


def test_no_loss_at_all_is_an_infinite_psnr() -> None:
    perfect = Reconstruction(mse=0.0, psnr=math.inf, ssim=1.0, count=2)
    assert from_plain(Reconstruction, json.loads(json.dumps(to_plain(perfect)))) == perfect


@pytest.mark.parametrize(
    ("plain", "named"),
    [
        ({"samples": {**SAMPLES, "kid": "low"}}, r"samples\.kid: .*number"),
        (
            {"samples": {key: value for key, value in SAMPLES.items() if key != "recall"}},
            r"samples\.recall: .*required",
        ),
        (
            {"reconstruction": {"z_q": {"mse": 0.1, "psnr": 1, "ssim": 1, "count": 1.5}}},
            r"reconstruction\.z_q\.count: ",
        ),
        ({"training": {"prior": {"steps": 3}}}, r"training\.prior\.images_seen: "),
        ([], "Measured: .*dictionary"),
    ],
)
def test_what_does_not_fit_is_named(plain: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^measured\.json cannot be read: {named}"):
        from_plain(Measured, plain, "measured.json")


def test_new_numbers_keep_what_is_known_of_the_training() -> None:
    known = from_plain(Measured, {"license": "mit", "training": {"revision": "abc"}, "samples": SAMPLES})
    found = Measured(samples=from_plain(SampleScores, SAMPLES | {"kid": 0.1}))
    after = known.with_numbers(found)
    assert (after.license, after.training.revision, after.samples.kid) == ("mit", "abc", 0.1)
