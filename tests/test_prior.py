"""Stage 2: masking, the transformer, and that it learns what it is shown."""

from pathlib import Path

import pytest
import torch

from scq.data.tokens import TokenDataset, TokenWriter
from scq.engine.accelerators import make_accelerator
from scq.engine.config import load_config
from scq.engine.errors import UserError
from scq.engine.loop import Trained
from scq.engine.run import run
from scq.engine.tracking import read_metrics
from scq.stage1_tokenizer.autoencoder import ImageTokenizer
from scq.stage2_prior.masking import SCHEDULES, mask_share, mask_tokens, masked_count
from scq.stage2_prior.prior_stage import (
    PriorExperiment,
    PriorStage,
    PriorTask,
    _LossOfPrior,
    build_prior,
    masked_cross_entropy,
)
from scq.stage2_prior.transformer import MaskedTransformer


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mask_schedules_fall_from_all_to_none(schedule: str) -> None:
    share = mask_share(torch.linspace(0, 1, 101, dtype=torch.float64), schedule)
    assert share[0] == pytest.approx(1)
    assert share[-1] == pytest.approx(0, abs=1e-12)
    assert (share.diff() < 0).all()


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="cubic"):
        mask_share(torch.zeros(1), "cubic")


def test_masking_hides_the_share_the_schedule_asks_for_and_nothing_else() -> None:
    codes = torch.randint(0, 10, (50, 64))
    progress = torch.linspace(0, 0.999, 50)
    masked = mask_tokens(codes, 10, masked_count(progress, 64), torch.rand(50, 64))
    assert torch.equal(masked.mask.sum(1), (mask_share(progress) * 64).ceil().clamp(1, 64).long())
    assert (masked.tokens[masked.mask] == 10).all()
    assert torch.equal(masked.tokens[~masked.mask], codes[~masked.mask])
    assert masked.mask[0].all()
    assert masked.mask.sum(1).min() >= 1


def test_the_loss_counts_masked_places_only() -> None:
    logits = torch.randn(2, 6, 5, requires_grad=True)
    codes, mask = torch.randint(0, 5, (2, 6)), torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = True
    loss, _ = masked_cross_entropy(logits, mask, codes)
    picked = torch.stack([logits[0, 1], logits[1, 4]]).log_softmax(-1)
    assert torch.isclose(loss, -(picked[0, codes[0, 1]] + picked[1, codes[1, 4]]) / 2)
    loss.backward()
    assert (logits.grad[~mask] == 0).all()


