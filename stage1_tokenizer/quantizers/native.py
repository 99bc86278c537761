"""The exact solver for a CPU, one row after another in compiled code: what active_set.py and working_set.py do for all
rows at once, where thousands of short tensor operations would cost more than the arithmetic in them.

Problem, notation and equation numbers are those of docs/quantizer.md. All arithmetic is float64, and coordinates are
centred on each row's nearest code. numba compiles at the first call and keeps the result on disk; compiled code
releases Python's lock, so plain threads share the rows.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

LARGEST_DIM = 64  # beyond it a factorisation per row is better left to a batched library routine
_BLOCK = 64  # codes priced together; the best code of each block is a candidate
_ENTERING = 2  # codes that may enter a support after one pricing pass
_ROWS_PER_PART = 512  # what a thread takes at a time: torch's own threads may hold a core for a while after their work

# No infinities are assumed away: padding has price -inf.
_compiled = njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "reassoc", "contract", "arcp"})


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
    codes_np = np.ascontiguousarray(codes.numpy())
    priced, bias = _blocks(codes_np)
    given = (z.contiguous().numpy(), codes_np, priced, bias, nearest.numpy(), reg.contiguous().numpy())

    def work(first: int, last: int) -> None:
        _solve_rows(*given, tol, max_iter, first, last, support, weights, size, residual, moves)

    _share(work, n)
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
    given = [x.contiguous().numpy() for x in (codes, support, weights)]
    _share(lambda first, last: _combine_rows(*given, first, last, combined), len(support))
    return torch.from_numpy(combined)


def gradient_rows(
    grad: Tensor, z: Tensor, codes: Tensor, nearest: Tensor, reg: Tensor, support: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (3): gradients (N, F) of z, (K, F) of the codes and (N,) of lambda; all arguments float64 or int64, CPU."""
    n, dim = z.shape
    grad_z, grad_reg = np.empty((n, dim)), np.empty(n)
    parts: list[np.ndarray] = []
    given = [x.contiguous().numpy() for x in (grad, z, codes, nearest, reg, support, weights)]

    def work(first: int, last: int) -> None:
        part = np.zeros(codes.shape)  # every thread adds to its own, in row order: the sum is the same every time
        _gradient_rows(*given, first, last, grad_z, part, grad_reg)
        parts.append((first, part))

    _share(work, n)
    grad_codes = np.zeros(codes.shape)
    for _, part in sorted(parts, key=lambda pair: pair[0]):
        grad_codes += part
    return torch.from_numpy(grad_z), torch.from_numpy(grad_codes), torch.from_numpy(grad_reg)


def _share(work, n: int) -> None:
    """Give rows 0 .. n to as many threads as torch uses."""
    parts = -(-n // _ROWS_PER_PART)
    threads = min(torch.get_num_threads(), parts)
    if threads == 1:
        work(0, n)
        return
    edges = [n * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))


