"""The reading benchmark on a small set: every way is measured, and the table says what the numbers say."""

import io
import pickle
import tarfile
from pathlib import Path

import pytest
from data_samples import write_folder

from scq.data.pack import pack
from scq.engine.errors import DataError
from scq.evaluation.speed.reading import STREAM, TOKENS, WEBDATASET, _webdataset, benchmark_data, format_table


def test_every_way_is_measured(tmp_path):
    folder = write_folder(tmp_path / "photos", 40)
    pack(folder, tmp_path / "out", format="folder", size=32, images_per_shard=20, workers=0)
    seen = []
    result = benchmark_data(
        tmp_path / "out", batch_size=8, workers=1, repeats=2, seconds=0.1, progress=lambda *step: seen.append(step)
    )
    assert seen[-1] == (8, 8)
    for way in result["ways"].values():
        assert 0 < way["lowest"] <= way["median"] <= way["highest"]
        assert len(way["runs"]) == 2
    ratio = result["ways"][STREAM]["median"] / result["ways"][WEBDATASET]["median"]
    assert result["stream_to_webdataset"] == pytest.approx(ratio)
    assert result["tokens_to_webdataset"] > 1
    lines = format_table(result).splitlines()
    assert lines[0] == "40 images of 32x32, batches of 8, 1 workers, 2 cores".replace(
        "2 cores", f"{result['cores']} cores"
    )
    assert [line.startswith(name) for line, name in zip(lines[2:], result["ways"], strict=True)] == [True] * 4
    assert lines[-1].startswith(TOKENS)


def test_what_cannot_be_measured_is_named(tmp_path):
    with pytest.raises(DataError, match="no packed images at"):
        benchmark_data(tmp_path)
    folder = write_folder(tmp_path / "photos", 6)
    manifest = pack(folder, tmp_path / "out", format="folder", size=32, images_per_shard=3, workers=0)
    (tmp_path / "out" / manifest["shards"][1]["name"]).unlink()
    with pytest.raises(DataError, match="not a complete folder"):
        benchmark_data(tmp_path / "out")


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_shard_is_unpickled(tmp_path):
    folder = write_folder(tmp_path / "photos", 40)
    manifest = pack(folder, tmp_path / "out", format="folder", size=32, images_per_shard=40, workers=0)
    shard, trap = tmp_path / "out" / manifest["shards"][0]["name"], tmp_path / "ran"
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(shard, "w") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
            if member.name.endswith(".png"):
                for suffix in ("pyd", "pickle", "pth"):
                    data = pickle.dumps(_Touch(trap))
                    hostile = tarfile.TarInfo(member.name.removesuffix("png") + suffix)
                    hostile.size = len(data)
                    tar.addfile(hostile, io.BytesIO(data))
    pickle.loads(pickle.dumps(_Touch(trap)))
    assert trap.exists(), "such a pickle runs code"
    trap.unlink()
    for workers in (0, 1):
        next(iter(_webdataset([shard], 8, workers)))
        assert not trap.exists()
