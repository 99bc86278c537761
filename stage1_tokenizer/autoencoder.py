"""Image <-> tokens: VQGAN's encoder and decoder (Esser, Rombach, Ommer, CVPR 2021) around any quantizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import nn

from scq.engine.checks import shown, whole_number, yes_or_no
from scq.engine.errors import UserError
from scq.engine.fingerprint import fingerprint
from scq.engine.network import Network
from scq.stage1_tokenizer.latent_network import LatentNetwork
from scq.stage1_tokenizer.quantizers import Mixture, Quantized, create_quantizer
from scq.stage1_tokenizer.robustness import NeighbourSwap, swap_for_neighbours

CHANNELS = (64, 128)
# A config from others may claim any size; networks beyond these would take hours to build, and nobody trains them.
MOST_PIXELS, MOST_CHANNELS, MOST_LAYERS, MOST_RESOLUTIONS = 2**15, 2**14, 512, 12


@dataclass
class ArchitectureConfig:
    """The networks around the quantizer, and the defaults of `ImageTokenizer`."""

    image_size: int = 32  # side of the square training images, in pixels
    # Width of the encoder at each resolution, finest first; every entry after the first halves the side.
    channels: list[int] = field(default_factory=lambda: list(CHANNELS))
    layers_per_block: int = 1  # residual blocks at each resolution (the decoder has one more, as in VQGAN)
    # Side of the squares of pixels that are folded into channels before the first convolution. 2 quarters the work at
    # the finest resolution, which is most of it on a CPU. In all, the side of an image shrinks by a factor of
    # patch_size * 2 ** (len(channels) - 1).
    patch_size: int = 2
    attention: bool = False  # self-attention at the coarsest resolution
    latent_dim: int = 8  # F, the size of a code
    # A LatentNetwork between quantizer and decoder; depth 0 for none. It gives the decoder of a hard quantizer as many
    # parameters as a refiner has: the control that a refiner must beat.
    neck_width: int = 192
    neck_depth: int = 0


@dataclass
class QuantizerConfig:
    """The quantizer, and the defaults of `ImageTokenizer`."""

    name: str = "scq"  # one known to `create_quantizer`
    codebook_size: int = 512  # K
    options: dict[str, Any] = field(default_factory=dict)  # further options of that quantizer


class ImageTokenizer(Network):
    """An autoencoder whose latents are quantized; a diffusers model with ``from_pretrained`` and ``save_pretrained``.

    Args:
        image_size, channels, layers_per_block, patch_size, attention, latent_dim, neck_width, neck_depth: see
            `ArchitectureConfig`.
        codebook_size, quantizer_name, quantizer_options: see `QuantizerConfig`.

    Raises:
        UserError: a size is out of range, the image size is not a multiple of the factor by which the encoder shrinks
            it, or the quantizer or one of its options is unknown.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        image_size: int = ArchitectureConfig.image_size,
        channels: tuple[int, ...] = CHANNELS,
        layers_per_block: int = ArchitectureConfig.layers_per_block,
        patch_size: int = ArchitectureConfig.patch_size,
        attention: bool = ArchitectureConfig.attention,
        latent_dim: int = ArchitectureConfig.latent_dim,
        neck_width: int = ArchitectureConfig.neck_width,
        neck_depth: int = ArchitectureConfig.neck_depth,
        codebook_size: int = QuantizerConfig.codebook_size,
        quantizer_name: str = QuantizerConfig.name,
        quantizer_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        channels = _checked_channels(channels)
        for name, value, least, most in (
            ("image_size", image_size, 1, MOST_PIXELS),
            ("layers_per_block", layers_per_block, 1, MOST_LAYERS),
            ("patch_size", patch_size, 1, 64),
            ("latent_dim", latent_dim, 1, MOST_CHANNELS),
            ("neck_width", neck_width, 1, MOST_CHANNELS),
            ("neck_depth", neck_depth, 0, MOST_LAYERS),
        ):
            whole_number(name, value, least, most)
        yes_or_no("attention", attention)
        if not isinstance(quantizer_options, Mapping | None):
            raise UserError(f"quantizer_options={shown(quantizer_options)} must be a mapping of names to values")
        factor = patch_size * 2 ** (len(channels) - 1)
        if image_size % factor:
            raise UserError(f"image_size={image_size} is not a multiple of {factor}, by which this encoder shrinks it")
        patch_channels = 3 * patch_size**2
        shared = {
            "block_out_channels": tuple(channels),
            "layers_per_block": layers_per_block,
            "norm_num_groups": _norm_groups(channels),
            "mid_block_add_attention": attention,
        }
        down, up = ("DownEncoderBlock2D",) * len(channels), ("UpDecoderBlock2D",) * len(channels)
        self.encoder = Encoder(patch_channels, latent_dim, down_block_types=down, double_z=False, **shared)
        self.before_quantizer = nn.Conv2d(latent_dim, latent_dim, 1)
        self.quantizer = create_quantizer(
            quantizer_name, codebook_size=codebook_size, dim=latent_dim, **(quantizer_options or {})
        )
        self.after_quantizer = nn.Conv2d(latent_dim, latent_dim, 1)
        self.neck = LatentNetwork(latent_dim, latent_dim, neck_width, neck_depth) if neck_depth else None
        self.decoder = Decoder(latent_dim, patch_channels, up_block_types=up, **shared)
        self.factor = factor

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the token grid of a training image."""
        return (self.config.image_size // self.factor,) * 2

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weights, at which VQGAN balances the gradients of its losses."""
        return self.decoder.conv_out.weight

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents before quantization (B, F, H / factor, W / factor).

        Raises:
            UserError: the images are not floating, or not of that shape with sides that the encoder can shrink.
        """
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1] != 3 or 0 in shape or shape[2] % self.factor or shape[3] % self.factor:
            raise UserError(f"images must be (B, 3, H, W) with H and W multiples of {self.factor}, not {shape}")
        if not images.is_floating_point():
            raise UserError(
                f"images must be floats in [-1, 1], not {images.dtype}; to_float makes them of uint8 pixels"
            )
        images = images.to(self.before_quantizer.weight.dtype)
        return self.before_quantizer(self.encoder(F.pixel_unshuffle(images, self.config.patch_size)))

    def encode(self, images: torch.Tensor) -> Mixture:
        """Images (B, 3, H, W) in [-1, 1] -> quantized latents, dominant codes, and which codes are mixed.

        A prior sees only ``indices``; the decoder is trained on ``z_q``.
        """
        return self.quantizer.mix(self.latents(images))

    def decode(self, z_q: torch.Tensor) -> torch.Tensor:
        """Quantized latents (B, F, h, w) -> images (B, 3, H, W), roughly in [-1, 1], not clamped.

        Raises:
            UserError: the latents are not floating, or of another shape.
        """
        if z_q.ndim != 4 or z_q.shape[1] != self.config.latent_dim or not z_q.is_floating_point():
            shape = f"(B, {self.config.latent_dim}, h, w)"
            raise UserError(f"latents must be floats {shape}, not {tuple(z_q.shape)} {z_q.dtype}")
        x = self.after_quantizer(z_q.to(self.after_quantizer.weight.dtype))  # (B, F, h, w)
        if self.neck is not None:
            x = x + self.neck(x)
        return F.pixel_shuffle(self.decoder(x), self.config.patch_size)

    def decode_indices(self, indices: torch.Tensor) -> torch.Tensor:
        """Codes (B, h, w) -> images (B, 3, H, W); each latent is a single code."""
        return self.decode(self.quantizer.lookup(indices))

    def codes(self) -> torch.Tensor:
        """The codebook (K, F), without gradients.

        Raises:
            UserError: the quantizer has no codes.
        """
        if not self.quantizer.has_codes:
            raise UserError(
                f"quantizer {self.config.quantizer_name!r} has no codes, so there is nothing to draw or refine; train "
                "a tokenizer with another quantizer.name"
            )
        with torch.no_grad():
            every = torch.arange(self.quantizer.codebook_size, device=self.device)
            return self.quantizer.lookup(every[None, None])[0, :, 0].t()

    def forward(
        self, images: torch.Tensor, image_noise: torch.Tensor | None = None, swap: NeighbourSwap | None = None
    ) -> tuple[torch.Tensor, Quantized]:
        """One training pass.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            image_noise: (B,) uniform in [0, 1), each image's own randomness for the quantizer.
            swap: which tokens to decode from a neighbour of their code, so that the decoder learns to tolerate a
                prior's mistakes.

        Returns:
            the reconstruction (B, 3, H, W) and what the quantizer returned.
        """
        quantized, z_q = self.quantize(self.latents(images), image_noise, swap)
        return self.decode(z_q), quantized

    def quantize(
        self, latents: torch.Tensor, image_noise: torch.Tensor | None, swap: NeighbourSwap | None
    ) -> tuple[Quantized, torch.Tensor]:
        """What the quantizer returned, and the z_q (B, F, h, w) that is decoded in training; see `forward`."""
        quantized = self.quantizer(latents, image_noise)
        return quantized, quantized.z_q if swap is None else swap_for_neighbours(quantized, self.quantizer, swap)

    def fingerprint(self) -> str:
        """The fingerprint of all weights. Tokens carry it, and a prior refuses tokens of another tokenizer."""
        return fingerprint(self)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images, clamped to [-1, 1] -> rounded uint8 pixels."""
    return ((images.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


def _checked_channels(channels: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(channels, Sequence) or isinstance(channels, str) or not 1 <= len(channels) <= MOST_RESOLUTIONS:
        raise UserError(f"channels={shown(channels)} must be a list of 1 to {MOST_RESOLUTIONS} whole numbers")
    return tuple(whole_number("channels", width, 1, MOST_CHANNELS) for width in channels)


def _norm_groups(channels: tuple[int, ...]) -> int:
    """VQGAN's 32 groups, or fewer if a width is not a multiple of 32."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if all(width % groups == 0 for width in channels))
