"""A training step on a GPU reads nothing back. Tensors are fake here: they have no values, so reading one fails."""

import pytest
import torch
from packaging.version import parse
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from scq.stage1_tokenizer.quantizers import create_quantizer, reviving
from scq.stage1_tokenizer.quantizers.kmeans import draw_rows, replace_rows
from scq.stage1_tokenizer.robustness import NeighbourSwap, swap_for_neighbours
from scq.stage1_tokenizer.solver import batched, codebook, soft_convex_solve
from scq.stage1_tokenizer.solver import solve as convex_solver

fused = pytest.importorskip("scq.stage1_tokenizer.solver.fused")

# vq_ema and rvq2 are not among them: the library asks at every step whether a code has expired.
NAMES = ["scq", "vq", "vq revive", "simvq", "fsq", "none"]
REVIVING = ("scq", "vq revive")


class NoTransfers(TorchDispatchMode):
    """Fails where a tensor goes from one device to another, for which the host would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = {x.device.type for x in (*args, out) if isinstance(x, torch.Tensor)}
            assert len(devices) == 1, f"{func} goes from one of {devices} to the other"
        return out


class _Kernel:
    """Stands for a kernel, which fake tensors cannot be given to."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    for name in ("nearest", "solve", "combine", "gradient", "sum"):
        monkeypatch.setattr(fused.kernels, f"{name}_kernel", _Kernel())
    monkeypatch.setattr(fused, "_processors", lambda z: 4)


@pytest.fixture
def cpu_as_gpu(monkeypatch):
    """Take the GPU's way through the code, on a CPU whose autograd can be run without a GPU."""
    monkeypatch.setattr(codebook, "ASYNCHRONOUS", {"cpu"})
    monkeypatch.setattr(convex_solver, "_implementation", lambda z: fused)
    for module in (codebook, convex_solver):
        monkeypatch.setattr(module, "fused_kernels", lambda z: fused)


def trained(name, device, images=0):
    """A quantizer in training after its k-means start, with ``images`` in the present window."""
    with unset_fake_temporarily():  # a constructor may read
        name, *revive = name.split()
        quantizer = create_quantizer(name, codebook_size=64, dim=6, **({"revive": True} if revive else {}))
    for module in quantizer.modules():
        for kept, kind in ((module._parameters, torch.nn.Parameter), (module._buffers, torch.Tensor)):
            for key, value in kept.items():
                if value is not None:
                    kept[key] = kind(torch.empty(value.shape, dtype=value.dtype, device=device))
    if name == "scq" or revive:
        quantizer._seen = reviving._Seen(20, 0, images)
    return quantizer


def step(quantizer, z):
    out = quantizer(z)
    b, _, h, w = z.shape
    return swap_for_neighbours(out, quantizer, NeighbourSwap(0.3, 4, z.new_empty(b, 2, h, w))).sum() + out.loss


# Older ones abort the process where autograd meets a fake tensor on a GPU that is not there.
@pytest.mark.skipif(parse(torch.__version__) < parse("2.10"), reason="needs torch 2.10 for gradients of fake tensors")
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_copied_between_host_and_gpu(name):
    with FakeTensorMode():
        quantizer, z = trained(name, "cuda"), torch.empty(4, 6, 5, 5, device="cuda", requires_grad=True)
        with NoTransfers():
            assert step(quantizer, z).device.type == "cuda"


@pytest.mark.parametrize("images", [0, 5000])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_back_forward_or_backward(name, images, cpu_as_gpu, monkeypatch):
    revived = []
    # Fake tensors take no generators; the test below is for what is left out here.
    monkeypatch.setattr(reviving, "replace_rows", lambda codes, *rest: revived.append(codes) or codes)
    with FakeTensorMode():
        quantizer = trained(name, "cpu", images)  # with 5000, codes are revived
        for _ in range(2):
            step(quantizer, torch.empty(4, 6, 5, 5, requires_grad=True)).backward()
        if name in REVIVING:
            assert (quantizer._seen.steps, quantizer._seen.images) == (22, 8)
            assert len(revived) == (images > 0)


class NoReads(TorchDispatchMode):
    """Fails where a value, or a shape that depends on values, is read; for tensors that are not fake."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func is torch.ops.aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        dynamic = torch.Tag.dynamic_output_shape in func.tags and func is not torch.ops.aten.index.Tensor
        reads = masked or dynamic or torch.Tag.data_dependent_output in func.tags
        assert not reads, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rows", "codes"), [(50, 20), (20, 50)])
@pytest.mark.parametrize("dead", [0, 1, 7, 20, 30])
def test_revived_codes_are_those_that_would_be_drawn_alone(rows, codes, dead):
    generator = torch.Generator().manual_seed(dead)
    latents, book = torch.randn(rows, 3, generator=generator), torch.randn(codes, 3, generator=generator)
    for share in (torch.rand(rows, generator=generator), torch.zeros(rows), (torch.arange(rows) < 5).float()):
        replaced = torch.randperm(codes, generator=generator) < dead
        count = int(replaced.sum())
        with NoReads():
            found = replace_rows(book, replaced, latents, 3, share)
        expected = book.clone()
        if count:
            expected[replaced] = draw_rows(latents, count, 3, share)
        assert torch.equal(found, expected)
    with pytest.raises(AssertionError, match="scalar"), NoReads():
        bool(replaced.any())


def test_an_evaluation_may_wait(cpu_as_gpu):
    with pytest.raises(ValueError, match="z has 8 entries"), torch.no_grad():
        soft_convex_solve(torch.full((2, 4), float("nan")), torch.ones(5, 4), 1.0)
    with FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"), torch.no_grad():
        trained("vq", "cpu")(torch.empty(4, 6, 5, 5))


def test_the_kernels_are_for_gpus_and_few_channels():
    with FakeTensorMode():
        assert codebook.fused_kernels(torch.empty(3, 32)) is None
        assert codebook.fused_kernels(torch.empty(3, 32, device="cuda")) is fused
        assert convex_solver._implementation(torch.empty(3, 33, device="cuda")) is batched
