"""The solver against an oracle that knows none of its tricks, and its gradients against finite differences."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from stage1_tokenizer.quantizers import soft_convex_solve


def make(n, f, k, *, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, f, generator=generator, dtype=torch.float64)
    codes = scale * torch.randn(k, f, generator=generator, dtype=torch.float64)
    return z.to(dtype), codes.to(dtype)


def oracle(z, codes, reg):
    """Weights of problem (1) for one latent by sequential least squares, from its primal definition."""
    z, codes = z.numpy(), codes.numpy()
    size = np.square(codes - z).sum(1).min() + reg  # scale the objective to about one, or SLSQP stops early
    e = np.zeros(len(codes))
    e[np.square(codes - z).sum(1).argmin()] = 1

    def value(p):
        r, s = codes.T @ p - z, p - e
        return (r @ r + reg * s @ s) / (2 * size), (codes @ r + reg * s) / size

    found = minimize(
        value,
        np.full(len(codes), 1 / len(codes)),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * len(codes),
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-16, "maxiter": 2000},
    )
    return found.x


def dense(solution, k):
    weights = torch.zeros(len(solution.weights), k, dtype=solution.weights.dtype)
    return weights.scatter_add_(1, solution.support, solution.weights)


@pytest.mark.parametrize(("f", "k"), [(2, 2), (2, 12), (3, 7), (8, 30), (12, 9)])
@pytest.mark.parametrize("reg", [0.05, 0.3, 3.0, 100.0])
def test_exact_agrees_with_slsqp(f, k, reg):
    z, codes = make(6, f, k, seed=f + k)
    solution = soft_convex_solve(z, codes, reg)
    assert solution.residual.max() <= 1e-10
    weights = dense(solution, k)
    for i in range(len(z)):
        expected = torch.from_numpy(oracle(z[i], codes, reg))
        torch.testing.assert_close(weights[i], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(solution.z_q[i], codes.T @ expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "local", "relaxed"])
def test_gradcheck(method):
    z, codes = make(5, 3, 9, seed=1)
    reg = torch.linspace(0.1, 1, 5, dtype=torch.float64).requires_grad_()
    z.requires_grad_()
    codes.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *a: soft_convex_solve(*a, method=method, neighbours=5).z_q, (z, codes, reg), atol=1e-7
    )


def kkt_violation(z, codes, reg, solution):
    """Natural residual over all K codes, densely: |p - Proj(p - gradient / reg)|."""
    weights = dense(solution, len(codes)).double()
    z, codes = z.double(), codes.double()
    e = torch.zeros_like(weights)
    e[torch.arange(len(z)), solution.nearest] = 1
    v = e + (z - weights @ codes) @ codes.T / reg
    ordered = v.sort(1, descending=True).values
    threshold = (ordered.cumsum(1) - 1) / torch.arange(1, len(codes) + 1)
    count = (ordered > threshold).sum(1, keepdim=True)
    return ((v - threshold.gather(1, count - 1)).clamp_min(0) - weights).abs().amax(1)


@pytest.mark.parametrize(("f", "k"), [(2, 300), (8, 1024), (32, 500)])
def test_optimality_on_large_problems(f, k):
    z, codes = make(400, f, k, seed=k)
    reg = 0.3 * torch.cdist(z, codes).square().amin(1).mean().item()
    solution = soft_convex_solve(z, codes, reg)
    assert solution.residual.max() <= 1e-10
    assert kkt_violation(z, codes, reg, solution).max() < 1e-9
    single = soft_convex_solve(z.float(), codes.float(), reg)
    assert single.residual.max() <= 1e-5
    torch.testing.assert_close(single.z_q.double(), solution.z_q, rtol=0, atol=1e-4)


def test_limits_of_lambda():
    z, codes = make(50, 4, 40, seed=3)
    nearest = torch.cdist(z, codes).argmin(1)
    hard = soft_convex_solve(z, codes, 1e9)
    torch.testing.assert_close(hard.z_q, codes[nearest], rtol=0, atol=1e-6)
    assert torch.equal(hard.dominant, nearest)
    inside = torch.softmax(torch.randn(50, 40, dtype=torch.float64), 1) @ codes
    soft = soft_convex_solve(inside, codes, 1e-6)
    torch.testing.assert_close(soft.z_q, inside, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reg": 0.0}, "reg must be positive"),
        ({"reg": float("nan")}, "reg must be positive"),
        ({"reg": torch.ones(3)}, "reg must be a number or one per row"),
        ({"codebook": torch.zeros(0, 4)}, "codebook is empty"),
        ({"codebook": torch.zeros(5, 3)}, "codebook has 3 columns"),
        ({"z": torch.full((2, 4), float("inf"))}, "z has 8 entries"),
        ({"z": torch.zeros(4)}, "z must be a two-dimensional"),
        ({"method": "best"}, "method must be one of"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"z": torch.zeros(2, 4), "codebook": torch.ones(5, 4), "reg": 1.0} | change
    with pytest.raises(ValueError, match=message):
        soft_convex_solve(**arguments)
