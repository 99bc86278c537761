"""Codes that no latent takes: counted over windows of training images, and moved to where latents lack a code."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scq.engine.checks import whole_number, yes_or_no
from scq.engine.processes import gather_rows, rank_and_world_size, same_everywhere, sum_across_processes
from scq.stage1_tokenizer.quantizers.interface import Quantizer, count_codes
from scq.stage1_tokenizer.quantizers.kmeans import replace_rows
from scq.stage1_tokenizer.solver.codebook import nearest_codes


@dataclass
class _Seen:
    """What a quantizer has seen in training, where the host can look it up without waiting for a GPU."""

    steps: int
    parts: int  # of the present step; checkpoints are written between steps, so they need not know it
    images: int  # in the window being filled, of all processes


class RevivingQuantizer(Quantizer):
    """Base of the quantizers that replace codes which were not used over a whole window of training images.

    It is the same in all processes, and on a GPU nobody waits for a number. A training forward calls `_turn_window`
    before codes enter the graph, and `_advance` at its end.

    Attributes:
        codebook: (K, F).
        revive: whether codes are replaced; they are counted in any case.
        window: images over which codes are counted.
    """

    codebook: nn.Parameter

    def _count(self, revive: bool, window: int) -> None:
        """Called once by the constructor, with ``codebook_size`` set.

        Raises:
            UserError: an option is out of range.
        """
        yes_or_no("revive", revive)
        whole_number("window", window, 1)
        self.revive, self.window = revive, window
        self.steps: Tensor  # () int64, training steps seen
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.counts: Tensor  # (K,), codes taken in the window being filled
        self.register_buffer("counts", torch.zeros(self.codebook_size))
        self.last_counts: Tensor  # (K,), in the last full window
        self.register_buffer("last_counts", torch.zeros(self.codebook_size))
        self.images: Tensor  # () int64, in the window being filled
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))
        self._seen: _Seen | None = None  # None: not read from the buffers yet

    def usage_counts(self) -> Tensor | None:
        return self.counts + self.last_counts

    def _host(self) -> _Seen:
        """The counts of training, read from the buffers once. Only training keeps both alike: others copy buffers."""
        if self._seen is None:
            self._seen = _Seen(int(self.steps), 0, int(self.images))
        return self._seen

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen = None

    @torch.no_grad()
    def _turn_window(self, rows: Tensor) -> None:
        """When a window is full, replace the codes that it did not use by some of the latents ``rows`` (N, F)."""
        seen = self._host()
        # Between the parts of a step no code is replaced, because their gradients are for one codebook.
        if seen.parts > 0 or seen.images < self.window:
            return
        if self.revive:
            self._revive(rows, seen.steps)
        self.last_counts.copy_(self.counts)
        self.counts.zero_()
        self.images.zero_()
        seen.images = 0

    @torch.no_grad()
    def _advance(self, index: Tensor, images: int, *sums: Tensor) -> Tensor:
        """Count the codes ``index`` (N,) of so many images, and end this part of a step.

        Returns:
            of each of ``sums`` (), its sum over all processes, float64 (len(sums),).
        """
        counts = count_codes(index, self.codebook_size)
        here = torch.stack([*sums, counts.new_full((), images)])
        summed = sum_across_processes(torch.cat([here.double(), counts.double()]))
        self.counts += summed[len(here) :].float()
        self.images += summed[len(here) - 1].long()
        seen = self._host()
        seen.images += images * rank_and_world_size()[1]  # every process has the same number, see `gather_rows`
        seen.parts += 1
        if seen.parts == self.parts_per_step:
            seen.parts = 0
            seen.steps += 1
            self.steps += 1
        return summed[: len(sums)]

    def _codes(self) -> Tensor:
        """(K, F) float32, the codes as latents are compared with them."""
        return self.codebook.float()

    def _revive(self, rows: Tensor, seed: int) -> None:
        """Move codes that took nothing in the window onto latents drawn by squared distance to their codes."""
        everywhere = gather_rows(rows)
        codes = self._codes()
        distance = (everywhere - codes[nearest_codes(everywhere, codes)]).square().sum(1)  # (n,)
        codes = replace_rows(self.codebook.detach(), self.counts == 0, everywhere, seed, distance)
        self.codebook.copy_(same_everywhere(codes))
