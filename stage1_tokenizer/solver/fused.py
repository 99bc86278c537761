"""The implementation for NVIDIA's GPUs: rows of problem (1) in kernels of Triton, without a word from the host.

Shapes do not depend on values and nothing is read back, so a training step never waits. Sums are taken in one order, so
a seed has the same bits every time. `fused_rows` has the kernels.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from scq.stage1_tokenizer.solver import fused_rows as kernels
from scq.stage1_tokenizer.solver.batched import SolvedRows
from scq.stage1_tokenizer.solver.codebook import Codebook

# A program of 8 warps and 128 registers a thread leaves room for a second one on a multiprocessor, which computes while
# the first one waits. By ptxas for sm_90, at F=8 the loop over codes then spills 12 of its values; unbounded, a thread
# takes 255 registers and none is spilled.
_WARPS, _REGISTERS, _PROGRAMS_PER_PROCESSOR = 8, 128, 2
_FLOAT32_TOLERANCE = 1e-6  # prices in float32 prove nothing below it


def solve_rows(book: Codebook, z: Tensor, reg: Tensor, *, tol: float, max_iter: int) -> SolvedRows:
    """See `batched.solve_rows`; F <= FUSED_DIM, and book, z and reg are float64.

    Rows that prices in float32 do not bring to ``tol`` are solved again with prices in float64, whether there are any
    or not. A support that outgrows its room, or a row that runs out of moves, says so in its residual.
    """
    n, dim = z.shape
    slots, words = _layout(dim)
    room = triton.next_power_of_2(2 * dim + 32)
    programs = min(triton.cdiv(n, slots), _PROGRAMS_PER_PROCESSOR * _processors(z))
    support, weights = _integers(z, n, room), z.new_empty(n, room)
    nearest, residual, moves = _integers(z, n), z.new_full((n,), torch.inf), _integers(z, n).int()
    farthest = 2 * book.codes.square().sum(1).amax().sqrt()  # () no |c_k - c_n| exceeds it
    for dtype in (torch.float32, torch.float64) if tol >= _FLOAT32_TOLERANCE else (torch.float64,):
        missed = ~(residual <= tol)  # (N,), with what is NaN
        columns = _columns(book, dtype, 32 * words)  # (F + 1, width)
        kernels.solve_kernel[(programs,)](
            z.contiguous(),
            book.codes,
            reg.flatten().contiguous(),
            columns,
            missed.int().argsort(descending=True, stable=True),
            missed.sum(dtype=torch.int32),
            _integers(z).int().zero_(),
            _integers(z, programs, room, slots).int(),
            z.new_empty(programs, room, slots),
            z.new_empty(programs, room, slots),
            columns.new_empty(programs, dim + 2, slots),
            _padding(book, columns).view(-1, 1).repeat(programs, 1, slots),
            support,
            weights,
            nearest,
            residual,
            moves,
            farthest,
            0.5 * tol,  # the other half is left to rounding
            max_iter,
            columns.shape[1],
            DIM=dim,
            PADDED=_padded(dim),
            SLOTS=slots,
            WORDS=words,
            ROOM=room,
            num_warps=_WARPS,
            maxnreg=_REGISTERS,
        )
    return SolvedRows(support, weights, nearest, residual, moves.amax())


def nearest_codes(rows: Tensor, codes: Tensor) -> Tensor:
    """See `codebook.nearest_codes`."""
    book, n = Codebook(codes), len(rows)
    slots, words = _layout(book.dim)
    columns, programs = _columns(book, codes.dtype, 32 * words), triton.cdiv(n, slots)
    query = codes.new_zeros(book.dim + 2, programs * slots)
    query[:-2, :n] = (rows - book.centre).t()
    query[-2] = 1
    nearest = _integers(rows, n)
    kernels.nearest_kernel[(programs,)](
        query, columns, nearest, n, columns.shape[1], DIM=book.dim, SLOTS=slots, WORDS=words, num_warps=_WARPS
    )
    return nearest


def combine_rows(book: Codebook, support: Tensor, weights: Tensor) -> Tensor:
    """See `batched.combine_rows`; book float64."""
    n, width = support.shape
    combined = book.codes.new_empty(n, book.dim)
    kernels.combine_kernel[(triton.cdiv(n, 32),)](
        book.codes, support, weights, combined, n, width, DIM=book.dim, PADDED=_padded(book.dim), ROWS=32
    )
    return combined


def gradient_rows(
    grad: Tensor, codebook: Tensor, support: Tensor, weights: Tensor, nearest: Tensor, target: Tensor, reg: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of eq. (3); see `batched.gradient_rows`."""
    (n, width), (size, dim) = support.shape, codebook.shape
    slots, _ = _layout(dim)
    codes = codebook.double().contiguous()
    shared: dict[str, Any] = {"DIM": dim, "PADDED": _padded(dim)}
    grad_z, through, multiplier = (codes.new_empty(n, dim) for _ in range(3))
    grad_reg, along = codes.new_empty(n), codes.new_empty(n, width)
    kernels.gradient_kernel[(triton.cdiv(n, slots),)](
        grad.double().contiguous(),
        target.double().contiguous(),
        codes,
        reg.double().flatten().contiguous(),
        support,
        weights,
        nearest,
        grad_z,
        grad_reg,
        through,
        multiplier,
        along,
        n,
        width,
        ROWS=slots,
        num_warps=_WARPS,
        **shared,
    )
    # Entries in the order of their codes, and of rows for the same code; those without weight come last.
    keys = torch.where(weights > 0, support, size).flatten().int()  # (N width,)
    keys, entry = torch.sort(keys, stable=True)
    first = torch.searchsorted(keys, torch.arange(size + 1, device=keys.device, dtype=keys.dtype))  # (K + 1,)
    grad_codebook = torch.empty_like(codes)
    kernels.sum_kernel[(size,)](
        first, entry, weights, along, through, multiplier, grad_codebook, width, ENTRIES=32, num_warps=1, **shared
    )
    return grad_z.to(grad.dtype), grad_codebook.to(grad.dtype), grad_reg.to(grad.dtype).unsqueeze(1)


def _layout(dim: int) -> tuple[int, int]:
    """SLOTS and WORDS for F channels. As many rows as their inverses, (F, F) in float64, leave registers for."""
    return {16: (16, 4), 32: (8, 4)}.get(_padded(dim), (32, 4))


def _padded(dim: int) -> int:
    return triton.next_power_of_2(dim)


def _columns(book: Codebook, dtype: torch.dtype, multiple: int) -> Tensor:
    """(F + 1, width) centred codes and below them -|c_k|^2 / 2; the width is a multiple of ``multiple``."""
    width = triton.cdiv(book.size, multiple) * multiple
    columns = torch.zeros(book.dim + 1, width, dtype=dtype, device=book.codes.device)
    columns[:-1, : book.size] = book.codes.t()
    columns[-1] = torch.finfo(dtype).min / 4
    columns[-1, : book.size] = -book.codes.square().sum(1) / 2
    return columns


def _padding(book: Codebook, columns: Tensor) -> Tensor:
    """(width / 32,) int32, a bit set for each column that is no code."""
    column = torch.arange(columns.shape[1], device=columns.device, dtype=torch.int32)  # (width,)
    bits = torch.where(column < book.size, 0, 1 << column % 32)
    return bits.view(-1, 32).sum(1).int()


def _integers(z: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=z.device)


def _processors(z: Tensor) -> int:
    return torch.cuda.get_device_properties(z.device).multi_processor_count if z.is_cuda else 1
