"""What tells reconstructions from real images: by their patches, or by what a trained network makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

NORMS = ("group", "spectral")
KINDS = ("patch", "features")
MOST_CHANNELS, MOST_LAYERS = 2**12, 12


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., CVPR 2017): one logit for every overlapping patch.

    Images (B, 3, H, W) in [-1, 1] -> patch logits (B, 1, h, w), positive for real.

    It uses group or spectral normalisation instead of the original's batch normalisation: an image's logits must not
    depend on the rest of the batch, nor differ between processes.

    Args:
        channels: width of the first layer; it doubles with each further layer, up to 8 times this width.
        layers: number of layers with stride 2; the image side must be at least 3 * 2 ** layers.
        norm: ``group``, or ``spectral`` (Miyato et al., arXiv 1802.05957), which bounds every layer's gain by one.

    Raises:
        ValueError: the norm is unknown.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm: str = "group"):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be group or spectral, not {norm!r}")
        bounded = spectral_norm if norm == "spectral" else nn.Identity()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [bounded(nn.Conv2d(3, widths[0], 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            blocks.append(bounded(nn.Conv2d(widths[i - 1], widths[i], 4, stride, padding=1, bias=norm == "spectral")))
            if norm == "group":
                blocks.append(nn.GroupNorm(min(32, widths[i] // 4), widths[i]))
            blocks.append(nn.LeakyReLU(0.2))
        blocks.append(bounded(nn.Conv2d(widths[-1], 1, 4, padding=1)))
        self.layers = nn.Sequential(*blocks)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


class FeatureDiscriminator(nn.Module):
    """One logit for every place of the maps that a frozen network makes of an image.

    Maps (B, C, h, w), one for each stage of that network -> logits (B, n), positive for real.

    The idea is that of Projected GANs (Sauer et al., arXiv 2111.01007). Here the maps are those that LPIPS has computed
    anyway, and every layer is a 1x1 convolution, so it costs next to nothing: a place of VGG16's third stage sees 40
    pixels already. Spectral normalisation bounds every layer's gain by one.

    Args:
        widths: channels of the maps.
        channels: of the two hidden layers.
    """

    def __init__(self, widths: Sequence[int], channels: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(width, channels, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(channels, channels, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(channels, 1, 1)),
            )
            for width in widths
        )

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([head(_levelled(x)).flatten(1) for head, x in zip(self.heads, maps, strict=True)], dim=1)


def _levelled(maps: torch.Tensor) -> torch.Tensor:
    """Maps whose channels have mean square one at every place, whose scale says nothing about an image's being real."""
    scale = torch.linalg.vector_norm(maps, dim=1, keepdim=True).float() / maps.shape[1] ** 0.5  # (B, 1, h, w)
    return maps * (scale + 1e-3).reciprocal().to(maps.dtype)
