"""The solver against oracles that know none of its tricks, its gradients against differences of an oracle."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from solver_problems import make, one_thread, path  # noqa: F401  the last two are fixtures for every test

from scq.stage1_tokenizer.solver import soft_convex_solve
from scq.stage1_tokenizer.solver.relaxed import simplex_threshold


def slsqp(z, codes, reg):
    """Weights of problem (1) for one latent by sequential least squares, from its primal definition."""
    z, codes = z.numpy(), codes.numpy()
    size = np.square(codes - z).sum(1).min() + reg  # the objective scaled to about one, or SLSQP stops early
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


def enumerated(z, codes, reg, nearest):
    """z_q of problem (1) for one latent to machine precision: the optimality conditions tried on every support."""
    k = len(codes)
    e = np.eye(k)[nearest]
    for size in range(1, k + 1):
        for support in map(list, combinations(range(k), size)):
            c = codes[support]
            # Stationarity and the sum constraint: (c c^T + reg) p + mu = c z + reg e, sum p = 1.
            system = np.block(
                [[c @ c.T + reg * np.eye(size), np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]]
            )
            answer = np.linalg.solve(system, np.append(c @ z + reg * e[support], 1))
            p = np.zeros(k)
            p[support] = answer[:-1]
            slack = codes @ (codes.T @ p - z) + reg * (p - e) + answer[-1]
            if p.min() >= -1e-11 and slack.min() >= -1e-9:
                return codes.T @ p
    raise AssertionError("no support satisfies the optimality conditions")


def dense(solution, k):
    weights = torch.zeros(len(solution.weights), k, dtype=solution.weights.dtype)
    return weights.scatter_add_(1, solution.support, solution.weights)


def kkt_violation(z, codes, reg, solution):
    """Natural residual of (1) over all K codes, by a dense sort: |p - Proj(e + C (z - C^T p) / reg)|."""
    weights = dense(solution, len(codes)).double()
    z, codes = z.double(), codes.double()
    e = torch.zeros_like(weights)
    e[torch.arange(len(z)), solution.nearest] = 1
    v = e + (z - weights @ codes) @ codes.T / reg
    ordered = v.sort(1, descending=True).values
    threshold = (ordered.cumsum(1) - 1) / torch.arange(1, len(codes) + 1)
    count = (ordered > threshold).sum(1, keepdim=True)
    return ((v - threshold.gather(1, count - 1)).clamp_min(0) - weights).abs().amax(1)


@pytest.mark.parametrize(("f", "k"), [(2, 2), (2, 12), (3, 7), (8, 30), (12, 9)])
@pytest.mark.parametrize("reg", [0.05, 0.3, 3.0, 100.0])
def test_exact_agrees_with_slsqp(f, k, reg):
    z, codes = make(6, f, k, seed=f + k)
    solution = soft_convex_solve(z, codes, reg)
    assert solution.residual.max() <= 1e-10
    weights = dense(solution, k)
    for i in range(len(z)):
        expected = torch.from_numpy(slsqp(z[i], codes, reg))
        torch.testing.assert_close(weights[i], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(solution.z_q[i], codes.T @ expected, rtol=0, atol=1e-6)


def nasty(name):
    """(z, codes, reg) of a problem that breaks careless solvers."""
    z, codes = make(6, 3, 8, seed=5)
    if name == "duplicate codes":
        return z, torch.cat([codes, codes[:4], codes[:1]]), 0.2
    if name == "latents on codes":
        return codes[:6].clone(), codes, 0.2
    if name == "one code":
        return z, codes[:1], 0.2
    if name == "all codes equal":
        return z, codes[:1].repeat(5, 1), 0.2
    if name == "far-away latents":
        return 100 * z, codes, 0.2
    if name == "codebook far from the origin":
        return z + 1e4, codes + 1e4, 0.2
    if name == "codes on a line":
        return z, torch.linspace(-2, 2, 9, dtype=z.dtype).unsqueeze(1) * codes[:1], 0.2
    if name == "latent between two codes":
        return (codes[:1] + codes[1:2]) / 2, codes[:2], 0.2
    if name == "tiny lambda":
        return z, codes, 1e-4
    if name == "tiny scale":
        return 1e-4 * z, 1e-4 * codes, 0.2e-8
    raise AssertionError(name)


NASTY = [
    "duplicate codes",
    "latents on codes",
    "one code",
    "all codes equal",
    "far-away latents",
    "codebook far from the origin",
    "codes on a line",
    "latent between two codes",
    "tiny lambda",
    "tiny scale",
]


@pytest.mark.parametrize("name", NASTY)
def test_exact_agrees_with_enumeration_on_nasty_problems(name):
    z, codes, reg = nasty(name)
    solution = soft_convex_solve(z, codes, reg, tol=1e-7)
    assert solution.residual.max() <= 1e-7
    # e of a tie goes to the first code; the solution must not depend on how often a code is listed otherwise.
    assert torch.equal(solution.nearest, (z.unsqueeze(1) - codes).square().sum(2).argmin(1))
    scale = codes.abs().max().item()
    centre = codes.mean(0)
    for i in range(len(z)):
        expected = enumerated((z[i] - centre).numpy(), (codes - centre).numpy(), reg, int(solution.nearest[i]))
        torch.testing.assert_close(solution.z_q[i] - centre, torch.from_numpy(expected), rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("name", NASTY)
def test_float32_reaches_its_tolerance_on_nasty_problems(name):
    z, codes, reg = (x.float() if isinstance(x, torch.Tensor) else x for x in nasty(name))
    single = soft_convex_solve(z, codes, reg)
    assert single.residual.max() <= 1e-5
    assert single.z_q.dtype == torch.float32
    double = soft_convex_solve(z.double(), codes.double(), reg)
    scale = codes.abs().max().item()
    torch.testing.assert_close(single.z_q.double(), double.z_q, rtol=0, atol=2e-5 * scale)


def test_gradients_agree_with_differences_of_the_oracle():
    z, codes = make(4, 3, 6, seed=11)
    reg = 0.4
    z.requires_grad_()
    codes.requires_grad_()
    solution = soft_convex_solve(z, codes, reg)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    (solution.z_q * direction).sum().backward()
    z0, c0 = z.detach().numpy(), codes.detach().numpy()

    def loss(zs, cs):
        return sum(enumerated(zs[i], cs, reg, int(solution.nearest[i])) @ direction[i].numpy() for i in range(len(zs)))

    step = 1e-6
    for array, grad in ((z0, z.grad), (c0, codes.grad)):
        for where in np.ndindex(array.shape):
            kept = array[where]
            array[where] = kept + step
            up = loss(z0, c0)
            array[where] = kept - step
            down = loss(z0, c0)
            array[where] = kept
            assert abs((up - down) / (2 * step) - grad[where].item()) < 1e-6


@pytest.mark.parametrize("method", ["exact", "local", "relaxed"])
@pytest.mark.parametrize(("f", "k"), [(3, 9), (7, 4)])
def test_gradcheck(method, f, k):
    z, codes = make(5, f, k, seed=1)
    reg = torch.linspace(0.1, 1, 5, dtype=torch.float64).requires_grad_()
    z.requires_grad_()
    codes.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *a: soft_convex_solve(*a, method=method, neighbours=5).z_q, (z, codes, reg), atol=1e-7
    )


def test_only_the_inputs_that_ask_get_gradients():
    z, codes = make(5, 3, 9)
    assert not soft_convex_solve(z, codes, 0.3).z_q.requires_grad
    soft_convex_solve(z.requires_grad_(), codes, 0.3).z_q.sum().backward()
    assert z.grad is not None
    assert codes.grad is None
    z = z.detach()
    soft_convex_solve(z, codes.requires_grad_(), 0.3).z_q.sum().backward()
    assert codes.grad is not None
    y = soft_convex_solve(z.requires_grad_(), codes, 0.3).z_q
    (first,) = torch.autograd.grad(y.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    f=st.integers(1, 40),
    k=st.integers(1, 200),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    offset=st.sampled_from([0.0, 30.0]),
    rho=st.floats(0.05, 100),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_shape_and_scale(n, f, k, scale, offset, rho, seed, dtype):
    z, codes = make(n, f, k, seed=seed)
    z, codes = (scale * (z + offset)).to(dtype), (scale * (codes + offset)).to(dtype)
    reg = rho * (torch.cdist(z.double(), codes.double()).square().amin(1).mean().item() + 1e-3 * scale**2)
    tol = 1e-5 if dtype == torch.float32 else 1e-9
    solution = soft_convex_solve(z, codes, reg, tol=tol)
    assert solution.residual.max() <= tol
    assert solution.weights.min() >= 0
    torch.testing.assert_close(solution.weights.sum(1), torch.ones(n, dtype=dtype), rtol=0, atol=10 * tol)
    combined = dense(solution, k) @ codes
    torch.testing.assert_close(solution.z_q, combined, rtol=0, atol=100 * tol * scale * (1 + offset))
    double = soft_convex_solve(z.double(), codes.double(), reg, tol=1e-9)
    torch.testing.assert_close(dense(solution, k).double(), dense(double, k), rtol=0, atol=2e-3 if tol > 1e-6 else 1e-7)
    assert kkt_violation(z.double() - scale * offset, codes.double() - scale * offset, reg, double).max() < 1e-6


def test_a_shift_and_a_scale_change_nothing():
    z, codes = make(30, 6, 80, seed=2)
    plain = soft_convex_solve(z, codes, 0.5)
    moved = soft_convex_solve(7 * z + 3, 7 * codes + 3, 49 * 0.5)
    torch.testing.assert_close(dense(moved, 80), dense(plain, 80), rtol=0, atol=1e-10)
    assert torch.equal(moved.dominant, plain.dominant)


@pytest.mark.parametrize(
    ("n", "f", "k"), [(400, 2, 300), (400, 8, 1024), (300, 32, 500), (64, 256, 700), (200, 8, 16384)]
)
@pytest.mark.parametrize("rho", [0.05, 0.3, 100.0])
def test_optimality_on_large_problems(n, f, k, rho):
    z, codes = make(n, f, k, seed=k)
    reg = rho * torch.cdist(z, codes).square().amin(1).mean().item()
    solution = soft_convex_solve(z, codes, reg)
    assert solution.residual.max() <= 1e-10
    assert kkt_violation(z, codes, reg, solution).max() < 1e-8
    single = soft_convex_solve(z.float(), codes.float(), reg)
    assert single.residual.max() <= 1e-5
    torch.testing.assert_close(single.z_q.double(), solution.z_q, rtol=0, atol=1e-4)


def test_rows_may_have_their_own_lambda():
    z, codes = make(20, 4, 30)
    reg = torch.linspace(0.05, 5, 20, dtype=torch.float64)
    for method in ("exact", "local", "relaxed"):
        together = soft_convex_solve(z, codes, reg, method=method)
        for i in (0, 7, 19):
            alone = soft_convex_solve(z[i : i + 1], codes, reg[i].item(), method=method)
            torch.testing.assert_close(together.z_q[i : i + 1], alone.z_q, rtol=0, atol=1e-10)


def test_local_with_all_codes_is_exact_and_with_few_says_so():
    z, codes = make(50, 4, 40, seed=4)
    exact = soft_convex_solve(z, codes, 0.3)
    whole = soft_convex_solve(z, codes, 0.3, method="local", neighbours=99)
    torch.testing.assert_close(whole.z_q, exact.z_q, rtol=0, atol=1e-9)
    assert whole.residual.max() <= 1e-10
    few = soft_convex_solve(z, codes, 0.3, method="local", neighbours=5)
    wrong = (few.z_q - exact.z_q).norm(dim=1) > 1e-6
    assert wrong.any()
    assert (few.residual[wrong] > 1e-6).all()


@pytest.mark.parametrize("size", [40, 64, 70])
def test_relaxed_is_the_published_formula(size):
    z, codes = make(20, 4, size, seed=6)
    solution = soft_convex_solve(z, codes, 0.7, method="relaxed")
    nearest = torch.cdist(z, codes).argmin(1)
    ridge = codes.T @ codes + 0.7 * torch.eye(4, dtype=torch.float64)
    v = torch.linalg.solve(ridge, (z - codes[nearest]).T).T @ codes.T
    v[torch.arange(20), nearest] += 1
    expected = (v - simplex_threshold(v)).clamp_min(0)
    torch.testing.assert_close(dense(solution, size), expected, rtol=0, atol=1e-12)
    multipliers = (z - solution.z_q) / 0.7 @ codes.T - expected
    multipliers[torch.arange(20), nearest] += 1  # e + C y - p: equal over the codes in use at the optimum of (1)
    violation = multipliers.amax(1) - multipliers.masked_fill(expected == 0, torch.inf).amin(1)
    torch.testing.assert_close(solution.residual, violation, rtol=0, atol=1e-9)


def test_relaxed_uses_codes_alone():
    """Beyond the hull the threshold is zero but for rounding, as the price of padding is: 70 codes have 128 columns."""
    z, codes = make(2000, 4, 70, seed=1)
    z, codes = (10 * z).float(), codes.float().requires_grad_()
    solution = soft_convex_solve(z, codes, 0.7, method="relaxed")
    assert solution.support.max() < 70
    solution.z_q.sum().backward()
    assert codes.grad.isfinite().all()


def test_where_relaxed_is_exact_it_says_so():
    codes, z = torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.tensor([[-0.2]], dtype=torch.float64)
    solution, exact = soft_convex_solve(z, codes, 0.3, method="relaxed"), soft_convex_solve(z, codes, 0.3)
    torch.testing.assert_close(dense(solution, 2), dense(exact, 2), rtol=0, atol=1e-12)
    assert solution.residual.item() < 1e-12


def test_limits_of_lambda():
    z, codes = make(50, 4, 40, seed=3)
    nearest = torch.cdist(z, codes).argmin(1)
    hard = soft_convex_solve(z, codes, 1e9)
    torch.testing.assert_close(hard.z_q, codes[nearest], rtol=0, atol=1e-6)
    assert torch.equal(hard.dominant, nearest)
    inside = torch.softmax(torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).double(), 1) @ codes
    soft = soft_convex_solve(inside, codes, 1e-6)
    torch.testing.assert_close(soft.z_q, inside, rtol=0, atol=1e-5)
    # Outside the hull the limit is the projection on it: no code lies beyond the plane through z_q facing z.
    outside = 3 * z
    edge = soft_convex_solve(outside, codes, 1e-6)
    normal = outside - edge.z_q
    beyond = (codes @ normal.T - (edge.z_q * normal).sum(1)).amax(0) / normal.norm(dim=1)
    truly_outside = normal.norm(dim=1) > 0.1
    assert truly_outside.sum() > 10
    assert beyond[truly_outside].max() < 1e-4
