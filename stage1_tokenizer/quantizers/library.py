"""The strongest hard quantizers to compare with, as `vector-quantize-pytorch` implements them, behind our interface.

The training rules are the library's. The float32 arithmetic, the checks and the statistics are ours.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from math import log2, prod

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, ResidualVQ, SimVQ, VectorQuantize

from scq.engine.checks import finite_number, shown, whole_number, yes_or_no
from scq.engine.errors import UserError
from scq.stage1_tokenizer.quantizers.interface import (
    MOST_CODES,
    MOST_DIM,
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

# Levels per channel, Mentzer et al. (arXiv 2309.15505), table 1; 64 and 512, which it lacks, are powers of 8.
_FSQ_LEVELS = {
    64: [8, 8],
    240: [8, 6, 5],
    512: [8, 8, 8],
    1000: [8, 5, 5, 5],
    4375: [7, 5, 5, 5, 5],
    15360: [8, 8, 8, 6, 5],
    64000: [8, 8, 8, 5, 5, 5],
}


class LibraryQuantizer(Quantizer):
    """Base of the wrappers: ``layer`` maps (1, N, F) latents to (quantized, indices, loss)."""

    def __init__(self, codebook_size: int, dim: int, layer: nn.Module):
        super().__init__()
        self.codebook_size, self.dim, self.layer = codebook_size, dim, layer

    def forward(self, z: Tensor, image_noise: Tensor | None = None) -> Quantized:
        check_latents(z, self.dim)
        with torch.autocast(z.device.type, enabled=False):
            rows = flatten_latents(z)  # (N, F)
            z_q, index, loss = self._quantize(rows.unsqueeze(0))
            index = index.reshape(-1).long()  # (N,)
            # A straight-through output is its code only up to rounding, so not in eval mode.
            z_q = z_q[0] if self.training else self._codes(index)  # (N, F)
            stats = usage_of(count_codes(index, self.codebook_size))
            stats["hard_error"] = (rows - z_q).detach().square().sum(1).mean()
        indices = index.view(z.shape[0], *z.shape[2:])
        return Quantized(returned(unflatten_latents(z_q, z), z), indices, loss.float().sum(), stats)

    def lookup(self, indices: Tensor) -> Tensor:
        indices = check_indices(indices, self.codebook_size)
        with torch.autocast(indices.device.type, enabled=False):
            codes = self._codes(indices.flatten())
        return codes.view(*indices.shape, self.dim).permute(0, 3, 1, 2).contiguous()

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, N, F) -> quantized (1, N, F), indices with N entries, loss."""
        return self.layer(rows)

    def _codes(self, indices: Tensor) -> Tensor:
        """(N,) -> (N, F)."""
        raise NotImplementedError


