"""Every image's random numbers are its own: the same in any batch, and good enough to train and sample with."""

import torch
from scipy import stats

from scq.engine.randomness import image_gumbel, image_uniform, step_seed
from scq.engine.schedules import learning_rate_share, linear_ramp


def test_an_images_numbers_do_not_depend_on_its_batch() -> None:
    whole = image_uniform(torch.arange(10), 3, 4, seed=5, purpose="a")
    part = image_uniform(torch.tensor([7, 2]), 3, 4, seed=5, purpose="a")
    assert torch.equal(whole[[7, 2]], part)


def test_seed_purpose_and_image_each_change_the_numbers() -> None:
    keys = torch.arange(4)
    variants = [
        image_uniform(keys, 8, seed=0, purpose="a"),
        image_uniform(keys, 8, seed=1, purpose="a"),
        image_uniform(keys, 8, seed=0, purpose="b"),
        image_uniform(keys + 100, 8, seed=0, purpose="a"),
    ]
    for i, one in enumerate(variants):
        for other in variants[i + 1 :]:
            assert not torch.isclose(one, other).any()


def test_numbers_are_uniform_and_unrelated() -> None:
    numbers = image_uniform(torch.arange(200), 500, seed=1, purpose="quality").double()
    assert 0 < numbers.min() < numbers.max() < 1
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(image_uniform(torch.arange(20000)).numpy(), "uniform").pvalue > 1e-3
    correlation = torch.corrcoef(numbers) - torch.eye(200)
    assert correlation.abs().max() < 6 / 500**0.5
    assert torch.corrcoef(torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()]))[0, 1].abs() < 0.02


def test_gumbel_numbers_have_gumbels_distribution() -> None:
    numbers = image_gumbel(torch.arange(100), 200, seed=2)
    assert numbers.isfinite().all()
    assert stats.kstest(numbers.flatten().double().numpy(), "gumbel_r").pvalue > 1e-3


def test_steps_and_ranks_have_different_seeds() -> None:
    seeds = {step_seed(0, step, rank) for step in range(100) for rank in range(4)}
    assert len(seeds) == 400


def test_learning_rate_warms_up_and_falls_to_its_share() -> None:
    shares = [learning_rate_share(step, 100, 10, "cosine", 0.1) for step in range(100)]
    assert shares[0] == 0.1
    assert max(shares) == 1.0
    assert shares[9:] == sorted(shares[9:], reverse=True)
    assert abs(shares[-1] - 0.1) < 0.01
    assert learning_rate_share(50, 100, 10, "constant", 0.1) == 1.0


def test_ramp() -> None:
    assert [linear_ramp(step, 2, 4) for step in range(8)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert linear_ramp(2, 2, 0) == 1
