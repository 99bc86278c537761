"""The tokenizer's losses: pixel error, perceptual distance, and the adversarial loss of a discriminator."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from scq.engine.config import Ranges
from scq.engine.errors import UserError
from scq.engine.processes import rank_and_world_size, sum_across_processes
from scq.engine.schedules import linear_ramp
from scq.stage1_tokenizer.adversarial import (
    AUGMENTATIONS,
    GAMES,
    LeCam,
    augment,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from scq.stage1_tokenizer.discriminator import MOST_CHANNELS, MOST_LAYERS, NORMS, PatchDiscriminator
from scq.stage1_tokenizer.perceptual import STAGES, PerceptualLoss


@dataclass
class LossConfig:
    """The weights and settings of `TokenizerLoss`."""

    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 1.0  # weight of LPIPS (VGG16); 0 switches it off
    perceptual_stages: int = STAGES  # of VGG16's five stages, how many LPIPS compares, the first ones
    perceptual_share: float = 1.0  # share of each batch's images that LPIPS sees: it costs more than the autoencoder
    perceptual_weights: str = ""  # file of VGG16's weights, named as in torchvision; empty: torchvision downloads them
    adversarial: float = 0.5  # weight of the adversarial loss; 0 trains without a discriminator
    adversarial_start: int = 10000  # the step at which the adversarial loss sets in
    adversarial_ramp: int = 2000  # steps in which it rises to its full weight
    adaptive_max: float = 10.0  # cap of VQGAN's adaptive weight; 0 for a constant weight of 1 instead
    game: str = "hinge"  # hinge | non-saturating
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    discriminator_norm: str = "group"  # group | spectral
    discriminator_lead: int = 1000  # steps that the discriminator trains before adversarial_start
    r1: float = 0.0  # weight of the gradient penalty on real images
    r1_every: int = 16  # steps between penalties, each of which counts this many times
    lecam: float = 0.0  # weight of LeCam regularization
    augment: list[str] = field(default_factory=list)  # for small sets: colour, shift, cutout

    def ranges(self) -> Ranges:
        weights = ("l1", "l2", "perceptual", "adversarial", "adaptive_max", "r1", "lecam")
        steps = ("adversarial_start", "adversarial_ramp", "discriminator_lead")
        return [
            *((name, getattr(self, name) >= 0, "at least 0") for name in (*weights, *steps)),
            ("perceptual_stages", 1 <= self.perceptual_stages <= STAGES, f"1 to {STAGES}"),
            ("perceptual_share", 0 < self.perceptual_share <= 1, "above 0, and at most 1"),
            ("r1_every", self.r1_every >= 1, "at least 1"),
            ("game", self.game in GAMES, " or ".join(GAMES)),
            ("discriminator_norm", self.discriminator_norm in NORMS, " or ".join(NORMS)),
            ("discriminator_channels", 1 <= self.discriminator_channels <= MOST_CHANNELS, f"1 to {MOST_CHANNELS}"),
            ("discriminator_layers", 1 <= self.discriminator_layers <= MOST_LAYERS, f"1 to {MOST_LAYERS}"),
        ]


class TokenizerLoss(nn.Module):
    """VQGAN's training objective. It owns the discriminator and LeCam's running means, which `stateful` names.

    Images are (B, 3, H, W) in [-1, 1] throughout; every loss is 0-dim.

    Args:
        parts_per_step: calls of `discriminate` in one optimizer step.
        image_size: side of the images in pixels; 0 if it is not known yet.

    Raises:
        UserError: the game, the norm or an augmentation is unknown, ``r1_every`` is below 1, or the discriminator is
            too deep for the images.
    """

    def __init__(self, config: LossConfig, parts_per_step: int = 1, image_size: int = 0):
        super().__init__()
        smallest = 3 * 2**config.discriminator_layers
        if config.adversarial > 0 and 0 < image_size < smallest:
            raise UserError(
                f"loss.discriminator_layers={config.discriminator_layers} needs images of at least {smallest} pixels, "
                f"but these have {image_size}"
            )
        if config.r1 > 0 and config.r1_every < 1:
            raise UserError(f"loss.r1_every is {config.r1_every}; it must be at least 1")
        if config.game not in GAMES:
            raise UserError(f"loss.game is {config.game!r}; it must be {' or '.join(GAMES)}")
        unknown = sorted(set(config.augment) - set(AUGMENTATIONS))
        if unknown:
            raise UserError(f"loss.augment has {unknown[0]!r}; choose from: {', '.join(AUGMENTATIONS)}")
        self.config = config
        self.perceptual = None
        if config.perceptual > 0:
            self.perceptual = PerceptualLoss(config.perceptual_weights, config.perceptual_stages)
        self.discriminator = self.lecam = None
        if config.adversarial > 0:
            try:
                self.discriminator = PatchDiscriminator(
                    config.discriminator_channels, config.discriminator_layers, config.discriminator_norm
                )
            except ValueError as error:
                raise UserError(f"loss.discriminator: {error}") from error
            self.lecam = LeCam(parts_per_step=parts_per_step) if config.lecam > 0 else None

    @property
    def stateful(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint must save for training to resume, by name."""
        return {name: part for name in ("discriminator", "lecam") if (part := getattr(self, name)) is not None}

    def generator(
        self,
        images: torch.Tensor,
        reconstruction: torch.Tensor,
        last_layer: nn.Parameter,
        step: int,
        noise: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The autoencoder's loss, without the quantizer's.

        Args:
            last_layer: the decoder's, for `adaptive_weight`.
            noise: (B, 7) for `augment`.

        Returns:
            the loss, and its terms for the log.
        """
        config = self.config
        reconstruction = reconstruction.float()
        error = reconstruction - images
        terms = {"l1": error.abs().mean(), "l2": error.square().mean()}
        loss = config.l1 * terms["l1"] + config.l2 * terms["l2"]
        if self.perceptual is not None:
            seen = math.ceil(config.perceptual_share * len(images))  # the stream has shuffled them
            terms["perceptual"] = self.perceptual(images[:seen], reconstruction[:seen])
            loss = loss + config.perceptual * terms["perceptual"]
        ramp = linear_ramp(step, config.adversarial_start, config.adversarial_ramp)
        if self.discriminator is not None and ramp > 0:
            self.discriminator.requires_grad_(False)  # its own step is the only one that trains it
            fake = self.discriminator(augment(reconstruction, noise, tuple(config.augment)))
            self.discriminator.requires_grad_(True)
            terms["adversarial"] = generator_loss(fake, config.game)
            weight = config.adversarial * ramp
            if config.adaptive_max > 0:
                terms["adaptive_weight"] = adaptive_weight(loss, terms["adversarial"], last_layer, config.adaptive_max)
                weight = weight * terms["adaptive_weight"]
            loss = loss + weight * terms["adversarial"]
        return loss, terms

    def trains_discriminator(self, step: int) -> bool:
        """Whether the discriminator is trained at ``step``."""
        return self.discriminator is not None and step >= self.config.adversarial_start - self.config.discriminator_lead

    def discriminate(
        self,
        discriminator: nn.Module,
        images: torch.Tensor,
        reconstruction: torch.Tensor,
        step: int,
        noise: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The discriminator's loss.

        Args:
            discriminator: this object's own, perhaps wrapped by accelerate.
            noise: (B, 7) for `augment`.

        Returns:
            the loss, and its terms for the log.
        """
        config, kinds = self.config, tuple(self.config.augment)
        penalised = config.r1 > 0 and step % config.r1_every == 0
        shown = augment(images, noise, kinds).requires_grad_(penalised)
        both = torch.cat([shown, augment(reconstruction.detach().float(), noise, kinds)])
        real, fake = discriminator(both).chunk(2)
        terms = {"discriminator": discriminator_loss(real, fake, config.game)}
        loss = terms["discriminator"]
        if penalised:
            terms["r1"] = gradient_penalty(shown, real)
            loss = loss + config.r1 * config.r1_every * terms["r1"]
        if self.lecam is not None:
            terms["lecam"] = self.lecam(real, fake)
            loss = loss + config.lecam * terms["lecam"]
            self.lecam.update(real, fake)
        return loss, terms


def adaptive_weight(
    reconstruction_loss: torch.Tensor, adversarial_loss: torch.Tensor, last_layer: nn.Parameter, largest: float
) -> torch.Tensor:
    """VQGAN's adaptive weight (eq. 7 of Esser et al.): the ratio of the norms of the two losses' gradients at the
    decoder's last layer, over the images of all processes. It is 0-dim, and clamped to [0, ``largest``]."""
    processes = rank_and_world_size()[1]
    wanted, found = (
        sum_across_processes(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]) / processes
        for loss in (reconstruction_loss, adversarial_loss)
    )
    return (wanted.norm() / (found.norm() + 1e-6)).clamp(0.0, largest).detach()
