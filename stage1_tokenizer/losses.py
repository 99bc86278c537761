"""The tokenizer's losses: pixel error, perceptual distance, and the adversarial loss of a discriminator."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
from scq.stage1_tokenizer.discriminator import (
    KINDS,
    MOST_CHANNELS,
    MOST_LAYERS,
    NORMS,
    FeatureDiscriminator,
    PatchDiscriminator,
)
from scq.stage1_tokenizer.perceptual import STAGES, WIDTHS, PerceptualLoss


@dataclass
class LossConfig:
    """The weights and settings of `TokenizerLoss`."""

    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 1.0  # weight of LPIPS (VGG16); 0 switches it off
    perceptual_start: int = 0  # the step at which LPIPS sets in
    perceptual_stages: int = STAGES  # of VGG16's five stages, how many LPIPS compares, the first ones
    perceptual_share: float = 1.0  # share of each batch's images that LPIPS sees: it costs more than the autoencoder
    perceptual_weights: str = ""  # file of VGG16's weights, named as in torchvision; empty: torchvision downloads them
    adversarial: float = 0.5  # weight of the adversarial loss; 0 trains without a discriminator
    adversarial_start: int = 10000  # the step at which the adversarial loss sets in
    adversarial_ramp: int = 2000  # steps in which it rises to its full weight
    adaptive_max: float = 10.0  # cap of VQGAN's adaptive weight; 0 for a constant weight of 1 instead
    game: str = "hinge"  # hinge | non-saturating
    # patch: a PatchGAN of its own. features: it sees what LPIPS's network makes of the images that LPIPS sees, from the
    # second of `perceptual_stages` on, which is nearly free.
    discriminator: str = "patch"
    discriminator_rate: float = 1.0  # its learning rate, as a share of the autoencoder's
    discriminator_betas: list[float] = field(default_factory=list)  # of its AdamW; empty: the autoencoder's
    discriminator_channels: int = 64
    discriminator_layers: int = 3  # of patch
    discriminator_norm: str = "group"  # of patch: group | spectral
    discriminator_lead: int = 1000  # steps that the discriminator trains before adversarial_start
    r1: float = 0.0  # weight of the gradient penalty on real images, of patch
    r1_every: int = 16  # steps between penalties, each of which counts this many times
    lecam: float = 0.0  # weight of LeCam regularization
    augment: list[str] = field(default_factory=list)  # for small sets: colour, shift, cutout

    def ranges(self) -> Ranges:
        weights = ("l1", "l2", "perceptual", "adversarial", "adaptive_max", "r1", "lecam", "discriminator_rate")
        steps = ("perceptual_start", "adversarial_start", "adversarial_ramp", "discriminator_lead")
        return [
            *((name, getattr(self, name) >= 0, "at least 0") for name in (*weights, *steps)),
            ("perceptual_stages", 1 <= self.perceptual_stages <= STAGES, f"1 to {STAGES}"),
            ("perceptual_share", 0 < self.perceptual_share <= 1, "above 0, and at most 1"),
            ("r1_every", self.r1_every >= 1, "at least 1"),
            ("game", self.game in GAMES, " or ".join(GAMES)),
            ("discriminator", self.discriminator in KINDS, " or ".join(KINDS)),
            ("discriminator_betas", self._known_betas(), "empty, or two numbers in [0, 1)"),
            ("discriminator_norm", self.discriminator_norm in NORMS, " or ".join(NORMS)),
            ("discriminator_channels", 1 <= self.discriminator_channels <= MOST_CHANNELS, f"1 to {MOST_CHANNELS}"),
            ("discriminator_layers", 1 <= self.discriminator_layers <= MOST_LAYERS, f"1 to {MOST_LAYERS}"),
        ]

    def _known_betas(self) -> bool:
        return len(self.discriminator_betas) in (0, 2) and all(0 <= beta < 1 for beta in self.discriminator_betas)


class Shown(NamedTuple):
    """What a discriminator is shown of a part of a batch: images (B, 3, H, W), or the maps of a frozen network."""

    real: list[Tensor]
    fake: list[Tensor]


class TokenizerLoss(nn.Module):
    """VQGAN's training objective. It owns the discriminator and LeCam's running means, which `stateful` names.

    Images are (B, 3, H, W) in [-1, 1] throughout; every loss is 0-dim.

    Args:
        parts_per_step: calls of `discriminate` in one optimizer step.
        image_size: side of the images in pixels; 0 if it is not known yet.

    Raises:
        UserError: the game, the norm or an augmentation is unknown, ``r1_every`` is below 1, or the discriminator is
            too deep for the images or does not fit the other settings.
    """

    def __init__(self, config: LossConfig, parts_per_step: int = 1, image_size: int = 0):
        super().__init__()
        _refuse_unfit(config, image_size)
        self.config = config
        self.perceptual = None
        if config.perceptual > 0:
            self.perceptual = PerceptualLoss(config.perceptual_weights, config.perceptual_stages)
        self.discriminator = self.lecam = None
        if config.adversarial > 0:
            self.discriminator = self._create_discriminator()
            self.lecam = LeCam(parts_per_step=parts_per_step) if config.lecam > 0 else None

    def _create_discriminator(self) -> nn.Module:
        config = self.config
        if config.discriminator == "features":
            return FeatureDiscriminator(WIDTHS[1 : config.perceptual_stages], config.discriminator_channels)
        try:
            return PatchDiscriminator(
                config.discriminator_channels, config.discriminator_layers, config.discriminator_norm
            )
        except ValueError as error:
            raise UserError(f"loss.discriminator: {error}") from error

    @property
    def stateful(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint must save for training to resume, by name."""
        return {name: part for name in ("discriminator", "lecam") if (part := getattr(self, name)) is not None}

    def generator(
        self, images: Tensor, reconstruction: Tensor, last_layer: nn.Parameter, step: int, noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Shown]:
        """The autoencoder's loss, without the quantizer's.

        Args:
            last_layer: the decoder's, for `adaptive_weight`.
            noise: (B, 7) for `augment`.

        Returns:
            the loss, its terms for the log, and what `discriminate` is to be shown.
        """
        config = self.config
        reconstruction = reconstruction.float()
        error = reconstruction - images
        terms = {"l1": error.abs().mean(), "l2": error.square().mean()}
        loss = config.l1 * terms["l1"] + config.l2 * terms["l2"]
        shown = Shown([images], [reconstruction])
        if self.perceptual is not None and step >= config.perceptual_start:
            seen = math.ceil(config.perceptual_share * len(images))  # the stream has shuffled them
            pair = images[:seen], reconstruction[:seen]
            if config.discriminator == "features":
                terms["perceptual"], real, fake = self.perceptual.compare(*pair)
                shown = Shown(real[1:], fake[1:])
            else:
                terms["perceptual"] = self.perceptual(*pair)
            loss = loss + config.perceptual * terms["perceptual"]
        ramp = linear_ramp(step, config.adversarial_start, config.adversarial_ramp)
        if self.discriminator is not None and ramp > 0:
            self.discriminator.requires_grad_(False)  # its own step is the only one that trains it
            if config.discriminator == "features":
                fake = self.discriminator(shown.fake)
            else:
                fake = self.discriminator(augment(reconstruction, noise, tuple(config.augment)))
            self.discriminator.requires_grad_(True)
            terms["adversarial"] = generator_loss(fake, config.game)
            weight = config.adversarial * ramp
            if config.adaptive_max > 0:
                terms["adaptive_weight"] = adaptive_weight(loss, terms["adversarial"], last_layer, config.adaptive_max)
                weight = weight * terms["adaptive_weight"]
            loss = loss + weight * terms["adversarial"]
        return loss, terms, Shown(shown.real, [each.detach() for each in shown.fake])

    def trains_discriminator(self, step: int) -> bool:
        """Whether the discriminator is trained at ``step``."""
        return self.discriminator is not None and step >= self.config.adversarial_start - self.config.discriminator_lead

    def discriminate(
        self, discriminator: nn.Module, shown: Shown, step: int, noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss.

        Args:
            discriminator: this object's own, perhaps wrapped by accelerate.
            shown: what `generator` returned.
            noise: (B, 7) for `augment`.

        Returns:
            the loss, and its terms for the log.
        """
        config, kinds, images = self.config, tuple(self.config.augment), shown.real[0]
        penalised = config.r1 > 0 and step % config.r1_every == 0
        if config.discriminator == "features":
            both: Any = [torch.cat(pair) for pair in zip(shown.real, shown.fake, strict=True)]
        else:
            images = augment(images, noise, kinds).requires_grad_(penalised)
            both = torch.cat([images, augment(shown.fake[0], noise, kinds)])
        real, fake = discriminator(both).chunk(2)
        terms = {"discriminator": discriminator_loss(real, fake, config.game)}
        loss = terms["discriminator"]
        if penalised:
            terms["r1"] = gradient_penalty(images, real)
            loss = loss + config.r1 * config.r1_every * terms["r1"]
        if self.lecam is not None:
            terms["lecam"] = self.lecam(real, fake)
            loss = loss + config.lecam * terms["lecam"]
            self.lecam.update(real, fake)
        return loss, terms


def _refuse_unfit(config: LossConfig, image_size: int) -> None:
    """Raise UserError for what is wrong with settings together, or with those that were given from Python."""
    if config.r1 > 0 and config.r1_every < 1:
        raise UserError(f"loss.r1_every is {config.r1_every}; it must be at least 1")
    if config.game not in GAMES:
        raise UserError(f"loss.game is {config.game!r}; it must be {' or '.join(GAMES)}")
    unknown = sorted(set(config.augment) - set(AUGMENTATIONS))
    if unknown:
        raise UserError(f"loss.augment has {unknown[0]!r}; choose from: {', '.join(AUGMENTATIONS)}")
    if config.adversarial == 0:
        return
    if config.discriminator == "features":
        first = config.adversarial_start - config.discriminator_lead
        for unfit, why in (
            (config.perceptual == 0, "it sees what LPIPS computes: set loss.perceptual, too"),
            (config.perceptual_stages < 2, "it sees VGG16's stages from the second on: raise loss.perceptual_stages"),
            (config.perceptual_start > first, f"it begins at step {first}, before loss.perceptual_start"),
            (config.r1 > 0, "it takes no gradient penalty: set loss.r1=0"),
            (bool(config.augment), "it sees the images that LPIPS sees, unchanged: set loss.augment=[]"),
        ):
            if unfit:
                raise UserError(f"loss.discriminator=features does not fit: {why}")
        return
    smallest = 3 * 2**config.discriminator_layers
    if 0 < image_size < smallest:
        raise UserError(
            f"loss.discriminator_layers={config.discriminator_layers} needs images of at least {smallest} pixels, "
            f"but these have {image_size}"
        )


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: nn.Parameter, largest: float
) -> Tensor:
    """VQGAN's adaptive weight (eq. 7 of Esser et al.): the ratio of the norms of the two losses' gradients at the
    decoder's last layer, over the images of all processes. It is 0-dim, and clamped to [0, ``largest``]."""
    processes = rank_and_world_size()[1]
    wanted, found = (
        sum_across_processes(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]) / processes
        for loss in (reconstruction_loss, adversarial_loss)
    )
    return (wanted.norm() / (found.norm() + 1e-6)).clamp(0.0, largest).detach()
