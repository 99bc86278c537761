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
_GROUPS = 2


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
        self.lanes = min(_LANES, self.size)
        self.groups = _GROUPS if self.lanes % _GROUPS == 0 else self.lanes
        self.depth = -(-self.size // self.lanes)
        width = self.lanes * self.depth
        # (1, c_k), all zeros for padding: its price above the threshold is zero, so it never enters.
        self.lifted = codes.new_zeros(width, 1 + self.dim)
        self.lifted[: self.size, 0] = 1
        self.lifted[: self.size, 1:] = self.codes
        self.price_matrix = self.lifted.t().contiguous()  # (1 + F, width)
        # Finite, since packing bits into an infinity would make it a NaN.
        self.lowest = torch.finfo(codes.dtype).min / 4
        self.half_norm = self.codes.square().sum(1) / 2
        self.nearness_bias = codes.new_full((width,), self.lowest)
        self.nearness_bias[: self.size] = -self.half_norm
        # The place in the lane is packed into the lowest bits of a score; see `candidates`.
        self.integer = {4: torch.int32, 8: torch.int64}[codes.element_size()]
        self.clear = ~((1 << max(self.depth - 1, 0).bit_length()) - 1)
        place = torch.arange(self.depth, device=codes.device, dtype=self.integer)
        self.place = place.repeat_interleave(self.lanes)  # (width,)
        self.first_lane = torch.arange(0, self.lanes, self.lanes // self.groups, device=codes.device)
        entries = _BLOCK_ENTRIES.get(codes.device.type, _BLOCK_ENTRIES["cuda"])
        self.rows_per_block = max(1, entries // width)

    def blocks(self, n: int) -> Iterator[slice]:
        """Slices of n rows whose (rows, K) block fits the budget."""
        for start in range(0, n, self.rows_per_block):
            yield slice(start, min(start + self.rows_per_block, n))

    def nearness(self, z: Tensor) -> Tensor:
        """(n, width) scores z.c_k - |c_k|^2 / 2 of centred latents (n, F): the largest is the nearest code."""
        return torch.addmm(self.nearness_bias, z, self.price_matrix[1:])

    def argmax(self, block: Tensor) -> Tensor:
        """(n,) first index of each row's largest score: best of each contiguous group, then within that group.

        The plain argmax keeps an index per entry and costs four times as much on a CPU.
        """
        n = len(block)
        parts = block.view(n, self.lanes, self.depth)
        part = parts.amax(2).argmax(1)
        inside = parts[torch.arange(n, device=block.device), part].argmax(1)
        return part * self.depth + inside

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

    def around(self, anchor: Tensor, index: Tensor) -> Tensor:
        """(n, m, 1 + F) codes (1, c_k - c_anchor) of index (n, m) and anchor (n,)."""
        origin = self.lifted[anchor]
        origin[:, 0] = 0
        return self.lifted[index] - origin.unsqueeze(1)

    def to_global(self, anchor: Tensor, dual: Tensor) -> Tensor:
        """Dual variables (n, 1 + F) for codes around an anchor (n,), turned into those for the codes as stored."""
        lead = dual[:, :1] - (self.codes[anchor] * dual[:, 1:]).sum(1, keepdim=True)
        return torch.cat([lead, dual[:, 1:]], 1)

    def prices(self, dual: Tensor) -> Tensor:
        """(n, width) block of c_k.y - tau at global dual variables (n, 1 + F), 0 for padding; e_k is not in it."""
        return dual @ self.price_matrix


def compact(index: Tensor, keep: Tensor, fill: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Move the kept entries of each row to its front, in order, and cut the rows to the longest.

    Args:
        index: (n, m) int64; keep: (n, m) bool; fill: (n,) what pads shorter rows of the index.
        values: (n, m) tensors that go the same way, padded with zeros.

    Returns:
        The index and the values, each (n, largest number kept).
    """
    count = keep.cumsum(1)
    width = int(count[:, -1].max())
    position = torch.where(keep, count - 1, width)  # what is dropped lands in a column that is cut off
    out = [fill.unsqueeze(1).repeat(1, width + 1).scatter_(1, position, index)[:, :width]]
    for value in values:
        out.append(value.new_zeros(len(value), width + 1).scatter_(1, position, value)[:, :width])
    return tuple(out)
