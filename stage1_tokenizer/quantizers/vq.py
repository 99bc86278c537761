"""What soft convex quantization is compared with first: VQGAN's quantizer, and none at all."""

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from scq.engine.checks import finite_number, yes_or_no
from scq.stage1_tokenizer.quantizers.interface import (
    Quantized,
    Quantizer,
    check_codebook_shape,
    check_indices,
    check_latents,
    count_codes,
    flatten_latents,
    register_quantizer,
    returned,
    unflatten_latents,
    usage_of,
)
from scq.stage1_tokenizer.quantizers.reviving import RevivingQuantizer
from scq.stage1_tokenizer.solver.codebook import nearest_codes


@register_quantizer("vq")
class VectorQuantizer(RevivingQuantizer):
    """Vector quantization as VQGAN trains it: nearest code, straight-through gradient.

    Loss (van den Oord et al. 2017, arXiv 1711.00937, eq. 3): |sg(z) - c|^2 + commitment |z - sg(c)|^2, averaged over
    latents and channels; ``commitment`` is on the encoder's term, as published.
    """

    def __init__(
        self, codebook_size: int, dim: int, commitment: float = 0.25, revive: bool = False, window: int = 2048
    ):
        """Codes start uniform in [-1/K, 1/K], as VQGAN's do.

        Args:
            commitment: at least 0.
            revive: replace codes that took no latent over a whole window by latents far from their codes. VQGAN does
                not, and few of its codes are used; with it, VQ stands beside SCQ with the same remedy.
            window: images over which codes are counted for that, >= 1.
        """
        super().__init__()
        check_codebook_shape(codebook_size, dim)
        finite_number("commitment", commitment, 0)
        self.codebook_size, self.dim, self.commitment = codebook_size, dim, commitment
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))
        self.counts_codes = yes_or_no("revive", revive)  # VQGAN's keeps no counts, so its models hold none
        if revive:
            self._count(revive, window)

    def forward(self, z: Tensor, image_noise: Tensor | None = None) -> Quantized:
        check_latents(z, self.dim)
        with torch.autocast(z.device.type, enabled=False):
            rows, revives = flatten_latents(z), self.training and self.counts_codes  # (N, F)
            if revives:
                self._turn_window(rows.detach())
            codebook = self.codebook.float()  # (K, F)
            with torch.no_grad():
                index = nearest_codes(rows, codebook)  # (N,)
            code = codebook[index]  # (N, F)
            loss = nnf.mse_loss(code, rows.detach()) + self.commitment * nnf.mse_loss(rows, code.detach())
            # Straight-through in training; rows + (code - rows) is the code only up to rounding, so not in eval mode.
            z_q = unflatten_latents(rows + (code - rows).detach() if self.training else code, z)
            stats = usage_of(count_codes(index, self.codebook_size))
            stats["hard_error"] = (rows - code).detach().square().sum(1).mean()
            if revives:
                self._advance(index, z.shape[0])
        return Quantized(returned(z_q, z), index.view(z.shape[0], *z.shape[2:]), loss, stats)

    def usage_counts(self) -> Tensor | None:
        return super().usage_counts() if self.counts_codes else None

    def lookup(self, indices: Tensor) -> Tensor:
        return self.codebook.float()[check_indices(indices, self.codebook_size)].permute(0, 3, 1, 2).contiguous()


@register_quantizer("none")
class NoQuantizer(Quantizer):
    """The ceiling: latents pass unchanged. Its one "code" is zero, so there is nothing for a prior to learn."""

    has_codes = False

    def __init__(self, codebook_size: int, dim: int):
        super().__init__()
        check_codebook_shape(codebook_size, dim)
        self.codebook_size, self.dim = codebook_size, dim

    def forward(self, z: Tensor, image_noise: Tensor | None = None) -> Quantized:
        check_latents(z, self.dim)
        indices = torch.zeros(z.shape[0], *z.shape[2:], dtype=torch.int64, device=z.device)
        return Quantized(returned(z.float(), z), indices, z.new_zeros((), dtype=torch.float32), {})

    def lookup(self, indices: Tensor) -> Tensor:
        raise ValueError("quantizer 'none' has no codes to look up")
