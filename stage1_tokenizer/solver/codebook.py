"""Passes over all K codes: the nearest code, candidates for a support, and the price of every code.

Rows are taken in blocks whose (rows, K) scores stay in the processor's cache, where a pass costs a tenth of what it
costs in memory. Nothing here sorts K columns.
"""

import os
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from scq.engine.errors import NotFiniteError, require_finite

# Entries of the one (rows, K) block that is alive: 4 MB of float32 fit a core's cache; a GPU wants larger launches.
_BLOCK_ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 26}
# Entries of the codes gathered at once: they bound the memory of a chunk of rows, however many rows there are.
_GATHER_ENTRIES = {"cpu": 1 << 22, "cuda": 1 << 28}
# A maximum over lanes runs along contiguous memory. The number of groups is how many candidates a pass can bring.
_LANES = 64
_GROUPS = 2
# Devices that compute while the host goes on, until it asks for a value.
ASYNCHRONOUS = {"cuda"}
# Beyond it, a row's system does not fit the registers and shared memory of `fused`.
FUSED_DIM = 32
_SWITCH = "SCQ_FUSED"  # environment variable; 0 leaves `fused` out, where a driver or a compiler fails on its kernels


class Codebook:
    """A codebook laid out for passes over all of its codes.

    Codes are centred on their mean, so that a codebook far from the origin keeps its digits, and padded to a multiple
    of the number of lanes: ``width`` columns in all. Lane j holds codes j, j + lanes, j + 2 lanes, ... in its slots
    0, 1, 2, ...
    """

    def __init__(self, codes: Tensor):
        """codes: (K, F)."""
        self.size, self.dim = codes.shape
        self.centre = codes.mean(0)  # (F,)
        self.codes = codes - self.centre  # (K, F)
        self.lanes = min(_LANES, self.size)
        self.groups = _GROUPS if self.lanes % _GROUPS == 0 else self.lanes
        self.depth = -(-self.size // self.lanes)  # slots in a lane
        width = self.lanes * self.depth
        # (1, c_k), all zeros for padding: the price of padding above the threshold is zero, so it never enters.
        lifted = codes.new_zeros(width, 1 + self.dim)
        lifted[: self.size, 0] = 1
        lifted[: self.size, 1:] = self.codes
        self.lifted = lifted  # (width, 1 + F)
        self.price_matrix = lifted.t().contiguous()  # (1 + F, width)
        # Finite, since packing bits into an infinity would make it a NaN.
        self.lowest = torch.finfo(codes.dtype).min / 4
        self.nearness_bias = codes.new_full((width,), self.lowest)  # (width,), -|c_k|^2 / 2
        self.nearness_bias[: self.size] = -(self.codes.square().sum(1) / 2)
        # The slot is packed into the lowest bits of a score; see `candidates`.
        self.integer = {4: torch.int32, 8: torch.int64}[codes.element_size()]
        self.clear = ~((1 << max(self.depth - 1, 0).bit_length()) - 1)
        slots = torch.arange(self.depth, device=codes.device, dtype=self.integer)
        self.slot = slots.repeat_interleave(self.lanes)  # (width,)
        self.first_lane = torch.arange(0, self.lanes, self.lanes // self.groups, device=codes.device)  # (groups,)
        self.rows_per_block = max(1, _entries(_BLOCK_ENTRIES, codes) // width)

    def blocks(self, n: int) -> Iterator[slice]:
        """Slices of n rows for passes over all codes: a (rows, K) block fits the cache."""
        return _slices(n, self.rows_per_block)

    def chunks(self, n: int, columns: int) -> Iterator[slice]:
        """Slices of n rows small enough to gather ``columns`` codes for each of their rows."""
        return _slices(n, max(1, _entries(_GATHER_ENTRIES, self.codes) // (columns * self.dim)))

    def nearness(self, z: Tensor) -> Tensor:
        """(n, width) scores z.c_k - |c_k|^2 / 2 of centred latents (n, F): the largest is the nearest code."""
        return torch.addmm(self.nearness_bias, z, self.price_matrix[1:])

    def argmax(self, block: Tensor) -> Tensor:
        """(n,) first index of each row's largest score: the best of each contiguous part, then within that part.

        The plain argmax keeps an index per entry and costs four times as much on a CPU.
        """
        n = len(block)
        parts = block.view(n, self.lanes, self.depth)
        part = parts.amax(2).argmax(1)  # (n,)
        inside = parts[torch.arange(n, device=block.device), part].argmax(1)  # (n,)
        return part * self.depth + inside

    def candidates(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """The best codes of a block of scores (n, width), one from each group of lanes. The block is overwritten.

        The slot of a code replaces the lowest bits of its score, so one vectorised maximum finds value and index
        together, thirty times faster than a maximum that carries an index. Scores lose log2(K / lanes) of their bits,
        which a choice of candidates can spare.

        Returns:
            Scores (n, groups), rounded as said, and their codes (n, groups), all different.
        """
        n = len(block)
        block.view(self.integer).bitwise_and_(self.clear).bitwise_or_(self.slot)
        lanes = block.view(n, self.depth, self.lanes).amax(1)  # (n, lanes)
        score, member = lanes.view(n, self.groups, -1).max(2)  # (n, groups)
        lane = member + self.first_lane
        slot = lanes.view(self.integer).gather(1, lane).bitwise_and_(~self.clear)
        return score, slot.long() * self.lanes + lane

    def nearest(self, z: Tensor) -> Tensor:
        """(n,) index of the nearest code of centred latents (n, F), the first one where several tie."""
        return torch.cat([self.argmax(self.nearness(z[rows])) for rows in self.blocks(len(z))])

    def around(self, anchor: Tensor, index: Tensor) -> Tensor:
        """(n, m, 1 + F) codes (1, c_k - c_anchor) of index (n, m) and anchor (n,)."""
        origin = self.lifted[anchor]  # (n, 1 + F)
        origin[:, 0] = 0
        return self.lifted[index] - origin.unsqueeze(1)

    def to_global(self, anchor: Tensor, dual: Tensor) -> Tensor:
        """Dual variables (n, 1 + F) for codes around an anchor (n,), turned into those for the codes as stored."""
        lead = dual[:, :1] - (self.codes[anchor] * dual[:, 1:]).sum(1, keepdim=True)  # (n, 1)
        return torch.cat([lead, dual[:, 1:]], 1)

    def prices(self, dual: Tensor) -> Tensor:
        """(n, width) block of c_k.y - tau at global dual variables (n, 1 + F), 0 for padding; e_k is not in it."""
        return dual @ self.price_matrix

    def missing(self, working: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
        """Price all codes at global dual variables (n, 1 + F) and find the best ones outside the working sets (n, m).

        Returns:
            How far their prices are above tau (n, groups), and which codes they are (n, groups).
        """
        found = []
        for rows in self.blocks(len(dual)):
            block = self.prices(dual[rows]).scatter_(1, working[rows], self.lowest)
            found.append(self.candidates(block))
        excess, index = zip(*found, strict=True)
        return torch.cat(excess), torch.cat(index)


def require_finite_squares(name: str, value: Tensor) -> None:
    """Check that squared distances of a tensor's rows can be computed in its type, or in float32 if that is wider.

    If so, this costs one reduction.

    Args:
        name: what the message calls the tensor.

    Raises:
        NotFiniteError: an entry is NaN or infinite, or so large that its square is near the end of the type.
    """
    value = value.detach()
    value = value if value.dtype == torch.float64 else value.float()
    if bool(value.square().sum().isfinite()):
        return
    require_finite(name, value)
    most, largest = 1e-2 * torch.finfo(value.dtype).max ** 0.5, float(value.abs().max())
    if largest > most:  # the sum of small squares may still overflow
        raise NotFiniteError(f"{name} has entries up to {largest:.2g}; squared distances need {most:.2g} at most")


def may_wait(x: Tensor) -> bool:
    """Whether the host may ask for values of ``x``: always but in a training step on a GPU, which would stand still.

    A training step is whatever records gradients.
    """
    return x.device.type not in ASYNCHRONOUS or not torch.is_grad_enabled()


def fused_kernels(x: Tensor) -> ModuleType | None:
    """The module `fused` if it can be used for rows x (n, F), else None."""
    return _fused() if x.device.type == "cuda" and x.shape[1] <= FUSED_DIM else None


@cache
def _fused() -> ModuleType | None:
    # CPU-only builds, macOS and Windows have no Triton, and AMD's has other options.
    if torch.version.cuda is None or find_spec("triton") is None or os.environ.get(_SWITCH) == "0":
        return None
    return import_module("scq.stage1_tokenizer.solver.fused")


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Add rows (n, F) to ``total`` (K, F) at index (n,), in place, in an order that is the same every time.

    On a GPU index_add_ adds as threads happen to arrive, and index_put_ sorts first.
    """
    if total.is_cuda:
        return total.index_put_((index,), rows, accumulate=True)
    return total.index_add_(0, index, rows)


def nearest_codes(rows: Tensor, codes: Tensor) -> Tensor:
    """(n,) index of the nearest of the codes (K, F) to each row (n, F), the first one where several tie."""
    fused = fused_kernels(rows)
    if fused is not None:
        return fused.nearest_codes(rows, codes)
    book = Codebook(codes)
    return book.nearest(rows - book.centre)


def compact(index: Tensor, keep: Tensor, fill: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Move the kept entries of each row to its front, in order, and cut the rows to the longest.

    Args:
        index: (n, m) int64.
        keep: (n, m) bool.
        fill: (n,) what pads shorter rows of the index.
        values: (n, m) tensors that go the same way, padded with zeros.

    Returns:
        The index and the values, each (n, largest number kept).
    """
    count = keep.cumsum(1)
    width = int(count[:, -1].max())
    position = torch.where(keep, count - 1, width)  # (n, m); what is dropped lands in a column that is cut off
    out = [fill.unsqueeze(1).repeat(1, width + 1).scatter_(1, position, index)[:, :width]]
    for value in values:
        out.append(value.new_zeros(len(value), width + 1).scatter_(1, position, value)[:, :width])
    return tuple(out)


def _entries(budget: dict[str, int], codes: Tensor) -> int:
    return budget.get(codes.device.type, budget["cuda"])


def _slices(n: int, step: int) -> Iterator[slice]:
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
