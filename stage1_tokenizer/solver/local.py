"""Problem (1) over the m nearest codes of each latent only: one round, no proof about the other codes."""

import torch
from torch import Tensor

from scq.stage1_tokenizer.solver.active_set import solve_active_set, weight_error
from scq.stage1_tokenizer.solver.codebook import Codebook
from scq.stage1_tokenizer.solver.working_set import WorkingSolution, missing_codes, nearest_first, row_chunks, stack


def solve_local(
    book: Codebook, z: Tensor, reg: Tensor, *, neighbours: int, tol: float, max_iter: int
) -> tuple[WorkingSolution, Tensor]:
    """Solve (1) over the ``neighbours`` nearest codes of latents z (n, F), centred as the codebook is; reg (n, 1).

    Returns:
        The solution, whose residual is against all K codes, and the nearest codes (n,).
    """
    count = min(neighbours, book.size)
    parts, nearests = [], []
    for rows in row_chunks(book, len(z), count):
        nearest, candidates = _nearest_codes(book, z[rows], count)
        codes = book.around(nearest, candidates)  # (n, m, 1 + F)
        target = z[rows] - book.codes[nearest]
        start = torch.zeros_like(codes[:, :, 0])
        start[:, 0] = 1
        none = torch.zeros_like(start)
        point = solve_active_set(codes, target, reg[rows], start, none, tol=0.5 * tol, max_iter=max_iter)
        error = weight_error(codes, target, reg[rows], point.weights, point.dual)
        excess, _ = missing_codes(book, candidates, book.to_global(nearest, point.dual))
        residual = torch.maximum(error, excess.amax(1))
        parts.append(WorkingSolution(candidates, point.weights, residual, point.iterations))
        nearests.append(nearest)
    nearest = torch.cat(nearests)
    return stack(parts, nearest), nearest


def _nearest_codes(book: Codebook, z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest code (n,) and the ``count`` nearest codes (n, count), the nearest one first."""
    nearest, candidates = [], []
    for rows in book.blocks(len(z)):
        block = book.nearness(z[rows])
        nearest.append(book.argmax(block))
        candidates.append(block.topk(count, dim=1, sorted=False).indices)
    return torch.cat(nearest), nearest_first(torch.cat(nearest), torch.cat(candidates))
