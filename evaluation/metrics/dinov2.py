"""A second backbone for the Frechet distance: DINOv2, or any other vision transformer of timm.

The Inception network was trained to tell ImageNet's classes apart, and FID with it ranks diffusion models lower than
people do; with DINOv2 ViT-L/14 the ranking is theirs (Stein et al. 2023, arXiv 2306.04675, whose protocol this is).
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F

from scq.engine.errors import UserError, first_line
from scq.engine.weights import read_weights
from scq.evaluation.metrics.networks import check_images, weights_fingerprint

INPUT_SIZE = 224

# Images through the network at once.
CHUNK = {"cpu": 8, "cuda": 128}


class TransformerFeatures(nn.Module):
    """The class token of a vision transformer after its last norm, for uint8 images; always float32.

    The learned positions are timm's resampling (bicubic, antialiased) of the trained grid to that of 224 pixels. Meta's
    code resamples DINOv2's slightly otherwise: values compare with each other, and only nearly with published ones.

    Args:
        model: with its weights, at the size that they were trained at.
        name: timm's.
        source: where the weights came from, in words for ``description``.

    Attributes: those of `evaluation.metrics.networks.FeatureNetwork`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: VisionTransformer, name: str, source: str):
        super().__init__()
        self.num_features = model.num_features
        # Of the weights as trained: how their positions are resampled is the protocol's.
        self.fingerprint = weights_fingerprint(model.state_dict())
        self.description = f"{name} from {source}, weights sha256 {self.fingerprint[:12]}"
        config = resolve_model_data_config(model)
        self.protocol = (
            f"uint8 RGB -> {INPUT_SIZE}x{INPUT_SIZE} bicubic (antialias, rounded to uint8) -> "
            f"(x/255 - {config['mean']}) / {config['std']} -> {name}, class token"
        )
        model.set_input_size(img_size=(INPUT_SIZE, INPUT_SIZE))
        self.model = model.eval().requires_grad_(False)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key])[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB images (B, 3, H, W), 0..255, any size -> float32 (B, num_features).

        Raises:
            TypeError: images of another dtype.
            ValueError: images of another shape.
        """
        check_images(images)
        chunks = images.split(CHUNK.get(self.mean.device.type, CHUNK["cpu"]))
        return torch.cat([self._chunk_features(chunk.to(self.mean.device)) for chunk in chunks])

    def _chunk_features(self, images: Tensor) -> Tensor:
        with (
            torch.autocast(images.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            size = (INPUT_SIZE, INPUT_SIZE)
            pixels = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 255).round()
            return self.model.forward_features((pixels / 255 - self.mean) / self.std)[:, 0]  # (b, num_features)


def load_transformer(
    name: str, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> TransformerFeatures:
    """A vision transformer as a feature network.

    Args:
        name: timm's, such as vit_large_patch14_dinov2 or vit_base_patch14_dinov2.
        weights: a .safetensors or .pth file with timm's names or Meta's; None for timm's cache or download.

    Raises:
        UserError: timm knows no vision transformer of that name, the file is not its weights, or the download failed.
    """
    if not timm.is_model(name):
        raise UserError(f"timm has no model named {name!r}; DINOv2's are vit_large_patch14_dinov2 and the like")
    if weights:
        model = _create(name)
        _load(model, Path(weights), name)
        return TransformerFeatures(model, name, Path(weights).name).to(device)
    with torch.device("meta"):
        _create(name)  # a name that does not fit is refused before anything is fetched
    try:
        model = _create(name, pretrained=True)
    except Exception as error:  # no network, no such weights: the hub's library and its transport raise what they like
        known = timm.get_pretrained_cfg(name)
        raise UserError(
            f"timm's weights of {name} cannot be fetched: {first_line(error)} On another machine, fetch "
            f"model.safetensors of {known.hf_hub_id if known else name} on the Hugging Face hub, or Meta's "
            "own .pth, and name the file with --second-weights"
        ) from error
    return TransformerFeatures(model, name, "timm's pretrained weights").to(device)


def _create(name: str, pretrained: bool = False) -> VisionTransformer:
    model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    if not isinstance(model, VisionTransformer) or model.cls_token is None:
        raise UserError(f"{name} is no vision transformer with a class token, whose features could be taken")
    return model


def _load(model: VisionTransformer, path: Path, name: str) -> None:
    what = f"the weights of {name},"
    read = read_weights(path, what)
    try:
        weights = checkpoint_filter_fn(read, model)
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise UserError(f"{what} {path} have other shapes: {str(error).strip().splitlines()[-1].strip()}") from error
    unexpected = [key for key in unexpected if not key.startswith("head.")]  # a classifier's, which nobody asks
    if missing or unexpected:
        odd = f"no tensor named {missing[0]}" if missing else f"a tensor named {unexpected[0]}"
        raise UserError(f"{what} {path} are another network's: they have {odd}")
