"""The refiner: from a grid of dominant codes to the convex latents that the decoder was trained on.

A prior emits dominant codes, and decoding them alone loses the convex detail. The refiner predicts the difference
between a convex latent and its dominant code, in units of that difference's standard deviation: as a mean
(``regression``), or by transporting noise to it (``flow``: rectified flow, Liu et al., arXiv 2209.03003). It is
convolutional, so it also refines grids larger than those it was trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from scq.engine.checks import one_of, whole_number
from scq.engine.network import Network
from scq.engine.precision import KeepsFloat32
from scq.engine.randomness import standard_normal
from scq.stage1_tokenizer.autoencoder import MOST_CHANNELS, MOST_LAYERS, ArchitectureConfig, QuantizerConfig
from scq.stage1_tokenizer.latent_network import LatentNetwork
from scq.stage1_tokenizer.quantizers.interface import MOST_CODES

KINDS = ("regression", "flow")


@dataclass
class RefinerArchitectureConfig:
    """The refiner's network, and the defaults of `ConvexRefiner`."""

    kind: str = "regression"  # regression | flow
    width: int = 192  # channels of the LatentNetwork
    depth: int = 8  # its blocks


class ConvexRefiner(KeepsFloat32, Network):
    """Grids of codes (B, h, w) -> latents (B, F, h, w).

    Args:
        codebook_size: K.
        latent_dim: F.
        kind, width, depth: see `RefinerArchitectureConfig`.
        tokenizer_fingerprint: of the tokenizer whose latents these are.

    Raises:
        UserError: the kind is unknown, or a size is out of range.
    """

    @register_to_config
    def __init__(
        self,
        codebook_size: int = QuantizerConfig.codebook_size,
        latent_dim: int = ArchitectureConfig.latent_dim,
        kind: str = RefinerArchitectureConfig.kind,
        width: int = RefinerArchitectureConfig.width,
        depth: int = RefinerArchitectureConfig.depth,
        tokenizer_fingerprint: str = "",
    ):
        super().__init__()
        one_of("kind", kind, KINDS)
        for name, value, most in (
            ("codebook_size", codebook_size, MOST_CODES),
            ("latent_dim", latent_dim, MOST_CHANNELS),
            ("width", width, MOST_CHANNELS),
            ("depth", depth, MOST_LAYERS),
        ):
            whole_number(name, value, 1, most)
        self.register_buffer("codes", torch.zeros(codebook_size, latent_dim))
        self.register_buffer("spread", torch.ones(latent_dim))  # standard deviation of latent - code, per channel
        self.embedding = nn.Embedding(codebook_size, width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width)) if kind == "flow" else None
        self.network = LatentNetwork(2 * latent_dim if kind == "flow" else latent_dim, latent_dim, width, depth)

    @torch.no_grad()
    def describe(self, codes: Tensor, spread: Tensor) -> None:
        """Copy the tokenizer's codes (K, F), and the standard deviation (F,) of latents around their codes."""
        self.codes.copy_(codes)
        self.spread.copy_(spread.clamp_min(1e-6))

    def forward(self, indices: Tensor, noisy: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """The predicted difference, or the velocity of a flow, in units of ``spread``.

        Args:
            indices: (B, h, w) int64.
            noisy: flow only: (B, F, h, w), the state of the flow at ``time``.
            time: flow only: (B,) in [0, 1].

        Returns:
            (B, F, h, w).
        """
        code = self.codes[indices].permute(0, 3, 1, 2) / self.spread.mean()  # (B, F, h, w)
        given = code if noisy is None else torch.cat([code, noisy], 1)
        embedded = self.embedding(indices).permute(0, 3, 1, 2)  # (B, width, h, w)
        moment = None if time is None else self.time(_waves(time))[:, :, None, None]  # (B, width, 1, 1)
        return self.network(given, embedded, moment)

    def flow_loss(self, indices: Tensor, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Mean squared error of a flow's velocity, 0-dim.

        Args:
            indices: (B, h, w); latents: (B, F, h, w).
            noise: (B, F, h, w) standard normal; time: (B,) uniform in [0, 1].
        """
        wanted, t = self.difference(indices, latents), time[:, None, None, None]
        return F.mse_loss(self(indices, (1 - t) * noise + t * wanted, time), wanted - noise)

    def regression_loss(self, refined: Tensor, indices: Tensor, latents: Tensor) -> Tensor:
        """Mean squared error of ``refined``, which is ``mean(indices)``, in units of ``spread``; codes alone give 1."""
        return F.mse_loss(self.difference(indices, refined), self.difference(indices, latents))

    def mean(self, indices: Tensor) -> Tensor:
        """The latents (B, F, h, w) that a regression predicts for codes (B, h, w)."""
        return self._code(indices) + self(indices) * self.spread[:, None, None]

    def difference(self, indices: Tensor, latents: Tensor) -> Tensor:
        """(B, F, h, w): latents minus their codes in units of ``spread``."""
        return (latents - self._code(indices)) / self.spread[:, None, None]

    @torch.no_grad()
    def refine(self, indices: Tensor, seeds: Tensor | None = None, steps: int = 8) -> Tensor:
        """Latents (B, F, h, w) for codes (B, h, w).

        Args:
            seeds: flow only: (B,) int64, one for each image: the same seed gives the same latents in any batch.
            steps: flow only: steps of Heun's method, the last one of Euler's; >= 1.

        Raises:
            ValueError: a flow gets no seeds, or ``steps`` is below 1.
        """
        if self.config.kind == "regression":
            return self.mean(indices)
        if seeds is None or steps < 1:
            raise ValueError(f"a flow needs seeds and at least one step, not seeds={seeds} and steps={steps}")
        x = standard_normal(seeds, self.config.latent_dim, *indices.shape[1:], purpose="refiner")
        for step in range(steps):
            now = torch.full((len(x),), step / steps, device=x.device)
            velocity = self(indices, x, now)
            ahead = x + velocity / steps
            if step + 1 < steps:
                velocity = (velocity + self(indices, ahead, now + 1 / steps)) / 2
            x = x + velocity / steps
        return self._code(indices) + x * self.spread[:, None, None]

    def _code(self, indices: Tensor) -> Tensor:
        return self.codes[indices].permute(0, 3, 1, 2)


def _waves(time: Tensor) -> Tensor:
    """(B,) -> (B, 64): sines and cosines of the time at frequencies from 1 to 1000."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000.0), 32, device=time.device))
    angles = time[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)
