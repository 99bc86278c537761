"""Problem (1) over a few codes per row: semismooth Newton on its dual, eq. (2) of docs/quantizer.md.

The unknown is y in R^F; the weights follow as p = Proj(e + C y). Codes arrive centred on the row's nearest code, so the
nearest code is the origin: its price stays e = 1, sums of weights drop out, and far-away codebooks keep their digits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stage1_tokenizer.quantizers.simplex import simplex_threshold, solve_positive_definite


class DualPoint(NamedTuple):
    """Rows of a solved problem."""

    y: Tensor  # (n, F) dual variable, (target - z_q) / reg at the optimum
    weights: Tensor  # (n, m)
    threshold: Tensor  # (n, 1) tau: a code is used when its price is above it
    step: Tensor  # (n,) largest change of a weight in the last Newton step: the stationarity residual
    iterations: int


def solve_dual(codes: Tensor, target: Tensor, reg: Tensor, y: Tensor, *, tol: float, max_iter: int) -> DualPoint:
    """Minimise (1) over the given codes of each row.

    Args:
        codes: (n, m, F) candidate codes minus the row's nearest code; column 0 is the nearest code itself, all zeros.
            A column that repeats column 0 never gets weight, so it serves as padding.
        target: (n, F) latent minus its nearest code.
        reg: (n, 1) lambda.
        y: (n, F) starting point; a solution of a subset of the codes is a good one.
        tol: stop a row when a step has changed no weight by more than this.
        max_iter: Newton steps at most.
    """
    n, m, _ = codes.shape
    y, weights = y.clone(), codes.new_empty(n, m)
    threshold, last_step = codes.new_empty(n, 1), codes.new_full((n,), torch.inf)
    rows = None  # indices of the rows still open; None: all of them
    iterations = 0
    open_codes, open_target, open_reg, open_y = codes, target, reg, y
    v, tau, p = _prices(open_codes, open_y)
    for iterations in range(1, max_iter + 1):
        direction, slope = _newton_direction(open_codes, p, open_target, open_reg, open_y)
        full_y = open_y + direction
        full_v, full_tau, full_p = _prices(open_codes, full_y)
        step = (full_p - p).abs_().amax(1)
        w = full_v - v
        full_slope = (direction * (open_target - open_reg * full_y)).sum(1) - (w * full_p).sum(1)
        # Close to the optimum both slopes are rounding noise, so a step that changes nothing is never shortened.
        short = ((full_slope < -_SLOPE_SHARE * slope) & (step > tol)).nonzero().squeeze(1)
        if short.numel():
            curve = (open_reg * direction.square().sum(1, keepdim=True))[short]
            t = _line_search(
                v[short], w[short], slope[short].unsqueeze(1), full_slope[short].unsqueeze(1), p[short], curve
            )
            full_y[short] = open_y[short] + t * direction[short]
            full_v[short], full_tau[short], full_p[short] = _prices(open_codes[short], full_y[short])
            # Only a full step proves anything: a shortened one can leave the weights as they are, far from the optimum.
            step[short] = torch.inf
        open_y, v, tau, p = full_y, full_v, full_tau, full_p
        done = (step <= tol) | (iterations == max_iter)
        if done.any():
            where = done if rows is None else rows[done]
            y[where], weights[where], threshold[where], last_step[where] = open_y[done], p[done], tau[done], step[done]
            left = (~done).nonzero().squeeze(1)
            rows = left if rows is None else rows[left]
            if rows.numel() == 0:
                break
            open_codes, open_target, open_reg, open_y = (x[left] for x in (open_codes, open_target, open_reg, open_y))
            v, tau, p = v[left], tau[left], p[left]
    return DualPoint(y, weights, threshold, last_step, iterations)


def _newton_direction(codes: Tensor, p: Tensor, target: Tensor, reg: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Newton step on the dual, J dy = target - C^T p - reg y (n, F), and the dual's slope along it (n,)."""
    residual = target - (p.unsqueeze(1) @ codes).squeeze(1) - reg * y  # (n, F)
    direction = solve_support_system(support_spread(codes, p > 0), reg, residual)
    return direction, (direction * residual).sum(1)


def support_spread(codes: Tensor, used: Tensor) -> Tensor:
    """(n, m, F): c_k - m for the codes in use, m being their mean; zero for the others."""
    used = used.to(codes.dtype)
    mean = (used.unsqueeze(1) @ codes) / used.sum(1)[:, None, None]  # (n, 1, F)
    return (codes - mean) * used.unsqueeze(-1)


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


def _prices(codes: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Prices v = e + C y (n, m), the simplex threshold (n, 1) of each row and the weights Proj(v) (n, m)."""
    v = (codes @ y.unsqueeze(-1)).squeeze(-1)
    v[:, 0] += 1  # e: one on the nearest code
    tau = simplex_threshold(v)
    return v, tau, (v - tau).clamp_min_(0)


# A step is kept when the slope has fallen to this share of the first slope: an exact line search gains nothing.
_SLOPE_SHARE = 0.25
_PROBES = 8


def _line_search(v: Tensor, w: Tensor, first: Tensor, full: Tensor, p: Tensor, curve: Tensor) -> Tensor:
    """Step lengths (n, 1) in (0, 1) for rows whose full step overshot, from the slope of the concave dual along it.

    With v the prices at the start, w their change over the full step, p the weights at the start, the slope at t is
    first - t curve - w.(Proj(v + t w) - p): no code is touched. It falls from ``first`` > 0 to ``full`` < 0.
    """
    n = len(v)
    t = first.new_empty(n, 1)
    rows = torch.arange(n, device=v.device)
    low, high = torch.zeros_like(first), torch.ones_like(first)
    slope_low, slope_high, goal = first, full, _SLOPE_SHARE * first
    for probe_number in range(_PROBES):
        # The secant's root, kept away from the ends of the bracket so that it shrinks whatever the curvature.
        probe = low + (slope_low / (slope_low - slope_high)).clamp(0.1, 0.9) * (high - low)
        moved = torch.addcmul(v, probe, w)
        weights = (moved - simplex_threshold(moved)).clamp_min_(0)
        slope = first - probe * curve - (w * (weights - p)).sum(1, keepdim=True)
        rising = slope > 0
        low, slope_low = torch.where(rising, probe, low), torch.where(rising, slope, slope_low)
        high, slope_high = torch.where(rising, high, probe), torch.where(rising, slope_high, slope)
        done = (slope.abs() <= goal).squeeze(1)
        t[rows] = probe
        if probe_number == _PROBES - 1:
            # A bracket still open ends at its lower end, where the dual is surely higher than at the start.
            t[rows] = torch.where(done.unsqueeze(1) | (low == 0), probe, low)
            break
        if done.all():
            break
        left = (~done).nonzero().squeeze(1)
        rows = rows[left]
        v, w, first, p, curve, goal = v[left], w[left], first[left], p[left], curve[left], goal[left]
        low, high, slope_low, slope_high = low[left], high[left], slope_low[left], slope_high[left]
    return t
