"""The whole-tensor implementation, for any device: all rows of problem (1) take each step together.

Equation numbers are those of docs/quantizer.md. From the top down:

- `solve_rows` generates columns. It solves (1) over a few codes per row, the working set, and prices all the others. A
  code outside the working set can only gain weight where its price is above the threshold tau, so a pass that finds no
  such code proves that the solution over the working set solves the whole problem; otherwise the codes it found join.
- `solve_local` does one such round over the nearest codes, without the proof.
- `solve_active_set` solves (1) over the working sets by a primal active-set method.
- `solve_support` solves eq. (2) on fixed supports, by `solve_positive_definite`.
- `combine_rows` and `gradient_rows` make z_q of the weights, and the gradient of eq. (3).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scq.stage1_tokenizer.solver.codebook import Codebook, add_rows, compact

# Codes per row that a chunk of rows is planned for; supports rarely reach it.
_PLANNED_COLUMNS = 24
_MAX_ROUNDS = 200
# Codes within this share of the highest excess price enter together: fewer moves, and few of them have to leave again.
_ENTER_SHARE = 0.4
# Solved rows are dropped from memory once they are this share of those at hand, because dropping copies the rest.
_DROP_SHARE = 0.1
# Unrolling D columns launches about 3 D tensor operations; beyond this LAPACK's call per matrix is the cheaper one.
_UNROLL_UP_TO = 32


class SolvedRows(NamedTuple):
    """Solutions of n rows over all K codes."""

    support: Tensor  # (n, S) int64, padded with the nearest code
    weights: Tensor  # (n, S), padded with 0
    nearest: Tensor  # (n,) int64, the nearest codes
    residual: Tensor  # (n,) error of the weights or the highest price above the threshold, whichever is larger
    iterations: int | Tensor  # moves of the support of the row that took most, over all rounds


class SmallSolution(NamedTuple):
    """Solutions of n rows over m codes each."""

    weights: Tensor  # (n, m) on the simplex
    dual: Tensor  # (n, 1 + F): -tau and y, which is (target - z_q) / lambda at the optimum
    iterations: int


def join(parts: list[SolvedRows], rows: list[Tensor] | None = None) -> SolvedRows:
    """Join solutions of some rows each, padding their supports to the widest, in the first part's dtype.

    Args:
        rows: indices of the rows that each part solves, every row once; None: consecutive rows.
    """
    sizes = [len(part.support) for part in parts]
    width, first = max(part.support.shape[1] for part in parts), parts[0]
    if rows is None:
        rows = list(torch.arange(sum(sizes), device=first.support.device).split(sizes))
    support = first.support.new_empty(sum(sizes), width)
    weights = first.weights.new_zeros(sum(sizes), width)
    nearest, residual = first.nearest.new_empty(sum(sizes)), first.residual.new_empty(sum(sizes))
    for where, part in zip(rows, parts, strict=True):
        padding = part.nearest.unsqueeze(1).expand(-1, width - part.support.shape[1])
        support[where] = torch.cat([part.support, padding], 1)
        weights[where, : part.weights.shape[1]] = part.weights.to(weights.dtype)
        nearest[where], residual[where] = part.nearest, part.residual.to(residual.dtype)
    return SolvedRows(support, weights, nearest, residual, max(part.iterations for part in parts))


def solve_rows(book: Codebook, z: Tensor, reg: Tensor, *, tol: float, max_iter: int) -> SolvedRows:
    """Solve (1) exactly for latents z (n, F), centred as the codebook is, and lambda reg (n, 1).

    Args:
        tol: what the residual is asked to stay below, in units of weight.
        max_iter: moves of a row's support at most, in each round.
    """
    parts = []
    for rows in book.chunks(len(z), _PLANNED_COLUMNS):
        nearest, working = _first_working_set(book, z[rows])
        parts.append(_generate_columns(book, z[rows], reg[rows], nearest, working, tol, max_iter))
    return join(parts)


def solve_local(book: Codebook, z: Tensor, reg: Tensor, *, neighbours: int, tol: float, max_iter: int) -> SolvedRows:
    """Solve (1) over the ``neighbours`` nearest codes of latents z (n, F), centred as the codebook is; reg (n, 1).

    The residual is against all K codes nevertheless.
    """
    count = min(neighbours, book.size)
    parts = []
    for rows in book.chunks(len(z), count):
        nearest, working = _first_working_set(book, z[rows], count)  # (n,), (n, m)
        codes = book.around(nearest, working)  # (n, m, 1 + F)
        target = z[rows] - book.codes[nearest]  # (n, F)
        start = torch.zeros_like(codes[:, :, 0])
        start[:, 0] = 1
        none = torch.zeros_like(start)
        point = solve_active_set(codes, target, reg[rows], start, none, tol=0.5 * tol, max_iter=max_iter)
        error = weight_error(codes, target, reg[rows], point.weights, point.dual)
        excess, _ = book.missing(working, book.to_global(nearest, point.dual))
        residual = torch.maximum(error, excess.amax(1))
        parts.append(SolvedRows(working, point.weights, nearest, residual, point.iterations))
    return join(parts)


def _first_working_set(book: Codebook, z: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Nearest code (n,) and a first working set (n, m): the nearest code, then other near codes, none twice.

    Args:
        count: how many codes, the nearest ones; None: the nearest code of every group of lanes, which costs less.
    """
    nearest, near = [], []
    for rows in book.blocks(len(z)):
        block = book.nearness(z[rows])
        nearest.append(book.argmax(block))
        if count is None:
            near.append(book.candidates(block)[1])
        else:
            near.append(block.topk(count, dim=1, sorted=False).indices)
    nearest, near = torch.cat(nearest), torch.cat(near)
    first = nearest.unsqueeze(1)
    keep = torch.cat([torch.ones_like(first, dtype=torch.bool), near != first], 1)
    return nearest, compact(torch.cat([first, near], 1), keep, nearest)[0]


