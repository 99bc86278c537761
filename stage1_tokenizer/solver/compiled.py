"""The implementation for a CPU: rows of problem (1) one after another in compiled code, in float64 throughout.

A row's moves are a hundred operations each. As short tensor operations, which is how `batched` does them for all rows
at once, they would cost more to start than to do.

numba compiles at the first call, and the result is kept on disk. Rows are shared among threads of OpenMP, which on
Linux are torch's own: threads of another pool would compete with torch's, which spin for a while after their work.
"""

import sys
import threading
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from scq.engine.processes import is_forked
from scq.stage1_tokenizer.solver.batched import SolvedRows
from scq.stage1_tokenizer.solver.codebook import Codebook
from scq.stage1_tokenizer.solver.compiled_rows import ROWS_PER_PART, combine_all, gradient_all, in_blocks, solve_all

LARGEST_DIM = 64  # beyond it a factorisation per row is better left to a batched library routine
_GRADIENT_PARTS = 16  # sums over rows, added in this order: the same result with any number of threads
_turn = threading.Lock()  # where OpenMP is missing, numba's own threads serve one caller at a time


def solve_rows(book: Codebook, z: Tensor, reg: Tensor, *, tol: float, max_iter: int) -> SolvedRows:
    """See `batched.solve_rows`; F <= LARGEST_DIM.

    The nearest code is in column 0 of the support. The residual of a row whose support outgrew the room for it is
    infinite.
    """
    n, dim = z.shape
    nearest = book.nearest(z)  # (N,)
    given = _arrays(z, book.codes, nearest, reg[:, 0])
    room = min(book.size, 4 * dim + 64)
    support = np.empty((n, room), np.int64)
    weights = np.zeros((n, room))
    size, residual, moves = np.empty(n, np.int64), np.empty(n), np.empty(n, np.int64)
    found = support, weights, size, residual, moves
    _in_threads(solve_all, *given, *in_blocks(given[1]), 0.5 * tol, max_iter, *found)
    width = int(size.max())
    return SolvedRows(
        torch.from_numpy(support[:, :width].copy()),
        torch.from_numpy(weights[:, :width].copy()).to(z.dtype),
        nearest,
        torch.from_numpy(residual).to(z.dtype),
        int(moves.max()),
    )


def combine_rows(book: Codebook, support: Tensor, weights: Tensor) -> Tensor:
    """See `batched.combine_rows`."""
    combined = np.zeros((len(support), book.dim))
    _in_threads(combine_all, *_arrays(book.codes, support, weights), combined)
    return torch.from_numpy(combined).to(weights.dtype)


def gradient_rows(
    grad: Tensor, codebook: Tensor, support: Tensor, weights: Tensor, nearest: Tensor, target: Tensor, reg: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of eq. (3); see `batched.gradient_rows`."""
    n, dim = grad.shape
    codes = codebook - codebook.mean(0)  # (K, F)
    latents = target + codes[nearest]  # (N, F)
    grad_z, grad_reg = np.empty((n, dim)), np.empty(n)
    grad_codes = np.zeros((min(_GRADIENT_PARTS, -(-n // ROWS_PER_PART)), *codes.shape))  # (parts, K, F)
    given = _arrays(grad, latents, codes, nearest, reg[:, 0], support, weights)
    _in_threads(gradient_all, *given, grad_z, grad_codes, grad_reg)
    return (
        torch.from_numpy(grad_z).to(grad.dtype),
        torch.from_numpy(grad_codes.sum(0)).to(grad.dtype),
        torch.from_numpy(grad_reg).to(grad.dtype).unsqueeze(1),
    )


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    """What the compiled code takes: contiguous arrays, float64 where the tensors are floating."""
    return [(x.double() if x.is_floating_point() else x).contiguous().numpy() for x in tensors]


def _in_threads(shared: Any, *arguments: Any) -> None:
    """Call a function that shares its rows among numba's threads, as many as torch has; the bits do not depend on them.

    In a fork, which has none of them, Python runs the same loop over the same compiled parts.
    """
    if is_forked():
        shared.py_func(*arguments)
        return
    threads = torch.get_num_threads()
    with _turn:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        if torch.get_num_threads() != threads:  # when numba starts OpenMP's threads, it sets their number for torch too
            torch.set_num_threads(threads)
        if "torch._dynamo" in sys.modules:  # inside a compiled model: torch would trace numba's compiler, and fail
            shared = torch.compiler.disable(shared)
        shared(*arguments)
