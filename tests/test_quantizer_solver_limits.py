"""What surrounds the solver's answers: memory, threads, ties, bad input."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from solver_problems import make, one_thread, path  # noqa: F401  the last two are fixtures for every test
from torch.utils._python_dispatch import TorchDispatchMode

from scq.stage1_tokenizer.solver import soft_convex_solve
from scq.stage1_tokenizer.solver.batched import solve_positive_definite
from scq.stage1_tokenizer.solver.codebook import nearest_codes


class LargestTensor(TorchDispatchMode):
    """Records the largest number of entries that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


@pytest.mark.parametrize("method", ["exact", "local", "relaxed"])
def test_memory_stays_below_one_block(method):
    z, codes = make(2500, 4, 4096, dtype=torch.float32)
    with LargestTensor() as largest:
        soft_convex_solve(z, codes, 0.3, method=method)
    assert largest.entries < z.shape[0] * codes.shape[0] / 8


def test_ties_go_to_the_first_code():
    _, codes = make(1, 5, 40)
    doubled = codes.repeat(4, 1)
    solution = soft_convex_solve(codes, doubled, 1.0)
    assert torch.equal(solution.nearest, torch.arange(40))
    assert torch.equal(nearest_codes(codes, doubled), torch.arange(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["exact", "local", "relaxed"])
@pytest.mark.parametrize("reg", [1e-12, 1e-30])
def test_a_lambda_below_the_digits_of_float64_projects_on_the_hull(dtype, method, reg):
    z, codes = (x.to(dtype) for x in make(300, 4, 16))
    solution = soft_convex_solve(z.requires_grad_(), codes, reg, method=method, neighbours=16)
    (gradient,) = torch.autograd.grad(solution.z_q.sum(), z)
    assert gradient.isfinite().all()
    assert solution.dominant.max() < 16
    torch.testing.assert_close(solution.weights.sum(1), torch.ones(300, dtype=dtype), rtol=0, atol=2e-5)
    if method != "relaxed":
        small = soft_convex_solve(z.detach().double(), codes.double(), 2e-6 * codes.var(0).sum().item())
        torch.testing.assert_close(solution.z_q.double(), small.z_q, rtol=0, atol=1e-4)


def test_positive_definite_systems():
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 9, 32, 40):
        half = torch.randn(7, size, size, generator=generator, dtype=torch.float64)
        matrix = half @ half.transpose(1, 2) + torch.eye(size)
        right = torch.randn(7, size, generator=generator, dtype=torch.float64)
        kept = matrix.clone(), right.clone()
        x = solve_positive_definite(matrix, right)
        torch.testing.assert_close((matrix @ x.unsqueeze(-1)).squeeze(-1), right, rtol=0, atol=1e-9)
        assert torch.equal(matrix, kept[0])
        assert torch.equal(right, kept[1])


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
        ({"neighbours": 0}, "neighbours must be a positive integer"),
        ({"tol": -1.0}, "tol must be positive"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"z": torch.zeros(2, 4), "codebook": torch.ones(5, 4), "reg": 1.0} | change
    with pytest.raises(ValueError, match=message):
        soft_convex_solve(**arguments)


def test_a_row_that_ran_out_of_moves_is_reported():
    z, codes = make(50, 8, 60, seed=8)
    stopped = soft_convex_solve(z, codes, 0.05, max_iter=1)
    solved = soft_convex_solve(z, codes, 0.05)
    wrong = (stopped.z_q - solved.z_q).norm(dim=1) > 1e-6
    if wrong.any():
        assert (stopped.residual[wrong] > 1e-10).all()
    assert solved.residual.max() <= 1e-10


def test_any_number_of_threads_gives_the_same_solution():
    z, codes = make(2000, 8, 90, dtype=torch.float32)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        leaves = [x.clone().requires_grad_() for x in (z, codes)]
        solution = soft_convex_solve(*leaves, 0.5)
        solution.z_q.square().sum().backward()
        found.append((solution.z_q, solution.weights, *(leaf.grad for leaf in leaves)))
    torch.set_num_threads(1)
    for one, three in zip(*found, strict=True):
        assert torch.allclose(one, three, rtol=1e-5, atol=1e-6)


def test_a_support_too_large_for_compiled_code_is_solved_all_the_same():
    z, codes = make(3, 2, 5)
    duplicates = codes.repeat(120, 1)  # (600, 2): every used code shares its weight with 119 copies
    solution = soft_convex_solve(z, duplicates, 0.05)
    assert solution.residual.max() < 1e-9
    assert (solution.weights > 0).sum(1).max() > 72


def test_solving_leaves_torchs_number_of_threads_alone():
    """numba starts OpenMP's threads, which are torch's, and sets their number: in several processes far too many."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from scq import soft_convex_solve\n"
        "soft_convex_solve(torch.randn(300, 4), torch.randn(8, 4), 0.3)\n"
        "assert torch.get_num_threads() == 1, torch.get_num_threads()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
