"""The refiner gives back what can be known of convex latents, and nothing of what it must not."""

from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from data_samples import write_folder

from scq.data.pack import pack
from scq.data.stream import iterate_once
from scq.engine.accelerators import make_accelerator
from scq.engine.config import load_config
from scq.engine.errors import UserError
from scq.engine.loop import Trained
from scq.engine.randomness import standard_normal
from scq.engine.run import run
from scq.engine.tracking import read_metrics
from scq.sampling.pipeline import SoftConvexPipeline
from scq.stage1_tokenizer.autoencoder import ImageTokenizer, to_float
from scq.stage2_prior.model import Model
from scq.stage2_prior.refiner import ConvexRefiner
from scq.stage2_prior.refiner_stage import RefinerExperiment, RefinerStage, RefinerTask
from scq.stage2_prior.transformer import MaskedTransformer


def make(kind: str, **keywords) -> ConvexRefiner:
    torch.manual_seed(0)
    refiner = ConvexRefiner(codebook_size=16, latent_dim=4, kind=kind, width=32, depth=2, **keywords)
    refiner.describe(torch.randn(16, 4), torch.tensor([0.5, 1.0, 2.0, 0.1]))
    return refiner.eval()


def pairs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (B, 6, 6), what can be known of the latents around them, a function of the neighbour to the right, and what
    is there: that, and noise of half its size. Both (B, 4, 6, 6)."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, 16, (count, 6, 6), generator=generator)
    table = torch.randn(16, 4, generator=torch.Generator().manual_seed(7))
    known = table[indices.roll(-1, 2)].permute(0, 3, 1, 2)
    return indices, known, known + 0.5 * torch.randn(known.shape, generator=generator)


