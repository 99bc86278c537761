"""Problem (1) over a few codes per row by a primal active-set method, all rows at once.

Every row keeps a support and weights on the simplex. It moves towards the optimum of its support as far as no weight
turns negative; a weight that reaches zero leaves the support; a row at its support's optimum takes in codes whose price
c_k.y + e_k is above the threshold tau, and is solved when there is none. The objective of (1) is strictly convex and
falls at every move, so a row ends after finitely many moves whatever lambda is.

Codes arrive centred on the nearest code c_n and with a leading one: (1, c_k - c_n). The dual variables of a row are
(-tau, y), so that one product gives every price above the threshold, and the optimum of a support is one symmetric
positive definite system in F + 1 unknowns: eq. (2) of docs/quantizer.md on a fixed support. The nearest code is the
origin, which keeps the digits of a codebook far away.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scq.stage1_tokenizer.solver.simplex import solve_positive_definite

# Codes within this share of the highest excess price enter together: fewer moves, and the odd one leaves again.
ENTER_SHARE = 0.4
# Rows that are solved are dropped from memory once they are this share of those at hand: dropping copies the rest.
_DROP_SHARE = 0.1


class SmallSolution(NamedTuple):
    """Rows of problem (1) over m codes each."""

    weights: Tensor  # (n, m) on the simplex
    dual: Tensor  # (n, 1 + F): -tau and y, which is (target - z_q) / lambda at the optimum
    iterations: int


def solve_active_set(
    codes: Tensor, target: Tensor, reg: Tensor, weights: Tensor, enters: Tensor, *, tol: float, max_iter: int
) -> SmallSolution:
    """Minimise (1) over the given codes of each row.

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
    p, dual = weights.clone(), torch.zeros_like(codes[:, 0])
    rows = torch.arange(len(codes), device=codes.device)
    tiny, huge = torch.finfo(codes.dtype).tiny, torch.finfo(codes.dtype).max / 4
    # Sets are kept as 0 and 1 in floating point: arithmetic on them is vectorised, selecting by booleans is not.
    used = weights.sign() + enters
    c, d, lam, now = codes, target, reg, weights
    iterations = 0
    while iterations < max_iter and rows.numel():
        iterations += 1
        x = solve_support(c, used, lam, torch.cat([1 - used[:, :1], d], 1))
        above = prices_above(c, x)
        best = above * used
        # A weight reaches zero at the share now / (now - best) of the way: the first one is where now falls fastest.
        fall = best.neg().clamp_min_(0) / now.clamp_min(tiny)
        steepest = fall.amax(1, keepdim=True)
        stays = (fall < steepest.clamp_min(tiny)).to(c.dtype)
        now = torch.addcmul(now, best - now, 1 / (1 + steepest)) * stays
        # A row that got there takes in the codes whose price is highest above the threshold.
        above -= huge * used
        highest = above.amax(1, keepdim=True)
        done = torch.maximum(highest, steepest).squeeze(1) <= tol * (steepest <= 0).squeeze(1).to(c.dtype)
        bar = (ENTER_SHARE * highest).clamp_min(tol) + huge * steepest.sign()
        used = used * stays + (above >= bar).to(c.dtype)
        if int(done.sum()) > _DROP_SHARE * len(rows) or iterations == max_iter:
            p[rows], dual[rows] = now, x
            left = (~done).nonzero().squeeze(1)
            rows, c, d, lam, now, used = (t[left] for t in (rows, c, d, lam, now, used))
    return SmallSolution(p, dual, iterations)


def prices_above(codes: Tensor, dual: Tensor) -> Tensor:
    """e_k + c_k.y - tau (n, m) of codes (n, m, 1 + F) at the dual variables (n, 1 + F)."""
    above = (codes @ dual.unsqueeze(-1)).squeeze(-1)
    above[:, 0] += 1
    return above


def solve_support(codes: Tensor, used: Tensor, reg: Tensor, right: Tensor) -> Tensor:
    """Solve (diag(0, reg, .., reg) + sum over the support of (1, c_k)(1, c_k)^T) x = right for every row.

    With right = (1 - sum of e over the support, target) x is (-tau, y) at the optimum of the support; with right =
    (0, g) it is (-m.v, v), v = J^-1 g, J = reg I + sum_k (c_k - m)(c_k - m)^T, m the mean of the support's codes.

    Args:
        codes: (n, m, 1 + F); used: (n, m), 1 on the support and else 0, not all 0; reg: (n, 1); right: (n, 1 + F).
    """
    _, m, size = codes.shape
    chosen = codes * used.unsqueeze(-1)
    if size <= m + 1:
        # The leading one is the first pivot, so elimination centres the codes on their mean before all else.
        matrix = chosen.transpose(1, 2) @ codes
        matrix.diagonal(dim1=1, dim2=2)[:, 1:].add_(reg)
        return solve_positive_definite(matrix, right)
    # Fewer codes than unknowns: eliminate the leading unknown, then solve in the codes' own number (Woodbury).
    mean = chosen.sum(1) / used.sum(1, keepdim=True)  # (n, 1 + F), (1, m)
    spread = (chosen - mean.unsqueeze(1) * used.unsqueeze(-1))[:, :, 1:]
    goal = right[:, 1:] - mean[:, 1:] * right[:, :1]
    matrix = spread @ spread.transpose(1, 2)
    matrix.diagonal(dim1=1, dim2=2).add_(reg)
    inner = solve_positive_definite(matrix, (spread @ goal.unsqueeze(-1)).squeeze(-1))
    v = (goal - (inner.unsqueeze(1) @ spread).squeeze(1)) / reg
    lead = right[:, :1] / used.sum(1, keepdim=True) - (mean[:, 1:] * v).sum(1, keepdim=True)
    return torch.cat([lead, v], 1)


def weight_error(codes: Tensor, target: Tensor, reg: Tensor, weights: Tensor, dual: Tensor) -> Tensor:
    """(n,) error of weights to first order, in units of weight.

    That is their distance from what the dual variables make of them, max(e + C y - tau, 0), plus what the step would
    change that mends the other half of the optimality conditions, reg y = target - C^T p.
    """
    used = weights.sign()
    distance = (prices_above(codes, dual).clamp_min_(0) - weights).abs_().amax(1)
    miss = torch.cat([1 - weights.sum(1, keepdim=True), target - reg * dual[:, 1:]], 1)
    miss[:, 1:] -= (weights.unsqueeze(1) @ codes[:, :, 1:]).squeeze(1)
    step = (codes @ solve_support(codes, used, reg, miss).unsqueeze(-1)).squeeze(-1) * used
    return distance + step.abs_().amax(1)
