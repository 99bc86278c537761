"""The published relaxation, eq. (4) of docs/quantizer.md: a ridge system without constraints, then one projection.

From Gautam et al., "Soft Convex Quantization" (arXiv 2310.03004), reduced to an F x F system by the matrix inversion
lemma. It is no solver of (1): the ridge correction spreads over all codes and the projection removes most of it.
"""

import torch
from torch import Tensor

from scq.stage1_tokenizer.solver.codebook import Codebook
from scq.stage1_tokenizer.solver.simplex import simplex_threshold
from scq.stage1_tokenizer.solver.working_set import WorkingSolution, stack


class RidgeFactor:
    """(C^T C + reg I)^-1 for a different reg in every row, from one eigendecomposition of the F x F matrix C^T C."""

    def __init__(self, codebook: Tensor, reg: Tensor):
        """codebook: (K, F) as given, not centred, since a shift of the codes changes the ridge term; reg: (n, 1)."""
        values, self.vectors = torch.linalg.eigh(codebook.t() @ codebook)
        self.scale = 1 / (values.clamp_min(0) + reg)  # (n, F)

    def solve(self, right: Tensor) -> Tensor:
        """(n, F) -> (n, F)."""
        return ((right @ self.vectors) * self.scale) @ self.vectors.t()


def solve_relaxed(book: Codebook, codebook: Tensor, z: Tensor, reg: Tensor) -> tuple[WorkingSolution, Tensor]:
    """Eq. (4) for latents z (n, F), centred as ``book`` is; ``codebook`` are the codes as given, reg is (n, 1).

    Returns:
        The solution, whose residual is against problem (1), and the nearest codes (n,).
    """
    parts, nearests = [], book.nearest(z)
    target = z - book.codes[nearests]
    y = RidgeFactor(codebook, reg).solve(target)  # (n, F)
    for rows in book.blocks(len(z)):
        nearest = nearests[rows]
        # A shift of all codes shifts all prices of a row alike, which the projection ignores: centred codes will do.
        block = book.prices(_dual(book, nearest, y[rows]))
        block[torch.arange(len(block), device=z.device), nearest] += 1  # e
        # The threshold of some entries is never above that of all: the lanes' maxima, which are few, bring it close.
        start = simplex_threshold(block.view(len(block), book.depth, book.lanes).amax(1))
        above = (block - simplex_threshold(block, start)).clamp_min_(0)
        support, weights = _entries(above, nearest)
        differences = book.around(nearest, support)[:, :, 1:]  # (n, S, F)
        left = target[rows] - (weights.unsqueeze(1) @ differences).squeeze(1)
        residual = _violation(book, above, nearest, left / reg[rows])
        parts.append(WorkingSolution(support, weights, residual, 0))
    return stack(parts, nearests), nearests


def relaxed_gradient(
    grad: Tensor, codebook: Tensor, support: Tensor, weights: Tensor, nearest: Tensor, target: Tensor, reg: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of eq. (4) with e and the nearest code's index held constant.

    Args:
        grad: (n, F) with respect to z_q.
        codebook: (K, F); support, weights: (n, S); nearest: (n,); target: (n, F) z minus its nearest code; reg: (n, 1).

    Returns:
        Gradients with respect to z (n, F), the codebook (K, F) and reg (n, 1).
    """
    ridge = RidgeFactor(codebook, reg)
    y = ridge.solve(target)
    used = (weights > 0).to(grad.dtype)
    codes = codebook[support]  # (n, S, F)
    gain = (codes @ grad.unsqueeze(-1)).squeeze(-1)
    # The projection's derivative subtracts the mean over the support.
    gain = (gain - (gain * used).sum(1, keepdim=True) / used.sum(1, keepdim=True)) * used  # (n, S)
    grad_target = ridge.solve((gain.unsqueeze(1) @ codes).squeeze(1))
    per_code = weights.unsqueeze(-1) * grad.unsqueeze(1) + gain.unsqueeze(-1) * y.unsqueeze(1)  # (n, S, F)
    grad_codebook = torch.zeros_like(codebook).index_add_(0, support.flatten(), per_code.flatten(0, 1))
    grad_codebook.index_add_(0, nearest, -grad_target)
    through_ridge = grad_target.t() @ y  # (F, F), minus the gradient with respect to C^T C
    grad_codebook -= codebook @ (through_ridge + through_ridge.t())
    return grad_target, grad_codebook, -(grad_target * y).sum(1, keepdim=True)


def _entries(above: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n, S) and weights (n, S) of the positive entries of a (n, K) block, padded with the nearest code."""
    row, code = above.nonzero(as_tuple=True)  # sorted by row, then by code
    count = torch.bincount(row, minlength=len(above))
    column = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    support = nearest.unsqueeze(1).repeat(1, int(count.max()))
    weights = above.new_zeros(support.shape)
    support[row, column], weights[row, column] = code, above[row, code]
    return support, weights


def _violation(book: Codebook, weights: Tensor, nearest: Tensor, y: Tensor) -> Tensor:
    """(n,) by how much weights (n, width), those of all codes and of padding, violate the optimality of (1).

    With y = (z - z_q) / reg (n, F), the multipliers e_k + c_k.y - p_k must be equal over the codes in use and no larger
    over the others; the violation is the largest over all minus the smallest over the codes in use.
    """
    multipliers = book.prices(_dual(book, nearest, y)) - weights  # relative to c_n, so that of n is now -p_n
    multipliers[torch.arange(len(nearest), device=y.device), nearest] += 1  # e
    return multipliers.amax(1) - multipliers.masked_fill(weights == 0, torch.inf).amin(1)


def _dual(book: Codebook, nearest: Tensor, y: Tensor) -> Tensor:
    """Dual variables that price codes relative to the nearest one: c_k.y - c_n.y."""
    return book.to_global(nearest, torch.cat([torch.zeros_like(y[:, :1]), y], 1))
