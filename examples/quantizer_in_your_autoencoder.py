"""Soft convex quantization in an autoencoder of your own: any network that makes latents (B, F, h, w) will do.

python examples/quantizer_in_your_autoencoder.py IMAGES.npy [STEPS]      IMAGES.npy: uint8 (N, 3, 32, 32)
"""

import sys

import numpy as np
import torch
from torch import nn

from scq import SoftConvexQuantizer


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.GELU(), nn.Conv2d(32, 8, 3, padding=1))
        self.quantizer = SoftConvexQuantizer(codebook_size=256, dim=8)
        self.decoder = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.GELU(), nn.ConvTranspose2d(32, 3, 4, 4))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        quantized = self.quantizer(self.encoder(images))  # z_q (B, 8, 8, 8), indices (B, 8, 8), loss (), stats
        return self.decoder(quantized.z_q), quantized.loss, quantized.stats


def main(path: str, steps: int = 300) -> None:
    images = torch.from_numpy(np.load(path)).float() / 127.5 - 1
    torch.manual_seed(0)
    model = Autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        batch = images[torch.randint(len(images), (64,))]
        reconstruction, quantizer_loss, stats = model(batch)
        error = (reconstruction - batch).square().mean()
        optimizer.zero_grad()
        (error + quantizer_loss).backward()
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1}: error {error:.4f}, perplexity {stats['perplexity']:.0f} of 256 codes")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
