"""What only a GPU can show: it computes what a CPU does, twice the same, and the host never waits for it in a step.

    pytest -m gpu tests/test_gpu.py                          # where there is one; minutes, and no network
    SCQ_TEST_DEVICE=cpu pytest -m gpu tests/test_gpu.py      # the same code on a CPU, to try it

Of small networks with random weights: no file is needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_samples import feature_set, gaussians
from PIL import Image
from safetensors.torch import load_file
from test_prior import stripes_config, stripes_tokenizer, write_stripes
from training_steps import STAGES, TOKENIZER, training

from scq.data.pack import pack
from scq.engine.config import load_config
from scq.engine.run import run
from scq.evaluation.metrics.distances import precision_recall
from scq.evaluation.metrics.inception import InceptionFeatures, _layers
from scq.sampling.pipeline import SoftConvexPipeline
from scq.sampling.samplers import SAMPLERS, GuidedPrior
from scq.stage1_tokenizer.autoencoder import ImageTokenizer
from scq.stage1_tokenizer.quantizers import create_quantizer
from scq.stage1_tokenizer.solver import METHODS, soft_convex_solve
from scq.stage1_tokenizer.stage import TokenizerExperiment, TokenizerStage
from scq.stage2_prior.prior_stage import PriorStage
from scq.stage2_prior.refiner import ConvexRefiner
from scq.stage2_prior.scheduler import UnmaskingScheduler
from scq.stage2_prior.transformer import MaskedTransformer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("halfway")]


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Any wait of the host for the GPU is an error; on a CPU there is none."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Algorithms that add in one order, where CUDA's fastest add as threads come."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def small_pipeline() -> SoftConvexPipeline:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(16, (16, 32), latent_dim=4, codebook_size=64, quantizer_name="vq")
    prior = MaskedTransformer(64, (4, 4), width=64, depth=2, heads=2, tokenizer_fingerprint=tokenizer.fingerprint())
    refiner = ConvexRefiner(64, 4, kind="flow", width=32, depth=1)
    return SoftConvexPipeline(tokenizer, prior, refiner)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference beside that of what is expected."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


# ---------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("dim", [8, 16, 32])
@pytest.mark.parametrize("method", METHODS)
def test_the_solver_finds_what_it_finds_on_the_cpu(method: str, dim: int, device: torch.device) -> None:
    """In float64, with the gradients of latents, codes and lambda."""
    generator = torch.Generator().manual_seed(dim)
    z, codes, direction = (torch.randn(rows, dim, generator=generator, dtype=torch.float64) for rows in (256, 128, 256))
    reg = 0.1 + torch.rand(256, generator=generator, dtype=torch.float64)

    def solved(where: torch.device) -> list[torch.Tensor]:
        given = [each.to(where).detach().requires_grad_() for each in (z, codes, reg)]
        solution = soft_convex_solve(*given, method=method)
        gradients = torch.autograd.grad((solution.z_q * direction.to(where)).sum(), given)
        return [solution.z_q.detach(), *gradients]

    for found, expected in zip(solved(device), solved(torch.device("cpu")), strict=True):
        assert found.device.type == device.type
        assert relative_error(found, expected) < 1e-7


def test_float32_solutions_are_those_of_float64(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    z, codes = (torch.randn(rows, 8, generator=generator) for rows in (2048, 512))
    found = soft_convex_solve(z.to(device), codes.to(device), 0.5)
    expected = soft_convex_solve(z.double(), codes.double(), 0.5)
    assert relative_error(found.z_q, expected.z_q) < 1e-4
    assert (found.dominant.cpu() == expected.dominant).double().mean() > 0.999


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seeds_draw_what_they_draw_on_the_cpu(sampler: str, device: torch.device) -> None:
    """But for rounding: a code may change where two are equally likely, and with it what follows in that image."""
    pipeline, seeds = small_pipeline(), torch.arange(100, 164)
    settings = {"sampler": sampler, "steps": 6}
    expected = pipeline.draw_tokens(seeds, **settings)
    there = pipeline.to(device)
    found = there.draw_tokens(seeds, **settings)
    assert (found.cpu() == expected).double().mean() >= 0.99
    few = torch.cat([there.draw_tokens(part, **settings) for part in seeds[:9].split(4)])
    assert torch.equal(few, found[:9]), "the same seed gives the same image in any batch"


def test_images_are_those_of_the_cpu(device: torch.device) -> None:
    pipeline, seeds = small_pipeline(), torch.arange(8)
    codes = torch.randint(0, 64, (8, 4, 4), generator=torch.Generator().manual_seed(0))
    expected = pipeline.decode_tokens(codes, seeds).int()
    found = pipeline.to(device).decode_tokens(codes, seeds).cpu().int()
    # Convolutions take TF32 on a GPU, which has ten bits.
    assert (found - expected).abs().double().mean() < 1


def test_features_of_inception_are_those_of_the_cpu(device: torch.device) -> None:
    """With random weights: the same layers, and float32 throughout, without TF32."""
    torch.manual_seed(0)
    weights = {name: tensor for name, tensor in _layers().state_dict().items() if "num_batches" not in name}
    network = InceptionFeatures(weights, "random weights")
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = network(images)
    found = network.to(device)(images)
    assert relative_error(found, expected) < 1e-3
    spread = expected - expected.mean(0)
    assert relative_error(found.cpu() - found.cpu().mean(0), spread) < 1e-3, "what tells images apart, too"


def test_precision_and_recall_are_those_of_the_cpu(device: torch.device) -> None:
    real, fake = feature_set(gaussians(1500)), feature_set(gaussians(1500, seed=1) * 0.8)
    expected, found = precision_recall(real, fake), precision_recall(real, fake, device=device)
    assert found.precision == pytest.approx(expected.precision, abs=0.01)
    assert found.recall == pytest.approx(expected.recall, abs=0.01)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_in_bf16_is_nearly_one_in_float32(stage: str, device: torch.device, tmp_path: Path) -> None:
    """The losses of the second step; in the first one, layers that begin with zeros are zero in any precision."""
    rows = []
    for precision in ("fp32", "bf16"):
        (tmp_path / precision).mkdir()
        _, step = training(stage, tmp_path / precision, f"training.precision={precision}")
        step(0)
        rows.append({name: float(value) for name, value in step(1).items()})
    full, half = rows
    assert half.keys() == full.keys()
    for name in ("loss", "gradient_norm"):
        assert half[name] == pytest.approx(full[name], rel=0.05), name
        assert half[name] != full[name], "it was computed in another precision"


def test_networks_in_bf16_agree_with_float32(device: torch.device) -> None:
    pipeline = small_pipeline().to(device)
    tokens = torch.randint(0, 65, (16, 16), generator=torch.Generator().manual_seed(0)).to(device)
    z_q = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(1)).to(device)
    half = deepcopy(pipeline).to(dtype=torch.bfloat16)
    with torch.no_grad():
        assert relative_error(half.prior(tokens), pipeline.prior(tokens)) < 0.02
        assert relative_error(half.tokenizer.decode(z_q), pipeline.tokenizer.decode(z_q)) < 0.04


# ------------------------------------------------------------------------------------------------------ twice the same


@pytest.mark.parametrize("name", ["scq", "vq"])
def test_a_quantizer_gives_the_same_bits_twice(name: str, device: torch.device, deterministic: None) -> None:
    torch.manual_seed(0)
    first = create_quantizer(name, codebook_size=64, dim=8).to(device).train()
    second = deepcopy(first)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):  # past the first step of k-means
        z = torch.randn(16, 8, 4, 4, generator=generator).to(device)
        noise = torch.rand(16, generator=generator).to(device)
        found = []
        for quantizer in (first, second):
            given = z.clone().requires_grad_()
            torch.manual_seed(2)
            quantized = quantizer(given, noise)
            (gradient,) = torch.autograd.grad(quantized.loss + quantized.z_q.square().mean(), given)
            found.append((quantized.z_q, quantized.indices, quantized.loss, gradient))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def train_stripes(folder: Path, steps: int) -> Path:
    tokens = folder.parent / "tokens"
    if not tokens.exists():
        write_stripes(tokens)
    settings = ["optimizer.schedule=constant", "training.checkpoint_every=4", "training.precision=auto"]
    run(PriorStage(stripes_config(tokens, folder, *settings, f"training.steps={steps}"), stripes_tokenizer()))
    return folder


def train_images(folder: Path, steps: int) -> Path:
    shards = folder.parent / "shards"
    if not shards.exists():
        (folder.parent / "photos").mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
        for number, each in enumerate(pixels):
            Image.fromarray(each).save(folder.parent / "photos" / f"{number}.png")
        pack(folder.parent / "photos", shards, format="folder", size=16)
    settings = [*TOKENIZER, "loss.perceptual=0", "optimizer.schedule=constant", "training.checkpoint_every=4"]
    settings += [f"data.train={shards}", f"out={folder}", f"training.steps={steps}", "robustness.swapped_share=0.2"]
    run(TokenizerStage(load_config(TokenizerExperiment, None, settings)))
    return folder


@pytest.mark.parametrize("train", [train_stripes, train_images])
def test_training_goes_on_bit_for_bit(train, tmp_path: Path, device: torch.device, deterministic: None) -> None:
    """Eight steps, and four and four from a checkpoint. Convolutions are chosen once in a process."""
    whole, halves = train(tmp_path / "whole", 8), tmp_path / "halves"
    train(halves, 4)
    train(halves, 8)
    files = sorted(path.name for path in (whole / "checkpoints" / "step_00000008").glob("*.safetensors"))
    assert {"ema.safetensors", "model.safetensors"} <= set(files)
    for name in files:
        one, other = (load_file(each / "checkpoints" / "step_00000008" / name) for each in (whole, halves))
        for key, tensor in one.items():
            assert torch.equal(other[key], tensor), f"{name}: {key}"


# -------------------------------------------------------------------------------------------------------- nobody waits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_no_training_step_waits(stage: str, precision: str, device: torch.device, tmp_path: Path) -> None:
    _, step = training(stage, tmp_path, f"training.precision={precision}")
    for number in range(3):  # first allocations, and cuDNN's search
        step(number)
    with no_waiting(device):
        terms = step(3)
    assert all(bool(value.isfinite()) for value in terms.values())


@pytest.mark.parametrize("name", ["scq", "vq", "fsq"])
def test_no_step_with_a_quantizer_waits(name: str, device: torch.device, tmp_path: Path) -> None:
    """With tokens swapped, and with codes revived in every second step; k-means, which may wait, is over by then."""
    options = ["quantizer.options.kmeans_batches=2", "quantizer.options.window=16"] if name == "scq" else []
    size = "quantizer.codebook_size=64"
    settings = [f"quantizer.name={name}", size, "robustness.swapped_share=0.2", *options]
    _, step = training("tokenizer", tmp_path, *settings)
    for number in range(6):
        step(number)
    with no_waiting(device):
        rows = [step(number) for number in range(6, 9)]
    assert all(bool(value.isfinite()) for terms in rows for value in terms.values())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_step_of_a_sampler_waits(sampler: str, device: torch.device) -> None:
    prior = small_pipeline().prior.to(device)
    start, seeds = torch.full((8, 4, 4), prior.mask_token, device=device), torch.arange(8, device=device)
    settings = UnmaskingScheduler(steps=4, sampler=sampler, top_k=8, top_p=0.9)
    predict = GuidedPrior(prior, prior.mask_token)
    with torch.no_grad():
        expected = SAMPLERS[sampler](predict, start, seeds, settings)
        with no_waiting(device):
            found = SAMPLERS[sampler](predict, start, seeds, settings)
    assert torch.equal(found, expected)


def test_training_has_what_a_gpu_gives(device: torch.device, tmp_path: Path) -> None:
    on_gpu = device.type == "cuda"
    task, step = training("tokenizer", tmp_path)
    assert task.accelerator.device.type == device.type
    assert torch.backends.cudnn.benchmark == on_gpu
    assert (task.accelerator.mixed_precision == "bf16") or not on_gpu or not torch.cuda.is_bf16_supported()
    always = task.losses.perceptual  # bf16 on a CPU, too, is several times as fast with it
    for network in (task.modules["model"].encoder, task.discriminator, always):
        kernels = [each for each in network.parameters() if each.ndim == 4 and each.shape[1] > 1 and each.shape[2] > 1]
        assert kernels
        expected = on_gpu or network is always
        assert all(each.is_contiguous(memory_format=torch.channels_last) == expected for each in kernels)
    step(0)
    for optimizer in task.optimizers.values():
        assert bool(optimizer.param_groups[0]["fused"]) == on_gpu
        for parameter, state in optimizer.state.items():
            assert parameter.device.type == device.type
            assert not on_gpu or state["step"].device.type == "cuda"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "prior", "refiner"])
def test_a_compiled_step_is_the_step(stage: str, device: torch.device, tmp_path: Path) -> None:
    rows = []
    for compiled in (False, True):
        (tmp_path / str(compiled)).mkdir()
        settings = ["training.precision=fp32", f"training.compile={str(compiled).lower()}"]
        # Torch compiles no gradient of a gradient, and a compiled dropout drops others.
        settings += {"tokenizer": ["loss.r1=0"], "prior": ["architecture.dropout=0"]}.get(stage, [])
        _, step = training(stage, tmp_path / str(compiled), *settings)
        rows.append([{name: float(value) for name, value in step(number).items()} for number in range(2)])
    for plain, fast in zip(*rows, strict=True):
        assert fast == pytest.approx(plain, rel=0.02, abs=1e-3)
