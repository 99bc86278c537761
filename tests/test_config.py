"""Configs: inheritance, overrides, and mistakes that are named."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scq.engine.config import CONFIG_ROOT, as_dict, load_config, save_config
from scq.engine.errors import UserError
from scq.engine.plain_yaml import leaves
from scq.engine.run import run
from scq.evaluation.benchmark.run import BenchmarkConfig
from scq.evaluation.benchmark.tokenizers import ComparisonConfig
from scq.stage1_tokenizer.autoencoder import ImageTokenizer
from scq.stage1_tokenizer.stage import TokenizerExperiment, TokenizerStage, build_tokenizer
from scq.stage2_prior.prior_stage import PriorExperiment, build_prior
from scq.stage2_prior.refiner_stage import RefinerExperiment, build_refiner
from scq.stage2_prior.scheduler import parse_settings
from scq.stage2_prior.transformer import MaskedTransformer

ALL_CONFIGS = sorted(CONFIG_ROOT.rglob("*.yaml"))


def schema_of(path: Path) -> type:
    if path.stem.startswith("tokenizer") or path.stem.endswith("tokenizer"):
        return TokenizerExperiment
    if path.parent.name in ("ablation", "tokenizers"):
        return ComparisonConfig
    if "refiner" in path.stem:
        return RefinerExperiment
    return PriorExperiment if "prior" in path.stem or path.parent.name == "prior_sizes" else BenchmarkConfig


@pytest.mark.parametrize("path", ALL_CONFIGS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_config_loads_and_says_what_it_is_for(path: Path) -> None:
    load_config(schema_of(path), path)
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(("name", "millions"), [("2m", 2), ("10m", 10), ("40m", 40), ("85m", 85), ("300m", 300)])
def test_priors_have_the_size_that_their_configs_say(name: str, millions: int) -> None:
    config = load_config(PriorExperiment, CONFIG_ROOT / "prior_sizes" / f"{name}.yaml").architecture
    with torch.device("meta"):
        prior = MaskedTransformer(
            1024, (16, 16), width=config.width, depth=config.depth, heads=config.heads, positions=config.positions
        )
    assert sum(p.numel() for p in prior.parameters()) == pytest.approx(1e6 * millions, rel=0.15)


BENCHMARKS = [
    path for path in sorted((CONFIG_ROOT / "benchmarks").glob("*.yaml")) if schema_of(path) is BenchmarkConfig
]


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.stem)
def test_the_files_that_a_benchmark_names_are_there_and_build(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageTokenizer, "fingerprint", lambda self: "")  # of weights, of which meta tensors have none
    config = load_config(BenchmarkConfig, path)
    assert next(iter(config.arms)) == "scq", "the arm that is compared with the others"
    prior = load_config(PriorExperiment, path.parent / config.prior)
    refiner = load_config(RefinerExperiment, path.parent / config.refiner) if config.refiner else None
    assert (refiner is not None) == any(arm.refiners for arm in config.arms.values())
    for name, arm in config.arms.items():
        experiment = load_config(TokenizerExperiment, path.parent / (arm.tokenizer or config.tokenizer), arm.overrides)
        # Without memory where they are large; some libraries' quantizers compute something of their weights.
        with torch.device("meta" if experiment.architecture.image_size > 64 else "cpu"):
            tokenizer = build_tokenizer(experiment)
            if not arm.prior:
                continue
            tokens = SimpleNamespace(
                codebook_size=tokenizer.quantizer.codebook_size,
                grid=tokenizer.grid,
                num_classes=10 if path.stem.startswith("cifar10") else 0,
                class_names=(),
                fingerprint=name,
            )
            build_prior(prior, tokens, torch.empty(tokens.codebook_size, tokenizer.config.latent_dim))
            for kind in arm.refiners:
                refiner.architecture.kind = kind
                build_refiner(refiner, tokenizer)
    for settings in config.measure.sweep:
        config.sampling.changed(**parse_settings(settings.split()))


@pytest.mark.parametrize("path", [path for path in BENCHMARKS if "_gpu" not in path.stem], ids=lambda p: p.stem)
def test_refined_arms_stand_beside_a_decoder_with_the_refiners_shape(path: Path) -> None:
    config = load_config(BenchmarkConfig, path)
    assert config.arms["scq"].refiners
    refiner = load_config(RefinerExperiment, path.parent / config.refiner).architecture
    control = config.arms["vq_plus"]
    neck = load_config(TokenizerExperiment, path.parent / config.tokenizer, control.overrides).architecture
    assert (neck.neck_width, neck.neck_depth) == (refiner.width, refiner.depth)


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.stem)
def test_a_sweep_has_its_own_baseline(path: Path) -> None:
    config = load_config(BenchmarkConfig, path)
    steps = {setting.split()[0] for setting in config.measure.sweep if len(setting.split()) > 1}
    assert steps <= set(config.measure.sweep)


@pytest.mark.parametrize("folder", ["quickstart", "cifar10", "lsun_church", "lsun_bedroom", "gtsrb"])
def test_arms_share_everything_but_the_quantizer(folder: str) -> None:
    scq, vqgan = (
        as_dict(load_config(TokenizerExperiment, CONFIG_ROOT / folder / f"tokenizer_{arm}.yaml"))
        for arm in ("scq", "vqgan")
    )
    assert scq.pop("quantizer") == {"name": "scq", "codebook_size": vqgan["quantizer"]["codebook_size"], "options": {}}
    assert vqgan.pop("quantizer")["name"] == "vq"
    scq.pop("out"), vqgan.pop("out")
    assert scq == vqgan


def test_overrides_win_over_the_file_and_the_file_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("training: {steps: 10, batch_size: 8, seed: 3}\n")
    (tmp_path / "derived.yaml").write_text("base: base.yaml\ntraining: {steps: 20, batch_size: 16}\n")
    config = load_config(TokenizerExperiment, tmp_path / "derived.yaml", ["training.steps=30"])
    assert (config.training.steps, config.training.batch_size, config.training.seed) == (30, 16, 3)


def test_a_tilde_is_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = load_config(TokenizerExperiment, None, ["out=~/runs/one", "data.train=~/shards"])
    assert (config.out, config.data.train) == ("/home/ada/runs/one", "/home/ada/shards")


def test_a_saved_config_loads_to_the_same(tmp_path: Path) -> None:
    config = load_config(TokenizerExperiment, None, ["quantizer.options.rho=0.5", "architecture.channels=[8,16]"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TokenizerExperiment, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.stps=3", "training.stps"),
        ("training.steps=many", "training.steps"),
        ("training.steps", "not of the form"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate"),
        ("out=${foo}", "foo"),
        ("training.steps=0", "training.steps is 0; it must be at least 1"),
        ("training.batch_size=0", "training.batch_size is 0"),
        ("training.log_every=0", "training.log_every is 0"),
        ("training.checkpoint_every=0", "training.checkpoint_every is 0"),
        ("training.images_every=-1", "training.images_every is -1"),
        ("training.ema_decay=1.0", r"training.ema_decay is 1.0; it must be in \[0, 1\)"),
        ("optimizer.betas=[0.9]", r"optimizer.betas is \[0.9\]; it must be two numbers"),
        ("optimizer.learning_rate=-1.0", "optimizer.learning_rate is -1.0"),
        ("optimizer.name=lion", "optimizer.name is 'lion'; it must be adamw or muon"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate is nan"),
        ("data.workers=-1", "data.workers is -1"),
        ("data.shuffle=some", "data.shuffle is 'some'; it must be full or blocks"),
        ("data.workers=1000000000", "data.workers is 1000000000; it must be at most 1024"),
        ("training.batch_size=1000000000", "training.batch_size is 1000000000; it must be at most 1048576"),
        ("training.seed=9223372036854775807", "training.seed is 9223372036854775807; it must be a whole number from"),
        (f"training.steps={10**30}", r"training.steps is 2\*\*99 or beyond; it must be a whole number from"),
        ("optimizer.betas={a: 1}", "wrong value for 'optimizer.betas': it is a list, and not a mapping"),
        ("architecture.channels={}", "wrong value for 'architecture.channels'"),
        ("out=a\0b", r"out is 'a\\x00b'; it must be text without NUL"),
        ("loss.adaptive_max=nan", "loss.adaptive_max is nan; it must be finite"),
        ("loss.adversarial=inf", "loss.adversarial is inf; it must be finite"),
        ("loss.perceptual=-1", "loss.perceptual is -1.0; it must be at least 0"),
        ("loss.perceptual_share=0", "loss.perceptual_share is 0.0; it must be above 0, and at most 1"),
        ("loss.discriminator=pixels", "loss.discriminator is 'pixels'; it must be patch or features"),
        ("loss.discriminator_betas=[0.5]", r"loss.discriminator_betas is \[0.5\]; it must be empty, or two numbers"),
        ("loss.perceptual_stages=6", "loss.perceptual_stages is 6; it must be 1 to 5"),
        ("loss.game=chess", "loss.game is 'chess'; it must be hinge or non-saturating"),
        ("loss.discriminator_norm=none", "loss.discriminator_norm is 'none'; it must be group or spectral"),
        ("loss.discriminator_layers=1000000000", "loss.discriminator_layers is 1000000000; it must be 1 to 12"),
        ("robustness.steps=-1", "robustness.steps is -1; it must be at least 0"),
    ],
)
def test_a_wrong_override_is_named(override: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_config(TokenizerExperiment, None, [override])


def test_a_config_from_python_is_checked_as_well(tmp_path: Path) -> None:
    config = TokenizerExperiment(out=str(tmp_path))
    config.loss.lecam = math.nan
    with pytest.raises(UserError, match=r"loss\.lecam is nan; it must be finite"):
        run(TokenizerStage(config))


@pytest.mark.parametrize("experiment", [TokenizerExperiment, PriorExperiment, RefinerExperiment])
def test_every_number_of_a_config_has_an_end(experiment: type) -> None:
    for key, default in leaves(as_dict(experiment())):
        if type(default) in (int, float):
            for value in ("nan", "inf") if type(default) is float else (2**31, -(2**40), 10**30):
                with pytest.raises(UserError, match=f"^{re.escape(key)} is "):
                    load_config(experiment, None, [f"{key}={value}"])


def test_a_prior_without_heads_is_refused() -> None:
    tokens = SimpleNamespace(codebook_size=16, grid=(2, 2), num_classes=0, class_names=(), fingerprint="f00d")
    with pytest.raises(UserError, match="heads=0 must be a whole number, at least 1"):
        build_prior(load_config(PriorExperiment, None, ["architecture.heads=0"]), tokens, torch.empty(16, 4))


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml"):
        load_config(TokenizerExperiment, tmp_path / "missing.yaml")
    (tmp_path / "broken.yaml").write_text("training: {steps: [\n")
    with pytest.raises(UserError, match=r"broken.yaml.*YAML"):
        load_config(TokenizerExperiment, tmp_path / "broken.yaml")
    (tmp_path / "unknown.yaml").write_text("trainnig: {steps: 3}\n")
    with pytest.raises(UserError, match=r"unknown.yaml.*trainnig"):
        load_config(TokenizerExperiment, tmp_path / "unknown.yaml")
    (tmp_path / "circle.yaml").write_text("base: circle.yaml\n")
    with pytest.raises(UserError, match="based on itself"):
        load_config(TokenizerExperiment, tmp_path / "circle.yaml")
