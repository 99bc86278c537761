"""Stage 1: shapes, losses, and that a tokenizer learns, saves, loads and says what is wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from scq.data.shards import ShardSet
from scq.data.stream import iterate_once
from scq.engine.accelerators import make_accelerator
from scq.engine.config import CONFIG_ROOT, load_config
from scq.engine.errors import DataError, UserError
from scq.engine.run import dry_run, run
from scq.engine.tracking import read_metrics
from scq.stage1_tokenizer.autoencoder import ImageTokenizer, to_float, to_uint8
from scq.stage1_tokenizer.losses import LossConfig
from scq.stage1_tokenizer.model_folder import load_tokenizer
from scq.stage1_tokenizer.stage import TokenizerExperiment, TokenizerStage, TokenizerTask, build_tokenizer
from scq.stage1_tokenizer.write_tokens import write_tokens
from scq.stage2_prior.refiner import ConvexRefiner


def small(quantizer: str = "scq", **keywords) -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(32, (16, 32), quantizer_name=quantizer, codebook_size=64, latent_dim=4, **keywords)


@pytest.mark.parametrize("quantizer", ["scq", "vq", "vq_ema", "simvq", "fsq", "rvq2"])
def test_the_way_of_an_image(quantizer: str) -> None:
    tokenizer = small(quantizer)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    reconstruction, quantized = tokenizer(images)
    assert reconstruction.shape == images.shape
    assert quantized.z_q.shape == (3, 4, 8, 8)
    assert quantized.indices.shape == (3, *tokenizer.grid)
    tokenizer.eval()
    encoding = tokenizer.encode(images)
    decoded = tokenizer.decode_indices(encoding.indices)
    same = torch.allclose(decoded, tokenizer.decode(encoding.z_q), atol=1e-5)
    assert same == (quantizer != "scq"), "only a hard quantizer's z_q is its codes"


@pytest.mark.parametrize("quantizer", ["scq", "vq"])
def test_an_encoding_says_which_codes_it_mixes(quantizer: str) -> None:
    tokenizer = small(quantizer)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    tokenizer(images)
    encoding = tokenizer.eval().encode(images)
    torch.testing.assert_close(encoding.weights.sum(-1), torch.ones(3, 8, 8))
    assert torch.equal(encoding.support.gather(-1, encoding.weights.argmax(-1, keepdim=True))[..., 0], encoding.indices)
    codes = tokenizer.quantizer.lookup(encoding.support.flatten(2)).unflatten(3, (8, -1))  # (B, F, h, w, S)
    mixed = (codes * encoding.weights.unsqueeze(1)).sum(-1)
    torch.testing.assert_close(mixed, encoding.z_q, rtol=0, atol=1e-4)
    assert (encoding.support.shape[-1] > 1) == (quantizer == "scq")


def test_a_neck_adds_a_refiners_parameters_and_nothing_else_at_first() -> None:
    plain, necked = small("vq"), small("vq", neck_width=24, neck_depth=2)
    found = necked.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.startswith("neck.") for name in found.missing_keys)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(plain.eval()(images)[0], necked.eval()(images)[0]), "zero before training"
    refiner = ConvexRefiner(codebook_size=64, latent_dim=4, width=24, depth=2)
    assert sum(p.numel() for p in necked.neck.parameters()) == sum(p.numel() for p in refiner.network.parameters())


def test_pixels_survive_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(to_float(pixels)), pixels)


def test_what_is_no_image_and_no_latent_is_named() -> None:
    tokenizer = small().eval()
    for shape in ((3, 32, 32), (1, 1, 32, 32), (1, 3, 31, 32), (1, 3, 32, 34), (0, 3, 32, 32)):
        with pytest.raises(UserError, match=r"images must be \(B, 3, H, W\) with H and W multiples of 4, not \("):
            tokenizer.encode(torch.zeros(shape))
    with pytest.raises(UserError, match=r"floats in \[-1, 1\], not torch.uint8; to_float makes them of uint8 pixels"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    for z_q in (torch.zeros(1, 3, 8, 8), torch.zeros(4, 8, 8), torch.zeros(1, 4, 8, 8, dtype=torch.int64)):
        with pytest.raises(UserError, match=r"latents must be floats \(B, 4, h, w\), not \("):
            tokenizer.decode(z_q)


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = small()
    tokenizer.train()(torch.rand(4, 3, 32, 32) * 2 - 1)  # fills the quantizer's running statistics
    tokenizer.eval().save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(tmp_path)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert torch.equal(loaded.encode(images).z_q, tokenizer.encode(images).z_q)
    assert {p.suffix for p in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}
    with torch.no_grad():
        loaded.quantizer.codebook[0, 0] += 1
    assert loaded.fingerprint() != tokenizer.fingerprint()


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    small().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("quantizer.name=nearest", "nearest"),
        ("quantizer.options.roh=0.3", "roh"),
        ("architecture.image_size=30", "30"),
    ],
)
def test_a_config_that_is_no_tokenizer_is_named(override: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        build_tokenizer(load_config(TokenizerExperiment, None, [override]))


def test_training_lowers_the_error_and_tokens_fit_the_codebook(emoji: dict[str, Path], tmp_path: Path) -> None:
    config = load_config(
        TokenizerExperiment,
        CONFIG_ROOT / "quickstart" / "tokenizer_scq.yaml",
        [f"out={tmp_path / 'run'}", f"data.train={emoji['train']}", f"data.validation={emoji['test']}"]
        + ["training.steps=160", "training.batch_size=32", "training.precision=fp32", "training.images_every=160"]
        + ["quantizer.codebook_size=64", "architecture.channels=[16,32]", "training.ema_decay=0.9"],
    )
    images = to_float(next(iterate_once(emoji["test"], 64)).images)
    trained = run(TokenizerStage(config)).averaged
    encoding = trained.encode(images)
    variance = images.var()
    soft, dominant = trained.decode(encoding.z_q), trained.decode_indices(encoding.indices)
    assert (soft - images).square().mean() < 0.45 * variance
    assert (dominant - images).square().mean() < 0.55 * variance
    assert (tmp_path / "run" / "images" / "step_00000160.png").is_file()

    tokens = write_tokens(trained, emoji["test"], tmp_path / "tokens")
    assert len(tokens) == sum(len(batch.images) for batch in iterate_once(emoji["test"], 64))
    assert tokens.fingerprint == load_tokenizer(tmp_path / "run").fingerprint()
    assert torch.equal(tokens.read(torch.arange(64).numpy(), torch.zeros(64, dtype=int).numpy()), encoding.indices)


def test_views_of_an_image_are_tokenized_beside_each_other(emoji: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = small().eval()
    with pytest.raises(UserError, match="'none', has no codes: there are no tokens to write"):
        write_tokens(ImageTokenizer(quantizer_name="none"), emoji["test"], tmp_path / "tokens")
    tokens = write_tokens(tokenizer, emoji["test"], tmp_path / "tokens", views=2)
    images = next(iterate_once(emoji["test"], 20)).images
    numbers = np.arange(20)
    for view, pixels in enumerate((images, images.flip(-1))):
        found = tokens.read(numbers, np.full(20, view))
        assert (found == tokenizer.encode(to_float(pixels)).indices).float().mean() > 0.999


def test_tokens_of_an_unusable_image_are_those_of_the_next(
    emoji: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, tokenizer = tmp_path / "shards", small().eval()
    shutil.copytree(emoji["test"], shards)
    row, key = ShardSet(shards).rows[3], ShardSet(shards).key(3)
    shard = shards / f"shard-{row['shard']:06d}.tar"
    content, start = bytearray(shard.read_bytes()), int(row["offset"])
    content[start + 40 : start + 120] = bytes(80)
    shard.write_bytes(content)
    with pytest.raises(DataError, match=f"image '{key}' of "):
        write_tokens(tokenizer, shards, tmp_path / "tokens")
    tokens = write_tokens(tokenizer, shards, tmp_path / "tokens", max_bad=0.01)
    assert capsys.readouterr().err.count(key) == 1
    whole = write_tokens(tokenizer, emoji["test"], tmp_path / "whole")
    wanted = np.arange(len(whole))
    wanted[3] = 4
    numbers, views = np.arange(len(whole)), np.zeros(len(whole), int)
    assert len(tokens) == len(whole)
    assert torch.equal(tokens.read(numbers, views), whole.read(wanted, views))
    with pytest.raises(UserError, match="must be in"):
        write_tokens(tokenizer, shards, tmp_path / "tokens", max_bad=1)


def test_the_discriminator_learns_and_the_generator_does_not_touch_it(emoji: dict[str, Path]) -> None:
    config = load_config(TokenizerExperiment, CONFIG_ROOT / "quickstart" / "tokenizer_vqgan.yaml")
    config.loss = LossConfig(
        perceptual=0.0, adversarial=0.5, adversarial_start=0, adversarial_ramp=0, discriminator_lead=0,
        discriminator_channels=16, discriminator_layers=2,
    )  # fmt: skip
    config.training.precision = "fp32"
    task = TokenizerTask(config, make_accelerator(config.training), torch.zeros(1))
    before = {name: p.clone() for name, p in task.modules["discriminator"].named_parameters()}
    batch = next(iterate_once(emoji["train"], 16))
    images = to_float(batch.images)
    reconstruction, _ = task.tokenizer(images)
    last_layer, noise = task.modules["model"].last_layer, torch.rand(16, 7)
    loss, _, _ = task.losses.generator(images, reconstruction, last_layer, step=0, noise=noise)
    loss.backward()
    assert all(p.grad is None for p in task.modules["discriminator"].parameters())
    terms = task.training_step(batch, step=0)
    assert {"adversarial", "adaptive_weight", "discriminator"} <= terms.keys()
    assert any(not torch.equal(p, before[name]) for name, p in task.modules["discriminator"].named_parameters())


FULL_GAME = {
    "perceptual": 0.0, "adversarial": 0.5, "adversarial_start": 0, "adversarial_ramp": 0, "discriminator_lead": 0,
    "discriminator_channels": 16, "discriminator_layers": 2, "game": "non-saturating", "r1": 1.0, "r1_every": 2,
    "lecam": 0.1, "discriminator_norm": "spectral", "augment": ["colour", "shift", "cutout"],
}  # fmt: skip


def one_step(emoji: dict[str, Path], loss: LossConfig, steps: int = 1, **training) -> tuple[TokenizerTask, dict]:
    config = load_config(TokenizerExperiment, CONFIG_ROOT / "quickstart" / "tokenizer_vqgan.yaml")
    config.loss = loss
    for name, value in {"precision": "fp32", **training}.items():
        setattr(config.training, name, value)
    task = TokenizerTask(config, make_accelerator(config.training), torch.zeros(1))
    batches = iterate_once(emoji["train"], 16)
    for step in range(steps):
        terms = task.training_step(next(batches), step)
    return task, terms


def test_all_of_the_game_together_trains_and_is_saved(emoji: dict[str, Path]) -> None:
    task, terms = one_step(emoji, LossConfig(**FULL_GAME))
    assert {"adversarial", "adaptive_weight", "discriminator", "r1", "lecam"} <= terms.keys()
    assert all(value.isfinite() for value in terms.values())
    assert set(task.modules) == {"model", "discriminator", "lecam"}
    assert task.modules["lecam"].real_mean != 0


def test_accumulated_gradients_are_those_of_the_whole_batch(emoji: dict[str, Path], monkeypatch) -> None:
    """With a constant adversarial weight; VQGAN's adaptive one is a ratio of norms, each micro-batch's own."""
    found: list[dict[str, torch.Tensor]] = []

    def record(module: torch.nn.Module, *_) -> torch.Tensor:
        found.append({name: p.grad.clone() for name, p in module.named_parameters()})
        module.zero_grad()
        return torch.zeros(())

    monkeypatch.setattr("scq.engine.stage.optimizer_step", record)
    loss = LossConfig(**FULL_GAME | {"adaptive_max": 0.0, "lecam": 0.0, "discriminator_norm": "group"})
    _, whole = one_step(emoji, loss)
    _, parts = one_step(emoji, loss, accumulate=4)
    for first, second in zip(found[:2], found[2:], strict=True):  # of the autoencoder, and of the discriminator
        for name in first:
            scale = first[name].abs().max()
            assert scale > 0
            torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-4 * float(scale) + 1e-7)
    assert float(whole["loss"]) == pytest.approx(float(parts["loss"]), rel=1e-5)
    with pytest.raises(UserError, match=r"training.accumulate=3 does not divide the 64 images"):
        one_step(emoji, loss, accumulate=3)


def test_a_dry_run_estimates_and_writes_nothing(emoji: dict[str, Path], tmp_path: Path) -> None:
    settings = [f"out={tmp_path / 'run'}", f"data.train={emoji['train']}", "training.batch_size=32"]
    path = CONFIG_ROOT / "quickstart" / "tokenizer_vqgan.yaml"
    config = load_config(TokenizerExperiment, path, settings)
    lines = "\n".join(dry_run(TokenizerStage(config)))
    size = sum(p.numel() for p in build_tokenizer(config).parameters())
    assert f"model {size / 1e6:.1f}M" in lines
    assert "3,616 images, 113 steps per epoch" in lines
    assert "activations for 32 images" in lines
    settings[1] = f"data.train={tmp_path / 'none'}"
    without_data = TokenizerStage(load_config(TokenizerExperiment, path, settings))
    assert "the training set is not available here" in "\n".join(dry_run(without_data))
    assert not any(tmp_path.iterdir())


def test_the_best_checkpoint_is_kept_and_exported(emoji: dict[str, Path], tmp_path: Path) -> None:
    config = load_config(
        TokenizerExperiment,
        CONFIG_ROOT / "quickstart" / "tokenizer_vqgan.yaml",
        [f"out={tmp_path}", f"data.train={emoji['train']}", "training.steps=8", "training.batch_size=8"]
        + ["training.checkpoint_every=2", "training.keep_checkpoints=1", "architecture.channels=[8,16]"],
    )
    scores = iter([3.0, 1.0, 2.0, 1.5])
    seen = []

    def measure(tokenizer: ImageTokenizer) -> float:
        seen.append(tokenizer.fingerprint())
        return next(scores)

    trained = run(TokenizerStage(config, measure))
    assert trained.best.name == "step_00000004"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000008"]
    assert load_tokenizer(tmp_path / "best").fingerprint() == seen[1]
    assert load_tokenizer(tmp_path / "model").fingerprint() == seen[3]
    assert [row["rfid"] for row in read_metrics(tmp_path)] == [3.0, 1.0, 2.0, 1.5]
    assert (tmp_path / "images" / "curves.png").stat().st_size > 1000


def test_muon_turns_maps_and_leaves_codes_and_biases_to_adamw(emoji: dict[str, Path]) -> None:
    config = load_config(
        TokenizerExperiment,
        CONFIG_ROOT / "quickstart" / "tokenizer_scq.yaml",
        ["optimizer.name=muon", "optimizer.clip_norm=0", "optimizer.weight_decay=0.1"],
    )
    task = TokenizerTask(config, make_accelerator(config.training), torch.zeros(1))
    batch = next(iterate_once(emoji["train"], batch_size=8))
    task.training_step(batch, step=0)
    optimizer = task.optimizers["autoencoder"]
    names = {id(parameter): name for name, parameter in task.modules["model"].named_parameters()}
    by_adamw = {names[id(p)] for p, state in optimizer.state.items() if "exp_avg_sq" in state}
    assert "quantizer.codebook" in by_adamw
    assert not {name for name in by_adamw if name.endswith((".conv1.weight", ".conv2.weight"))}
    assert {name for name in names.values() if name.endswith("bias")} <= by_adamw
    kept = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert kept <= by_adamw  # which also has maps of too few channels


@pytest.mark.parametrize("folder", ["lsun_church", "lsun_bedroom"])
@pytest.mark.parametrize("arm", ["scq", "vqgan"])
def test_a_config_for_256_pixels_takes_a_real_step(folder: str, arm: str, vgg_weights: Path) -> None:
    config = load_config(
        TokenizerExperiment,
        CONFIG_ROOT / folder / f"tokenizer_{arm}.yaml",
        [f"loss.perceptual_weights={vgg_weights}", "loss.adversarial_start=0", "loss.discriminator_lead=0"]
        + ["loss.adversarial_ramp=0", "training.batch_size=1"],
    )
    task = TokenizerTask(config, make_accelerator(config.training), torch.zeros(1))
    tokenizer = task.modules["model"]
    assert (tokenizer.config.image_size, tokenizer.grid) == (256, (16, 16))
    before = tokenizer.last_layer.detach().clone()
    pixels = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    batch = type("Batch", (), {"images": pixels, "positions": torch.arange(1)})
    terms = task.training_step(batch, step=0)
    assert all(value.isfinite() for value in terms.values())
    assert {"perceptual", "adversarial", "discriminator"} <= terms.keys()
    assert not torch.equal(tokenizer.last_layer, before)
