"""What every feature network is: uint8 images in, features out, its weights named."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor


class FeatureNetwork(Protocol):
    """Maps uint8 RGB images (B, 3, H, W) in 0..255, of any size, to float32 features (B, num_features)."""

    num_features: int
    description: str  # one line: which weights these are and where they came from
    protocol: str  # the fixed preprocessing, to be written next to every number
    fingerprint: str  # sha256 (hex) of the weights: features of two networks are never compared

    def __call__(self, images: Tensor) -> Tensor: ...


def check_images(images: Tensor) -> None:
    """Refuse what no feature network takes.

    Raises:
        TypeError: another dtype than uint8; floats would silently be on another scale.
        ValueError: another shape than (B, 3, H, W).
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"feature networks take uint8 images in 0..255, not {images.dtype}")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"feature networks take images of shape (B, 3, H, W), not {tuple(images.shape)}")


def weights_fingerprint(weights: dict[str, Tensor]) -> str:
    """sha256 (hex) of names and values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].numpy().tobytes())
    return digest.hexdigest()
