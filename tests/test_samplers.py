"""Samplers keep their promises whatever the network says."""

import pytest
import torch

from sampling.samplers import Step, guided, maskgit
from stage2_prior.transformer import MaskedTransformer

MASK = 6


def uneven(tokens: torch.Tensor) -> torch.Tensor:
    """A network that answers with fixed, uneven logits for every place."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens.shape[1], MASK, generator=generator).expand(len(tokens), -1, -1)


@pytest.mark.parametrize("steps", [1, 2, 5, 16])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "arccos"])
def test_revealed_tokens_stay_and_every_step_reveals(steps: int, schedule: str) -> None:
    seen: list[Step] = []
    tokens = maskgit(uneven, torch.arange(5), 16, MASK, steps=steps, schedule=schedule, callback=seen.append)
    assert [step.step for step in seen] == list(range(1, steps + 1))
    before = torch.full((5, 16), MASK)
    for step in seen:
        known = before != MASK
        assert torch.equal(step.tokens[known], before[known])
        assert ((step.tokens != MASK).sum(1) > known.sum(1)).all()
        before = step.tokens
    assert torch.equal(tokens, before)
    assert ((tokens >= 0) & (tokens < MASK)).all()


def test_the_same_seed_gives_the_same_tokens_in_any_batch() -> None:
    whole = maskgit(uneven, torch.arange(10), 16, MASK, steps=4)
    assert torch.equal(maskgit(uneven, torch.tensor([7, 3]), 16, MASK, steps=4), whole[[7, 3]])
    assert not torch.equal(whole[0], whole[1])


def test_one_step_draws_from_the_networks_distribution() -> None:
    tokens = maskgit(uneven, torch.arange(20000), 4, MASK, steps=1)
    for place in range(4):
        share = torch.bincount(tokens[:, place], minlength=MASK) / 20000
        assert torch.allclose(share, uneven(tokens[:1, :4])[0, place].softmax(-1), atol=0.015)


def test_a_low_temperature_takes_the_likeliest_code() -> None:
    tokens = maskgit(uneven, torch.arange(50), 8, MASK, steps=4, temperature=1e-3)
    assert torch.equal(tokens, uneven(tokens).argmax(-1))


def test_without_noise_the_surest_places_come_first() -> None:
    """Place i is certain to the degree i, so greedy confidence must reveal the last places first."""
    logits = torch.zeros(1, 8, MASK)
    logits[0, :, 0] = torch.arange(8.0) * 1.5
    seen: list[Step] = []
    maskgit(
        lambda tokens: logits, torch.zeros(1, dtype=torch.int64), 8, MASK, steps=8, choice_temperature=0,
        schedule="linear", callback=seen.append,
    )  # fmt: skip
    first = (seen[0].tokens[0] != MASK).nonzero().flatten()
    assert first.tolist() == [7]


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"steps": 9}, {"temperature": 0}, {"choice_temperature": -1}, {"schedule": "cubic"}]
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        maskgit(uneven, torch.arange(2), 8, MASK, **{"steps": 4, **wrong})


def test_guidance_moves_away_from_the_unconditional() -> None:
    torch.manual_seed(0)
    prior = MaskedTransformer(codebook_size=8, grid=(2, 2), width=16, depth=1, heads=2, num_classes=3).eval()
    tokens = torch.full((2, 4), prior.mask_token)
    labels = torch.tensor([0, 2])
    conditional, unconditional = prior(tokens, labels), prior(tokens)
    assert torch.equal(guided(prior, labels, 0.0, 3)(tokens), conditional)
    expected = 3 * conditional - 2 * unconditional
    assert torch.allclose(guided(prior, labels, 2.0, 3)(tokens), expected, atol=1e-5)
