"""How often each code of a codebook is used, and what that says of the rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from scq.engine.errors import UserError
from scq.engine.measurements import CodebookSummary, MixtureSummary
from scq.engine.processes import sum_across_processes


@dataclass(frozen=True, eq=False)
class CodebookUsage:
    """How often each code was used over a set; usages of two parts of a set add up with `+`.

    Attributes:
        counts: (K,) int64, occurrences of each code.
        images: number of images.
    """

    counts: Tensor
    images: int

    def __add__(self, other: CodebookUsage) -> CodebookUsage:
        return CodebookUsage(self.counts + other.counts, self.images + other.images)

    def gather(self) -> CodebookUsage:
        """The sum over all processes, on every process; every one must call it."""
        images = int(sum_across_processes(torch.tensor([self.images])))
        return CodebookUsage(sum_across_processes(self.counts), images)

    @property
    def tokens(self) -> int:
        """Number of tokens counted."""
        return int(self.counts.sum())

    @property
    def used_share(self) -> float:
        """Share of the codebook that occurs at least once, in (0, 1]."""
        return _used_share(self.counts)

    @property
    def bits_per_token(self) -> float:
        """Empirical entropy of single codes, in bits: at most log2(K), reached by uniform use."""
        return _entropy(self.counts)

    @property
    def perplexity(self) -> float:
        """2 ** bits_per_token: the number of codes that, used uniformly, would carry as much. In [1, K]."""
        return 2**self.bits_per_token

    @property
    def bits_per_image(self) -> float:
        """Tokens per image times bits_per_token: what an ideal code for single tokens would need."""
        return self.tokens / self.images * self.bits_per_token

    @property
    def fixed_bits_per_image(self) -> float:
        """Tokens per image times log2(K): the nominal rate, without any entropy coding."""
        return self.tokens / self.images * math.log2(len(self.counts))

    def summary(self) -> CodebookSummary:
        """The numbers for a table or a JSON file."""
        return CodebookSummary(
            used_share=self.used_share,
            perplexity=self.perplexity,
            bits_per_token=self.bits_per_token,
            bits_per_image=self.bits_per_image,
            fixed_bits_per_image=self.fixed_bits_per_image,
            tokens=self.tokens,
            images=self.images,
        )


class CodeCounter:
    """Accumulates the `CodebookUsage` of batches of code indices in [0, codebook_size)."""

    def __init__(self, codebook_size: int):
        self.usage = CodebookUsage(torch.zeros(codebook_size, dtype=torch.int64), 0)

    def update(self, indices: Tensor) -> None:
        """Add indices int64 (b, h, w), or (b, any...).

        Raises:
            UserError: an index lies outside the codebook.
        """
        size = len(self.usage.counts)
        codes = indices.flatten().cpu()
        if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise UserError(
                f"code indices from {int(codes.min())} to {int(codes.max())} do not fit a codebook of {size}"
            )
        self.usage += CodebookUsage(codes.bincount(minlength=size), len(indices))


class MixtureCounter:
    """Accumulates the weight that each code has in all mixtures of a set of images."""

    def __init__(self, codebook_size: int):
        self.weight = torch.zeros(codebook_size, dtype=torch.float64)  # (K,)

    def update(self, support: Tensor, weights: Tensor) -> None:
        """Add mixtures: codes and their weights, each (any..., S), as `Mixture` has them."""
        self.weight.index_add_(0, support.flatten().cpu(), weights.flatten().cpu().double())

    def summary(self, shared: bool = False) -> MixtureSummary:
        """The numbers for a table; with ``shared``, of all processes, every one of which must call it."""
        weight = sum_across_processes(self.weight) if shared else self.weight
        return MixtureSummary(used_share=_used_share(weight), perplexity=2 ** _entropy(weight))


def codebook_usage(indices: Iterable[Tensor], codebook_size: int) -> CodebookUsage:
    """Usage of the codebook over a whole set.

    Args:
        indices: batches of int64 (b, h, w) (or (b, any...)) code indices in [0, codebook_size).
        codebook_size: K.

    Raises:
        UserError: an index lies outside the codebook, or the set is empty.
    """
    counter = CodeCounter(codebook_size)
    for batch in indices:
        counter.update(batch)
    if not counter.usage.tokens:
        raise UserError("there are no code indices to measure")
    return counter.usage


def _used_share(weight: Tensor) -> float:
    return float((weight > 0).double().mean())


def _entropy(weight: Tensor) -> float:
    """Bits, of the distribution over codes that is proportional to weight (K,)."""
    p = weight[weight > 0].double()
    p = p / p.sum()
    return float(-(p * p.log2()).sum())
