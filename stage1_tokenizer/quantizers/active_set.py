"""Problem (1) over a few codes per row by a primal active-set method, all rows at once.

Every row keeps a support and weights on the simplex. It moves towards the optimum of its support as far as no weight
turns negative; a weight that reaches zero leaves the support; a row at its support's optimum takes in codes whose price
c_k.y + e_k is above the threshold tau, and is solved when there is none. The objective of (1) is strictly convex and falls
at every move, so a row ends after finitely many moves whatever lambda is. The optimum of a support costs one linear
system in the F unknowns of the dual, eq. (2) of docs/quantizer.md.

Codes arrive centred on the row's nearest code: that code is the origin and a codebook far away keeps its digits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stage1_tokenizer.quantizers.simplex import simplex_threshold, solve_positive_definite

# Codes within this share of the highest excess price enter together: fewer moves, and the odd one leaves again.
_ENTER_SHARE = 0.8
# Rows that are solved are dropped from memory once they are this share of those at hand: dropping copies the rest.
_DROP_SHARE = 0.2


class SmallSolution(NamedTuple):
    """Rows of problem (1) over m codes each."""

    weights: Tensor  # (n, m) on the simplex
    y: Tensor  # (n, F) dual variable, (target - z_q) / lambda at the optimum
    threshold: Tensor  # (n, 1) tau: a code is used when its price is above it
    error: Tensor  # (n,) largest error of a weight, to first order, for these codes
    iterations: int


def solve_active_set(
    codes: Tensor, target: Tensor, reg: Tensor, weights: Tensor, enters: Tensor, *, tol: float, max_iter: int
) -> SmallSolution:
    """Minimise (1) over the given codes of each row.

    Args:
        codes: (n, m, F) candidate codes minus the row's nearest code; column 0 is the nearest code itself, all zeros.
            A column that repeats column 0 never gets weight, so it serves as padding.
        target: (n, F) latent minus its nearest code.
        reg: (n, 1) lambda.
        weights: (n, m) where to start, on the simplex.
        enters: (n, m) bool, codes without weight that join the support at the start.
        tol: how far above the threshold a price outside the support may be.
        max_iter: moves of a row at most.
    """
    p, y = weights.clone(), torch.zeros_like(target)
    rows = torch.arange(len(codes), device=codes.device)
    tiny, huge = torch.finfo(codes.dtype).tiny, torch.finfo(codes.dtype).max / 4
    # Sets are kept as 0 and 1 in floating point: arithmetic on them is vectorised, selecting by booleans is not.
    used = ((weights > 0) | enters).to(codes.dtype)
    c, d, lam, now = codes, target, reg, weights
    iterations = 0
    while iterations < max_iter and rows.numel():
        iterations += 1
        y_now, price, tau = _support_optimum(c, d, lam, used)
        above = price - tau
        best = above * used
        # A weight reaches zero at the share now / (now - best) of the way: the first one is where now falls fastest.
        fall = best.neg().clamp_min_(0) / now.clamp_min(tiny)
        steepest = fall.amax(1, keepdim=True)
        stays = (fall < steepest.clamp_min(tiny)).to(codes.dtype)
        now = torch.addcmul(now, best - now, 1 / (1 + steepest)) * stays
        # A row that got there takes in the codes whose price is highest above the threshold.
        highest = (above - huge * used).amax(1, keepdim=True)
        blocked = steepest > 0
        bar = (_ENTER_SHARE * highest).clamp_min(tol) + huge * blocked.to(codes.dtype)
        enters = (above - huge * used >= bar).to(codes.dtype)
        used = used * stays + enters
        done = ((highest <= tol) & ~blocked).squeeze(1)
        if int(done.sum()) > _DROP_SHARE * len(rows) or iterations == max_iter:
            p[rows], y[rows] = now, y_now
            left = (~done).nonzero().squeeze(1)
            rows, c, d, lam, now, used = (x[left] for x in (rows, c, d, lam, now, used))
    v = _prices(codes, y)
    tau = simplex_threshold(v)
    return SmallSolution(p, y, tau, _error(codes, target, reg, p, y, (v - tau).clamp_min_(0)), iterations)


def _error(codes: Tensor, target: Tensor, reg: Tensor, p: Tensor, y: Tensor, projected: Tensor) -> Tensor:
    """(n,) error of the weights to first order: their distance from Proj(e + C y) plus what another step would change."""
    spread, _ = centre_on_support(codes, (p > 0).to(p.dtype))
    step = solve_support_system(spread, reg, target - (p.unsqueeze(1) @ codes).squeeze(1) - reg * y)
    return (projected - p).abs_().amax(1) + (spread @ step.unsqueeze(-1)).squeeze(-1).abs_().amax(1)


def centre_on_support(codes: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Codes around the mean of those in use: c_k - m (n, m, F), zero for codes not in use, and m (n, 1, F).

    Args:
        codes: (n, m, F); used: (n, m), one for codes in use and zero for the others.
    """
    mean = (used.unsqueeze(1) @ codes) / used.sum(1)[:, None, None]
    return (codes - mean).mul_(used.unsqueeze(-1)), mean


def solve_support_system(spread: Tensor, reg: Tensor, right: Tensor) -> Tensor:
    """Solve J x = right, J = reg I + sum_k spread_k spread_k^T, in the smaller of the F and the m dimensions.

    Args:
        spread: (n, m, F), reg: (n, 1), right: (n, F).
    """
    _, m, dim = spread.shape
    if dim <= m:
        matrix = spread.transpose(1, 2) @ spread
        matrix.diagonal(dim1=1, dim2=2).add_(reg)
        return solve_positive_definite(matrix, right)
    matrix = spread @ spread.transpose(1, 2)
    matrix.diagonal(dim1=1, dim2=2).add_(reg)
    inner = solve_positive_definite(matrix, (spread @ right.unsqueeze(-1)).squeeze(-1))
    return (right - (inner.unsqueeze(1) @ spread).squeeze(1)) / reg


def _support_optimum(codes: Tensor, target: Tensor, reg: Tensor, used: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Optimum of (1) on a support without its sign constraints: y (n, F), the prices of all codes (n, m), tau (n, 1).

    On the support p_k = e_k + c_k.y - tau, which makes (2) linear:  J y = target - m - sum_k e_k (c_k - m).
    """
    spread, mean = centre_on_support(codes, used)
    y = solve_support_system(spread, reg, target - mean.squeeze(1) - spread[:, 0])
    price = _prices(codes, y)
    return y, price, ((price * used).sum(1, keepdim=True) - 1) / used.sum(1, keepdim=True)


def _prices(codes: Tensor, y: Tensor) -> Tensor:
    """e + C y (n, m)."""
    price = (codes @ y.unsqueeze(-1)).squeeze(-1)
    price[:, 0] += 1
    return price
