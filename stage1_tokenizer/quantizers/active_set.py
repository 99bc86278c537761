"""Problem (1) over a few codes per row by a primal active-set method: slower than Newton's, and it cannot stall.

Semismooth Newton takes ever shorter steps as lambda goes to zero. The objective of (1) is strictly convex, so changing
the support one code at a time and lowering the objective at every change ends after finitely many changes for any
lambda; rows that Newton left open come here, with the weights it reached.
"""

import torch
from torch import Tensor

from stage1_tokenizer.quantizers.dual_newton import DualPoint, solve_dual, solve_support_system, support_spread
from stage1_tokenizer.quantizers.simplex import simplex_threshold


# Support changes that a row may take for every Newton step it may take.
_CHANGES_PER_STEP = 10


def solve_small(codes: Tensor, target: Tensor, reg: Tensor, y: Tensor, *, tol: float, max_iter: int) -> DualPoint:
    """Minimise (1) over the given codes of each row, by Newton's method and, where that stalls, by active sets.

    Arguments as in `dual_newton.solve_dual`, whose ``max_iter`` the active sets take tenfold.
    """
    point = solve_dual(codes, target, reg, y, tol=tol, max_iter=max_iter)
    stalled = (point.step > tol).nonzero().squeeze(1)
    if stalled.numel() == 0:
        return point
    again = solve_active_set(
        codes[stalled],
        target[stalled],
        reg[stalled],
        point.weights[stalled],
        tol=tol,
        max_iter=_CHANGES_PER_STEP * max_iter,
    )
    for whole, part in zip(point[:4], again[:4], strict=True):
        whole[stalled] = part
    return point._replace(iterations=point.iterations + again.iterations)


def solve_active_set(
    codes: Tensor, target: Tensor, reg: Tensor, weights: Tensor, *, tol: float, max_iter: int
) -> DualPoint:
    """Minimise (1) over the given codes of each row; arguments as in `dual_newton.solve_dual`.

    Args:
        weights: (n, m) a feasible start, on the simplex.
        max_iter: changes of a support at most.
    """
    rows = torch.arange(len(codes), device=codes.device)
    y, p = torch.zeros_like(target), weights.clone()
    used = p > 0
    iterations = 0
    for iterations in range(1, max_iter + 1):
        c, s, now = codes[rows], used[rows], p[rows]
        open_y, best, prices, tau = _best_on_support(c, target[rows], reg[rows], s)
        # As far towards the support's own optimum as no weight turns negative; those that reach zero leave.
        blocked = s & (best < 0)
        reach = torch.where(blocked, now / (now - best), torch.inf)
        share = reach.amin(1, keepdim=True)
        now = torch.where(share < 1, now + share.clamp_max(1) * (best - now), best)
        leaves = blocked & (reach <= share)
        now = now.masked_fill(leaves, 0)
        # At the optimum of its support a row takes in the code of highest price above the threshold, if there is one.
        whole = ~blocked.any(1)
        excess, entering = torch.where(s, -torch.inf, prices - tau).max(1)
        grows = whole & (excess > 0.1 * tol)
        s = s & ~leaves
        s[grows, entering[grows]] = True
        p[rows], used[rows], y[rows] = now, s, open_y
        rows = rows[~(whole & ~grows)]
        if rows.numel() == 0:
            break
    v = (codes @ y.unsqueeze(-1)).squeeze(-1)
    v[:, 0] += 1
    tau = simplex_threshold(v)
    return DualPoint(y, p, tau, ((v - tau).clamp_min_(0) - p).abs().amax(1), iterations)


def _best_on_support(codes: Tensor, target: Tensor, reg: Tensor, used: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Optimum of (1) on a support without its sign constraints: y, weights, the prices of all codes and tau.

    On the support p_k = e_k + c_k.y - tau, so J y = target - sum_k spread_k e_k with the J of Newton's step.
    """
    spread = support_spread(codes, used)
    y = solve_support_system(spread, reg, target - spread[:, 0])
    prices = (codes @ y.unsqueeze(-1)).squeeze(-1)
    prices[:, 0] += 1
    tau = ((prices * used).sum(1, keepdim=True) - 1) / used.sum(1, keepdim=True)
    return y, (prices - tau) * used, prices, tau
