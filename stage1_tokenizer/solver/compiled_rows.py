"""Problem (1) and its gradient for some rows, compiled: active sets on an inverse that is kept up to date.

Notation and equation numbers are those of docs/quantizer.md. All arithmetic is float64. A row's coordinates are centred
on its nearest code c_n, the anchor: a_k = c_k - c_n. With v_k = (a_k, 1), x = (y, -tau) and sums over a support, the
linear system of the support is

    (diag(lambda, .., lambda, 0) + sum of v_k v_k^T) x = (z - c_n, 1 - sum of e_k),    weights e_k + v_k.x,

so any code that enters or leaves changes the matrix by v_k v_k^T, and its inverse by one rank-one update (Sherman and
Morrison). Rounding errors add up on the way; a fresh factorisation takes them out of the solution.

All compiled code is in this one file, because a function's file tells whether its kept code is still good.
"""

import numpy as np
from numba import prange

from scq.stage1_tokenizer.solver.kept_code import njit

ROWS_PER_PART = 128  # what a thread takes at a time
_BLOCK = 64  # codes priced together; a lane is a position in a block, and the best code of a lane is a candidate
_TOGETHER = 4  # coordinates whose products are summed in registers before the sum goes back to memory
_ENTERING = 2  # codes that may enter a support after one pricing pass, one from each half of the lanes
_LEAST_PIVOT = 1e-9  # of an update: below it the inverse is built again

# Not "ninf": padding has price -inf.
_OPTIONS = {"error_model": "numpy", "fastmath": {"nnan", "nsz", "reassoc", "contract", "arcp"}}
compiled = njit(nogil=True, **_OPTIONS)
inlined = njit(nogil=True, inline="always", **_OPTIONS)  # a call would count every array's references up and down
compiled_in_parallel = njit(nogil=True, parallel=True, **_OPTIONS)


