"""Networks computed for a fixed number of images at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Images computed together: enough to keep the device busy, few enough that filling up the last chunk costs little.
CHUNK = {"cpu": 8, "cuda": 64}
# Of larger images, such as a canvas that grew, fewer: no more pixels than this many images of 256 x 256.
LARGEST = 256 * 256
TOKEN = 16 * 16  # pixels that a token or latent may stand for; the largest of the usual tokenizers


def chunk_size(inputs: torch.Tensor) -> int:
    """How many images of this size are computed together: the same for every call with images of one size.

    Args:
        inputs: (B, L) or (B, h, w) tokens, (B, F, h, w) latents, or (B, 3, H, W) pixels.
    """
    most = CHUNK.get(inputs.device.type, CHUNK["cuda"])
    places = inputs.shape[2:].numel() if inputs.dim() == 4 else inputs.shape[1:].numel()
    pixels = places if inputs.dim() == 4 and inputs.shape[1] == 3 else places * TOKEN
    return min(most, max(1, most * LARGEST // pixels))


def in_equal_chunks(
    network: Callable[..., torch.Tensor], inputs: torch.Tensor, others: torch.Tensor | None = None
) -> torch.Tensor:
    """``network(inputs)`` or ``network(inputs, others)``, computed for a fixed number of images at a time.

    Matrix products of different sizes add in different orders. With chunks of one size, the last one filled up, an
    image's pixels are the same to the last bit whatever was asked for together with it.
    """
    chunk = chunk_size(inputs)
    outputs = []
    for start in range(0, len(inputs), chunk):
        given = [x[start : start + chunk] for x in (inputs, others) if x is not None]
        count = len(given[0])
        filled = [torch.cat([x, x[-1:].expand(chunk - count, *x.shape[1:])]) for x in given]
        outputs.append(network(*filled)[:count])
    return torch.cat(outputs)
