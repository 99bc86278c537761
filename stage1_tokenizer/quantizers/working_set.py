"""Problem (1) over all K codes by column generation: solve over a few codes per row, price the rest, add, repeat.

A code outside the working set can only enter where its price c_k.y is above the threshold tau, so a pricing pass that
finds no such code proves that the solution over the working set solves the whole problem.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stage1_tokenizer.quantizers.active_set import solve_active_set
from stage1_tokenizer.quantizers.pricing import Codebook, compact, compact_values

# Codes gathered at once, times F: bounds the memory of a round whatever N is.
_GATHER_ENTRIES = {"cpu": 1 << 23, "cuda": 1 << 28}
_MAX_ROUNDS = 40


class WorkingSolution(NamedTuple):
    """Solutions of n rows over all K codes."""

    support: Tensor  # (n, S) int64, column 0 the nearest code, padded with it
    weights: Tensor  # (n, S), padded with 0
    residual: Tensor  # (n,) larger of the stationarity residual and the largest price above the threshold
    iterations: int  # moves of the support of the row that took most, over all rounds


def solve_exact(book: Codebook, z: Tensor, reg: Tensor, *, tol: float, max_iter: int) -> tuple[WorkingSolution, Tensor]:
    """Solve (1) for latents z (n, F), centred as the codebook is, lambda reg (n, 1); also the nearest codes (n,)."""
    parts, nearests = [], []
    for rows in row_chunks(book, len(z), 2 * book.lanes):
        nearest, candidates = _first_candidates(book, z[rows])
        parts.append(_generate_columns(book, z[rows], reg[rows], nearest, candidates, tol, max_iter))
        nearests.append(nearest)
    return stack(parts, nearests)


def row_chunks(book: Codebook, n: int, columns: int) -> Iterator[slice]:
    """Slices of n rows small enough to gather ``columns`` codes for each of their rows."""
    entries = _GATHER_ENTRIES.get(book.codes.device.type, _GATHER_ENTRIES["cuda"])
    step = max(1, entries // (columns * book.dim))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def stack(parts: list[WorkingSolution], nearests: list[Tensor]) -> tuple[WorkingSolution, Tensor]:
    """Join solutions of consecutive rows, padding their supports to the widest."""
    nearest = torch.cat(nearests)
    width = max(part.support.shape[1] for part in parts)
    support = nearest.unsqueeze(1).repeat(1, width)
    weights = parts[0].weights.new_zeros(len(nearest), width)
    start = 0
    for part in parts:
        rows = slice(start, start + len(part.support))
        support[rows, : part.support.shape[1]] = part.support
        weights[rows, : part.support.shape[1]] = part.weights
        start = rows.stop
    residual = torch.cat([part.residual for part in parts])
    return WorkingSolution(support, weights, residual, max(part.iterations for part in parts)), nearest


def _first_candidates(book: Codebook, z: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest code (n,) and a first working set (n, m): the nearest code, then the nearest code of every group."""
    nearest, candidates = [], []
    for rows in book.blocks(len(z)):
        block = book.nearness(z[rows])
        nearest.append(book.argmax(block))
        candidates.append(book.candidates(block)[1])
    nearest, candidates = torch.cat(nearest), torch.cat(candidates)
    return nearest, nearest_first(nearest, candidates)


def nearest_first(nearest: Tensor, candidates: Tensor) -> Tensor:
    """Working set (n, m) with the nearest code in column 0 and the other candidates behind it, none twice."""
    keep = torch.cat([torch.ones_like(nearest.unsqueeze(1), dtype=torch.bool), candidates != nearest.unsqueeze(1)], 1)
    return compact(torch.cat([nearest.unsqueeze(1), candidates], 1), keep, nearest)


def _generate_columns(
    book: Codebook, z: Tensor, reg: Tensor, nearest: Tensor, working: Tensor, tol: float, max_iter: int
) -> WorkingSolution:
    target = z - book.codes[nearest]  # (n, F)
    rows = torch.arange(len(z), device=z.device)
    weights = z.new_zeros(working.shape)
    weights[:, 0] = 1
    enters = torch.zeros_like(working, dtype=torch.bool)
    finished, iterations = [], 0
    for round_number in range(1, _MAX_ROUNDS + 1):
        anchor = nearest[rows]
        codes = book.codes[working] - book.codes[anchor].unsqueeze(1)  # (n', m, F)
        point = solve_active_set(codes, target[rows], reg[rows], weights, enters, tol=0.1 * tol, max_iter=max_iter)
        iterations += point.iterations
        excess, found = _missing_codes(book, working, anchor, point.y, point.threshold)
        missing = excess > tol
        used = point.weights > 0
        used[:, 0] = True
        done = ~missing.any(1)
        if round_number == _MAX_ROUNDS:
            done = torch.ones_like(done)
        if done.any():
            residual = torch.maximum(point.error, excess.amax(1))[done]
            support = compact(working[done], used[done], anchor[done])
            finished.append((rows[done], support, compact_values(point.weights[done], used[done]), residual))
        left = (~done).nonzero().squeeze(1)
        if left.numel() == 0:
            break
        rows, keep = rows[left], torch.cat([used[left], missing[left]], 1)
        working = compact(torch.cat([working[left], found[left]], 1), keep, anchor[left])
        old = torch.zeros_like(point.weights[left])
        weights = compact_values(torch.cat([point.weights[left], torch.zeros_like(excess[left])], 1), keep)
        joins = torch.cat([old, (excess[left] >= 0.8 * excess[left].amax(1, keepdim=True)).to(old.dtype)], 1)
        enters = compact_values(joins, keep) > 0
    width = max(part[1].shape[1] for part in finished)
    support, weights = nearest.unsqueeze(1).repeat(1, width), z.new_zeros(len(z), width)
    residual = z.new_empty(len(z))
    for where, codes_used, weights_used, residual_left in finished:
        support[where, : codes_used.shape[1]] = codes_used
        weights[where, : codes_used.shape[1]] = weights_used
        residual[where] = residual_left
    return WorkingSolution(support, weights, residual, iterations)


def _missing_codes(book: Codebook, working: Tensor, anchor: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Price all codes: by how much the best codes outside the working set are above tau (n, groups), and which."""
    floor = tau + (book.codes[anchor] * y).sum(1, keepdim=True)  # (n, 1)
    excess, found = [], []
    for rows in book.blocks(len(y)):
        block = book.prices_above(y[rows], floor[rows])
        block.scatter_(1, working[rows], book.lowest)
        best, index = book.candidates(block)
        excess.append(best)
        found.append(index)
    return torch.cat(excess), torch.cat(found)
