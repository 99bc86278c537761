"""The losses of generator and discriminator, and what keeps the discriminator from winning on a small set.

Logits are (B, 1, h, w), positive for real; images (B, 3, H, W) in [-1, 1]; every loss is 0-dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scq.engine.processes import sum_across_processes

GAMES = ("hinge", "non-saturating")
AUGMENTATIONS = ("colour", "shift", "cutout")


def generator_loss(fake: Tensor, game: str) -> Tensor:
    """The autoencoder's adversarial loss: large if its reconstructions are not taken for real.

    Args:
        fake: logits of reconstructions.
        game: one of GAMES.
    """
    return -fake.float().mean() if game == "hinge" else F.softplus(-fake.float()).mean()


def discriminator_loss(real: Tensor, fake: Tensor, game: str) -> Tensor:
    """The hinge loss (Lim and Ye, arXiv 1705.02894), or the non-saturating one (Goodfellow et al., arXiv 1406.2661)."""
    real, fake = real.float(), fake.float()
    if game == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def gradient_penalty(real_images: Tensor, real: Tensor) -> Tensor:
    """R1 (Mescheder et al., arXiv 1801.04406): half the squared norm of the logits' gradient at the real images.

    It is averaged over images. ``real`` are the logits of ``real_images``, which must require gradients.
    """
    (gradient,) = torch.autograd.grad(real.float().sum(), real_images, create_graph=True)
    return 0.5 * gradient.float().square().sum((1, 2, 3)).mean()


class LeCam(nn.Module):
    """LeCam regularization (Tseng et al., arXiv 2104.03310): pulls the logits of real images towards the running mean
    of the fake ones, and those of fake images towards that of the real ones.

    The paper's eq. 7 pulls from both sides of the mean; as in its authors' released code, only logits beyond it are
    pulled. The running means are buffers, so that checkpoints save them.

    Args:
        decay: of the running means from one optimizer step to the next.
        parts_per_step: calls of `update` in one optimizer step.
    """

    def __init__(self, decay: float = 0.999, parts_per_step: int = 1):
        super().__init__()
        self.decay = decay ** (1 / parts_per_step)
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty for these logits of real and fake images."""
        real, fake = real.float(), fake.float()
        return F.relu(real - self.fake_mean).square().mean() + F.relu(self.real_mean - fake).square().mean()

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """Update the running means with the logits of all processes."""
        here = torch.stack([real.float().mean(), fake.float().mean(), real.new_ones((), dtype=torch.float32)])
        summed = sum_across_processes(here)
        self.real_mean.lerp_(summed[0] / summed[2], 1 - self.decay)
        self.fake_mean.lerp_(summed[1] / summed[2], 1 - self.decay)


def augment(images: Tensor, noise: Tensor, kinds: tuple[str, ...]) -> Tensor:
    """Differentiable augmentation (Zhao et al., arXiv 2006.10738) of what a discriminator sees.

    Args:
        images: (B, 3, H, W).
        noise: (B, 7) uniform in [0, 1), each image's own.
        kinds: any of AUGMENTATIONS, applied in that order. ``colour`` changes brightness, saturation and contrast.
            ``shift`` moves the image by up to an eighth of its side and fills with zeros. ``cutout`` sets a square of
            half the side to zero.
    """
    brightness, saturation, contrast, down, right, top, left = noise[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1)
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)
    if "colour" in kinds:
        images = images + (brightness - 0.5)
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * (2 * saturation) + grey
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * (contrast + 0.5) + mean
    if "shift" in kinds:
        most = max(1, round(height / 8))
        down, right = ((2 * most + 1) * down).long() - most, ((2 * most + 1) * right).long() - most
        source = (rows - down).squeeze(1), (columns - right).squeeze(1)  # (B, H, 1), (B, 1, W) or broadcast to them
        inside = (source[0] >= 0) & (source[0] < height) & (source[1] >= 0) & (source[1] < width)  # (B, H, W)
        flat = source[0].clamp(0, height - 1) * width + source[1].clamp(0, width - 1)
        taken = images.flatten(2).gather(2, flat.view(len(images), 1, -1).expand(-1, images.shape[1], -1))
        images = taken.view_as(images) * inside.unsqueeze(1)
    if "cutout" in kinds:
        above, before = (height * top).long() - height // 4, (width * left).long() - width // 4
        cut = (rows >= above) & (rows < above + height // 2) & (columns >= before) & (columns < before + width // 2)
        images = images * ~cut
    return images
