"""What a reconstruction costs: pixels, perceptual distance, and the verdict of a discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import VGG16_Weights, vgg16

from engine.errors import UserError
from engine.schedules import linear_ramp
from stage1_tokenizer.discriminator import PatchDiscriminator


@dataclass
class LossConfig:
    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 1.0  # weight of LPIPS (VGG16); 0 switches it off
    perceptual_weights: str = ""  # VGG16 weights as torchvision names them; empty: torchvision's own download
    adversarial: float = 0.5  # weight of the adversarial loss; 0 trains without a discriminator
    adversarial_start: int = 10000  # the step at which the discriminator's verdict begins to count
    adversarial_ramp: int = 2000  # steps until it counts in full
    adaptive_max: float = 10.0  # cap of VQGAN's adaptive weight
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    discriminator_lead: int = 1000  # steps that the discriminator trains before adversarial_start


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al., CVPR 2018) on VGG16, with torchmetrics' bundled linear heads.

    Args:
        weights: file of VGG16's convolution weights (``features.*``); empty for torchvision's download.

    Raises:
        UserError: the file is missing or unfit, or the download failed.
    """

    def __init__(self, weights: str = ""):
        super().__init__()
        self.network = _LPIPS(net="vgg", pnet_rand=True)
        state = _vgg16_features(weights)
        layers = {
            index: layer
            for stage in self.network.net.children()
            for index, layer in stage.named_children()
            if isinstance(layer, nn.Conv2d)
        }
        try:
            for index, layer in layers.items():
                layer.load_state_dict({leaf: state[f"features.{index}.{leaf}"] for leaf in ("weight", "bias")})
        except (KeyError, RuntimeError) as error:
            raise UserError(f"loss.perceptual_weights={weights} does not hold VGG16's features.*: {error}") from error
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Mean distance of two batches (B, 3, H, W) in [-1, 1], 0-dim."""
        return self.network(images, others).mean()

    def train(self, mode: bool = True) -> PerceptualLoss:
        return super().train(False)  # a yardstick: its dropout stays off


class TokenizerLoss(nn.Module):
    """VQGAN's training objective. Owns the discriminator; everything it needs to resume is in its parameters.

    Images are (B, 3, H, W) in [-1, 1] throughout; every loss is 0-dim.
    """

    def __init__(self, config: LossConfig):
        super().__init__()
        self.config = config
        self.perceptual = PerceptualLoss(config.perceptual_weights) if config.perceptual > 0 else None
        self.discriminator = None
        if config.adversarial > 0:
            self.discriminator = PatchDiscriminator(config.discriminator_channels, config.discriminator_layers)

    def generator(
        self, images: torch.Tensor, reconstruction: torch.Tensor, last_layer: nn.Parameter, step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The autoencoder's loss without the quantizer's, and its terms for the log."""
        config = self.config
        reconstruction = reconstruction.float()
        error = reconstruction - images
        terms = {"l1": error.abs().mean(), "l2": error.square().mean()}
        loss = config.l1 * terms["l1"] + config.l2 * terms["l2"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(images, reconstruction)
            loss = loss + config.perceptual * terms["perceptual"]
        ramp = linear_ramp(step, config.adversarial_start, config.adversarial_ramp)
        if self.discriminator is not None and ramp > 0:
            self.discriminator.requires_grad_(False)  # its own step is the only one that trains it
            terms["adversarial"] = -self.discriminator(reconstruction).mean()
            self.discriminator.requires_grad_(True)
            terms["adaptive_weight"] = adaptive_weight(loss, terms["adversarial"], last_layer, config.adaptive_max)
            loss = loss + config.adversarial * ramp * terms["adaptive_weight"] * terms["adversarial"]
        return loss, terms

    def trains_discriminator(self, step: int) -> bool:
        return self.discriminator is not None and step >= self.config.adversarial_start - self.config.discriminator_lead

    @staticmethod
    def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
        """The hinge loss (Lim and Ye, 2017)."""
        return 0.5 * (F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean())


def adaptive_weight(
    reconstruction_loss: torch.Tensor, adversarial_loss: torch.Tensor, last_layer: nn.Parameter, largest: float
) -> torch.Tensor:
    """VQGAN's balance (eq. 7 of Esser et al.): the ratio of the two losses' gradients at the decoder's last layer."""
    (wanted,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (found,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    return (wanted.norm() / (found.norm() + 1e-6)).clamp(0.0, largest).detach()


def _vgg16_features(weights: str) -> dict[str, torch.Tensor]:
    if weights:
        if not Path(weights).is_file():
            raise UserError(f"loss.perceptual_weights={weights} does not exist")
        return torch.load(weights, map_location="cpu", weights_only=True)
    try:
        return vgg16(weights=VGG16_Weights.IMAGENET1K_V1, progress=False).state_dict()
    except OSError as error:
        raise UserError(
            f"LPIPS needs VGG16's weights, and torchvision could not download them ({error}). Set "
            "loss.perceptual_weights=FILE to torchvision's vgg16 weights, or loss.perceptual=0 to train without LPIPS"
        ) from error
