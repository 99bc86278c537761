"""Passes over all K codes: the nearest code, good candidates, and proof that no code outside a working set is missing.

Rows are taken in chunks whose (chunk, K) block stays in the processor's cache, where a pass costs a tenth of what it
costs in memory. Nothing here sorts K columns.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries of the one (chunk, K) block that is alive: 4 MB of float32 fit a core's cache; a GPU wants larger launches.
_BLOCK_ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 26}
# A maximum over lanes runs along contiguous memory; groups of lanes are how many candidates a pass can bring.
_LANES = 64
_GROUPS = 8


class Codebook:
    """A codebook laid out for passes over all of its codes.

    Codes are centred on their mean, so that a codebook far from the origin keeps its digits, and padded to a multiple
    of the number of lanes; lane j holds codes j, j + lanes, j + 2 lanes, ...
    """

    def __init__(self, codes: Tensor):
        """codes: (K, F)."""
        self.size, self.dim = codes.shape
        self.centre = codes.mean(0)  # (F,)
        self.codes = codes - self.centre  # (K, F)
        self.lanes = _LANES if self.size > _LANES else self.size
        self.groups = _GROUPS if self.lanes % _GROUPS == 0 else self.lanes
        self.depth = -(-self.size // self.lanes)
        padded = codes.new_zeros(self.lanes * self.depth, self.dim)
        padded[: self.size] = self.codes
        self.transposed = padded.t().contiguous()  # (F, lanes * depth)
        self.half_norm = padded.square().sum(1) / 2
        self.half_norm[self.size :] = -self.lowest
        # The place in the lane is packed into the lowest bits of a score; see `candidates`.
        bits = max(self.depth - 1, 0).bit_length()
        self.integer = {4: torch.int32, 8: torch.int64}[codes.element_size()]
        self.clear = ~((1 << bits) - 1)
        place = torch.arange(self.depth, device=codes.device, dtype=self.integer)
        self.place = place.repeat_interleave(self.lanes)  # (lanes * depth,)
        self.first_lane = torch.arange(0, self.lanes, self.lanes // self.groups, device=codes.device)
        entries = _BLOCK_ENTRIES.get(codes.device.type, _BLOCK_ENTRIES["cuda"])
        self.rows_per_block = max(1, entries // padded.shape[0])

    @property
    def lowest(self) -> float:
        """A score below every real one; finite, since packing bits into an infinity would make it a NaN."""
        return torch.finfo(self.codes.dtype).min / 4

    def blocks(self, n: int) -> Iterator[slice]:
        """Slices of n rows whose (rows, K) block fits the budget."""
        for start in range(0, n, self.rows_per_block):
            yield slice(start, min(start + self.rows_per_block, n))

    def nearness(self, z: Tensor) -> Tensor:
        """(n, lanes * depth) scores z.c_k - |c_k|^2 / 2 of centred latents (n, F): the largest is the nearest."""
        return torch.addmm(-self.half_norm, z, self.transposed)

    def argmax(self, block: Tensor) -> Tensor:
        """(n,) first index of each row's largest score: best of each contiguous group, then within that group.

        The plain argmax keeps an index per entry and costs four times as much on a CPU.
        """
        n = len(block)
        groups = block.view(n, self.lanes, self.depth)
        group = groups.amax(2).argmax(1)
        inside = groups[torch.arange(n, device=block.device), group].argmax(1)
        return group * self.depth + inside

    def candidates(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """The best codes of a block of scores, one from each of `groups` interleaved parts of the codebook.

        The place of a code within its lane replaces the lowest bits of its score, so one vectorised maximum finds value
        and index together, thirty times faster than a maximum that carries an index. Scores lose log2(K / lanes) of
        their bits, which a choice of candidates can spare. The block is overwritten.

        Returns:
            Scores (n, groups), rounded as said, and their codes (n, groups), all different.
        """
        n = len(block)
        block.view(self.integer).bitwise_and_(self.clear).bitwise_or_(self.place)
        lanes = block.view(n, self.depth, self.lanes).amax(1)
        score, member = lanes.view(n, self.groups, -1).max(2)
        lane = member + self.first_lane
        place = lanes.view(self.integer).gather(1, lane).bitwise_and_(~self.clear)
        return score, place.long() * self.lanes + lane

    def nearest(self, z: Tensor) -> Tensor:
        """(n,) index of the nearest code of centred latents (n, F), the first one where several tie."""
        return torch.cat([self.argmax(self.nearness(z[rows])) for rows in self.blocks(len(z))])

    def highest_price(self, y: Tensor) -> Tensor:
        """(n,) max_k c_k.y; y (n, F)."""
        zero = y.new_zeros(1, 1)
        return torch.cat([self.prices_above(y[rows], zero).amax(1) for rows in self.blocks(len(y))])

    def prices_above(self, y: Tensor, floor: Tensor) -> Tensor:
        """(n, lanes * depth) block of c_k.y - floor, padding codes excluded; y (n, F), floor (n, 1) or (1, 1)."""
        block = torch.addmm(-floor, y, self.transposed)
        if self.size < block.shape[1]:
            block[:, self.size :] = self.lowest
        return block


def compact(index: Tensor, keep: Tensor, fill: Tensor) -> Tensor:
    """Move the kept entries of each row to its front, in order, and cut the rows to the longest.

    Args:
        index: (n, m) int64, keep: (n, m) bool, fill: (n,) what pads shorter rows.

    Returns:
        (n, max kept) int64.
    """
    position, width = _positions(keep)
    out = fill.unsqueeze(1).repeat(1, width + 1)
    return out.scatter_(1, position, index)[:, :width]


def compact_values(values: Tensor, keep: Tensor) -> Tensor:
    """As `compact` for a floating tensor, padded with zeros."""
    position, width = _positions(keep)
    return values.new_zeros(len(values), width + 1).scatter_(1, position, values)[:, :width]


def _positions(keep: Tensor) -> tuple[Tensor, int]:
    count = keep.cumsum(1)
    width = int(count[:, -1].max())
    return torch.where(keep, count - 1, width), width  # what is dropped lands in a column that is cut off