def in_blocks(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (K, F) as (blocks, F / _TOGETHER, _TOGETHER, _BLOCK), and what is added to prices: 0, or -inf for padding.

    The prices of a whole block are then sums over neighbours in memory.
    """
    count, dim = codes.shape
    blocks, groups = -(-count // _BLOCK), -(-dim // _TOGETHER)
    padded = np.zeros((blocks * _BLOCK, groups * _TOGETHER))
    padded[:count, :dim] = codes
    bias = np.zeros(blocks * _BLOCK)
    bias[count:] = -np.inf
    return np.ascontiguousarray(padded.reshape(blocks, _BLOCK, groups, _TOGETHER).transpose(0, 2, 3, 1)), bias


@compiled_in_parallel
def solve_all(z, codes, nearest, reg, blocks, bias, tol, max_iter, support, weights, sizes, residual, moves):
    """Solve (1) for all rows.

    Args:
        z: (N, F) latents and codes (K, F), centred alike; nearest (N,) int64; reg (N,) lambda.
        blocks, bias: the codes as `in_blocks` lays them out.
        tol: what the residual is asked to stay below, in units of weight.
        max_iter: moves of a row's support at most.
        support: (N, room) int64 and weights (N, room) to write to, padded with the nearest code and 0.
        sizes: (N,) int64 to write to: columns in use.
        residual: (N,) to write to: infinite where a support outgrew the room.
        moves: (N,) int64 to write to: moves of each row's support.
    """
    parts = -(-len(z) // ROWS_PER_PART)
    for part in prange(parts):
        first, last = _edges(part, parts, len(z))
        _solve(
            z, codes, nearest, reg, blocks, bias, tol, max_iter, first, last, support, weights, sizes, residual, moves
        )


@compiled_in_parallel
def gradient_all(grad, z, codes, nearest, reg, support, weights, grad_z, grad_codes, grad_reg):
    """The gradient of eq. (3), from ``grad`` (N, F) and rows as solved.

    Writes grad_z (N, F) and grad_reg (N,), and adds to grad_codes (parts, K, F), one part of the rows to each.
    """
    parts = len(grad_codes)
    for part in prange(parts):
        first, last = _edges(part, parts, len(z))
        _gradient(grad, z, codes, nearest, reg, support, weights, first, last, grad_z, grad_codes[part], grad_reg)


@compiled_in_parallel
def combine_all(codes, support, weights, combined):
    """Add C^T p of weights (N, S) and support (N, S) to ``combined`` (N, F)."""
    parts = -(-len(support) // ROWS_PER_PART)
    for part in prange(parts):
        first, last = _edges(part, parts, len(support))
        _combine(codes, support, weights, first, last, combined)


@inlined
def _edges(part, parts, n):
    return part * n // parts, (part + 1) * n // parts


@compiled
def _combine(codes, support, weights, first, last, combined):
    for row in range(first, last):
        for s in range(support.shape[1]):
            weight = weights[row, s]
            if weight > 0.0:
                for f in range(codes.shape[1]):
                    combined[row, f] += weight * codes[support[row, s], f]


@compiled
def _solve(z, codes, nearest, reg, blocks, bias, tol, max_iter, first, last, support, weights, sizes, residual, moves):
    dim, room = z.shape[1], support.shape[1]
    spread = np.empty((room, dim + 1))  # v_k of the support
    members, share, wanted = np.empty(room, np.int64), np.empty(room), np.empty(room)
    right, x, q = np.empty(dim + 1), np.empty(dim + 1), np.empty(dim + 1)
    inverse, matrix, mean = np.empty((dim + 1, dim + 1)), np.empty((dim, dim)), np.empty(dim)
    prices, best, entry, y = np.empty(len(bias)), np.empty(_BLOCK), bias.copy(), np.zeros(blocks.shape[1] * _TOGETHER)
    farthest = 2.0 * np.sqrt((codes * codes).sum(1).max())  # no |c_k - c_n| exceeds it
    for row in range(first, last):
        anchor, lam = nearest[row], reg[row]
        for f in range(dim):
            right[f] = z[row, f] - codes[anchor, f]
        members[0], share[0], size = anchor, 1.0, 1
        _relative(codes, anchor, anchor, spread[0])
        _invert(spread, members, size, anchor, lam, right, inverse, x, q)
        entering, entered, blocked, count, excess, shift = _ENTERING, 0, 0, 0, np.inf, np.inf
        while count < max_iter:
            count += 1
            step, leaver = _step_to_optimum(spread, members, size, anchor, x, share, wanted)
            if leaver >= 0:  # a weight reached zero on the way: it leaves, and the rest is solved again
                blocked += step == 0.0
                updated = _update(inverse, spread[leaver], -1.0, wanted[leaver], x, q)
                size -= 1
                members[leaver], share[leaver] = members[size], share[size]
                spread[leaver] = spread[size]
                if not updated:
                    _invert(spread, members, size, anchor, lam, right, inverse, x, q)
                continue

            # Optimal on its support. Price all codes: those above the threshold tau want to enter.
            y[:dim] = x[:dim]
            one, other = _price(blocks, codes, anchor, members, size, x[dim], y, entry, prices, best)
            if best[other] > best[one]:
                one, other = other, one
            excess = best[one]
            if excess <= tol:
                before, shift = shift, _polish(spread, members, size, anchor, lam, farthest, right, x, q, mean, matrix)
                if shift <= tol or shift > 0.5 * before:
                    break
                continue  # what was priced was not accurate enough to prove anything
            # Codes that enter together may block each other. Then the best one enters alone and must gain weight; if it
            # cannot, its excess is rounding.
            if entered > 0 and blocked == entered:
                if entering == 1:
                    break
                entering = 1
            if size == room:
                excess = np.inf
                break
            before, blocked = size, 0
            for lane in (one, other):
                if size in (room, before + entering) or best[lane] <= max(tol, 0.5 * excess):
                    break
                code = lane
                while prices[code] != best[lane]:
                    code += _BLOCK
                members[size], share[size] = code, 0.0
                _relative(codes, code, anchor, spread[size])
                _update(inverse, spread[size], 1.0, _weight(spread[size], code == anchor, x), x, q)
                size += 1
            entered = size - before
        if shift > tol:
            shift = _polish(spread, members, size, anchor, lam, farthest, right, x, q, mean, matrix)
        for s in range(size):
            wanted[s] = _weight(spread[s], members[s] == anchor, x)
            shift = max(shift, -wanted[s])
            share[s] = max(0.0, wanted[s])
        residual[row], moves[row] = max(excess, shift), count
        sizes[row] = _write(members, share, size, anchor, support[row], weights[row])


@compiled
def _gradient(grad, z, codes, nearest, reg, support, weights, first, last, grad_z, grad_codes, grad_reg):
    dim, room = z.shape[1], support.shape[1]
    spread, members, share = np.empty((room, dim + 1)), np.empty(room, np.int64), np.empty(room)
    y, u, mean, matrix = np.empty(dim), np.empty(dim), np.empty(dim), np.empty((dim, dim))
    for row in range(first, last):
        anchor, lam, size = nearest[row], reg[row], 0
        for f in range(dim):
            y[f] = z[row, f] - codes[anchor, f]
            u[f] = lam * grad[row, f]
        for s in range(room):
            weight = weights[row, s]
            if weight > 0.0:
                members[size], share[size] = support[row, s], weight
                _relative(codes, members[size], anchor, spread[size])
                for f in range(dim):
                    y[f] -= weight * spread[size, f]
                size += 1
        _factorised_system(spread, size, lam, mean, matrix)
        _substitute(matrix, u)  # u of (3): (J / lambda)^-1 g
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


@inlined
def _relative(codes, code, anchor, v):
    """v_k = (c_k - c_n, 1)."""
    dim = codes.shape[1]
    for f in range(dim):
        v[f] = codes[code, f] - codes[anchor, f]
    v[dim] = 1.0


@inlined
def _weight(v, is_anchor, x):
    weight = 1.0 if is_anchor else 0.0
    for f in range(len(x)):
        weight += v[f] * x[f]
    return weight


@compiled
def _invert(spread, members, size, anchor, lam, right, inverse, x, q):
    """Inverse and solution x of the system of a support, from its first member, whose inverse is known, to its last.

    ``right`` holds z - c_n; its last entry is scratch.
    """
    dim = len(x) - 1
    v = spread[0]
    right[dim] = 0.0 if members[0] == anchor else 1.0
    corner = 1.0
    for i in range(dim):
        for j in range(dim):
            inverse[i, j] = 0.0
        inverse[i, i] = 1.0 / lam
        inverse[i, dim] = inverse[dim, i] = -v[i] / lam
        corner += v[i] * v[i] / lam
    inverse[dim, dim] = corner
    for i in range(dim + 1):
        x[i] = 0.0
        for j in range(dim + 1):
            x[i] += inverse[i, j] * right[j]
    for s in range(1, size):
        _update(inverse, spread[s], 1.0, _weight(spread[s], members[s] == anchor, x), x, q)


@inlined
def _update(inverse, v, sign, weight, x, q):
    """Count v v^T into the inverted matrix, or with sign -1 out of it; ``weight`` is that of its code before.

    Returns whether the pivot was large enough; if not, inverse and x are left as they were.
    """
    width = len(v)
    for i in range(width):
        q[i] = 0.0
    for j in range(width):
        for i in range(width):
            q[i] += inverse[j, i] * v[j]
    pivot = 1.0
    for i in range(width):
        pivot += sign * q[i] * v[i]
    if pivot < _LEAST_PIVOT:
        return False
    for i in range(width):
        scaled = sign / pivot * q[i]
        x[i] -= scaled * weight
        for j in range(width):
            inverse[i, j] -= scaled * q[j]
    return True


@inlined
def _step_to_optimum(spread, members, size, anchor, x, share, wanted):
    """Move the weights towards the support's optimum until one reaches zero: the step's length, and which or -1."""
    step, leaver = 1.0, -1
    for s in range(size):
        wanted[s] = _weight(spread[s], members[s] == anchor, x)
        if wanted[s] < 0.0:
            reach = share[s] / (share[s] - wanted[s])
            if reach < step:
                step, leaver = reach, s
    for s in range(size):
        share[s] += step * (wanted[s] - share[s])
    return step, leaver


@inlined
def _price(blocks, codes, anchor, members, size, minus_tau, y, entry, prices, best):
    """Prices e_k + a_k.y - tau of all codes, -inf for members, and the best of each lane; the best lane of each half.

    ``entry`` is 0, and -inf for padding, before and after.
    """
    offset = minus_tau
    for f in range(codes.shape[1]):
        offset -= codes[anchor, f] * y[f]
    entry[anchor] = 1.0
    for s in range(size):
        entry[members[s]] = -np.inf
    for lane in range(_BLOCK):
        best[lane] = -np.inf
    for block in range(blocks.shape[0]):
        start = block * _BLOCK
        for lane in range(_BLOCK):
            prices[start + lane] = entry[start + lane] + offset
        for group in range(blocks.shape[1]):
            for lane in range(_BLOCK):
                price = prices[start + lane]
                for j in range(_TOGETHER):
                    price += blocks[block, group, j, lane] * y[group * _TOGETHER + j]
                prices[start + lane] = price
        for lane in range(_BLOCK):
            best[lane] = max(best[lane], prices[start + lane])
    entry[anchor] = 0.0
    for s in range(size):
        entry[members[s]] = 0.0
    one, other = 0, _BLOCK // 2
    for lane in range(1, _BLOCK // 2):
        if best[lane] > best[one]:
            one = lane
        if best[_BLOCK // 2 + lane] > best[other]:
            other = _BLOCK // 2 + lane
    return one, other


@compiled
def _polish(spread, members, size, anchor, lam, farthest, right, x, rest, mean, matrix):
    """Take the error that updates left out of x, by a fresh factorisation; returns the most that any price moves."""
    dim = len(mean)
    _factorised_system(spread, size, lam, mean, matrix)
    missing = 1.0  # weight
    for f in range(dim):
        rest[f] = right[f] - lam * x[f]
    for s in range(size):
        weight = _weight(spread[s], members[s] == anchor, x)
        missing -= weight
        for f in range(dim):
            rest[f] -= weight * spread[s, f]
    for f in range(dim):
        rest[f] -= missing * mean[f]
    _substitute(matrix, rest)
    lift, length = missing / size, 0.0
    for f in range(dim):
        x[f] += rest[f]
        lift -= mean[f] * rest[f]
        length += rest[f] * rest[f]
    x[dim] += lift
    return abs(lift) + farthest * np.sqrt(length)


@compiled
def _factorised_system(spread, size, lam, mean, matrix):
    """Factor of J = lambda I + sum over the support of (c_k - m)(c_k - m)^T into ``matrix``, m - c_n into ``mean``."""
    dim = len(mean)
    for i in range(dim):
        mean[i] = 0.0
        for j in range(dim):
            matrix[i, j] = 0.0
    for s in range(size):
        for i in range(dim):
            mean[i] += spread[s, i]
            for j in range(dim):
                matrix[i, j] += spread[s, i] * spread[s, j]
    for i in range(dim):
        mean[i] /= size
    for i in range(dim):
        for j in range(dim):
            matrix[i, j] -= size * mean[i] * mean[j]
        matrix[i, i] += lam
    _factorise(matrix)


@inlined
def _factorise(matrix):
    """Cholesky factor in the lower triangle, in place, with the inverses of its diagonal on the diagonal."""
    dim = len(matrix)
    for j in range(dim):
        for k in range(j):
            for i in range(j, dim):
                matrix[i, j] -= matrix[i, k] * matrix[j, k]
        inverse = 1.0 / np.sqrt(matrix[j, j])
        for i in range(j + 1, dim):
            matrix[i, j] *= inverse
        matrix[j, j] = inverse


@inlined
def _substitute(factor, x):
    """Solve factor factor^T x = x in place; entries of x beyond the factor's are left alone."""
    dim = len(factor)
    for i in range(dim):
        for k in range(i):
            x[i] -= factor[i, k] * x[k]
        x[i] *= factor[i, i]
    for i in range(dim - 1, -1, -1):
        for k in range(i + 1, dim):
            x[i] -= factor[k, i] * x[k]
        x[i] *= factor[i, i]


@compiled
def _write(members, share, size, anchor, support, weights):
    """A row's members with the anchor first, then the rest, then padding; how many columns they take."""
    support[0], weights[0] = anchor, 0.0
    column = 1
    for s in range(size):
        if members[s] == anchor:
            weights[0] = share[s]
        else:
            support[column], weights[column] = members[s], share[s]
            column += 1
    for s in range(column, len(support)):
        support[s] = anchor
    return column
