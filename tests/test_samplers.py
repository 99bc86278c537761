"""Samplers keep their promises whatever the network says."""

from itertools import pairwise, product

import pytest
import torch

from scq.sampling.samplers import SAMPLERS, GuidedPrior, Step, halton_order
from scq.stage2_prior import scheduler
from scq.stage2_prior.masking import SCHEDULES
from scq.stage2_prior.scheduler import UnmaskingScheduler
from scq.stage2_prior.transformer import MaskedTransformer

MASK = 6
NAMES = sorted(SAMPLERS)
FOR_GOOD = [name for name in NAMES if name != "remask"]


def uneven(tokens: torch.Tensor, progress: float = 0.0) -> torch.Tensor:
    """A network that answers with fixed, uneven logits for every place."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens.shape[1], MASK, generator=generator).expand(len(tokens), -1, -1)


def sample(name: str, predict=uneven, seeds=5, side: int = 4, start=None, callback=None, **settings) -> torch.Tensor:
    """Grids and what the callback sees as rows of tokens (B, L), which the tests compare."""
    seeds = torch.arange(seeds) if isinstance(seeds, int) else seeds
    start = torch.full((len(seeds), side * side), MASK) if start is None else start
    settings = UnmaskingScheduler(**{"steps": 4, **settings})
    network = GuidedPrior(lambda tokens, labels: predict(tokens), MASK)

    def flat(step: Step) -> None:
        assert step.tokens.shape == (len(seeds), side, side)
        callback(step._replace(tokens=step.tokens.flatten(1)))

    grids = start.view(-1, side, side)
    return SAMPLERS[name](network, grids, seeds, settings, None if callback is None else flat).flatten(1)


def test_every_sampler_that_can_be_asked_for_is_there() -> None:
    assert tuple(SAMPLERS) == scheduler.SAMPLERS


@pytest.mark.parametrize("name", FOR_GOOD)
@pytest.mark.parametrize("steps", [1, 2, 5, 16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_revealed_tokens_stay_and_every_step_reveals(name: str, steps: int, schedule: str) -> None:
    seen: list[Step] = []
    tokens = sample(name, steps=steps, schedule=schedule, callback=seen.append)
    assert [step.step for step in seen] == list(range(1, steps + 1))
    before = torch.full((5, 16), MASK)
    for step in seen:
        known = before != MASK
        assert torch.equal(step.tokens[known], before[known])
        assert ((step.tokens != MASK).sum(1) > known.sum(1)).all()
        before = step.tokens
    assert torch.equal(tokens, before)
    assert ((tokens >= 0) & (tokens < MASK)).all()


@pytest.mark.parametrize("side", [3, 5, 7, 9, 11])
def test_as_many_steps_as_tokens_reveal_one_each(side: int) -> None:
    """Whatever the rounding of step / steps * tokens: only then is it the ancestral distribution."""
    seen: list[Step] = []
    sample("ancestral", seeds=1, side=side, steps=side * side, schedule="uniform", callback=seen.append)
    assert [int((step.tokens != MASK).sum()) for step in seen] == list(range(1, side * side + 1))


@pytest.mark.parametrize("name", NAMES)
def test_fixed_tokens_never_change_and_all_others_are_drawn(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(0, MASK, (8, 16), generator=generator)
    start[torch.rand(8, 16, generator=generator) < 0.6] = MASK
    start[0], start[1, 1:] = 2, 3  # one image with nothing to draw, one with at most a single place
    start[1, 0] = MASK
    fixed = start != MASK
    seen: list[Step] = []
    sample(name, seeds=8, start=start, steps=7, remask=1.0, callback=seen.append)
    for step in seen:
        assert torch.equal(step.tokens[fixed], start[fixed])
    assert (seen[-1].tokens < MASK).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_tokens_in_any_batch(name: str) -> None:
    whole = sample(name, seeds=10)
    assert torch.equal(sample(name, seeds=torch.tensor([7, 3])), whole[[7, 3]])
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("name", NAMES)
def test_one_step_draws_from_the_networks_distribution(name: str) -> None:
    tokens = sample(name, seeds=20000, side=2, steps=1)
    for place in range(4):
        share = torch.bincount(tokens[:, place], minlength=MASK) / 20000
        assert torch.allclose(share, uneven(tokens[:1])[0, place].softmax(-1), atol=0.015)


def interwoven(tokens: torch.Tensor, progress: float = 0.0) -> torch.Tensor:
    """A network over two codes and four places whose answer depends on what every other place holds."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 4, 3, 2, generator=generator) * 1.5  # (place, other place, what is there, code)
    held = torch.where(tokens < 2, tokens, 2)  # (B, 4)
    return sum(weight[:, other][:, held[:, other]].transpose(0, 1) for other in range(4))


def ancestral_distribution() -> torch.Tensor:
    """Of the any-order autoregressive model over `interwoven`: the mean over all orders of the product of conditionals.

    Returns (2, 2, 2, 2), the probability of every grid.
    """
    found = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    orders = [order for order in product(range(4), repeat=4) if len(set(order)) == 4]
    for grid in product(range(2), repeat=4):
        for order in orders:
            tokens, probability = torch.full((1, 4), MASK), 1.0
            for place in order:
                probability *= float(interwoven(tokens)[0, place].double().softmax(-1)[grid[place]])
                tokens[0, place] = grid[place]
            found[grid] += probability / len(orders)
    return found


