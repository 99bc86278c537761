"""LPIPS: the distance of two images for a network that was trained on photographs. A loss and a measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import VGG16_Weights, vgg16

from scq.engine.errors import UserError, first_line
from scq.engine.weights import read_weights, sound_weights

WIDTHS = (64, 128, 256, 512, 512)  # channels of VGG16's stages, each of which ends where its maps are halved
STAGES = len(WIDTHS)
_TOGETHER = 16  # images through the network at once on a CPU, so that the first stages' maps stay in its caches
_LEAST = 1e-8  # added to a squared norm, as in the published LPIPS


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al., CVPR 2018) on VGG16, with torchmetrics' bundled linear heads.

    Under autocast the network and its maps have autocast's type, and what is summed over channels is float32.

    Args:
        weights: file of VGG16's convolution weights (``features.*``); empty for torchvision's download.
        stages: how many of VGG16's five stages are compared, the first ones. Published LPIPS has all of them; on images
            of 32 pixels the last two see maps of 4 and 2 pixels, and take 40% of the work.

    Raises:
        UserError: the file is missing or does not hold these weights, or the download failed.
    """

    def __init__(self, weights: str = "", stages: int = STAGES):
        super().__init__()
        network = _LPIPS(net="vgg", pnet_rand=True)
        layers = {
            index: layer
            for stage in network.net.children()
            for index, layer in stage.named_children()
            if isinstance(layer, nn.Conv2d)
        }
        state = vgg16_features(weights)
        try:
            for index, layer in layers.items():
                layer.load_state_dict({leaf: state[f"features.{index}.{leaf}"] for leaf in ("weight", "bias")})
        except (KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"loss.perceptual_weights={weights} does not hold VGG16's features.*: {reason}") from error
        self.scaling: nn.Module = network.scaling_layer
        used = list(network.net.children())[:stages]
        self.stages = nn.ModuleList(used).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.heads = nn.ParameterList([head.model[-1].weight.flatten() for head in list(network.lins)[:stages]])
        self._casts: dict[tuple[torch.dtype, torch.device], nn.ModuleList] = {}
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Mean distance () of two batches (B, 3, H, W) in [-1, 1]. Gradients reach ``others`` only."""
        parts = zip(self._parts(images), self._parts(others), strict=True)
        return torch.cat([self._distances(self._maps_beside(real), self._maps(found)) for real, found in parts]).mean()

    def compare(self, images: Tensor, others: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """What `forward` does, and the maps (B, C, h, w) of either batch, a tensor for each stage."""
        real, found = self._whole(self._maps_beside, images), self._whole(self._maps, others)
        return self._distances(real, found).mean(), real, found

    def _parts(self, images: Tensor) -> tuple[Tensor, ...]:
        return images.split(_TOGETHER if images.device.type == "cpu" else max(1, len(images)))

    def _whole(self, maps: Callable[[Tensor], Iterable[Tensor]], images: Tensor) -> list[Tensor]:
        parts = [list(maps(part)) for part in self._parts(images)]
        return parts[0] if len(parts) == 1 else [torch.cat(each) for each in zip(*parts, strict=True)]

    def _distances(self, wanted: Iterable[Tensor], found: Iterable[Tensor]) -> Tensor:
        """(b,) distances of the images that these maps are of."""
        each: list[Tensor] = []
        for head, x, y in zip(self.heads, wanted, found, strict=True):
            rows = (maps.permute(0, 2, 3, 1).flatten(0, 2) for maps in (x, y))  # (b h w, C), nothing is copied
            distances: Any = _WeightedDistance.apply(*rows, head)  # (b h w,)
            each.append(distances.view(len(y), -1).mean(1))
        return torch.stack(each).sum(0)

    @torch.no_grad()
    def _maps_beside(self, images: Tensor) -> list[Tensor]:
        """`_maps` of what the others are compared with, through which no gradient goes."""
        return list(self._maps(images))

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        """(b, C, h, w) of each stage in turn, after its last ReLU."""
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        with torch.autocast(kind, enabled=False):
            x = self.scaling(images.float()).to(dtype).contiguous(memory_format=torch.channels_last)
        for stage in self._stages_in(dtype, images.device):
            with torch.autocast(kind, enabled=False):
                x = stage(x)
            yield x

    def _stages_in(self, dtype: torch.dtype, device: torch.device) -> nn.ModuleList:
        """The network in a type; autocast alone would cast frozen weights at every call."""
        if dtype == torch.float32:
            return self.stages
        if (dtype, device) not in self._casts:
            self._casts[dtype, device] = deepcopy(self.stages).to(dtype)
        return self._casts[dtype, device]

    def train(self, mode: bool = True) -> PerceptualLoss:
        return super().train(False)  # a fixed metric


class _WeightedDistance(torch.autograd.Function):
    """sum_c w_c (x_c / |x| - y_c / |y|)^2 for rows x, y (N, C) and w (C,), with a gradient for y.

    Expanded, s_xx / |x|^2 - 2 s_xy / (|x| |y|) + s_yy / |y|^2 with s_xy = sum_c w_c x_c y_c, it needs no normalised
    copies of the largest maps of a step: with three stages in bf16, a CPU spent 40% of LPIPS's time on them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        heads = torch.stack([torch.ones_like(w), w], dim=1).to(x.dtype)  # (C, 2)
        xx, xy, yy = ((a * b) @ heads for a, b in ((x, x), (x, y), (y, y)))  # (N, 2), the norms' squares and s
        xx, xy, yy = xx.float(), xy.float(), yy.float()
        x_norm, y_norm = (xx[:, 0] + _LEAST).sqrt(), (yy[:, 0] + _LEAST).sqrt()
        ctx.save_for_backward(x, y, w, x_norm, y_norm, xy[:, 1], yy[:, 1])
        return xx[:, 1] / x_norm.square() - 2 * xy[:, 1] / (x_norm * y_norm) + yy[:, 1] / y_norm.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y, w, x_norm, y_norm, s_xy, s_yy = ctx.saved_tensors
        gradient = 2 * gradient
        of_wy = gradient / y_norm.square()
        of_wx = -gradient / (x_norm * y_norm)
        of_y = gradient * (s_xy / (x_norm * y_norm**3) - s_yy / y_norm**4)
        of_wy, of_wx, of_y = (each.unsqueeze(1).to(y.dtype) for each in (of_wy, of_wx, of_y))
        return None, torch.addcmul(y * of_y, torch.addcmul(y * of_wy, x, of_wx), w.to(y.dtype)), None


def vgg16_features(weights: str = "") -> dict[str, Tensor]:
    """VGG16's tensors under torchvision's names; arguments and errors as those of `PerceptualLoss`."""
    if weights:
        return read_weights(Path(weights), "VGG16's weights")
    try:
        state = vgg16(weights=VGG16_Weights.IMAGENET1K_V1, progress=False).state_dict()
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # no network, or a damaged file in its cache
        raise UserError(
            f"LPIPS needs VGG16's weights, and torchvision cannot download or read them ({first_line(error)}). Set "
            "loss.perceptual_weights=FILE to torchvision's vgg16 weights, or loss.perceptual=0 to train without LPIPS"
        ) from error
    return sound_weights(state, "torchvision's weights of VGG16")
