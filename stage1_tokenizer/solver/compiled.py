"""The exact solver for a CPU, one row after another in compiled code: what active_set.py and working_set.py do for all
rows at once, where thousands of short tensor operations would cost more than the arithmetic in them.

numba compiles at the first call and keeps the result on disk. Rows are shared among threads of OpenMP, which on Linux
are torch's own: threads of another pool would compete with torch's, which spin for a while after their work.
"""

import threading

import numba
import numpy as np
import torch
from torch import Tensor

from scq.stage1_tokenizer.solver.compiled_rows import ROWS_PER_PART, combine_all, gradient_all, in_blocks, solve_all

LARGEST_DIM = 64  # beyond it a factorisation per row is better left to a batched library routine
_GRADIENT_PARTS = 16  # sums over rows, added in this order: the same result with any number of threads
_turn = threading.Lock()  # where OpenMP is missing, numba's own threads serve one caller at a time


def solve_rows(
    z: Tensor, codes: Tensor, nearest: Tensor, reg: Tensor, *, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Solve (1) exactly for every row.

    Args:
        z: (N, F) latents; codes: (K, F); both float64 on the CPU and centred alike. F <= LARGEST_DIM.
        nearest: (N,) int64; reg: (N,) float64, lambda > 0.
        tol: what the residual is asked to stay below, in units of weight.
        max_iter: moves of a row's support at most.

    Returns:
        support (N, S) int64 with the nearest code in column 0 and as padding, weights (N, S) float64, residual (N,)
        float64 (infinite for a row whose support outgrew the room for it), and the moves of the slowest row.
    """
    n, dim = z.shape
    room = min(len(codes), 4 * dim + 64)
    support = np.empty((n, room), np.int64)
    weights = np.zeros((n, room))
    size, moves, residual = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n)
    given = _arrays(z, codes, nearest, reg)
    _in_turn(
        solve_all,
        *given,
        *in_blocks(given[1]),
        tol,
        max_iter,
        support,
        weights,
        size,
        residual,
        moves,
    )
    width = int(size.max())
    return (
        torch.from_numpy(support[:, :width].copy()),
        torch.from_numpy(weights[:, :width].copy()),
        torch.from_numpy(residual),
        int(moves.max()),
    )


def combine_rows(codes: Tensor, support: Tensor, weights: Tensor) -> Tensor:
    """(N, F) weighted sums of the codes (K, F) that support (N, S) names; codes and weights float64, all on the CPU."""
    combined = np.zeros((len(support), codes.shape[1]))
    _in_turn(combine_all, *_arrays(codes, support, weights), combined)
    return torch.from_numpy(combined)


def gradient_rows(
    grad: Tensor, z: Tensor, codes: Tensor, nearest: Tensor, reg: Tensor, support: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (3): gradients (N, F) of z, (K, F) of the codes and (N,) of lambda; all arguments float64 or int64, CPU."""
    n, dim = z.shape
    grad_z, grad_reg = np.empty((n, dim)), np.empty(n)
    grad_codes = np.zeros((min(_GRADIENT_PARTS, -(-n // ROWS_PER_PART)), *codes.shape))
    _in_turn(gradient_all, *_arrays(grad, z, codes, nearest, reg, support, weights), grad_z, grad_codes, grad_reg)
    return torch.from_numpy(grad_z), torch.from_numpy(grad_codes.sum(0)), torch.from_numpy(grad_reg)


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [x.contiguous().numpy() for x in tensors]


def _in_turn(work, *arguments) -> None:
    threads = torch.get_num_threads()
    with _turn:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        if torch.get_num_threads() != threads:  # when numba starts OpenMP's threads, it sets their number for torch too
            torch.set_num_threads(threads)
        work(*arguments)
