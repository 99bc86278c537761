"""FID-infinity where the truth is known: Gaussians with given moments."""

import numpy as np
import pytest
import torch

from scq.engine.errors import UserError
from scq.evaluation.metrics.distances import fid
from scq.evaluation.metrics.features import FeatureSet
from scq.evaluation.metrics.fid_infinity import fid_infinity

DIM = 24
TRUTH = 24 * 0.1**2 + 24 * (1.2 - 1) ** 2  # N(0, 1) against N(0.1, 1.2^2) in each of 24 features


def feature_set(features, name="set"):
    return FeatureSet(features.float(), torch.arange(len(features)), name, "test")


@pytest.fixture(scope="module")
def real():
    """Has exactly the mean 0 and the covariance 1, so that all the bias is of the generated images."""
    x = torch.randn(2000, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean(dim=0)
    return feature_set(x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T, "real")


def generated(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return feature_set(0.1 + 1.2 * torch.randn(count, DIM, generator=generator), "fake")


def test_points_are_the_plain_fid(real):
    fake = generated(600, seed=1)
    result = fid_infinity(real, fake, resamples=2)
    assert result.counts[0] == 60
    assert result.counts[-1] == 600
    assert result.fids[-1] == pytest.approx(fid(real, fake).value, rel=1e-6)
    assert result.low < result.high


@pytest.mark.parametrize("images_per_feature", [5, 25])
def test_bias_is_gone_and_the_interval_holds_the_truth(real, images_per_feature):
    plain, extrapolated, covered = [], [], 0
    for seed in range(24):
        fake = generated(images_per_feature * DIM, seed)
        result = fid_infinity(real, fake, resamples=12)
        plain.append(result.fids[-1])
        extrapolated.append(result.value)
        covered += result.low <= TRUTH <= result.high
    bias_of_plain, bias = np.mean(plain) - TRUTH, np.mean(extrapolated) - TRUTH
    assert bias_of_plain > 0.3
    assert abs(bias) < bias_of_plain / 5
    assert covered >= 18, "a 90% interval"


def test_a_small_real_set_will_do(real):
    few = feature_set(real.features[:20], "few")
    assert fid_infinity(few, generated(200, seed=1), resamples=2).low > 0


def test_the_same_seed_gives_the_same_interval(real):
    fake = generated(200, seed=1)
    assert fid_infinity(real, fake, resamples=3) == fid_infinity(real, fake, resamples=3)
    assert fid_infinity(real, fake, resamples=3, seed=1).low != fid_infinity(real, fake, resamples=3).low


def test_too_few_images_are_refused(real):
    with pytest.raises(UserError, match="needs at least 50 generated images, 'fake' has 49"):
        fid_infinity(real, generated(49, seed=0))