def _generate_columns(
    book: Codebook, z: Tensor, reg: Tensor, nearest: Tensor, working: Tensor, tol: float, max_iter: int
) -> SolvedRows:
    target = z - book.codes[nearest]  # (n, F)
    rows = torch.arange(len(z), device=z.device)  # those not yet solved, n' of them
    weights = z.new_zeros(working.shape)  # (n', m)
    weights[:, 0] = 1
    enters = torch.zeros_like(weights)  # (n', m)
    parts, solved, iterations = [], [], 0
    for round_number in range(1, _MAX_ROUNDS + 1):
        anchor, d, lam = nearest[rows], target[rows], reg[rows]
        codes = book.around(anchor, working)  # (n', m, 1 + F)
        point = solve_active_set(codes, d, lam, weights, enters, tol=0.5 * tol, max_iter=max_iter)
        iterations += point.iterations
        excess, found = book.missing(working, book.to_global(anchor, point.dual))  # (n', groups) each
        highest = excess.amax(1)
        used = point.weights > 0
        used[:, 0] = True
        # A code whose price is above the threshold gains weight when it enters; where none did, the excess is rounding.
        stuck = ~((point.weights > 0) & (weights <= 0)).any(1) if round_number > 1 else torch.zeros_like(rows > 0)
        done = (highest <= tol) | stuck
        if round_number == _MAX_ROUNDS:
            done = torch.ones_like(done)
        if done.any():
            error = weight_error(codes[done], d[done], lam[done], point.weights[done], point.dual[done])
            support, kept = compact(working[done], used[done], anchor[done], point.weights[done])
            parts.append(SolvedRows(support, kept, anchor[done], torch.maximum(error, highest[done]), iterations))
            solved.append(rows[done])
        left = (~done).nonzero().squeeze(1)
        if left.numel() == 0:
            break
        rows, excess = rows[left], excess[left]
        joins = (excess >= _ENTER_SHARE * highest[left].unsqueeze(1)).to(z.dtype)
        old = point.weights[left]
        working, weights, enters = compact(
            torch.cat([working[left], found[left]], 1),
            torch.cat([used[left], excess > tol], 1),
            anchor[left],
            torch.cat([old, torch.zeros_like(excess)], 1),
            torch.cat([torch.zeros_like(old), joins], 1),
        )
    return join(parts, solved)


