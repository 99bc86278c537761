"""Small dense linear algebra that the convex quantizer runs over many rows at once.

Every routine is batched over rows and written in whole-tensor operations: a batch of thousands of tiny systems is
far slower through LAPACK, one call per row, than through a handful of passes over memory.
"""

import torch
from torch import Tensor

# Unrolling D columns launches about 3 D tensor operations; beyond this LAPACK's call per matrix is the cheaper one.
_UNROLL_UP_TO = 32


def simplex_threshold(v: Tensor, start: Tensor | None = None) -> Tensor:
    """Threshold tau of the projection on the probability simplex: Proj(v) = max(v - tau, 0) sums to one.

    Newton's method on the convex, decreasing, piecewise linear function sum(max(v - tau, 0)) - 1. From any start left
    of the root it climbs monotonically and ends after finitely many steps, each a pass over ``v``: nothing is sorted.

    Args:
        v: (n, m) rows to project, finite.
        start: (n, 1) thresholds known to be too small, or None for ``max(v) - 1``, which always is.

    Returns:
        (n, 1) thresholds.
    """
    tau = v.amax(1, keepdim=True) - 1 if start is None else start
    noise = torch.finfo(v.dtype).eps
    for _ in range(v.shape[1]):
        above = (v - tau).clamp_min_(0)
        step = above.sum(1, keepdim=True) - 1
        step /= above.sign_().sum(1, keepdim=True).clamp_min_(1)
        # Rounding makes the step alternate around zero in the end; the root is reached when no row moves right.
        moved = torch.where(step > noise, tau + step, tau)
        if torch.equal(moved, tau):
            break
        tau = moved
    return tau


def solve_positive_definite(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``matrix @ x = right`` for every row.

    Args:
        matrix: (n, D, D) symmetric positive definite.
        right: (n, D).

    Returns:
        (n, D) solutions; a matrix that is not positive definite to working precision gives non-finite entries.
    """
    size = matrix.shape[-1]
    if size > _UNROLL_UP_TO:
        factor, _ = torch.linalg.cholesky_ex(matrix)
        return torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    # (D, D, n) and (D, n), so that every operation below runs over contiguous rows; copies, since it works in place
    a = matrix.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    x = right.t().clone(memory_format=torch.contiguous_format)
    # a becomes L with unit diagonal and its diagonal holds D of L D L^T; the forward substitution rides along.
    for j in range(size - 1):
        column = a[j + 1 :, j] / a[j, j]  # (D-j-1, n)
        a[j + 1 :, j + 1 :] -= column.unsqueeze(1) * a[j, j + 1 :].unsqueeze(0)
        x[j + 1 :] -= column * x[j]
        a[j + 1 :, j] = column
    x /= a.diagonal(dim1=0, dim2=1).t()
    for j in range(size - 1, 0, -1):
        x[:j] -= a[j, :j] * x[j]
    return x.t().contiguous()  # a strided result makes every product with it many times slower
