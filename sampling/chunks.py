"""Networks computed for a fixed number of images at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Images computed together: enough to keep the device busy, few enough that filling up the last chunk costs little.
CHUNK = {"cpu": 8, "cuda": 64}


def in_equal_chunks(
    network: Callable[..., torch.Tensor], inputs: torch.Tensor, others: torch.Tensor | None = None
) -> torch.Tensor:
    """``network(inputs)`` or ``network(inputs, others)``, computed for a fixed number of images at a time.

    Matrix products of different sizes add in different orders. With chunks of one size, the last one filled up, an
    image's pixels are the same to the last bit whatever was asked for together with it.
    """
    chunk = CHUNK.get(inputs.device.type, CHUNK["cuda"])
    outputs = []
    for start in range(0, len(inputs), chunk):
        given = [x[start : start + chunk] for x in (inputs, others) if x is not None]
        count = len(given[0])
        filled = [torch.cat([x, x[-1:].expand(chunk - count, *x.shape[1:])]) for x in given]
        outputs.append(network(*filled)[:count])
    return torch.cat(outputs)