@pytest.mark.parametrize("weighting", ["tokens", "images"])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path, monkeypatch, weighting: str) -> None:
    """Although each part masks another number of tokens."""
    found = []

    def record(module: torch.nn.Module, *_) -> torch.Tensor:
        found.append({name: p.grad.clone() for name, p in module.named_parameters()})
        return torch.zeros(())

    monkeypatch.setattr("scq.engine.stage.optimizer_step", record)
    tokens, losses = write_stripes(tmp_path / "tokens"), []
    for parts in (1, 4):
        config = stripes_config(tokens, tmp_path, f"training.accumulate={parts}", f"masking.weighting={weighting}")
        accelerator = make_accelerator(config.training)
        stage = PriorStage(config, stripes_tokenizer())
        batch = next(iter(stage.open_stream(accelerator)))
        terms = stage.build(accelerator).training_step(batch, 0)
        losses.append(float(terms["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    whole, accumulated = found
    for name, gradient in whole.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(accumulated[name], gradient, rtol=0, atol=1e-5 * scale + 1e-9, msg=name)


def test_every_image_alike_is_the_likelihood_bound() -> None:
    """With the uniform schedule and no smoothing, the loss is the bound's estimate from these masks, in nats."""
    torch.manual_seed(0)
    logits, codes = torch.randn(3, 8, 5), torch.randint(0, 5, (3, 8))
    mask = torch.arange(8) < torch.tensor([[1], [4], [8]])
    found, _ = masked_cross_entropy(logits, mask, codes, weighting="images")
    nats = -logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0] * mask
    torch.testing.assert_close(found, (nats.sum(1) * 8 / mask.sum(1)).sum() / 8 / 3)
    with pytest.raises(ValueError, match="'pixels' does not exist"):
        masked_cross_entropy(logits, mask, codes, weighting="pixels")


def test_corruption_changes_only_what_is_shown(tmp_path: Path) -> None:
    tokens = TokenDataset(write_stripes(tmp_path / "tokens"))
    config = stripes_config(tmp_path / "tokens", tmp_path / "run", "masking.corrupted_share=0.5")
    loss = _LossOfPrior(build_prior(config, tokens, torch.zeros(16, 3)), config, compiled=False)
    shown = torch.randint(0, 16, (200, 16))
    mask = torch.rand(200, 16) < 0.5
    hidden = torch.where(mask, 16, shown)
    corrupted = loss._corrupt(hidden, mask, torch.arange(200))
    assert torch.equal(corrupted[mask], hidden[mask])
    changed = (corrupted != hidden)[~mask].float().mean()
    assert changed == pytest.approx(0.5 * 15 / 16, abs=0.04), "of sixteen codes, one is the right one by chance"
    with pytest.raises(UserError, match=r"corrupted_share is 1.0; it must be in \[0, 1\)"):
        train_prior(stripes_config(tmp_path / "tokens", tmp_path / "r", "masking.corrupted_share=1.0"))


@pytest.mark.parametrize(("tied", "positions"), [(True, "learned"), (False, "rotary")])
def test_checkpointing_changes_memory_and_not_gradients(tied: bool, positions: str) -> None:
    torch.manual_seed(0)
    prior = MaskedTransformer(codebook_size=8, grid=(3, 3), width=16, depth=2, heads=2, tied=tied, positions=positions)
    tokens = torch.randint(0, 9, (2, 9))
    gradients = []
    for _ in range(2):
        prior.zero_grad()
        prior(tokens).square().sum().backward()
        gradients.append([p.grad.clone() for p in prior.parameters() if p.grad is not None])
        prior.enable_gradient_checkpointing()
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_every_place_is_predicted_from_both_sides() -> None:
    torch.manual_seed(0)
    prior = MaskedTransformer(codebook_size=8, grid=(3, 3), width=16, depth=2, heads=2).eval()
    tokens = torch.randint(0, 8, (1, 9))
    tokens[0, 4] = prior.mask_token
    logits = prior(tokens)[0, 4]
    for place in (0, 8):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 8
        assert not torch.allclose(prior(changed)[0, 4], logits)


def test_with_rotary_positions_only_distances_count() -> None:
    torch.manual_seed(0)
    prior = MaskedTransformer(codebook_size=8, grid=(4, 4), width=32, depth=2, heads=2, positions="rotary").eval()
    alike = torch.full((1, 16), 3)
    everywhere = prior(alike)[0]
    torch.testing.assert_close(everywhere, everywhere[:1].expand(16, -1))
    alike[0, 5] = 4  # row 1, column 1
    seen = prior(alike)[0].view(4, 4, -1)
    assert not torch.allclose(seen[1, 2], seen[1, 3]), "one to the right, and two"
    assert not torch.allclose(seen[1, 2], seen[2, 1]), "to the right, and below"
    with pytest.raises(ValueError, match="width that is a multiple of four, not 6"):
        MaskedTransformer(width=12, heads=2, positions="rotary")
    with pytest.raises(ValueError, match="'spiral'"):
        MaskedTransformer(positions="spiral")


def test_codes_that_lie_close_together_begin_alike() -> None:
    torch.manual_seed(0)
    prior = MaskedTransformer(codebook_size=6, grid=(2, 2), width=32, depth=1, heads=2, code_dim=3)
    codes = torch.randn(6, 3)
    codes[4] = codes[1] + 0.01
    prior.describe(5 * codes + 7)
    embeddings = prior._embeddings()
    assert embeddings.shape == (7, 32)
    distance = torch.cdist(embeddings, embeddings) + 100 * torch.eye(7)
    assert distance[1].argmin() == 4
    assert distance[4].argmin() == 1


def test_weights_decay_and_tables_do_not(tmp_path: Path) -> None:
    tokens = write_stripes(tmp_path / "tokens", classes=3)
    settings = ["architecture.class_conditional=true", "architecture.code_features=true", "optimizer.weight_decay=0.05"]
    config = stripes_config(tokens, tmp_path / "run", *settings)
    task = PriorTask(config, make_accelerator(config.training), TokenDataset(tokens), torch.randn(16, 4))
    decay = {id(p): group["weight_decay"] for group in task.optimizers["prior"].param_groups for p in group["params"]}
    decayed = {name for name, p in task.modules["model"].named_parameters() if decay[id(p)] > 0}
    assert "to_embedding.weight" in decayed, "it is no table, for all its name"
    tables = {"token_embedding.weight", "code_embedding.weight", "class_embedding.weight", "position_embedding"}
    assert not tables & decayed
    assert not {name for name in decayed if name.endswith("bias")}


@pytest.mark.parametrize("setting", ["label_smoothing=1.5", "class_dropout=-0.1", "corrupted_share=1.0"])
def test_shares_beyond_their_range_are_named(tmp_path: Path, setting: str) -> None:
    tokens = write_stripes(tmp_path / "tokens")
    with pytest.raises(UserError, match=rf"masking.{setting.replace('=', ' is ')}; it must be in \[0, 1\)"):
        train_prior(stripes_config(tokens, tmp_path / "run", f"masking.{setting}"))


def test_a_prior_needs_its_tokenizer_and_is_told_its_codes(tmp_path: Path) -> None:
    tokens = write_stripes(tmp_path / "tokens")
    config = stripes_config(tokens, tmp_path / "run", "architecture.code_features=true", "training.steps=2")
    with pytest.raises(UserError, match="tokenizer is empty"):
        PriorStage(config)
    assert train_prior(config).averaged.codes.shape == (16, 3)


def test_a_class_conditional_prior_listens_to_the_class() -> None:
    torch.manual_seed(0)
    prior = MaskedTransformer(codebook_size=8, grid=(2, 2), width=16, depth=1, heads=2, num_classes=3).eval()
    tokens = torch.full((1, 4), prior.mask_token)
    none, one, two = (prior(tokens, torch.tensor([label])) for label in (3, 0, 1))
    assert torch.equal(prior(tokens), none)
    assert not torch.allclose(one, two)


def write_stripes(folder: Path, fingerprint: str = "stripes", classes: int = 0, names: tuple[str, ...] = ()) -> Path:
    """Grids whose rows are constant: once one token of a row is known, so are the others."""
    writer = TokenWriter(
        folder,
        grid=(4, 4),
        codebook_size=16,
        fingerprint=fingerprint,
        source="stripes",
        num_classes=classes,
        class_names=names,
    )
    rows = torch.randint(0, 16, (400, 4, 1), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(400) % max(1, classes)
    writer.write(rows.expand(400, 4, 4).contiguous(), labels, [str(i) for i in range(400)])
    writer.close()
    return folder


def stripes_tokenizer(fingerprint: str = "stripes") -> ImageTokenizer:
    """An untrained tokenizer of the stripes' shape that passes for the one that wrote them."""
    tokenizer = ImageTokenizer(8, (8,), latent_dim=3, codebook_size=16).eval()
    tokenizer.fingerprint = lambda: fingerprint
    return tokenizer


def train_prior(config: PriorExperiment, fingerprint: str = "stripes") -> Trained:
    return run(PriorStage(config, stripes_tokenizer(fingerprint)))


def stripes_config(tokens: Path, out: Path, *overrides: str) -> PriorExperiment:
    return load_config(
        PriorExperiment,
        None,
        [
            f"data.train={tokens}",
            f"out={out}",
            "training.steps=250",
            "training.batch_size=32",
            "training.precision=fp32",
        ]
        + ["architecture.width=32", "architecture.depth=2", "architecture.heads=2", "optimizer.learning_rate=3e-3"]
        + ["training.ema_decay=0.9", "optimizer.warmup_steps=10", "training.images_every=0"]
        + ["masking.label_smoothing=0", "architecture.code_features=false", *overrides],
    )


def test_the_prior_learns_the_structure_of_its_tokens(tmp_path: Path) -> None:
    tokens = write_stripes(tmp_path / "tokens")
    prior = train_prior(stripes_config(tokens, tmp_path / "run", "training.steps=600")).averaged
    rows = torch.randint(0, 16, (200, 4, 1), generator=torch.Generator().manual_seed(1)).expand(200, 4, 4)
    one_of_each_row = torch.eye(4, dtype=torch.bool)
    shown = torch.where(one_of_each_row, rows, prior.mask_token).flatten(1)
    guessed = prior(shown).argmax(-1).view(200, 4, 4)
    assert (guessed == rows).float().mean() > 0.9  # of 16 codes


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    tokens = write_stripes(tmp_path / "tokens", fingerprint="aaaa")
    with pytest.raises(UserError, match=r"aaaa.*bbbb"):
        train_prior(stripes_config(tokens, tmp_path / "run"), "bbbb")


def test_a_class_conditional_prior_needs_classes(tmp_path: Path) -> None:
    tokens = write_stripes(tmp_path / "tokens")
    with pytest.raises(UserError, match="no classes"):
        train_prior(stripes_config(tokens, tmp_path / "run", "architecture.class_conditional=true"))


def test_held_out_labels_must_mean_what_those_of_training_mean(tmp_path: Path) -> None:
    settings = ["architecture.class_conditional=true", "training.steps=2"]
    tokens, other = (write_stripes(tmp_path / str(count), classes=count) for count in (3, 2))
    with pytest.raises(UserError, match=r"3 has 3 classes, but .*2 has 2"):
        train_prior(stripes_config(tokens, tmp_path / "run", *settings, f"data.validation={other}"))
    train_prior(stripes_config(tokens, tmp_path / "run", *settings, f"data.validation={tokens}"))


def test_held_out_classes_are_compared_by_name_and_the_prior_keeps_them(tmp_path: Path) -> None:
    settings = ["architecture.class_conditional=true", "training.steps=2"]
    insects, animals = ("ant", "bee", "cat"), ("ant", "cat", "dog")
    tokens = write_stripes(tmp_path / "insects", classes=3, names=insects)
    other = write_stripes(tmp_path / "animals", classes=3, names=animals)
    with pytest.raises(UserError, match=r"label 1 is 'bee' in .*insects, but 'cat' in .*animals, so labels differ"):
        train_prior(stripes_config(tokens, tmp_path / "run", *settings, f"data.validation={other}"))
    nameless = write_stripes(tmp_path / "old", classes=3)
    trained = train_prior(stripes_config(tokens, tmp_path / "run", *settings, f"data.validation={nameless}")).averaged
    trained.save_pretrained(tmp_path / "prior")
    assert MaskedTransformer.from_pretrained(tmp_path / "prior").classes("it") == ("it", 3, list(insects))
    free = stripes_config(tokens, tmp_path / "free", settings[1], f"data.validation={other}")
    assert train_prior(free).averaged.classes("it").number == 0, "labels have no say there"


def test_validation_is_a_bound_in_bits_and_keeps_the_best(tmp_path: Path) -> None:
    tokens = write_stripes(tmp_path / "tokens")
    settings = ["training.steps=300", "training.checkpoint_every=100", f"data.validation={tokens}"]
    trained = train_prior(stripes_config(tokens, tmp_path / "run", *settings))
    scored = [row for row in read_metrics(tmp_path / "run") if "bits_per_token" in row]
    assert all(row["bits_per_image"] == pytest.approx(16 * row["bits_per_token"]) for row in scored)
    assert all(0 < row["bits_per_token_error"] < row["bits_per_token"] for row in scored)
    found = {row["step"]: row["bits_per_token"] for row in scored}
    assert list(found) == [100, 200, 300]
    assert 1.0 < found[300] < found[100] < 4.2, "four rows of four bits are one bit a token, knowing nothing is four"
    assert trained.best.name == "step_00000300"
    other = write_stripes(tmp_path / "other", fingerprint="another")
    settings[-1] = f"data.validation={other}"
    with pytest.raises(UserError, match=r"other was written by tokenizer another"):
        train_prior(stripes_config(tokens, tmp_path / "again", *settings))


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_saved_prior_is_the_same_prior(tmp_path: Path, positions: str) -> None:
    prior = MaskedTransformer(codebook_size=8, grid=(3, 3), width=16, depth=1, heads=2, positions=positions).eval()
    prior.save_pretrained(tmp_path)
    tokens = torch.randint(0, 9, (2, 9))
    assert torch.equal(MaskedTransformer.from_pretrained(tmp_path)(tokens), prior(tokens))
