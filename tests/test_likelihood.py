"""The likelihood bound against models for which it can be computed exactly."""

import math
from itertools import permutations, product

import pytest
import torch

from scq.stage2_prior.likelihood import likelihood_bound

MASK = 2


def interwoven(tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Over two codes and four places, every answer depending on what every other place holds."""
    weight = torch.randn(4, 4, 3, 2, generator=torch.Generator().manual_seed(3)) * 0.7
    logits = sum(weight[:, other][:, tokens[:, other]].transpose(0, 1) for other in range(4))
    return logits if labels is None else logits + labels[:, None, None] * torch.tensor([1.0, -1.0])


def exact_bits(codes: torch.Tensor) -> torch.Tensor:
    """(N,) the mean over all orders of -log2 of the product of conditionals, and -log2 of the mean of that product."""
    bounds, marginals = [], []
    for grid in codes:
        bits = []
        for order in permutations(range(4)):
            tokens, needed = torch.full((1, 4), MASK), 0.0
            for place in order:
                needed -= float(interwoven(tokens)[0, place].double().log_softmax(-1)[grid[place]]) / math.log(2)
                tokens[0, place] = grid[place]
            bits.append(needed)
        bounds.append(sum(bits) / len(bits))
        marginals.append(-math.log2(sum(2**-b for b in bits) / len(bits)))
    return torch.tensor([bounds, marginals], dtype=torch.float64)


def test_the_bound_is_the_mean_over_all_orders() -> None:
    codes = torch.tensor(list(product(range(2), repeat=4)))
    bound, marginal = exact_bits(codes).mean(1)
    found = likelihood_bound(interwoven, codes, MASK, passes=400)
    assert found.bits_per_image == pytest.approx(float(bound), abs=4 * found.error)
    assert found.error < 0.1
    assert found.bits_per_image > marginal - 4 * found.error, "it is an upper bound"
    assert found.bits_per_token == found.bits_per_image / 4
    assert (found.images, found.passes) == (16, 400)


def test_the_error_is_that_of_repeating_it() -> None:
    codes = torch.randint(0, 2, (64, 4), generator=torch.Generator().manual_seed(0))
    exact = float(exact_bits(codes)[0].mean())
    few = likelihood_bound(interwoven, codes, MASK, passes=30)
    assert abs(few.bits_per_image - exact) < 4 * few.error
    many = likelihood_bound(interwoven, codes, MASK, passes=480)
    assert many.error == pytest.approx(few.error / 4, rel=0.5)


def test_a_model_that_knows_nothing_needs_log2_of_the_codes() -> None:
    found = likelihood_bound(lambda tokens, labels: torch.zeros(len(tokens), 9, 8), torch.zeros(5, 9).long(), 8)
    assert found.bits_per_image == pytest.approx(27)
    assert found.error == pytest.approx(0, abs=1e-9)


def test_batches_and_labels() -> None:
    codes = torch.randint(0, 2, (30, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 2
    whole = likelihood_bound(interwoven, codes, MASK, labels, batch_size=30)
    parts = likelihood_bound(interwoven, codes, MASK, labels, batch_size=7)
    assert whole.bits_per_image == pytest.approx(parts.bits_per_image, rel=1e-9)
    assert whole.bits_per_image != pytest.approx(likelihood_bound(interwoven, codes, MASK).bits_per_image, rel=1e-3)


def test_what_cannot_be_measured_is_named() -> None:
    with pytest.raises(ValueError, match="passes=1"):
        likelihood_bound(interwoven, torch.zeros(1, 4).long(), MASK, passes=1)
    with pytest.raises(ValueError, match="no images"):
        likelihood_bound(interwoven, torch.zeros(0, 4).long(), MASK)
