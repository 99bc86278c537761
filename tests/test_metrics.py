"""The metrics against closed forms, direct formulas and torchmetrics fed with the images themselves."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch_fidelity.metric_prc
from metric_samples import PixelMoments, emoji_images, feature_set, gaussians
from torchmetrics.image import FrechetInceptionDistance, KernelInceptionDistance, PeakSignalNoiseRatio

from scq.engine.errors import UserError
from scq.evaluation.metrics.codebook import MixtureCounter, codebook_usage
from scq.evaluation.metrics.distances import fid, kid, nearest_neighbors, precision_recall
from scq.evaluation.metrics.features import FeatureSet, extract_features
from scq.evaluation.metrics.pixels import ReconstructionMetrics


@pytest.fixture(scope="module")
def emoji():
    return emoji_images()


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
    same = measure.compute()
    assert (same.mse, same.psnr, same.ssim) == (0, math.inf, pytest.approx(1, abs=1e-9))
    black, white = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    opposite = ReconstructionMetrics()
    opposite.update(black, white)
    assert (opposite.compute().mse, opposite.compute().psnr) == (1, 0)
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
    assert usage.summary().perplexity == usage.perplexity


def test_one_code_has_perplexity_one_and_parts_add_up():
    usage = codebook_usage([torch.full((3, 4, 4), 7)], codebook_size=8)
    assert (usage.perplexity, usage.bits_per_image) == (1, 0)
    other = codebook_usage([torch.full((3, 4, 4), 2)], codebook_size=8)
    assert (usage + other).perplexity == pytest.approx(2)
    assert (usage + other).images == 6


def test_mixtures_share_their_weight_among_codes() -> None:
    counter = MixtureCounter(8)
    counter.update(torch.tensor([[[0, 1]], [[0, 0]]]), torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]]))
    counter.update(torch.tensor([[[3, 0]]]), torch.tensor([[[1.0, 0.0]]]))
    found = counter.summary()
    assert found.used_share == 3 / 8, "padding has no weight"
    assert found.perplexity == pytest.approx(2 ** -sum(p * math.log2(p) for p in (1.5 / 3, 0.5 / 3, 1 / 3)))


def test_codes_outside_the_codebook_are_refused():
    with pytest.raises(UserError, match=r"from 0 to 8 do not fit a codebook of 8"):
        codebook_usage([torch.tensor([[[0, 8]]])], codebook_size=8)
    with pytest.raises(UserError, match="from -1"):
        codebook_usage([torch.tensor([[[-1, 3]]])], codebook_size=8)
    with pytest.raises(UserError, match="no code indices"):
        codebook_usage([], codebook_size=8)