def solve_active_set(
    codes: Tensor, target: Tensor, reg: Tensor, weights: Tensor, enters: Tensor, *, tol: float, max_iter: int
) -> SmallSolution:
    """Minimise (1) over the given codes of each row.

    Every row keeps a support and weights on the simplex. It moves towards the optimum of its support as far as no
    weight turns negative. A weight that reaches zero leaves the support. A row at its support's optimum takes in codes
    whose price e_k + c_k.y is above the threshold tau, and is solved when there is none. The objective of (1) is
    strictly convex and falls at every move, so a row ends after finitely many moves, whatever lambda is.

    Codes are centred on the nearest code c_n, which keeps the digits of a codebook far away, and have a leading one.
    The dual variables of a row are (-tau, y), so one product gives every price above the threshold.

    Args:
        codes: (n, m, 1 + F) candidate codes, (1, c_k - c_n); column 0 is the nearest code itself, (1, 0). A column that
            repeats column 0 never gets weight, so it serves as padding.
        target: (n, F) latent minus its nearest code.
        reg: (n, 1) lambda.
        weights: (n, m) where to start, on the simplex.
        enters: (n, m), 1 for codes without weight that join the support at the start, else 0.
        tol: how far above the threshold a price outside the support may be.
        max_iter: moves of a row at most.
    """
    p, dual = weights.clone(), torch.zeros_like(codes[:, 0])  # (n, m), (n, 1 + F)
    rows = torch.arange(len(codes), device=codes.device)
    tiny, huge = torch.finfo(codes.dtype).tiny, torch.finfo(codes.dtype).max / 4
    # Sets are kept as 0 and 1 in floating point: arithmetic on them is vectorised, selecting by booleans is not.
    used = weights.sign() + enters
    c, d, lam, now = codes, target, reg, weights
    iterations = 0
    while iterations < max_iter and rows.numel():
        iterations += 1
        x = solve_support(c, used, lam, torch.cat([1 - used[:, :1], d], 1))  # (n, 1 + F)
        above = _prices_above(c, x)  # (n, m)
        best = above * used
        # A weight reaches zero at the share now / (now - best) of the way: the first one is where now falls fastest.
        fall = best.neg().clamp_min_(0) / now.clamp_min(tiny)
        steepest = fall.amax(1, keepdim=True)  # (n, 1)
        stays = (fall < steepest.clamp_min(tiny)).to(c.dtype)
        now = torch.addcmul(now, best - now, 1 / (1 + steepest)) * stays
        # A row that reached the optimum takes in the codes whose price is highest above the threshold.
        above -= huge * used
        highest = above.amax(1, keepdim=True)  # (n, 1)
        done = torch.maximum(highest, steepest).squeeze(1) <= tol * (steepest <= 0).squeeze(1).to(c.dtype)
        bar = (_ENTER_SHARE * highest).clamp_min(tol) + huge * steepest.sign()
        used = used * stays + (above >= bar).to(c.dtype)
        if int(done.sum()) > _DROP_SHARE * len(rows) or iterations == max_iter:
            p[rows], dual[rows] = now, x
            left = (~done).nonzero().squeeze(1)
            rows, c, d, lam, now, used = (t[left] for t in (rows, c, d, lam, now, used))
    return SmallSolution(p, dual, iterations)


def _prices_above(codes: Tensor, dual: Tensor) -> Tensor:
    """e_k + c_k.y - tau (n, m) of codes (n, m, 1 + F) at the dual variables (n, 1 + F)."""
    above = (codes @ dual.unsqueeze(-1)).squeeze(-1)
    above[:, 0] += 1
    return above


def weight_error(codes: Tensor, target: Tensor, reg: Tensor, weights: Tensor, dual: Tensor) -> Tensor:
    """(n,) error of weights to first order, in units of weight; arguments as for `solve_active_set`.

    That is their distance from what the dual variables make of them, max(e + C y - tau, 0), plus the change of weights
    in the step that would satisfy the other optimality condition, reg y = target - C^T p.
    """
    used = weights.sign()
    distance = (_prices_above(codes, dual).clamp_min_(0) - weights).abs_().amax(1)
    miss = torch.cat([1 - weights.sum(1, keepdim=True), target - reg * dual[:, 1:]], 1)  # (n, 1 + F)
    miss[:, 1:] -= (weights.unsqueeze(1) @ codes[:, :, 1:]).squeeze(1)
    step = (codes @ solve_support(codes, used, reg, miss).unsqueeze(-1)).squeeze(-1) * used  # (n, m)
    return distance + step.abs_().amax(1)


def solve_support(codes: Tensor, used: Tensor, reg: Tensor, right: Tensor) -> Tensor:
    """Solve (diag(0, reg, .., reg) + sum over the support of (1, c_k)(1, c_k)^T) x = right for every row.

    With right = (1 - sum of e over the support, target), x is (-tau, y) at the optimum of the support, eq. (2). With
    right = (0, g) it is (-m.v, v), v = J^-1 g, J = reg I + sum_k (c_k - m)(c_k - m)^T, m the mean of the support's
    codes.

    Args:
        codes: (n, m, 1 + F).
        used: (n, m), 1 on the support and else 0, not all 0.
        reg: (n, 1).
        right: (n, 1 + F).

    Returns:
        x (n, 1 + F).
    """
    _, m, size = codes.shape
    chosen = codes * used.unsqueeze(-1)  # (n, m, 1 + F)
    if size <= m + 1:
        # The leading one is the first pivot, so elimination centres the codes on their mean before all else.
        matrix = chosen.transpose(1, 2) @ codes  # (n, 1 + F, 1 + F)
        matrix.diagonal(dim1=1, dim2=2)[:, 1:].add_(reg)
        return solve_positive_definite(matrix, right)
    # Fewer codes than unknowns: eliminate the leading unknown, then solve in the codes' own number (Woodbury).
    mean = chosen.sum(1) / used.sum(1, keepdim=True)  # (n, 1 + F), (1, m)
    spread = (chosen - mean.unsqueeze(1) * used.unsqueeze(-1))[:, :, 1:]  # (n, m, F)
    goal = right[:, 1:] - mean[:, 1:] * right[:, :1]  # (n, F)
    matrix = spread @ spread.transpose(1, 2)  # (n, m, m)
    matrix.diagonal(dim1=1, dim2=2).add_(reg)
    inner = solve_positive_definite(matrix, (spread @ goal.unsqueeze(-1)).squeeze(-1))  # (n, m)
    v = (goal - (inner.unsqueeze(1) @ spread).squeeze(1)) / reg  # (n, F)
    lead = right[:, :1] / used.sum(1, keepdim=True) - (mean[:, 1:] * v).sum(1, keepdim=True)  # (n, 1)
    return torch.cat([lead, v], 1)