@cache
def fit(kind: str) -> ConvexRefiner:
    refiner = make(kind)
    optimizer = torch.optim.AdamW(refiner.parameters(), lr=3e-3)
    for step in range(500):
        indices, _, around = pairs(16, step)
        latents = refiner._code(indices) + around * refiner.spread[:, None, None]
        if kind == "flow":
            loss = refiner.flow_loss(indices, latents, torch.randn_like(latents), torch.rand(16))
        else:
            loss = refiner.regression_loss(refiner.mean(indices), indices, latents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return refiner.eval()


def test_an_untrained_regression_changes_nothing() -> None:
    refiner = make("regression")
    indices = torch.randint(0, 16, (3, 5, 5))
    assert torch.equal(refiner.refine(indices), refiner.codes[indices].permute(0, 3, 1, 2))
    latents = refiner._code(indices) + refiner.spread[:, None, None] * torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(
        refiner.regression_loss(refiner.mean(indices), indices, latents),
        refiner.difference(indices, latents).square().mean(),
    )


def test_regression_finds_the_mean_and_a_flow_the_distribution() -> None:
    indices, known, around = pairs(200, seed=10**6)
    inside = (..., slice(1, -1), slice(1, -1))  # the last column's neighbour lies across the border
    regression, flow = fit("regression"), fit("flow")

    def drawn(refiner: ConvexRefiner, seed: int) -> torch.Tensor:
        found = refiner.refine(indices, torch.arange(200) + seed, steps=8)
        return refiner.difference(indices, found)[inside]

    mean = drawn(regression, 0)
    unexplained = (mean - known[inside]).square().mean() / known[inside].square().mean()
    assert unexplained < 0.05
    first, second = drawn(flow, 0), drawn(flow, 10**5)
    assert (first - second).square().mean() / 2 == pytest.approx(0.25, rel=0.35), "the noise's variance is 0.25"
    assert ((first + second) / 2 - known[inside]).square().mean() < 0.3
    assert (mean - around[inside]).square().mean() < (first - around[inside]).square().mean(), "the mean is nearest"


def test_the_same_seed_gives_the_same_latents_in_any_batch() -> None:
    refiner = fit("flow")
    indices = torch.randint(0, 16, (6, 4, 4))
    whole = refiner.refine(indices, torch.arange(6))
    torch.testing.assert_close(refiner.refine(indices[[4, 1]], torch.tensor([4, 1])), whole[[4, 1]], rtol=0, atol=1e-4)
    assert not torch.allclose(refiner.refine(indices[:1], torch.tensor([9])), whole[:1], atol=1e-2)
    assert refiner.refine(torch.randint(0, 16, (1, 9, 13)), torch.zeros(1).long()).shape == (1, 4, 9, 13)
    with pytest.raises(ValueError, match="needs seeds and at least one step, not seeds=None"):
        refiner.refine(indices)


def test_normal_numbers_are_normal() -> None:
    numbers = standard_normal(torch.arange(20000), 3, purpose="test")
    assert abs(float(numbers.mean())) < 0.02
    assert float(numbers.std()) == pytest.approx(1, abs=0.02)
    assert float((numbers.abs() < 1).float().mean()) == pytest.approx(0.683, abs=0.01)
    assert abs(float(torch.corrcoef(numbers.t())[0, 1])) < 0.03
    assert torch.equal(standard_normal(torch.tensor([7]), 3, purpose="test")[0], numbers[7])


def tokenizer(name: str = "scq") -> ImageTokenizer:
    torch.manual_seed(0)
    model = ImageTokenizer(32, (16, 32), quantizer_name=name, codebook_size=32, latent_dim=4)
    model.train()(torch.rand(16, 3, 32, 32) * 2 - 1)
    return model.eval()


def train_refiner(
    config: RefinerExperiment, tokenizer: ImageTokenizer, prior: MaskedTransformer | None = None
) -> Trained:
    return run(RefinerStage(config, tokenizer, None if prior is None else Model(tokenizer, prior)))


def config(emoji: dict[str, Path], out: Path, *overrides: str) -> RefinerExperiment:
    return load_config(
        RefinerExperiment,
        None,
        [
            f"out={out}", f"data.train={emoji['train']}", f"data.validation={emoji['test']}", "tokenizer=it",
            "architecture.width=32", "architecture.depth=2", "training.steps=40", "training.batch_size=16",
            "training.checkpoint_every=20", "training.ema_decay=0.9", "training.precision=fp32",
            "optimizer.learning_rate=3e-3", "optimizer.warmup_steps=5", *overrides,
        ],
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["regression", "flow"])
def test_training_explains_more_and_the_pipeline_uses_it(kind: str, emoji: dict[str, Path], tmp_path: Path) -> None:
    model = tokenizer()
    prior = MaskedTransformer(32, model.grid, width=16, depth=1, heads=2, tokenizer_fingerprint=model.fingerprint())
    trained = train_refiner(config(emoji, tmp_path / "run", f"architecture.kind={kind}"), model)
    scores = [row["unexplained_share"] for row in read_metrics(tmp_path / "run") if "unexplained_share" in row]
    assert scores[-1] < scores[0], "one in all is what the codes alone leave unexplained"
    assert all(row["held_out_mse"] > 0 for row in read_metrics(tmp_path / "run") if "unexplained_share" in row)
    assert kind == "flow" or scores[-1] < 0.95
    assert (tmp_path / "run" / "images" / "step_00000040.png").is_file()

    pipeline = SoftConvexPipeline(model, prior, trained.averaged)
    pipeline.save_pretrained(tmp_path / "model")
    loaded = SoftConvexPipeline.from_pretrained(tmp_path / "model")
    refined = loaded(num_images=5, seed=0, num_inference_steps=4, output_type="pt")
    plain = loaded(num_images=5, seed=0, num_inference_steps=4, output_type="pt", refine=False)
    assert torch.equal(refined.tokens, plain.tokens)
    assert not torch.equal(refined.images, plain.images)
    assert torch.equal(
        loaded(num_images=5, seed=0, num_inference_steps=4, output_type="pt", batch_size=2).images, refined.images
    )
    with pytest.raises(ValueError, match="refiner_steps=0"):
        loaded(num_images=1, refiner_steps=0)
    other = ConvexRefiner(32, 4, tokenizer_fingerprint="another")
    with pytest.raises(UserError, match="the refiner was trained on tokens of tokenizer another"):
        SoftConvexPipeline(model, prior, other)


def test_a_regression_may_aim_at_what_is_decoded(emoji: dict[str, Path], tmp_path: Path) -> None:
    model, decoded = tokenizer(), {}
    held_out = next(iterate_once(emoji["test"], 128)).images
    truth = to_float(held_out)
    for weight in (0, 100):
        asked = config(emoji, tmp_path / str(weight), f"pixel_weight={weight}", "training.steps=80")
        refiner = train_refiner(asked, model).averaged
        with torch.no_grad():
            indices = model.encode(truth).indices
            images, alone = model.decode(refiner.refine(indices)), model.decode_indices(indices)
        decoded[weight] = float((alone - truth).square().mean() - (images - truth).square().mean())
    assert decoded[100] > 2 * abs(decoded[0]), "how much nearer refined latents come to the image than codes alone"
    assert {"latents", "pixels"} <= read_metrics(tmp_path / "100")[-1].keys()
    with pytest.raises(UserError, match=r"pixel_weight is -1.0; it must be at least 0"):
        train_refiner(config(emoji, tmp_path / "bad", "pixel_weight=-1"), model)


def test_a_share_of_the_codes_is_the_priors(emoji: dict[str, Path], tmp_path: Path) -> None:
    model = tokenizer()
    prior = MaskedTransformer(32, model.grid, width=16, depth=1, heads=2)
    asked = config(emoji, tmp_path / "run", "resampled_share=0.6")
    batch = next(iterate_once(emoji["train"], 64))
    task = RefinerTask(asked, make_accelerator(asked.training), model, prior, batch.images, batch.images)
    codes, latents, images, _ = task._pairs(batch)
    real = model.encode(to_float(batch.images))
    torch.testing.assert_close(latents, real.z_q, msg="the latents stay those of the image")
    assert torch.equal(images, to_float(batch.images))
    changed = (codes != real.indices).flatten(1).float().mean(1)
    assert changed.max() < 0.75
    assert changed.mean() == pytest.approx(0.3 * 31 / 32, abs=0.06), "an untrained prior is right once in 32 times"
    assert changed.std() > 0.1, "every image has its own share"


def test_a_class_conditional_prior_is_told_the_class(emoji: dict[str, Path], tmp_path: Path) -> None:
    model = tokenizer()
    prior = MaskedTransformer(32, model.grid, width=16, depth=1, heads=2, num_classes=3)
    asked = config(emoji, tmp_path / "run", "resampled_share=1.0")
    batch = next(iterate_once(emoji["train"], 16))._replace(labels=torch.arange(16) % 3)
    task = RefinerTask(asked, make_accelerator(asked.training), model, prior, batch.images, batch.images)
    given: list[torch.Tensor] = []
    prior.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1]))
    task._pairs(batch)
    assert torch.equal(given[0], batch.labels)
    with pytest.raises(UserError, match=r"has 3 classes, but .* has 0"):
        train_refiner(asked, model, prior)


