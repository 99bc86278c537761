"""Features of an image set: the same in any batches and processes, and kept in a file that names what they are of."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict, astuple
from pathlib import Path

import pytest
import torch
from metric_samples import Batch, PixelMoments, emoji_images, feature_set
from safetensors.torch import save

from scq.engine.errors import UserError
from scq.engine.measurements import RealSet
from scq.evaluation.metrics.distances import fid, kid
from scq.evaluation.metrics.features import FeatureSet, cached_features, extract_features
from scq.evaluation.metrics.pixels import ReconstructionMetrics


@pytest.fixture(scope="module")
def emoji():
    return emoji_images()


def test_features_do_not_depend_on_the_batches(emoji):
    network = PixelMoments()
    whole = extract_features([emoji[:60]], network, name="real")
    pieces = extract_features(emoji[:60].split(7), network, name="real")
    limited = extract_features(iter(emoji.split(7)), network, name="real", limit=60)
    torch.testing.assert_close(pieces.features, whole.features)
    torch.testing.assert_close(limited.features, whole.features)
    assert whole.count == 60
    assert whole.features.dtype == torch.float32


def test_features_come_in_the_order_of_positions(emoji):
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    whole = extract_features([emoji[:60]], PixelMoments(), name="real")
    batches = [Batch(emoji[part], part) for part in shuffled.split(11)]
    torch.testing.assert_close(extract_features(batches, PixelMoments(), name="real").features, whole.features)


def test_parts_merge_into_the_whole_and_twice_is_refused(emoji):
    network, numbers = PixelMoments(), torch.arange(60)
    parts = [
        extract_features([Batch(emoji[numbers[rank::3]], numbers[rank::3])], network, name="real") for rank in range(3)
    ]
    whole = extract_features([emoji[:60]], network, name="real")
    merged = FeatureSet.merge(parts[::-1])
    torch.testing.assert_close(merged.features, whole.features)
    with pytest.raises(UserError, match=r"image 1 of 'real' is in two"):
        FeatureSet.merge([*parts, parts[1]])
    with pytest.raises(UserError, match="different feature networks"):
        FeatureSet.merge([parts[0], feature_set(torch.zeros(3, 48))])


def test_progress_counts_images_and_an_empty_set_is_refused(emoji):
    seen = []
    extract_features(emoji[:20].split(8), PixelMoments(), name="real", limit=18, progress=seen.append)
    assert seen == [8, 8, 2]
    with pytest.raises(UserError, match="'samples' is empty"):
        extract_features([], PixelMoments(), name="samples")


def test_gathered_features_are_those_of_one_process(tmp_path):
    """Two real processes, each with its half; FID of the gathered sets equals that of one process."""
    program = textwrap.dedent("""
        import sys, torch, torch.distributed as distributed
        from pathlib import Path
        from dataclasses import asdict, astuple
        from scq.engine.measurements import RealSet
        from scq.evaluation.metrics.distances import fid, kid
        from scq.evaluation.metrics.features import FeatureSet, cached_features
        from scq.evaluation.metrics.pixels import ReconstructionMetrics
        from metric_samples import Batch, PixelMoments
        rank = int(sys.argv[1])
        distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
        generator = torch.Generator().manual_seed(0)
        sets = []
        for name in ("real", "fake"):
            features, positions = torch.randn(101, 8, generator=generator), torch.arange(101)
            sets.append(FeatureSet(features[rank::2], positions[rank::2], name, "test").gather())
        pairs = torch.randint(0, 256, (2, 6, 3, 16, 16), generator=generator, dtype=torch.uint8)
        perceptual = lambda a, b: (a - b).abs().mean()
        measure = ReconstructionMetrics(across_processes=True, perceptual=perceptual)
        measure.update(pairs[0][rank::2], pairs[1][rank::2])
        numbers = torch.arange(rank, 6, 2)
        share = [Batch(pairs[0][numbers], numbers)]
        cache = Path(sys.argv[2]) / "real.safetensors"
        real = cached_features(cache, RealSet("noise", "all", 6, "none"), PixelMoments(), lambda: share)
        result = (fid(*sets).value, kid(*sets).value, *astuple(measure.compute())[:5])
        torch.save((result, real.features), f"{sys.argv[2]}/{rank}.pt")
        distributed.destroy_process_group()
    """)
    paths = os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    generator = torch.Generator().manual_seed(0)
    alone = [feature_set(torch.randn(101, 8, generator=generator), name) for name in ("real", "fake")]
    pairs = torch.randint(0, 256, (2, 6, 3, 16, 16), generator=generator, dtype=torch.uint8)
    measure = ReconstructionMetrics(perceptual=lambda a, b: (a - b).abs().mean())
    measure.update(*pairs)
    expected = (fid(*alone).value, kid(*alone).value, *astuple(measure.compute())[:5])
    whole = PixelMoments()(pairs[0])
    for rank in (0, 1):
        result, real = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert result == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(real, whole)
    cached = cached_features(tmp_path / "real.safetensors", RealSet("noise", "all", 6, "none"), PixelMoments(), list)
    torch.testing.assert_close(cached.features, whole)


def test_cache_is_read_back_and_refused_when_anything_differs(emoji, tmp_path):
    path, network = tmp_path / "deep" / "real.safetensors", PixelMoments()
    real_set = RealSet("emoji", "train", 60, "none 72", sha256="ab")
    written = cached_features(path, real_set, network, lambda: emoji[:60].split(8))
    assert [p.name for p in path.parent.iterdir()] == ["real.safetensors"]

    def must_not_run():
        raise AssertionError("the cache was not used")

    read = cached_features(path, real_set, network, must_not_run)
    torch.testing.assert_close(read.features, written.features, rtol=0, atol=0)
    assert read.network == network.fingerprint

    for key, value in {"dataset": "cifar10", "split": "val", "count": 59, "crop": "center 72", "sha256": "cd"}.items():
        other = RealSet(**{**real_set.__dict__, key: value})
        with pytest.raises(UserError, match=f"another real set: {key} is .*not {value!r}"):
            cached_features(path, other, network, must_not_run)
    network.fingerprint = "other"
    with pytest.raises(UserError, match="network is 'pixel-moments', not 'other'"):
        cached_features(path, real_set, network, must_not_run)


def test_damaged_cache_and_wrong_count_are_refused(emoji, tmp_path):
    (tmp_path / "damaged").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        cached_features(tmp_path / "damaged", RealSet("emoji", "train", 60, "none 72"), PixelMoments(), lambda: [])
    real_set, network, positions = RealSet("emoji", "train", 60, "none 72"), PixelMoments(), torch.arange(60)
    right = json.dumps({**asdict(real_set), "network": network.fingerprint, "protocol": network.protocol})
    for features, held, said in (
        (torch.full((60, 4), torch.nan), right, "are damaged"),
        (torch.zeros(59, 4), right, "are damaged"),
        (torch.zeros(60, 4), "[]", "another real set"),
        (torch.zeros(60, 4), "[" * 100_000, "not valid JSON"),
    ):
        tensors = {"features": features, "positions": positions}
        (tmp_path / "damaged").write_bytes(save(tensors, {"real_set": held}))
        with pytest.raises(UserError, match=f"{said}.*delete the file to start anew"):
            cached_features(tmp_path / "damaged", real_set, network, lambda: [])
    (tmp_path / "damaged").write_bytes(save({"positions": positions}, {"real_set": right}))
    with pytest.raises(UserError, match=r"cannot be read \(.*features"):
        cached_features(tmp_path / "damaged", real_set, network, lambda: [])
    with pytest.raises(UserError, match="gave 30 images, not 60"):
        cached_features(
            tmp_path / "new", RealSet("emoji", "train", 60, "none 72"), PixelMoments(), lambda: [emoji[:30]]
        )
    assert not (tmp_path / "new").exists()
