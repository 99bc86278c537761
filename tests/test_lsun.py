"""LSUN at 256 pixels, which nobody can train here: a step of every network at full size costs what the page says.

Tokenizers without a neck take theirs in test_tokenizer.py.
"""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from helpers import REPOSITORY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from scq.cli.main import build_parser
from scq.data.stream import Batch
from scq.data.tokens import TokenBatch
from scq.engine.accelerators import make_accelerator
from scq.engine.config import CONFIG_ROOT, load_config
from scq.evaluation.benchmark.run import BenchmarkConfig
from scq.stage1_tokenizer.stage import TokenizerExperiment, TokenizerTask, build_tokenizer
from scq.stage2_prior.prior_stage import PriorExperiment, PriorTask
from scq.stage2_prior.refiner_stage import RefinerExperiment, RefinerTask

PAGE = (REPOSITORY / "docs" / "benchmark.md").read_text()
BENCHMARK = CONFIG_ROOT / "benchmarks" / "lsun_church_256.yaml"
SETTINGS = ["training.batch_size=1", "training.precision=fp32"]
IMAGE = Batch(torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8), torch.full((1,), -1), torch.arange(1))
CODES = TokenBatch(torch.randint(0, 1024, (1, 16, 16)), torch.full((1,), -1), torch.arange(1))


def documented(training: str) -> float:
    """The page's TFLOP per image of a training."""
    return float(re.search(rf"^\| {training} \| ([\d.]+) \|", PAGE, re.M).group(1))


def tflop_of_a_step(task: TokenizerTask | PriorTask | RefinerTask, batch: Batch | TokenBatch) -> float:
    """Take a training step and count its work; attention by plain products, which the counter knows on every device."""
    before = {name: p.detach().clone() for name, p in task.modules["model"].named_parameters()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        terms = task.training_step(batch, 0)
    assert all(value.isfinite() for value in terms.values())
    assert any(not torch.equal(p, before[name]) for name, p in task.modules["model"].named_parameters())
    return counter.get_total_flops() / 1e12


def build_prior_task() -> PriorTask:
    benchmark = load_config(BenchmarkConfig, BENCHMARK)
    config = load_config(PriorExperiment, BENCHMARK.parent / benchmark.prior, SETTINGS)
    tokens = SimpleNamespace(codebook_size=1024, grid=(16, 16), num_classes=0, class_names=(), fingerprint="")
    return PriorTask(config, make_accelerator(config.training), tokens, torch.randn(1024, 16))


def test_a_step_of_the_tokenizer_with_the_refiners_neck_costs_what_the_page_says(tmp_path: Path) -> None:
    torch.save({k: v for k, v in vgg16(weights=None).state_dict().items() if k.startswith("features.")}, tmp_path / "v")
    benchmark = load_config(BenchmarkConfig, BENCHMARK)
    config = load_config(
        TokenizerExperiment,
        BENCHMARK.parent / benchmark.tokenizer,
        [*benchmark.arms["vq_plus"].overrides, *SETTINGS, f"loss.perceptual_weights={tmp_path / 'v'}"]
        + ["loss.adversarial_start=0", "loss.discriminator_lead=0", "loss.adversarial_ramp=0"],
    )
    task = TokenizerTask(config, make_accelerator(config.training), torch.zeros(1))
    assert tflop_of_a_step(task, IMAGE) == pytest.approx(documented("tokenizer of vq_plus, church"), rel=0.01)


def test_a_step_of_the_prior_costs_what_the_page_says() -> None:
    assert tflop_of_a_step(build_prior_task(), CODES) == pytest.approx(documented("prior"), rel=0.01)


def test_a_step_of_each_refiner_costs_what_the_page_says() -> None:
    benchmark = load_config(BenchmarkConfig, BENCHMARK)
    tokenizer = build_tokenizer(load_config(TokenizerExperiment, BENCHMARK.parent / benchmark.tokenizer))
    prior = build_prior_task().modules["model"]
    for kind in benchmark.arms["scq"].refiners:
        settings = [*SETTINGS, f"architecture.kind={kind}"]
        config = load_config(RefinerExperiment, BENCHMARK.parent / benchmark.refiner, settings)
        measured = IMAGE.images.repeat(2, 1, 1, 1)
        task = RefinerTask(config, make_accelerator(config.training), tokenizer, prior, measured, IMAGE.images)
        assert tflop_of_a_step(task, IMAGE) == pytest.approx(documented("refiner, either kind"), rel=0.01)


def test_the_pages_hours_follow_from_its_figures() -> None:
    sustained = 8 * 0.35 * 989e12
    rows = re.findall(
        r"^\| ([^|]+) \| ([\d.]+) \| ([\d,]+) x (\d+) \| ([\d.]+) million \| ([\d.]+) \| ([\d.]+) \|", PAGE, re.M
    )
    assert len(rows) == 5
    for name, tflop, steps, batch, millions, eflop, hours in rows:
        images = int(steps.replace(",", "")) * int(batch)
        work = images * float(tflop) * 1e12
        assert images == pytest.approx(1e6 * float(millions)), name
        assert work == pytest.approx(1e18 * float(eflop), rel=0.03), name
        assert work / sustained / 3600 == pytest.approx(float(hours), rel=0.05), name
        schema = {"tokenizer": TokenizerExperiment, "prior": PriorExperiment, "refiner": RefinerExperiment}
        folder = "lsun_bedroom" if "bedroom" in name else "lsun_church"
        file = {
            "tokenizer": f"{folder}/tokenizer_scq",
            "prior": f"{folder}/prior",
            "refiner": "benchmarks/lsun_refiner",
        }
        stage = re.match(r"\w+", name).group()
        training = load_config(schema[stage], CONFIG_ROOT / f"{file[stage]}.yaml").training
        assert (training.steps, training.batch_size) == (int(steps.replace(",", "")), int(batch)), name


def test_the_pages_launches_name_configs_and_settings_that_exist() -> None:
    launcher = shlex.split(re.search(r'^LAUNCH="(.+)"$', PAGE, re.M).group(1))
    assert launcher[:2] == ["accelerate", "launch"]
    schemas = {"tokenizer": TokenizerExperiment, "prior": PriorExperiment, "refiner": RefinerExperiment}
    launched = re.findall(r"^\$LAUNCH (train (\w+) .+)$", PAGE.replace("\\\n", " "), re.M)
    assert {stage for _, stage in launched} == set(schemas)
    for command, stage in launched:
        words = shlex.split(command)
        accelerated = launch_command_parser().parse_args([*launcher[2:], *words])
        assert (accelerated.num_processes, accelerated.module, accelerated.training_script) == (8, True, "scq")
        assert accelerated.training_script_args == words
        options = build_parser().parse_args(words)
        load_config(schemas[stage], REPOSITORY / options.config, options.overrides)


def test_the_page_packs_and_trains_what_the_benchmark_then_looks_for() -> None:
    benchmark = load_config(BenchmarkConfig, BENCHMARK)
    dataset = benchmark.dataset
    packed = [
        build_parser().parse_args(shlex.split(command))
        for command in re.findall(r"^scq (data pack \S+ \$RUN.+)$", PAGE, re.M)
    ]
    assert [(str(each.out), each.source, each.split) for each in packed] == [
        ("$RUN/shards/train", dataset.source, dataset.train_split),
        ("$RUN/shards/test", dataset.test_source, dataset.test_split),
    ]
    assert {(each.format, each.size, each.crop) for each in packed} == {(dataset.format, dataset.size, dataset.crop)}
    for arm in benchmark.arms.values():
        assert " ".join(arm.overrides) in PAGE