@pytest.mark.parametrize(("name", "steps"), [("ancestral", 4), ("remask", 200)])
def test_a_step_for_every_token_is_the_ancestral_distribution(name: str, steps: int) -> None:
    """Exactly it, up to counting: four standard deviations of the largest share.

    Without remasking it is what `remask` draws, too, with so many steps that two tokens are hardly ever drawn at once.
    """
    count = 20000
    tokens = sample(name, interwoven, seeds=count, side=2, steps=steps, schedule="uniform", remask=0.0)
    expected = ancestral_distribution().flatten()
    assert abs(expected.sum() - 1) < 1e-9
    within = 4 * float(expected.max() * (1 - expected.max()) / count) ** 0.5
    numbers = torch.tensor([8, 4, 2, 1])
    assert (torch.bincount(tokens @ numbers, minlength=16) / count - expected).abs().max() < within
    together = sample(name, interwoven, seeds=count, side=2, steps=1) @ numbers
    assert (torch.bincount(together, minlength=16) / count - expected).abs().max() > 2 * within, "all at once is not it"


def test_remasking_changes_its_mind_and_only_when_told() -> None:
    def changes(cap: float) -> int:
        seen: list[Step] = []
        sample("remask", seeds=50, steps=10, remask=cap, schedule="uniform", callback=seen.append)
        return sum(int(((a.tokens != MASK) & (b.tokens != a.tokens)).sum()) for a, b in pairwise(seen))

    assert changes(0.0) == 0
    assert 0 < changes(0.05) < changes(0.5)


def test_the_halton_order_visits_every_place_once_and_spreads() -> None:
    order = halton_order(8, 8)
    assert sorted(order.tolist()) == list(range(64))
    assert halton_order(4, 6).shape == (24,)
    quarter = torch.stack([order[:16] // 8, order[:16] % 8], 1).float()
    nearest = (torch.cdist(quarter, quarter) + 99 * torch.eye(16)).amin(1)
    assert nearest.min() >= 1
    assert nearest.mean() > 1.4, "the first quarter lies apart"
    seen: list[Step] = []
    sample("halton", side=8, steps=4, schedule="uniform", callback=seen.append)
    assert sorted(order[:16].tolist()) == (seen[0].tokens[0] != MASK).nonzero().flatten().tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_low_temperature_takes_the_likeliest_code(name: str) -> None:
    tokens = sample(name, seeds=50, temperature=1e-3)
    assert torch.equal(tokens, uneven(tokens).argmax(-1))
    assert not torch.equal(sample(name, seeds=50, temperature=1e-3, final_temperature=2.0), tokens)


@pytest.mark.parametrize("name", NAMES)
def test_top_k_and_top_p_leave_out_the_unlikely(name: str) -> None:
    probabilities = uneven(torch.zeros(1, 16))[0].softmax(-1)
    ordered, codes = probabilities.sort(-1, descending=True)
    tokens = sample(name, seeds=2000, top_k=2)
    for place in range(16):
        assert set(tokens[:, place].tolist()) == set(codes[place, :2].tolist())
    tokens = sample(name, seeds=2000, top_p=0.7)
    for place in range(16):
        kept = int((ordered[place].cumsum(0) < 0.7).sum()) + 1
        assert set(tokens[:, place].tolist()) == set(codes[place, :kept].tolist())


def test_without_noise_the_surest_places_come_first() -> None:
    """Place i is certain to the degree i, so greedy confidence must reveal the last places first."""
    logits = torch.zeros(1, 4, MASK)
    logits[0, :, 0] = torch.arange(4.0) * 3
    seen: list[Step] = []
    for filtered in ({}, {"top_k": 1}, {"top_p": 0.05}):  # one code is left, and is as sure as it was
        sample(
            "maskgit", lambda tokens: logits, seeds=1, side=2, choice_temperature=0, schedule="uniform",
            callback=seen.append, **filtered,
        )  # fmt: skip
        assert (seen[0].tokens[0] != MASK).nonzero().flatten().tolist() == [3]
        seen.clear()


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"temperature": 0}, {"final_temperature": -2}, {"choice_temperature": -1},
        {"schedule": "cubic"}, {"top_k": -3}, {"top_p": 0.0}, {"remask": 1.5},
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_settings_out_of_range_are_refused(name: str, wrong: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        sample(name, **wrong)


@pytest.mark.parametrize("name", FOR_GOOD)
def test_more_steps_than_tokens_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="steps=17 must be at most 16"):
        sample(name, steps=17)


def test_guidance_moves_away_from_the_unconditional() -> None:
    torch.manual_seed(0)
    prior = MaskedTransformer(codebook_size=8, grid=(2, 2), width=16, depth=1, heads=2, num_classes=3).eval()
    tokens = torch.full((2, 4), prior.mask_token)
    labels = torch.tensor([0, 2])
    conditional, unconditional = prior(tokens, labels), prior(tokens)

    def guided(scale: float, schedule: str = "constant") -> GuidedPrior:
        return GuidedPrior(prior, prior.mask_token, labels, 3, scale, schedule)

    assert torch.equal(guided(0.0)(tokens, 0.0), conditional)
    expected = 3 * conditional - 2 * unconditional
    torch.testing.assert_close(guided(2.0)(tokens, 0.5), expected, rtol=0, atol=1e-5)
    expected = 2 * conditional - unconditional
    torch.testing.assert_close(guided(2.0, "linear")(tokens, 0.5), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="guidance_schedule='cubic'"):
        guided(2.0, "cubic")
