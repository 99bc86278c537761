"""What soft latents cost: rounded weights are a mixture, their code is counted right, more bits come closer."""

import math
from itertools import combinations, product

import pytest
import torch

from scq.evaluation.metrics.mixture_rate import round_mixture
from scq.stage1_tokenizer.quantizers import Mixture, create_quantizer


@pytest.fixture
def mixture() -> tuple[torch.nn.Module, Mixture]:
    torch.manual_seed(0)
    quantizer = create_quantizer("scq", codebook_size=16, dim=3)
    z = torch.randn(5, 3, 4, 4)
    quantizer.train()(z)
    return quantizer, quantizer.eval().mix(z)


def test_more_bits_come_closer_and_cost_more(mixture: tuple[torch.nn.Module, Mixture]) -> None:
    quantizer, mixed = mixture
    found = [round_mixture(quantizer, mixed, bits) for bits in (1, 2, 4, 8, 12)]
    errors = [(each.z_q - mixed.z_q).square().mean().item() for each in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 < errors[1]
    rates = [each.bits.mean().item() for each in found]
    assert rates == sorted(rates)
    assert found[0].bits.shape == (5,)
    assert rates[0] >= 16 * math.log2(16), "never less than the dominant codes alone"


def test_rounded_weights_are_multiples_that_sum_to_one() -> None:
    """With codes that are unit vectors, z_q shows the weights themselves."""
    quantizer = create_quantizer("vq", codebook_size=4, dim=4).eval()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.eye(4))
    weights = torch.tensor([0.62, 0.31, 0.05, 0.02]).view(1, 1, 1, 4)
    mixed = Mixture(
        torch.zeros(1, 4, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64), torch.arange(4).view(1, 1, 1, 4), weights
    )
    rounded = round_mixture(quantizer, mixed, 3)
    assert (8 * rounded.z_q.flatten()).tolist() == [5, 3, 0, 0]
    two_of_four, two_parts_of_eight, size = math.comb(4, 2), math.comb(7, 1), 2**3
    assert rounded.bits.item() == pytest.approx(
        math.log2(two_of_four) + math.log2(two_parts_of_eight) + math.log2(size)
    )
    with pytest.raises(ValueError, match="weight_bits=0"):
        round_mixture(quantizer, mixed, 0)


def test_the_price_counts_every_mixture_there_is() -> None:
    """The code of one latent that mixes s codes of K in units of 2^-b has as many words as there are such mixtures."""
    codes, units = 5, 8
    for size in (1, 2, 3):
        ways = sum(
            1
            for _ in combinations(range(codes), size)
            for parts in product(range(1, units + 1), repeat=size)
            if sum(parts) == units
        )
        assert ways == math.comb(codes, size) * math.comb(units - 1, size - 1)
