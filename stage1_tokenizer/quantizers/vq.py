"""The quantizers that soft convex quantization stands beside: VQGAN's own, and none at all."""

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from scq.stage1_tokenizer.quantizers.interface import (
    Quantized,
    Quantizer,
    check_codebook_shape,
    check_indices,
    check_latents,
    register_quantizer,
)
from scq.stage1_tokenizer.solver.codebook import Codebook
from scq.stage1_tokenizer.solver.solve import check_finite


def flatten_latents(z: Tensor) -> Tensor:
    """(B, F, h, w) -> (B h w, F) float32."""
    return z.float().permute(0, 2, 3, 1).flatten(0, 2)


def unflatten_latents(rows: Tensor, z: Tensor) -> Tensor:
    """(B h w, F) -> (B, F, h, w) shaped as z."""
    batch, _, height, width = z.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of code counts (K,): the number of codes that a uniform use would amount to."""
    share = counts / counts.sum().clamp_min(1)
    return torch.exp(-torch.special.xlogy(share, share).sum())


@register_quantizer("vq")
class VectorQuantizer(Quantizer):
    """Vector quantization as VQGAN trains it: nearest code, straight-through gradient.

    Loss (van den Oord et al. 2017, arXiv 1711.00937, eq. 3): |sg(z) - c|^2 + commitment |z - sg(c)|^2, averaged over
    latents and channels; ``commitment`` is on the encoder's term, as published.
    """

    def __init__(self, codebook_size: int, dim: int, commitment: float = 0.25):
        """Codes start uniform in [-1/K, 1/K], as VQGAN's do; ``commitment`` >= 0."""
        super().__init__()
        check_codebook_shape(codebook_size, dim)
        if not commitment >= 0:
            raise ValueError(f"commitment must be at least 0, not {commitment!r}")
        self.codebook_size, self.dim, self.commitment = codebook_size, dim, commitment
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))

    def forward(self, z: Tensor, image_noise: Tensor | None = None) -> Quantized:
        check_latents(z, self.dim)
        check_finite("z", z)
        with torch.autocast(z.device.type, enabled=False):
            rows, codebook = flatten_latents(z), self.codebook.float()  # (N, F), (K, F)
            with torch.no_grad():
                book = Codebook(codebook)
                index = book.nearest(rows - book.centre)  # (N,)
            code = codebook[index]
            loss = nnf.mse_loss(code, rows.detach()) + self.commitment * nnf.mse_loss(rows, code.detach())
            # Straight-through in training; rows + (code - rows) is the code only up to rounding, so not in eval mode.
            z_q = unflatten_latents(rows + (code - rows).detach() if self.training else code, z)
            counts = torch.bincount(index, minlength=self.codebook_size).float()
            stats = {
                "usage": (counts > 0).float().mean(),
                "perplexity": perplexity(counts),
                "hard_error": (rows - code).detach().square().sum(1).mean(),
            }
        return Quantized(z_q, index.view(z.shape[0], *z.shape[2:]), loss, stats)

    def lookup(self, indices: Tensor) -> Tensor:
        check_indices(indices, self.codebook_size)
        return self.codebook.float()[indices].permute(0, 3, 1, 2).contiguous()


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
        check_finite("z", z)
        indices = torch.zeros(z.shape[0], *z.shape[2:], dtype=torch.int64, device=z.device)
        return Quantized(z.float(), indices, z.new_zeros((), dtype=torch.float32), {})

    def lookup(self, indices: Tensor) -> Tensor:
        raise ValueError("quantizer 'none' has no codes to look up")
