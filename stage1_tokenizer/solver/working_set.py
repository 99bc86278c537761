"""Problem (1) over all K codes by column generation: solve over a few codes per row, price the rest, add, repeat.

A code outside the working set can only enter where its price c_k.y is above the threshold tau, so a pricing pass that
finds no such code proves that the solution over the working set solves the whole problem.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from scq.stage1_tokenizer.solver.active_set import ENTER_SHARE, solve_active_set, weight_error
from scq.stage1_tokenizer.solver.codebook import Codebook, compact

# Codes gathered at once, times F: bounds the memory of a round whatever N is.
_GATHER_ENTRIES = {"cpu": 1 << 22, "cuda": 1 << 28}
# Codes per row that a round is planned for; supports rarely reach it.
_PLANNED_COLUMNS = 24
_MAX_ROUNDS = 200


class WorkingSolution(NamedTuple):
    """Solutions of n rows over all K codes."""

    support: Tensor  # (n, S) int64, column 0 the nearest code, padded with it
    weights: Tensor  # (n, S), padded with 0
    residual: Tensor  # (n,) larger of the weights' error and the largest price above the threshold
    iterations: int  # moves of the support of the row that took most, over all rounds


def solve_exact(book: Codebook, z: Tensor, reg: Tensor, *, tol: float, max_iter: int) -> tuple[WorkingSolution, Tensor]:
    """Solve (1) for latents z (n, F), centred as the codebook is, lambda reg (n, 1); also the nearest codes (n,)."""
    parts, nearests = [], []
    for rows in row_chunks(book, len(z), _PLANNED_COLUMNS):
        nearest, candidates = _first_candidates(book, z[rows])
        parts.append(_generate_columns(book, z[rows], reg[rows], nearest, candidates, tol, max_iter))
        nearests.append(nearest)
    nearest = torch.cat(nearests)
    return stack(parts, nearest), nearest


def row_chunks(book: Codebook, n: int, columns: int) -> Iterator[slice]:
    """Slices of n rows small enough to gather ``columns`` codes for each of their rows."""
    entries = _GATHER_ENTRIES.get(book.codes.device.type, _GATHER_ENTRIES["cuda"])
    step = max(1, entries // (columns * book.dim))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def stack(parts: list[WorkingSolution], nearest: Tensor, rows: list[Tensor | slice] | None = None) -> WorkingSolution:
    """Join partial solutions, padding their supports to the widest with the nearest codes.

    Args:
        parts: solutions of some rows each.
        nearest: (n,) nearest codes of all rows.
        rows: which rows each part solves; None: consecutive ones.
    """
    if rows is None:
        ends = torch.tensor([len(part.support) for part in parts]).cumsum(0).tolist()
        rows = [slice(end - len(part.support), end) for end, part in zip(ends, parts, strict=True)]
    width = max(part.support.shape[1] for part in parts)
    support = nearest.unsqueeze(1).repeat(1, width)
    weights = parts[0].weights.new_zeros(len(nearest), width)
    residual = weights.new_empty(len(nearest))
    for where, part in zip(rows, parts, strict=True):
        support[where] = nearest[where].unsqueeze(1)
        weights[where] = 0
        support[where, : part.support.shape[1]] = part.support
        weights[where, : part.support.shape[1]] = part.weights.to(weights.dtype)
        residual[where] = part.residual.to(weights.dtype)
    return WorkingSolution(support, weights, residual, max(part.iterations for part in parts))


def nearest_first(nearest: Tensor, candidates: Tensor) -> Tensor:
    """Working set (n, m) with the nearest code in column 0 and the other candidates behind it, none twice."""
    keep = torch.cat([torch.ones_like(nearest.unsqueeze(1), dtype=torch.bool), candidates != nearest.unsqueeze(1)], 1)
    return compact(torch.cat([nearest.unsqueeze(1), candidates], 1), keep, nearest)[0]


def _first_candidates(book: Codebook, z: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest code (n,) and a first working set (n, m): the nearest code, then the nearest code of every group."""
    nearest, candidates = [], []
    for rows in book.blocks(len(z)):
        block = book.nearness(z[rows])
        nearest.append(book.argmax(block))
        candidates.append(book.candidates(block)[1])
    nearest, candidates = torch.cat(nearest), torch.cat(candidates)
    return nearest, nearest_first(nearest, candidates)


def _generate_columns(
    book: Codebook, z: Tensor, reg: Tensor, nearest: Tensor, working: Tensor, tol: float, max_iter: int
) -> WorkingSolution:
    target = z - book.codes[nearest]  # (n, F)
    rows = torch.arange(len(z), device=z.device)
    weights = z.new_zeros(working.shape)
    weights[:, 0] = 1
    enters = torch.zeros_like(weights)
    parts, solved, iterations = [], [], 0
    for round_number in range(1, _MAX_ROUNDS + 1):
        anchor, d, lam = nearest[rows], target[rows], reg[rows]
        codes = book.around(anchor, working)  # (n', m, 1 + F)
        point = solve_active_set(codes, d, lam, weights, enters, tol=0.5 * tol, max_iter=max_iter)
        iterations += point.iterations
        excess, found = missing_codes(book, working, book.to_global(anchor, point.dual))
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
            parts.append(WorkingSolution(support, kept, torch.maximum(error, highest[done]), iterations))
            solved.append(rows[done])
        left = (~done).nonzero().squeeze(1)
        if left.numel() == 0:
            break
        rows, excess = rows[left], excess[left]
        joins = (excess >= ENTER_SHARE * highest[left].unsqueeze(1)).to(z.dtype)
        old = point.weights[left]
        working, weights, enters = compact(
            torch.cat([working[left], found[left]], 1),
            torch.cat([used[left], excess > tol], 1),
            anchor[left],
            torch.cat([old, torch.zeros_like(excess)], 1),
            torch.cat([torch.zeros_like(old), joins], 1),
        )
    return stack(parts, nearest, solved)


def missing_codes(book: Codebook, working: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
    """Price all codes: by how much the best codes outside the working set are above tau (n, groups), and which."""
    excess, found = [], []
    for rows in book.blocks(len(dual)):
        block = book.prices(dual[rows]).scatter_(1, working[rows], book.lowest)
        best, index = book.candidates(block)
        excess.append(best)
        found.append(index)
    return torch.cat(excess), torch.cat(found)
