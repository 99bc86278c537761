"""Augmented views of an image for token shards: a prior sees several views of each image, all tokenized in advance."""

import numpy as np
import torch

from scq.engine.randomness import position_bits


def augmented_view(images: torch.Tensor, numbers: torch.Tensor, view: int) -> torch.Tensor:
    """One view of each image, a pure function of (image number, view).

    View 0 is the image itself, view 1 its mirror image. Every further view is shifted by up to 1/16 of the side in each
    direction, with reflected borders, and mirrored with probability 1/2.

    Args:
        images: uint8 (b, 3, H, W).
        numbers: int64 (b,), the images' numbers in their set (`Batch.positions` of iterate_once).

    Returns:
        uint8 (b, 3, H, W).
    """
    if view == 0:
        return images
    if view == 1:
        return images.flip(-1)
    bits = position_bits(view, numbers.numpy(), purpose=3)  # (b,)
    reach = [max(1, side // 16) for side in images.shape[-2:]]
    top, left = (((bits >> np.uint64(16 * i)) & np.uint64(0xFFFF)) % np.uint64(2 * r + 1) for i, r in enumerate(reach))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (reach[0],) * 2, (reach[1],) * 2), mode="reflect")
    height, width = images.shape[-2:]
    corners = zip(padded, top.tolist(), left.tolist(), strict=True)
    views = np.stack([image[:, t : t + height, l : l + width] for image, t, l in corners])
    mirrored = (bits >> np.uint64(63)).astype(bool)
    views[mirrored] = views[mirrored][..., ::-1]
    return torch.from_numpy(views)