@register_quantizer("vq_ema")
class AveragedVectorQuantizer(LibraryQuantizer):
    """Codes as running means of their latents, from a k-means start, with dead codes replaced.

    The averages are of van den Oord et al. (arXiv 1711.00937), appendix A.1; low-dimensional, l2-normalised codes of Yu
    et al. (arXiv 2110.04627), section 3.2.

    Args:
        commitment: weight of |z - sg(c)|^2, >= 0.
        decay: of the running means, in (0, 1).
        expiry: a code whose running count falls below this many latents a batch is replaced by a latent; 0 for never.
        cosine: compare directions; codes are then l2-normalised.
        projection_dim: channels of the codes, if not those of the latents.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        commitment: float = 0.25,
        decay: float = 0.99,
        expiry: float = 1.0,
        cosine: bool = False,
        projection_dim: int | None = None,
    ):
        check_codebook_shape(codebook_size, dim)
        _check_averages(commitment, decay, expiry)
        yes_or_no("cosine", cosine)
        if projection_dim is not None:
            whole_number("projection_dim", projection_dim, 1, MOST_DIM)
        layer = VectorQuantize(
            dim,
            codebook_size,
            codebook_dim=projection_dim,
            decay=decay,
            kmeans_init=True,
            use_cosine_sim=cosine,
            threshold_ema_dead_code=expiry,
            commitment_weight=commitment,
            rotation_trick=False,
        )
        super().__init__(codebook_size, dim, layer)

    def _codes(self, indices: Tensor) -> Tensor:
        return self.layer.get_output_from_indices(indices)


@register_quantizer("simvq")
class LinearVectorQuantizer(LibraryQuantizer):
    """SimVQ (Zhu et al., arXiv 2411.02038): a frozen random codebook behind one learned linear map.

    Args:
        commitment: weight of |z - sg(c)|^2 beside |sg(z) - c|^2, >= 0.
        rotation: gradients by the rotation trick (arXiv 2410.06424), the library's default, or straight through.
    """

    def __init__(self, codebook_size: int, dim: int, commitment: float = 0.25, rotation: bool = True):
        check_codebook_shape(codebook_size, dim)
        finite_number("commitment", commitment, 0)
        yes_or_no("rotation", rotation)
        layer = SimVQ(dim, codebook_size, rotation_trick=rotation, input_to_quantize_commit_loss_weight=commitment)
        super().__init__(codebook_size, dim, layer)

    def _codes(self, indices: Tensor) -> Tensor:
        return self.layer.code_transform(self.layer.frozen_codebook[indices])


@register_quantizer("fsq")
class FiniteScalarQuantizer(LibraryQuantizer):
    """Finite scalar quantization (Mentzer et al., arXiv 2309.15505): a few channels, each rounded to a few levels.

    Args:
        levels: per channel; their product is the codebook size. None: the published ones for that size.

    Raises:
        ValueError: the levels' product is not ``codebook_size``, or none are known for it.
    """

    def __init__(self, codebook_size: int, dim: int, levels: list[int] | None = None):
        check_codebook_shape(codebook_size, dim)
        levels = _factors("levels", levels) if levels is not None else _FSQ_LEVELS.get(codebook_size)
        if levels is None or prod(levels) != codebook_size:
            raise ValueError(
                f"levels must be integers whose product is codebook_size={codebook_size}, not {levels}; sizes with "
                f"published levels: {', '.join(map(str, _FSQ_LEVELS))}"
            )
        # The library reads a size from a tensor, which on the meta device has none.
        meta = torch.get_default_device().type == "meta"
        with torch.device("cpu") if meta else nullcontext():
            layer = FSQ(levels, dim=dim)
        super().__init__(codebook_size, dim, layer)

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices = self.layer(rows)
        return quantized, indices, rows.new_zeros(())

    def _codes(self, indices: Tensor) -> Tensor:
        return self.layer.indices_to_codes(indices)


@register_quantizer("rvq2")
class ResidualVectorQuantizer(LibraryQuantizer):
    """Two codebooks, the second for what the first leaves (Lee et al., arXiv 2203.01941), at one codebook's rate.

    A pair of codes is one index of the product, so that tokens, rate and prior are those of the other quantizers.

    Args:
        sizes: of the two codebooks; their product is the codebook size. None: as equal as possible.
        commitment, decay, expiry: as for ``vq_ema``.

    Raises:
        ValueError: the sizes' product is not ``codebook_size``.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        sizes: list[int] | None = None,
        commitment: float = 0.25,
        decay: float = 0.99,
        expiry: float = 1.0,
    ):
        check_codebook_shape(codebook_size, dim)
        _check_averages(commitment, decay, expiry)
        sizes = _factors("sizes", sizes) if sizes is not None else _nearly_square(codebook_size)
        if len(sizes) != 2 or prod(sizes) != codebook_size:
            raise ValueError(f"sizes must be two integers whose product is codebook_size={codebook_size}, not {sizes}")
        super().__init__(codebook_size, dim, _residual_layer(dim, sizes, commitment, decay, expiry))
        self.sizes = sizes

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, pairs, losses = self.layer(rows)  # pairs (1, N, 2)
        return quantized, pairs[..., 0] * self.sizes[1] + pairs[..., 1], losses

    def _codes(self, indices: Tensor) -> Tensor:
        pairs = torch.stack([indices // self.sizes[1], indices % self.sizes[1]], dim=-1)  # (N, 2)
        return self.layer.get_output_from_indices(pairs.unsqueeze(0))[0]


@register_quantizer("rvq")
class DeepResidualVectorQuantizer(Quantizer):
    """Residual quantization with ``levels`` codebooks, each for what those before it leave (Lee et al., 2203.01941).

    What reconstructions cost at rates beyond one code for each latent. It has no single codes: their combinations are
    too many for a prior over indices.

    Args:
        codebook_size: of every level.
        levels: how many, from 1 to 64.
        commitment, decay, expiry: as for ``vq_ema``.
    """

    has_codes = False

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        levels: int = 4,
        commitment: float = 0.25,
        decay: float = 0.99,
        expiry: float = 1.0,
    ):
        super().__init__()
        check_codebook_shape(codebook_size, dim)
        whole_number("levels", levels, 1, 64)
        _check_averages(commitment, decay, expiry)
        self.codebook_size, self.dim = codebook_size, dim
        self.bits_per_latent = levels * log2(codebook_size)
        self.layer = _residual_layer(dim, [codebook_size] * levels, commitment, decay, expiry)

    def forward(self, z: Tensor, image_noise: Tensor | None = None) -> Quantized:
        check_latents(z, self.dim)
        with torch.autocast(z.device.type, enabled=False):
            rows = flatten_latents(z)  # (N, F)
            z_q, levels, losses = self.layer(rows.unsqueeze(0))  # levels (1, N, levels)
            # A straight-through output is a sum of codes only up to rounding, so not in eval mode.
            z_q = (z_q if self.training else self.layer.get_output_from_indices(levels))[0]  # (N, F)
            stats = {"hard_error": (rows - z_q).detach().square().sum(1).mean()}
        indices = torch.zeros(z.shape[0], *z.shape[2:], dtype=torch.int64, device=z.device)
        return Quantized(returned(unflatten_latents(z_q, z), z), indices, losses.float().sum(), stats)

    def lookup(self, indices: Tensor) -> Tensor:
        raise ValueError("quantizer 'rvq' has no single codes to look up; 'rvq2' has")


def _residual_layer(dim: int, sizes: list[int], commitment: float, decay: float, expiry: float) -> ResidualVQ:
    """A codebook of each size, every one for what those before it leave."""
    return ResidualVQ(
        dim=dim,
        codebook_size=tuple(sizes),
        decay=decay,
        kmeans_init=True,
        threshold_ema_dead_code=expiry,
        commitment_weight=commitment,
        rotation_trick=False,
    )


def _check_averages(commitment: float, decay: float, expiry: float) -> None:
    finite_number("commitment", commitment, 0)
    finite_number("decay", decay, above=0, below=1)
    finite_number("expiry", expiry, 0)


def _factors(name: str, factors: list[int]) -> list[int]:
    if not isinstance(factors, Sequence) or isinstance(factors, str) or len(factors) > 64:
        raise UserError(f"{name}={shown(factors)} must be a list of whole numbers")
    return [whole_number(name, factor, 1, MOST_CODES) for factor in factors]


def _nearly_square(number: int) -> list[int]:
    """Two factors, the larger first, as near to each other as possible."""
    small = next(factor for factor in range(int(number**0.5), 0, -1) if number % factor == 0)
    return [number // small, small]
