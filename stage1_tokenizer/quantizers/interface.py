"""What every quantizer is, latents in and quantized latents and dominant codes out, and what all of them share."""

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scq.engine.checks import whole_number
from scq.engine.precision import KeepsFloat32
from scq.stage1_tokenizer.solver.codebook import may_wait, require_finite_squares

MOST_CODES, MOST_DIM = 2**24, 2**14  # a model from others may claim any number


class Quantized(NamedTuple):
    """What a quantizer makes of latents z (B, F, h, w)."""

    z_q: Tensor  # (B, F, h, w) of z's type, what the decoder sees; float32 under autocast
    indices: Tensor  # (B, h, w) int64, the code that stands for each latent (`Quantizer.token`): what the prior learns
    loss: Tensor  # () codebook and commitment terms, already weighted
    stats: dict[str, Tensor]  # name -> 0-dim tensor, detached


class Mixture(NamedTuple):
    """Which codes a quantizer mixes for latents z (B, F, h, w)."""

    z_q: Tensor  # (B, F, h, w) float32
    indices: Tensor  # (B, h, w) int64, the codes that stand for the latents
    support: Tensor  # (B, h, w, S) int64, the codes mixed, padded; S is 1 for a hard quantizer
    weights: Tensor  # (B, h, w, S) float32, theirs: at least 0, summing to one; padding has 0


