"""The GPU's kernels on a CPU, in Triton's interpreter. test_quantizer_fused.py runs this in a process of its own."""

import math

import pytest
import torch

from scq.stage1_tokenizer.quantizers.kmeans import kmeans
from scq.stage1_tokenizer.solver import batched, codebook, compiled, fused, soft_convex_solve
from scq.stage1_tokenizer.solver import solve as convex_solver
from scq.stage1_tokenizer.solver.codebook import Codebook, nearest_codes


def make(n, f, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(rows, f, generator=generator, dtype=torch.float64) for rows in (n, k)]
    return draw[0], draw[1], 0.3 * torch.cdist(*draw).square().amin(1).mean().item()


def problem(name):
    """(z, codes, reg) float64."""
    z, codes, reg = make(5, 3, 9)
    return {
        "two channels": make(35, 2, 130),  # two programs, and two tiles of codes
        "eight channels": make(12, 8, 50),
        "sixteen channels": make(7, 16, 40),
        "most channels": make(3, 32, 40),
        "one latent, one code": make(1, 3, 1),
        "k-means": (make(9, 4, 1)[0], kmeans(make(200, 4, 1)[0], 60)[0], 0.2),
        "duplicates": (z, codes.repeat(2, 1), 0.2),
        "latents on codes": (codes[:4].clone(), codes, 0.2),
        "between two codes": ((codes[:1] + codes[1:2]) / 2, codes[:2], 0.2),
        "far from the origin": (z + 1e3, codes + 1e3, 0.2),
        "far-away latents": (100 * z, codes, 0.2),
        "small lambda": (z, codes, 1e-4),
        "large lambda": (z, codes, 1e4),
        "least lambda": (z, codes, 1e-9),
        "a lambda for every row": (z, codes, reg * torch.arange(1, 6, dtype=torch.float64)),
    }[name]


@pytest.fixture
def on_gpu(monkeypatch):
    """Call it to take a GPU's way through the code from there on."""

    def take():
        for module in (codebook, convex_solver):
            monkeypatch.setattr(module, "fused_kernels", lambda z: fused)
        monkeypatch.setattr(convex_solver, "_implementation", lambda z: fused)
        monkeypatch.setattr(codebook, "ASYNCHRONOUS", {"cpu"})

    return take


def solved(z, codes, reg):
    leaves = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in (z, codes, reg)]
    solution = soft_convex_solve(*leaves)
    (solution.z_q * torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)).sum().backward()
    weights = torch.zeros(len(z), len(codes), dtype=z.dtype).scatter_add_(1, solution.support, solution.weights)
    return solution, weights, [leaf.grad for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [
    "two channels", "eight channels", "sixteen channels", "most channels", "one latent, one code", "k-means",
    "duplicates", "latents on codes", "between two codes", "far from the origin", "far-away latents", "small lambda",
    "large lambda", "least lambda", "a lambda for every row",
])  # fmt: skip
def test_solution_and_gradient_are_those_of_the_cpu(name, dtype, on_gpu):
    z, codes, reg = (x.to(dtype) if isinstance(x, torch.Tensor) else x for x in problem(name))
    expected, expected_weights, expected_gradients = solved(z, codes, reg)
    on_gpu()
    found, weights, gradients = solved(z, codes, reg)
    tol = 1e-5 if dtype == torch.float32 else 1e-10
    assert found.residual.max() <= (1e-9 if name == "least lambda" and dtype == torch.float64 else tol)
    assert torch.equal(found.nearest, expected.nearest)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=10 * tol)
    scale = codes.abs().max().item()
    torch.testing.assert_close(found.z_q, expected.z_q, rtol=0, atol=10 * tol * scale)
    if "lambda" not in name:
        assert torch.equal(found.dominant, expected.dominant)
        for one, other in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3 if dtype == torch.float32 else 1e-6, atol=1e-4)


def test_gradients_and_combinations_are_those_of_whole_tensors():
    z, codes, reg = problem("eight channels")
    reg = torch.full((len(z), 1), reg, dtype=torch.float64)
    book = Codebook(codes)
    rows = compiled.solve_rows(book, z - book.centre, reg, tol=1e-10, max_iter=100)
    grad = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = grad, codes, rows.support, rows.weights, rows.nearest, z - codes[rows.nearest], reg
    for one, other in zip(fused.gradient_rows(*given), batched.gradient_rows(*given), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    one, other = (module.combine_rows(book, rows.support, rows.weights) for module in (fused, batched))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_codes_are_the_first_of_the_nearest(dtype):
    for n, f, k in ((1, 1, 1), (70, 3, 5), (33, 8, 300), (4, 20, 129)):
        z, codes, _ = make(n, f, k)
        z, codes = z.to(dtype), codes.to(dtype)
        assert torch.equal(fused.nearest_codes(z, codes), nearest_codes(z, codes))
        assert torch.equal(fused.nearest_codes(codes, codes.repeat(3, 1)), torch.arange(k))


def test_a_row_that_is_nan_ends_alone_and_says_so(on_gpu):
    z, codes, reg = problem("two channels")
    z, codes = z[:6].float(), codes[:40].float()
    whole, _, _ = solved(z, codes, reg)
    on_gpu()
    z[2, 1], z[4, 0] = math.nan, math.inf
    found, _, _ = solved(z, codes, reg)
    good = torch.tensor([True, True, False, True, False, True])
    assert found.residual.isfinite().tolist() == good.tolist()
    assert found.z_q.isfinite().all(1).tolist() == good.tolist()
    assert 0 <= found.dominant.min() <= found.dominant.max() < len(codes)
    torch.testing.assert_close(found.z_q[good], whole.z_q[good], rtol=0, atol=1e-5)


def test_what_does_not_fit_is_said_in_training_and_solved_elsewhere(on_gpu):
    z, codes, _ = make(1, 2, 5)
    duplicates = codes.repeat(120, 1)  # a code in use shares its weight with 119 copies: more than there is room for
    expected = soft_convex_solve(z, duplicates, 0.05)
    assert (expected.weights > 0).sum() > 64
    on_gpu()
    short = soft_convex_solve(z.requires_grad_(), duplicates, 0.05, max_iter=400)
    assert 1e-10 < short.residual.item() <= 1
    torch.testing.assert_close(short.weights.sum(), torch.ones((), dtype=torch.float64))
    with torch.no_grad():
        whole = soft_convex_solve(z, duplicates, 0.05)
    assert whole.residual.max() < 1e-9
    torch.testing.assert_close(whole.z_q, expected.z_q, rtol=0, atol=1e-9)


def test_a_row_that_ran_out_of_moves_says_so(on_gpu):
    z, codes, reg = problem("eight channels")
    solution, _, _ = solved(z, codes, reg)
    on_gpu()
    stopped = soft_convex_solve(z.requires_grad_(), codes, reg, max_iter=3)
    wrong = (stopped.z_q - solution.z_q).norm(dim=1) > 1e-6
    assert wrong.any()
    assert (stopped.residual[wrong] > 1e-6).all()
    torch.testing.assert_close(stopped.weights.sum(1), torch.ones(len(z), dtype=torch.float64))
