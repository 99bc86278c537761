"""The published relaxation, eq. (4) of docs/quantizer.md: a ridge system without constraints, then one projection.

From Gautam et al., "Soft Convex Quantization" (arXiv 2310.03004), reduced to an F x F system by the matrix inversion
lemma. It does not solve (1): the ridge correction spreads over all codes and the projection removes most of it.
"""

import torch
from torch import Tensor

from scq.stage1_tokenizer.solver.batched import SolvedRows, join
from scq.stage1_tokenizer.solver.codebook import Codebook, add_rows


class RidgeFactor:
    """(C^T C + reg I)^-1 for a different reg in every row, from one eigendecomposition of the F x F matrix C^T C."""

    def __init__(self, codebook: Tensor, reg: Tensor):
        """codebook: (K, F) as given, not centred, since a shift of the codes changes the ridge term; reg: (n, 1)."""
        values, self.vectors = torch.linalg.eigh(codebook.t() @ codebook)  # (F,), (F, F)
        self.scale = 1 / (values.clamp_min(0) + reg)  # (n, F)

    def solve(self, right: Tensor) -> Tensor:
        """(n, F) -> (n, F)."""
        return ((right @ self.vectors) * self.scale) @ self.vectors.t()


def solve_relaxed(book: Codebook, codebook: Tensor, z: Tensor, reg: Tensor) -> SolvedRows:
    """Eq. (4) for latents z (n, F), centred as ``book`` is; ``codebook`` (K, F) are the codes as given, reg is (n, 1).

    The residual is against problem (1).
    """
    parts, nearests = [], book.nearest(z)
    target = z - book.codes[nearests]  # (n, F)
    y = RidgeFactor(codebook, reg).solve(target)  # (n, F)
    for rows in book.blocks(len(z)):
        nearest = nearests[rows]
        # A shift of all codes shifts all prices of a row alike, which the projection ignores: centred codes will do.
        block = _prices(book, nearest, y[rows])  # (n', width)
        block[torch.arange(len(block), device=z.device), nearest] += 1  # e
        # The threshold of some entries is never above that of all: the lanes' maxima, which are few, bring it close.
        start = simplex_threshold(block.view(len(block), book.depth, book.lanes).amax(1))  # (n', 1)
        above = (block - simplex_threshold(block, start)).clamp_min_(0)
        support, weights = _entries(above, nearest)  # (n', S) each
        differences = book.around(nearest, support)[:, :, 1:]  # (n', S, F)
        left = target[rows] - (weights.unsqueeze(1) @ differences).squeeze(1)  # (n', F)
        residual = _violation(book, above, nearest, left / reg[rows])
        parts.append(SolvedRows(support, weights, nearest, residual, 0))
    return join(parts)


def relaxed_gradient(
    grad: Tensor, codebook: Tensor, support: Tensor, weights: Tensor, nearest: Tensor, target: Tensor, reg: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of eq. (4), with e and the nearest code's index held constant; see `batched.gradient_rows`."""
    ridge = RidgeFactor(codebook, reg)
    y = ridge.solve(target)  # (n, F)
    used = (weights > 0).to(grad.dtype)  # (n, S)
    codes = codebook[support]  # (n, S, F)
    gain = (codes @ grad.unsqueeze(-1)).squeeze(-1)  # (n, S)
    # The projection's derivative subtracts the mean over the support.
    gain = (gain - (gain * used).sum(1, keepdim=True) / used.sum(1, keepdim=True)) * used  # (n, S)
    grad_target = ridge.solve((gain.unsqueeze(1) @ codes).squeeze(1))  # (n, F)
    per_code = weights.unsqueeze(-1) * grad.unsqueeze(1) + gain.unsqueeze(-1) * y.unsqueeze(1)  # (n, S, F)
    grad_codebook = add_rows(torch.zeros_like(codebook), support.flatten(), per_code.flatten(0, 1))
    add_rows(grad_codebook, nearest, -grad_target)
    through_ridge = grad_target.t() @ y  # (F, F), minus the gradient with respect to C^T C
    grad_codebook -= codebook @ (through_ridge + through_ridge.t())
    return grad_target, grad_codebook, -(grad_target * y).sum(1, keepdim=True)


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
    tau = v.amax(1, keepdim=True) - 1 if start is None else start  # (n, 1)
    noise = torch.finfo(v.dtype).eps
    for _ in range(v.shape[1]):
        above = (v - tau).clamp_min_(0)  # (n, m)
        step = above.sum(1, keepdim=True) - 1  # (n, 1)
        step /= above.sign_().sum(1, keepdim=True).clamp_min_(1)
        # In the end rounding makes the step alternate around zero; the root is reached when no row moves right.
        moved = torch.where(step > noise, tau + step, tau)
        if torch.equal(moved, tau):
            break
        tau = moved
    return tau


def _entries(above: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n, S) and weights (n, S) of the positive entries of a (n, K) block, padded with the nearest code."""
    row, code = above.nonzero(as_tuple=True)  # sorted by row, then by code
    count = torch.bincount(row, minlength=len(above))  # (n,)
    column = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    support = nearest.unsqueeze(1).repeat(1, int(count.max()))  # (n, S)
    weights = above.new_zeros(support.shape)
    support[row, column], weights[row, column] = code, above[row, code]
    return support, weights


def _violation(book: Codebook, weights: Tensor, nearest: Tensor, y: Tensor) -> Tensor:
    """(n,) by how much weights (n, width), those of all codes and of padding, violate the optimality of (1).

    With y = (z - z_q) / reg (n, F), the multipliers e_k + c_k.y - p_k must be equal over the codes in use and no larger
    over the others; the violation is the largest over all minus the smallest over the codes in use.
    """
    multipliers = _prices(book, nearest, y) - weights  # relative to c_n, so that of n is now -p_n
    multipliers[torch.arange(len(nearest), device=y.device), nearest] += 1  # e
    return multipliers.amax(1) - multipliers.masked_fill(weights == 0, torch.inf).amin(1)


def _prices(book: Codebook, nearest: Tensor, y: Tensor) -> Tensor:
    """(n, width) block of c_k.y - c_n.y: the prices of all codes, relative to the nearest one."""
    dual = book.to_global(nearest, torch.cat([torch.zeros_like(y[:, :1]), y], 1))  # (n, 1 + F)
    block = book.prices(dual)
    block[:, book.size :] = book.lowest  # a threshold may be below zero, and padding never is in use
    return block