class Quantizer(KeepsFloat32):
    """Base of all quantizers.

    The arithmetic is float32 whatever the model outside computes in, and so are the weights: a cast of the model, such
    as ``model.half()``, leaves those of its quantizer as they are, because rounding would undo the convex detail.

    Attributes:
        codebook_size: K, the number of codes; indices are in [0, K).
        dim: F, the channels of a latent.
        token: which code of a latent ``indices`` name, "dominant" or "nearest"; they differ only where codes are mixed.
        has_codes: False where there is nothing to look up, and for a prior nothing to learn.
        bits_per_latent: of a quantizer without such codes, what a latent costs; None if it is continuous.
        parts_per_step: training forwards that make one optimizer step; above 1 where gradients are accumulated.
    """

    codebook_size: int
    dim: int
    token: str = "dominant"
    has_codes: bool = True
    bits_per_latent: float | None = None
    parts_per_step: int = 1

    def forward(self, z: Tensor, image_noise: Tensor | None = None) -> Quantized:
        """Quantize latents.

        Args:
            z: (B, F, h, w) latents of any floating type, in which z_q comes back. Under autocast z_q is float32, as
                what other operations return that autocast computes in float32.
            image_noise: (B,) uniform numbers in [0, 1), the randomness of each image, or None to draw them from torch's
                global generator. Quantizers without randomness ignore it. Nothing is random in eval mode.
        """
        raise NotImplementedError

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, F, h, w) of indices (B, h, w)."""
        raise NotImplementedError

    def mix(self, z: Tensor) -> Mixture:
        """What `forward` does with z (B, F, h, w) in eval mode, code by code."""
        z_q, indices, _, _ = self(z.float())
        return Mixture(z_q, indices, indices.unsqueeze(-1), torch.ones_like(indices, dtype=z_q.dtype).unsqueeze(-1))

    def usage_counts(self) -> Tensor | None:
        """(K,) how often each code was dominant lately in training; None where a quantizer does not count."""
        return None


_REGISTRY: dict[str, Callable[..., Quantizer]] = {}


def register_quantizer(name: str) -> Callable[[type[Quantizer]], type[Quantizer]]:
    """Class decorator: make a quantizer available to `create_quantizer` under a plain name."""

    def add(cls: type[Quantizer]) -> type[Quantizer]:
        if name in _REGISTRY:
            raise ValueError(f"quantizer {name!r} is registered twice")
        _REGISTRY[name] = cls
        return cls

    return add


def quantizer_names() -> list[str]:
    """Names that `create_quantizer` knows, sorted."""
    return sorted(_REGISTRY)


def create_quantizer(name: str, *, codebook_size: int, dim: int, **options: Any) -> Quantizer:
    """Build a quantizer by name.

    Args:
        name: one of `quantizer_names()`.
        codebook_size: K >= 1.
        dim: F >= 1, the channels of a latent.
        options: further arguments of that quantizer's constructor.

    Raises:
        ValueError: unknown name or option (the message lists those that exist), or a value out of its range.
    """
    if name not in _REGISTRY:
        raise ValueError(f"no quantizer is named {name!r}; there are: {', '.join(quantizer_names())}")
    cls = _REGISTRY[name]
    known = [p for p in signature(cls).parameters if p not in ("codebook_size", "dim")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"quantizer {name!r} has no option {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
    return cls(codebook_size=codebook_size, dim=dim, **options)


def check_codebook_shape(codebook_size: int, dim: int) -> None:
    """Raise UserError unless both sizes are positive integers, and not beyond any use."""
    whole_number("codebook_size", codebook_size, 1, MOST_CODES)
    whole_number("dim", dim, 1, MOST_DIM)


def check_latents(z: Tensor, dim: int) -> None:
    """Raise ValueError unless z is (B, dim, h, w), floating and not empty, and all of its squares are finite.

    A training step on a GPU does not look for the latter (see `may_wait`): the losses show it when they are logged.
    """
    if z.ndim != 4 or z.shape[1] != dim:
        raise ValueError(f"z must be (B, {dim}, h, w), not {tuple(z.shape)}")
    if not z.is_floating_point():
        raise ValueError(f"z must be floating point, not {z.dtype}")
    if z.numel() == 0:
        raise ValueError(f"z is empty: its shape is {tuple(z.shape)}")
    if may_wait(z):
        require_finite_squares("z", z.float())  # in which it is quantized


def check_indices(indices: Tensor, codebook_size: int) -> Tensor:
    """The indices (B, h, w) as int64; torch would take uint8 for a mask.

    Raises:
        ValueError: they are not integers (B, h, w) in [0, codebook_size). A training step on a GPU does not look at the
            range (see `may_wait`).
    """
    if indices.ndim != 3 or indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
        raise ValueError(f"indices must be integers (B, h, w), not {tuple(indices.shape)} {indices.dtype}")
    low, high = (int(indices.min()), int(indices.max())) if indices.numel() and may_wait(indices) else (0, 0)
    if low < 0 or high >= codebook_size:
        raise ValueError(f"indices must be in [0, {codebook_size}), but span [{low}, {high}]")
    return indices.long()


def flatten_latents(z: Tensor) -> Tensor:
    """(B, F, h, w) -> (B h w, F) float32."""
    return z.float().permute(0, 2, 3, 1).flatten(0, 2)


def returned(z_q: Tensor, z: Tensor) -> Tensor:
    """z_q (B, F, h, w) float32 in the type in which a quantizer returns it for latents z; see `Quantizer.forward`."""
    return z_q if torch.is_autocast_enabled(z.device.type) else z_q.to(z.dtype)


def unflatten_latents(rows: Tensor, z: Tensor) -> Tensor:
    """(B h w, F) -> (B, F, h, w) shaped as z."""
    batch, _, height, width = z.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()


def count_codes(index: Tensor, codebook_size: int) -> Tensor:
    """(K,) float32, how often each code occurs in index (N,)."""
    # Whole numbers have the same sum in any order. bincount would wait for the largest index on a GPU.
    return index.new_zeros(codebook_size).index_add_(0, index, torch.ones_like(index)).float()


def usage_of(counts: Tensor) -> dict[str, Tensor]:
    """Statistics of code counts (K,): the share of codes in use, and the perplexity.

    The perplexity is exp of the entropy: the number of codes that a uniform use would amount to.
    """
    share = counts / counts.sum().clamp_min(1)
    entropy = -torch.special.xlogy(share, share).sum()
    return {"usage": (counts > 0).float().mean(), "perplexity": torch.exp(entropy)}
