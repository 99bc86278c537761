"""Swapping tokens for near neighbours in training."""

import pytest
import torch

from scq.engine.errors import UserError
from scq.stage1_tokenizer.quantizers import create_quantizer
from scq.stage1_tokenizer.robustness import (
    NeighbourSwap,
    RobustnessConfig,
    nearest_codes,
    swap_for_neighbours,
    swapped_share,
)


def make(name: str = "vq", size: int = 32):
    torch.manual_seed(0)
    quantizer = create_quantizer(name, codebook_size=size, dim=4)
    if name == "vq":
        torch.nn.init.normal_(quantizer.codebook)
    z = torch.randn(3, 4, 6, 6, requires_grad=True)
    return quantizer, z, quantizer(z)


def test_nearest_codes_are_those_of_a_full_sort() -> None:
    quantizer, _, _ = make()
    distance = torch.cdist(quantizer.codebook, quantizer.codebook)
    asked = torch.tensor([5, 0, 5, 31])
    assert torch.equal(nearest_codes(quantizer, asked, 3), distance.sort(1).indices[asked, 1:4])
    assert nearest_codes(quantizer, asked, 100).shape == (4, 31)


@pytest.mark.parametrize("name", ["vq", "scq"])
def test_exactly_the_named_tokens_become_neighbours(name: str) -> None:
    quantizer, z, quantized = make(name)
    noise = torch.ones(3, 2, 6, 6) * 0.9
    noise[1, 0, 2, 3], noise[1, 1, 2, 3] = 0.05, 0.0  # one token, for the nearest of its neighbours
    swapped = swap_for_neighbours(quantized, quantizer, NeighbourSwap(0.1, 4, noise))
    changed = (swapped != quantized.z_q).any(1)
    assert changed.nonzero().tolist() == [[1, 2, 3]]
    code = quantized.indices[1, 2, 3]
    codes = quantizer.lookup(torch.arange(32).view(1, 1, 32))[0, :, 0].t()
    other = torch.cdist(codes[code : code + 1], codes)[0].sort().indices[1]
    torch.testing.assert_close(swapped[1, :, 2, 3], codes[other])
    swapped.sum().backward(retain_graph=True)
    straight = z.grad.clone()
    z.grad = None
    quantized.z_q.sum().backward()
    torch.testing.assert_close(straight, z.grad, msg="the encoder is not asked to follow the swap")


def test_a_share_of_one_swaps_all_and_none_swaps_nothing() -> None:
    quantizer, _, quantized = make()
    noise = torch.rand(3, 2, 6, 6)
    assert torch.equal(swap_for_neighbours(quantized, quantizer, NeighbourSwap(0.0, 4, noise)), quantized.z_q)
    swapped = swap_for_neighbours(quantized, quantizer, NeighbourSwap(1.0, 4, noise))
    assert (swapped != quantized.z_q).any(1).all()


def test_latents_without_codes_are_not_swapped() -> None:
    quantizer, _, quantized = make("none")
    swap = NeighbourSwap(1.0, 4, torch.rand(3, 2, 6, 6))
    assert torch.equal(swap_for_neighbours(quantized, quantizer, swap), quantized.z_q)


def test_the_share_anneals_in_a_straight_line() -> None:
    config = RobustnessConfig(swapped_share=0.4, final_share=0.0, steps=100)
    assert [swapped_share(step, config) for step in (0, 50, 100, 1000)] == pytest.approx([0.4, 0.2, 0.0, 0.0])
    assert swapped_share(10**6, RobustnessConfig(swapped_share=0.4)) == 0.4
    with pytest.raises(UserError, match=r"robustness.swapped_share is 1.5; it must be in \[0, 1\]"):
        swapped_share(0, RobustnessConfig(swapped_share=1.5))