def test_the_classes_of_the_prior_are_compared_by_name(tmp_path: Path) -> None:
    packed = tmp_path / "shards"
    pack(write_folder(tmp_path / "photos", 8, ("ant", "bee")), packed, format="folder", size=32, workers=0)
    model = tokenizer()
    for names, said in ((["ant", "cat"], "label 1 is 'cat' in the prior, but 'bee' in"), (["ant", "bee"], None)):
        prior = MaskedTransformer(32, model.grid, width=16, depth=1, heads=2, num_classes=2, class_names=names)
        asked = config({"train": packed, "test": packed}, tmp_path / "run", "resampled_share=1.0", "training.steps=1")
        with nullcontext() if said is None else pytest.raises(UserError, match=said):
            RefinerStage(asked, model, Model(model, prior)).open_stream(make_accelerator(asked.training))


def test_what_cannot_be_refined_is_named(emoji: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is nothing to refine"):
        train_refiner(config(emoji, tmp_path / "run"), tokenizer("vq"))
    with pytest.raises(UserError, match="quantizer 'none' has no codes"):
        train_refiner(config(emoji, tmp_path / "run"), tokenizer("none"))
    with pytest.raises(UserError, match="resampled_share needs a prior"):
        train_refiner(config(emoji, tmp_path / "run", "resampled_share=0.5"), tokenizer())
    with pytest.raises(UserError, match="kind='magic' must be one of regression, flow"):
        train_refiner(config(emoji, tmp_path / "run", "architecture.kind=magic"), tokenizer())


def test_a_run_goes_on_with_its_own_tokenizer_and_prior_only(emoji: dict[str, Path], tmp_path: Path) -> None:
    """Also where nothing is left to train: the caller would export old codes' refiner with a new tokenizer."""
    model, other = tokenizer(), tokenizer()
    with torch.no_grad():
        other.quantizer.codebook += 0.01
    priors = [MaskedTransformer(32, model.grid, width=16, depth=1, heads=2) for _ in range(2)]
    few = ["training.steps=2", "training.images_every=0", "resampled_share=0.5"]
    train_refiner(config(emoji, tmp_path / "run", *few), model, priors[0])
    with pytest.raises(UserError, match=f"holds a run with tokenizer {model.fingerprint()}, .* {other.fingerprint()}"):
        train_refiner(config(emoji, tmp_path / "run", *few), other, priors[0])
    with pytest.raises(UserError, match="holds a run with prior"):
        train_refiner(config(emoji, tmp_path / "run", *few, "training.steps=4"), model, priors[1])
    moved = config(emoji, tmp_path / "run", *few, "training.steps=4", "tokenizer=elsewhere", "prior=too")
    assert train_refiner(moved, model, priors[0]).steps == 4, "only their places have changed"
