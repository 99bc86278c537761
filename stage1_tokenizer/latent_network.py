"""A convolutional network over grids of latents: the body of a refiner, and the optional neck of a decoder."""

from __future__ import annotations

from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn


class LatentNetwork(nn.Module):
    """Grids (B, inputs, h, w) -> (B, outputs, h, w); the output is zero before training.

    Args:
        width: channels of the blocks.
        depth: number of ConvNeXt blocks (Liu et al., arXiv 2201.03545), here with a depthwise convolution of 3x3
            instead of 7x7, and with learned scales of the residual branch that start at 0.1.
    """

    def __init__(self, inputs: int, outputs: int, width: int, depth: int):
        super().__init__()
        self.enter = nn.Conv2d(inputs, width, 1)
        self.blocks = nn.ModuleList(ConvNeXtBlock(width, kernel_size=3, ls_init_value=0.1) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Conv2d(width, outputs, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, grid: Tensor, added: Tensor | None = None, moment: Tensor | None = None) -> Tensor:
        """``added`` (B, width, h, w) is added once, before the blocks, ``moment`` (B, width, 1, 1) before each."""
        x = self.enter(grid)  # (B, width, h, w)
        if added is not None:
            x = x + added
        for block in self.blocks:
            x = block(x if moment is None else x + moment)
        return self.leave(self.norm(x.movedim(1, -1)).movedim(-1, 1))