def solve_positive_definite(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``matrix @ x = right`` for every row.

    A batch of thousands of tiny systems is far slower through LAPACK, one call per row, than in a few passes over
    memory.

    Args:
        matrix: (n, D, D) symmetric positive definite.
        right: (n, D).

    Returns:
        x (n, D); a matrix that is not positive definite to working precision gives entries that are not finite.
    """
    size = matrix.shape[-1]
    if size > _UNROLL_UP_TO:
        factor, _ = torch.linalg.cholesky_ex(matrix)
        return torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    # Copies, since it works in place, with rows last, so that every operation below runs over contiguous rows.
    a = matrix.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)  # (D, D, n)
    x = right.t().clone(memory_format=torch.contiguous_format)  # (D, n)
    # a becomes L with unit diagonal and its diagonal holds D of L D L^T; the forward substitution is done on the way.
    for j in range(size - 1):
        column = a[j + 1 :, j] / a[j, j]  # (D-j-1, n)
        a[j + 1 :, j + 1 :] -= column.unsqueeze(1) * a[j, j + 1 :].unsqueeze(0)
        x[j + 1 :] -= column * x[j]
        a[j + 1 :, j] = column
    x /= a.diagonal(dim1=0, dim2=1).t()
    for j in range(size - 1, 0, -1):
        x[:j] -= a[j, :j] * x[j]
    return x.t().contiguous()  # a strided result makes every product with it many times slower


def combine_rows(book: Codebook, support: Tensor, weights: Tensor) -> Tensor:
    """C^T p (N, F), centred as the codebook is, of weights (N, S) on the codes that support (N, S) names."""
    z_q = weights.new_empty(len(weights), book.dim)
    for rows in book.chunks(len(weights), support.shape[1]):
        codes = book.codes[support[rows]]  # (n, S, F)
        z_q[rows] = (weights[rows].unsqueeze(1) @ codes).squeeze(1)
    return z_q


def gradient_rows(
    grad: Tensor, codebook: Tensor, support: Tensor, weights: Tensor, nearest: Tensor, target: Tensor, reg: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of eq. (3).

    Args:
        grad: (N, F) with respect to z_q.
        codebook: (K, F).
        support: (N, S), weights (N, S) and nearest (N,) as solved.
        target: (N, F) z minus its nearest code.
        reg: (N, 1) lambda.

    Returns:
        Gradients with respect to z (N, F), the codebook (K, F) and reg (N, 1).
    """
    book = Codebook(codebook)
    grad_z, grad_codebook, grad_reg = torch.empty_like(grad), torch.zeros_like(codebook), torch.empty_like(reg)
    for rows in book.chunks(len(grad), support.shape[1]):
        codes, p = book.around(nearest[rows], support[rows]), weights[rows]  # (n, S, 1 + F), (n, S)
        used = p.sign()
        right = torch.cat([torch.zeros_like(reg[rows]), grad[rows]], 1)  # (n, 1 + F)
        lifted = reg[rows] * solve_support(codes, used, reg[rows], right)  # (n, 1 + F), (-m.u, u)
        u = lifted[:, 1:]  # (n, F)
        spread_u = (codes @ lifted.unsqueeze(-1)).squeeze(-1) * used  # (n, S), (c_k - m).u
        y = (target[rows] - (p.unsqueeze(1) @ codes)[:, 0, 1:]) / reg[rows]  # (n, F)
        grad_z[rows] = grad[rows] - u
        per_code = p.unsqueeze(-1) * u.unsqueeze(1) + spread_u.unsqueeze(-1) * y.unsqueeze(1)  # (n, S, F)
        entries = used.flatten().nonzero().squeeze(1)  # two thirds are padding, not worth scattering
        add_rows(grad_codebook, support[rows].flatten()[entries], per_code.flatten(0, 1)[entries])
        grad_reg[rows] = -(grad_z[rows] * y).sum(1, keepdim=True)
    return grad_z, grad_codebook, grad_reg
