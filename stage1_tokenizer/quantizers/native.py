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
_LANE = 8  # float64 numbers in a vector register: vectors are padded with zeros to whole lanes, loops over one unroll
_BLOCK = 64  # codes priced together; the best code of each block is a candidate
_ENTERING = 2  # codes that may enter a support after one pricing pass
_ROWS_PER_THREAD = 64  # fewer are not worth a thread

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
    z, codes = _whole_lanes(z), _whole_lanes(codes)
    room = min(len(codes), 4 * dim + 64)
    support = np.empty((n, room), np.int64)
    weights = np.zeros((n, room))
    size, moves, residual = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n)
    priced, bias = _blocks(codes)
    given = (dim, z, codes, priced, bias, nearest.numpy(), reg.contiguous().numpy())

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


def gradient_rows(
    grad: Tensor, z: Tensor, codes: Tensor, nearest: Tensor, reg: Tensor, support: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (3): gradients (N, F) of z, (K, F) of the codes and (N,) of lambda; all arguments float64 or int64, CPU."""
    n, dim = z.shape
    wide = [_whole_lanes(x) for x in (grad, z, codes)]
    grad_z, grad_reg = np.empty_like(wide[0]), np.empty(n)
    parts: list[tuple[int, np.ndarray]] = []
    given = (dim, *wide, *(x.contiguous().numpy() for x in (nearest, reg, support, weights)))

    def work(first: int, last: int) -> None:
        part = np.zeros_like(wide[2])  # every thread adds to its own, in row order: the sum is the same every time
        _gradient_rows(*given, first, last, grad_z, part, grad_reg)
        parts.append((first, part))

    _share(work, n)
    grad_codes = sum(part for _, part in sorted(parts, key=lambda pair: pair[0]))
    found = (torch.from_numpy(x.reshape(len(x), -1)[:, :dim]) for x in (grad_z, grad_codes))
    return *found, torch.from_numpy(grad_reg)


def _share(work, n: int) -> None:
    """Give rows 0 .. n to as many threads as torch uses."""
    threads = min(torch.get_num_threads(), -(-n // _ROWS_PER_THREAD))
    edges = [n * i // threads for i in range(threads + 1)]
    if threads == 1:
        work(0, n)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))


def _whole_lanes(vectors: Tensor) -> np.ndarray:
    """(n, F) padded with zeros to (n, lanes, _LANE)."""
    n, dim = vectors.shape
    padded = np.zeros((n, -(-dim // _LANE) * _LANE))
    padded[:, :dim] = vectors.numpy()
    return padded.reshape(n, -1, _LANE)


def _blocks(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes as (blocks, lanes, _LANE, _BLOCK), so that prices of neighbours are summed together; -inf for padding."""
    count, lanes, _ = codes.shape
    blocks = -(-count // _BLOCK)
    padded = np.zeros((blocks * _BLOCK, lanes, _LANE))
    padded[:count] = codes
    bias = np.zeros(blocks * _BLOCK)
    bias[count:] = -np.inf
    priced = padded.reshape(blocks, _BLOCK, lanes, _LANE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(priced), bias.reshape(blocks, _BLOCK)


# Vectors are rows of (rows, lanes, _LANE) arrays, named by array and row: a slice would cost more than the arithmetic
# it is made for.
_TARGET, _RIGHT, _Y, _MEAN, _TOTAL, _U = range(6)  # rows of the scratch vectors: z - c_n, a right side, y, m - c_n, ...


@_compiled
def _dot(a, i, b, j):
    total = 0.0
    for lane in range(a.shape[1]):
        for f in range(_LANE):
            total += a[i, lane, f] * b[j, lane, f]
    return total


@_compiled
def _add_multiple(a, i, factor, b, j):
    """Row i of a += factor * row j of b."""
    for lane in range(a.shape[1]):
        for f in range(_LANE):
            a[i, lane, f] += factor * b[j, lane, f]


@_compiled
def _difference(out, row, a, i, b, j):
    """Row of out = row i of a - row j of b."""
    for lane in range(a.shape[1]):
        for f in range(_LANE):
            out[row, lane, f] = a[i, lane, f] - b[j, lane, f]


@_compiled
def _copy(out, row, factor, a, i):
    """Row of out = factor * row i of a."""
    for lane in range(a.shape[1]):
        for f in range(_LANE):
            out[row, lane, f] = factor * a[i, lane, f]


@_compiled
def _substitute(matrix, inverse_pivots, vectors, solution, dim):
    """Row ``solution`` with A x = row _RIGHT, for the A that was eliminated. The right side is used up."""
    for j in range(dim):
        lane, f = divmod(j, _LANE)
        x = vectors[_RIGHT, lane, f] * inverse_pivots[j]
        _add_multiple(vectors, _RIGHT, -x, matrix, j)
        vectors[_RIGHT, lane, f] = x
        vectors[solution, lane, f] = 0.0
    for i in range(dim - 1, -1, -1):
        lane, f = divmod(i, _LANE)
        x = vectors[_RIGHT, lane, f] - inverse_pivots[i] * _dot(matrix, i, vectors, solution)
        vectors[solution, lane, f] = x


@_compiled
def _count_in(spread, s, sign, vectors, squares, dim):
    """Count member s of the support in, or with sign -1 out: the sums of a and of a a^T, a = c_k - c_n."""
    _add_multiple(vectors, _TOTAL, sign, spread, s)
    for i in range(dim):
        _add_multiple(squares, i, sign * spread[s, i // _LANE, i % _LANE], spread, s)


@_compiled
def _sum_up(spread, size, vectors, squares, dim):
    _copy(vectors, _TOTAL, 0.0, vectors, _TOTAL)
    for i in range(dim):
        _copy(squares, i, 0.0, squares, i)
    for s in range(size):
        _count_in(spread, s, 1.0, vectors, squares, dim)


@_compiled
def _eliminate(vectors, squares, size, lam, matrix, inverse_pivots, dim):
    """J = lambda I + sum over the support of (c_k - m)(c_k - m)^T, eliminated; m - c_n into the scratch vectors.

    Gauss elimination in place: what counts after it is the upper triangle. Whole rows are subtracted, though half of
    each is of no use: that keeps the loops straight.
    """
    _copy(vectors, _MEAN, 1.0 / size, vectors, _TOTAL)
    for i in range(dim):
        _copy(matrix, i, 1.0, squares, i)
        _add_multiple(matrix, i, -vectors[_TOTAL, i // _LANE, i % _LANE], vectors, _MEAN)
        matrix[i, i // _LANE, i % _LANE] += lam
    for j in range(dim):
        inverse_pivots[j] = 1.0 / matrix[j, j // _LANE, j % _LANE]
        for i in range(j + 1, dim):
            _add_multiple(matrix, i, -matrix[j, i // _LANE, i % _LANE] * inverse_pivots[j], matrix, j)


@_compiled
def _price(priced, bias, offset, vectors, prices, best):
    """Prices c_k.y - offset of all codes, the best of each block and of all; a bias of -inf leaves a code out."""
    excess = -np.inf
    for block in range(priced.shape[0]):
        for k in range(_BLOCK):
            prices[block, k] = bias[block, k] - offset
        for lane in range(priced.shape[1]):  # eight at a time, so that a price is stored once for them all
            y0, y1, y2, y3 = vectors[_Y, lane, 0], vectors[_Y, lane, 1], vectors[_Y, lane, 2], vectors[_Y, lane, 3]
            y4, y5, y6, y7 = vectors[_Y, lane, 4], vectors[_Y, lane, 5], vectors[_Y, lane, 6], vectors[_Y, lane, 7]
            for k in range(_BLOCK):
                first = priced[block, lane, 0, k] * y0 + priced[block, lane, 1, k] * y1
                second = priced[block, lane, 2, k] * y2 + priced[block, lane, 3, k] * y3
                third = priced[block, lane, 4, k] * y4 + priced[block, lane, 5, k] * y5
                fourth = priced[block, lane, 6, k] * y6 + priced[block, lane, 7, k] * y7
                prices[block, k] += (first + second) + (third + fourth)
        highest = -np.inf
        for k in range(_BLOCK):
            highest = max(highest, prices[block, k])
        best[block] = highest
        excess = max(excess, highest)
    return excess


@_compiled
def _remaining_error(spread, share, wanted, size, lam, vectors, matrix, inverse_pivots, dim):
    """What is left of (2) as the change of weights it would make to first order, or of the weights themselves."""
    _copy(vectors, _RIGHT, 1.0, vectors, _TARGET)
    _add_multiple(vectors, _RIGHT, -lam, vectors, _Y)
    for s in range(size):
        _add_multiple(vectors, _RIGHT, -share[s], spread, s)
    _substitute(matrix, inverse_pivots, vectors, _U, dim)
    error, shift = 0.0, _dot(vectors, _MEAN, vectors, _U)
    for s in range(size):
        error = max(error, abs(_dot(spread, s, vectors, _U) - shift), abs(share[s] - wanted[s]))
    return error


@_compiled
def _solve_rows(
    dim, z, codes, priced, bias, nearest, reg, tol, max_iter, first, last, support, weights, sizes, residual, moves
):
    lanes, room, blocks = z.shape[1], support.shape[1], priced.shape[0]
    bias = bias.copy()  # this thread's own: codes in the support are left out of a pricing
    spread = np.zeros((room, lanes, _LANE))  # c_k - c_n of the support
    members, share, wanted = np.empty(room, np.int64), np.empty(room), np.empty(room)
    vectors, squares = np.zeros((6, lanes, _LANE)), np.zeros((dim, lanes, _LANE))
    matrix = np.zeros((dim, lanes, _LANE))
    inverse_pivots, prices, best = np.empty(dim), np.empty((blocks, _BLOCK)), np.empty(blocks)
    for row in range(first, last):
        anchor, lam = nearest[row], reg[row]
        _difference(vectors, _TARGET, z, row, codes, anchor)
        _difference(spread, 0, codes, anchor, codes, anchor)
        members[0], share[0], size, has_anchor, fresh = anchor, 1.0, 1, 1.0, True
        _sum_up(spread, size, vectors, squares, dim)
        entering, entered, blocked, count, excess = _ENTERING, 0, 0, 0, np.inf
        while count < max_iter:
            count += 1
            _eliminate(vectors, squares, size, lam, matrix, inverse_pivots, dim)
            _copy(vectors, _RIGHT, 1.0, vectors, _TARGET)
            _add_multiple(vectors, _RIGHT, has_anchor - 1.0, vectors, _MEAN)
            _substitute(matrix, inverse_pivots, vectors, _Y, dim)
            tau = _dot(vectors, _MEAN, vectors, _Y) + (has_anchor - 1.0) / size
            step, leaver = 1.0, -1
            for s in range(size):
                wanted[s] = _dot(spread, s, vectors, _Y) - tau + (members[s] == anchor)
                if wanted[s] < 0.0:
                    reach = share[s] / (share[s] - wanted[s])
                    if reach < step:
                        step, leaver = reach, s
            for s in range(size):
                share[s] += step * (wanted[s] - share[s])
            if leaver >= 0:  # a weight reached zero on the way: it leaves, and the rest is solved again
                blocked += step == 0.0
                if members[leaver] == anchor:
                    has_anchor = 0.0
                _count_in(spread, leaver, -1.0, vectors, squares, dim)
                fresh = False
                size -= 1
                members[leaver], share[leaver] = members[size], share[size]
                _copy(spread, leaver, 1.0, spread, size)
                continue

            # Optimal on its support. Price all codes: those above the threshold tau want to enter.
            offset = tau + _dot(codes, anchor, vectors, _Y)
            bias[anchor // _BLOCK, anchor % _BLOCK] = 1.0
            for s in range(size):
                bias[members[s] // _BLOCK, members[s] % _BLOCK] = -np.inf
            excess = _price(priced, bias, offset, vectors, prices, best)
            bias[anchor // _BLOCK, anchor % _BLOCK] = 0.0
            for s in range(size):
                bias[members[s] // _BLOCK, members[s] % _BLOCK] = 0.0
            if excess <= tol:
                error = _remaining_error(spread, share, wanted, size, lam, vectors, matrix, inverse_pivots, dim)
                if fresh or error <= tol:
                    break
                _sum_up(spread, size, vectors, squares, dim)  # sums that were subtracted from have lost digits
                fresh = True
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
                place = 0
                while prices[block, place] != best[block]:
                    place += 1
                code, best[block] = block * _BLOCK + place, -np.inf
                members[size], share[size] = code, 0.0
                if code == anchor:
                    has_anchor = 1.0
                _difference(spread, size, codes, code, codes, anchor)
                _count_in(spread, size, 1.0, vectors, squares, dim)
                size += 1
            entered = size - before
        error = _remaining_error(spread, share, wanted, size, lam, vectors, matrix, inverse_pivots, dim)
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
def _gradient_rows(dim, grad, z, codes, nearest, reg, support, weights, first, last, grad_z, grad_codes, grad_reg):
    lanes, room = z.shape[1], support.shape[1]
    spread, members, share = np.empty((room, lanes, _LANE)), np.empty(room, np.int64), np.empty(room)
    vectors, squares = np.zeros((6, lanes, _LANE)), np.zeros((dim, lanes, _LANE))
    matrix = np.zeros((dim, lanes, _LANE))
    inverse_pivots = np.empty(dim)
    for row in range(first, last):
        anchor, lam, size = nearest[row], reg[row], 0
        _difference(vectors, _Y, z, row, codes, anchor)
        for s in range(room):
            if weights[row, s] > 0.0:
                members[size], share[size] = support[row, s], weights[row, s]
                _difference(spread, size, codes, members[size], codes, anchor)
                _add_multiple(vectors, _Y, -share[size], spread, size)
                size += 1
        _copy(vectors, _Y, 1.0 / lam, vectors, _Y)  # the multiplier of (2)
        _sum_up(spread, size, vectors, squares, dim)
        _eliminate(vectors, squares, size, lam, matrix, inverse_pivots, dim)
        _copy(vectors, _RIGHT, lam, grad, row)
        _substitute(matrix, inverse_pivots, vectors, _U, dim)  # u of (3): (J / lambda)^-1 g
        _difference(grad_z, row, grad, row, vectors, _U)
        grad_reg[row] = -_dot(grad_z, row, vectors, _Y)
        shift = _dot(vectors, _MEAN, vectors, _U)
        for s in range(size):
            _add_multiple(grad_codes, members[s], share[s], vectors, _U)
            _add_multiple(grad_codes, members[s], _dot(spread, s, vectors, _U) - shift, vectors, _Y)