def _blocks(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes as (blocks, F, _BLOCK), so that a price is a sum over rows of neighbours, and 0 or -inf for padding."""
    count, dim = codes.shape
    blocks = -(-count // _BLOCK)
    padded = np.zeros((blocks * _BLOCK, dim))
    padded[:count] = codes
    bias = np.zeros(blocks * _BLOCK)
    bias[count:] = -np.inf
    return np.ascontiguousarray(padded.reshape(blocks, _BLOCK, dim).transpose(0, 2, 1)), bias


@_compiled
def _factorise(matrix, dim):
    """Cholesky factor in the lower triangle, in place, with the inverses of its diagonal on the diagonal."""
    for j in range(dim):
        for k in range(j):
            for i in range(j, dim):
                matrix[i, j] -= matrix[i, k] * matrix[j, k]
        inverse = 1.0 / np.sqrt(matrix[j, j])
        for i in range(j + 1, dim):
            matrix[i, j] *= inverse
        matrix[j, j] = inverse


@_compiled
def _substitute(factor, x, dim):
    """Solve factor factor^T x = x in place."""
    for i in range(dim):
        for k in range(i):
            x[i] -= factor[i, k] * x[k]
        x[i] *= factor[i, i]
    for i in range(dim - 1, -1, -1):
        for k in range(i + 1, dim):
            x[i] -= factor[k, i] * x[k]
        x[i] *= factor[i, i]


@_compiled
def _add(spread, s, dim, sign, total, squares):
    """Count member s of the support in, or with sign -1 out: the sums of a and of a a^T, a = c_k - c_n."""
    for i in range(dim):
        left = sign * spread[s, i]
        total[i] += left
        for j in range(dim):
            squares[i, j] += left * spread[s, j]


@_compiled
def _sum_up(spread, size, dim, total, squares):
    total[:] = 0.0
    squares[:] = 0.0
    for s in range(size):
        _add(spread, s, dim, 1.0, total, squares)


@_compiled
def _factorised_system(total, squares, size, dim, lam, mean, matrix):
    """Factor of J = lambda I + sum over the support of (c_k - m)(c_k - m)^T into ``matrix``, m - c_n into ``mean``."""
    for i in range(dim):
        mean[i] = total[i] / size
    for i in range(dim):
        for j in range(dim):
            matrix[i, j] = squares[i, j] - total[i] * mean[j]
        matrix[i, i] += lam
    _factorise(matrix, dim)


@_compiled
def _remaining_error(spread, share, wanted, size, dim, lam, target, y, mean, matrix):
    """What is left of (2) as the change of weights it would make to first order, or of the weights. Uses y up."""
    for f in range(dim):
        rest = target[f] - lam * y[f]
        for s in range(size):
            rest -= share[s] * spread[s, f]
        y[f] = rest
    _substitute(matrix, y, dim)
    error = 0.0
    for s in range(size):
        change = 0.0
        for f in range(dim):
            change += (spread[s, f] - mean[f]) * y[f]
        error = max(error, abs(change), abs(share[s] - wanted[s]))
    return error


@_compiled
def _solve_rows(
    z, codes, priced, bias, nearest, reg, tol, max_iter, first, last, support, weights, sizes, residual, moves
):
    dim, room, blocks = z.shape[1], support.shape[1], priced.shape[0]
    spread = np.empty((room, dim))  # c_k - c_n of the support
    members, share, wanted = np.empty(room, np.int64), np.empty(room), np.empty(room)
    target, y, mean, matrix = np.empty(dim), np.empty(dim), np.empty(dim), np.empty((dim, dim))
    total, squares = np.empty(dim), np.empty((dim, dim))
    prices, best = np.empty(blocks * _BLOCK), np.empty(blocks)
    for row in range(first, last):
        anchor, lam = nearest[row], reg[row]
        for f in range(dim):
            target[f] = z[row, f] - codes[anchor, f]
            spread[0, f] = 0.0
            total[f] = 0.0
        squares[:] = 0.0
        members[0], share[0], fresh = anchor, 1.0, True
        size, entering, entered, blocked, count, excess, error = 1, _ENTERING, 0, 0, 0, np.inf, -1.0
        while count < max_iter:
            count += 1
            has_anchor = 0.0
            for s in range(size):
                if members[s] == anchor:
                    has_anchor = 1.0
            _factorised_system(total, squares, size, dim, lam, mean, matrix)
            for f in range(dim):
                y[f] = target[f] - (1.0 - has_anchor) * mean[f]
            _substitute(matrix, y, dim)
            tau = (has_anchor - 1.0) / size
            for f in range(dim):
                tau += mean[f] * y[f]
            step, leaver = 1.0, -1
            for s in range(size):
                price = 1.0 if members[s] == anchor else 0.0
                for f in range(dim):
                    price += spread[s, f] * y[f]
                wanted[s] = price - tau
                if wanted[s] < 0.0:
                    reach = share[s] / (share[s] - wanted[s])
                    if reach < step:
                        step, leaver = reach, s
            for s in range(size):
                share[s] += step * (wanted[s] - share[s])
            if leaver >= 0:  # a weight reached zero on the way: it leaves, and the rest is solved again
                blocked += step == 0.0
                _add(spread, leaver, dim, -1.0, total, squares)
                fresh = False
                size -= 1
                members[leaver], share[leaver] = members[size], share[size]
                for f in range(dim):
                    spread[leaver, f] = spread[size, f]
                continue

            # Optimal on its support. Price all codes: those above the threshold tau want to enter.
            offset = tau
            for f in range(dim):
                offset += codes[anchor, f] * y[f]
            for block in range(blocks):
                start = block * _BLOCK
                for k in range(_BLOCK):
                    prices[start + k] = bias[start + k] - offset
                for f in range(dim):
                    for k in range(_BLOCK):
                        prices[start + k] += priced[block, f, k] * y[f]
            prices[anchor] += 1.0
            for s in range(size):
                prices[members[s]] = -np.inf
            excess = -np.inf
            for block in range(blocks):
                highest = -np.inf
                for k in range(_BLOCK):
                    highest = max(highest, prices[block * _BLOCK + k])
                best[block] = highest
                excess = max(excess, highest)
            if excess <= tol:
                error = _remaining_error(spread, share, wanted, size, dim, lam, target, y, mean, matrix)
                if fresh or error <= tol:
                    break
                _sum_up(spread, size, dim, total, squares)  # sums that were subtracted from have lost digits
                fresh, error = True, -1.0
                continue
            # Codes that enter together may block each other. Then the best one enters alone, which must gain weight; if
            # that one cannot either, its excess is rounding.
            if entered > 0 and blocked == entered:
                if entering == 1:
                    break
                entering = 1
            if size == room:
                excess = np.inf
                break
            before, blocked = size, 0
            for _ in range(min(entering, room - size)):
                block = 0
                for other in range(1, blocks):
                    if best[other] > best[block]:
                        block = other
                if best[block] <= max(tol, 0.5 * excess):
                    break
                code = block * _BLOCK
                while prices[code] != best[block]:
                    code += 1
                best[block] = -np.inf
                members[size], share[size] = code, 0.0
                for f in range(dim):
                    spread[size, f] = codes[code, f] - codes[anchor, f]
                _add(spread, size, dim, 1.0, total, squares)
                size += 1
            entered = size - before
        if error < 0.0:
            error = _remaining_error(spread, share, wanted, size, dim, lam, target, y, mean, matrix)
        residual[row], moves[row] = max(excess, error), count
        support[row, 0], weights[row, 0] = anchor, 0.0
        place = 1
        for s in range(size):
            if members[s] == anchor:
                weights[row, 0] = share[s]
            else:
                support[row, place], weights[row, place] = members[s], share[s]
                place += 1
        sizes[row] = place
        for s in range(place, room):
            support[row, s] = anchor


@_compiled
def _combine_rows(codes, support, weights, first, last, combined):
    for row in range(first, last):
        for s in range(support.shape[1]):
            weight = weights[row, s]
            if weight > 0.0:
                for f in range(codes.shape[1]):
                    combined[row, f] += weight * codes[support[row, s], f]


@_compiled
def _gradient_rows(grad, z, codes, nearest, reg, support, weights, first, last, grad_z, grad_codes, grad_reg):
    dim, room = z.shape[1], support.shape[1]
    spread, members, share = np.empty((room, dim)), np.empty(room, np.int64), np.empty(room)
    y, u, mean, matrix = np.empty(dim), np.empty(dim), np.empty(dim), np.empty((dim, dim))
    total, squares = np.empty(dim), np.empty((dim, dim))
    for row in range(first, last):
        anchor, lam, size = nearest[row], reg[row], 0
        for f in range(dim):
            y[f] = z[row, f] - codes[anchor, f]
            u[f] = lam * grad[row, f]
        for s in range(room):
            weight = weights[row, s]
            if weight > 0.0:
                members[size], share[size] = support[row, s], weight
                for f in range(dim):
                    spread[size, f] = codes[members[size], f] - codes[anchor, f]
                    y[f] -= weight * spread[size, f]
                size += 1
        _sum_up(spread, size, dim, total, squares)
        _factorised_system(total, squares, size, dim, lam, mean, matrix)
        _substitute(matrix, u, dim)  # u of (3): (J / lambda)^-1 g
        slope = 0.0
        for f in range(dim):
            y[f] /= lam  # the multiplier of (2)
            grad_z[row, f] = grad[row, f] - u[f]
            slope -= grad_z[row, f] * y[f]
        grad_reg[row] = slope
        for s in range(size):
            along = 0.0
            for f in range(dim):
                along += (spread[s, f] - mean[f]) * u[f]
            for f in range(dim):
                grad_codes[members[s], f] += share[s] * u[f] + along * y[f]
