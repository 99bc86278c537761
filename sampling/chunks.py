"""Networks computed for a fixed number of images at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Images of 256 x 256 computed together: enough to keep the device busy, few enough that filling up the last chunk costs
# little. Of larger images, such as a canvas that was extended, fewer: no more pixels than these have. Of smaller ones,
# a GPU takes more, up to MOST.
CHUNK = {"cpu": 8, "cuda": 64}
MOST = {"cpu": 8, "cuda": 512}
LARGEST = 256 * 256
TOKEN = 16 * 16  # pixels that a token or latent may stand for: the most among common tokenizers


def chunk_size(inputs: torch.Tensor) -> int:
    """How many images of this size are computed together; every call with images of that size gets the same number.

    Args:
        inputs: (B, L) or (B, h, w) tokens, (B, F, h, w) latents, or (B, 3, H, W) pixels.
    """
    device = inputs.device.type if inputs.device.type in CHUNK else "cuda"
    positions = inputs.shape[2:].numel() if inputs.dim() == 4 else inputs.shape[1:].numel()
    pixels = positions if inputs.dim() == 4 and inputs.shape[1] == 3 else positions * TOKEN
    return min(MOST[device], max(1, CHUNK[device] * LARGEST // pixels))


def in_equal_chunks(
    network: Callable[..., torch.Tensor], inputs: torch.Tensor, others: torch.Tensor | None = None
) -> torch.Tensor:
    """``network(inputs)`` or ``network(inputs, others)``, computed for a fixed number of images at a time.

    Matrix products of different sizes add in different orders. With chunks of one size (the last one is filled up), an
    image's pixels are the same to the last bit, whatever else is computed with it.
    """
    chunk = chunk_size(inputs)
    outputs = []
    for start in range(0, len(inputs), chunk):
        given = [x[start : start + chunk] for x in (inputs, others) if x is not None]
        count = len(given[0])
        filled = [torch.cat([x, x[-1:].expand(chunk - count, *x.shape[1:])]) for x in given]
        outputs.append(network(*filled)[:count])
    return torch.cat(outputs)
