"""A copy of a model for sharing: half the bytes, and the same images up to rounding."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scq.engine.folders import refuse_to_replace, replaced_model
from scq.sampling.pipeline import SoftConvexPipeline
from scq.stage1_tokenizer.model_folder import MODEL_CLASSES


@torch.no_grad()
def export_half(pipeline: SoftConvexPipeline, folder: Path) -> None:
    """Write ``pipeline`` with its networks' weights in float16; codebooks and statistics stay as they are.

    The weights are rounded before fingerprints are computed, so that the tokenizer in the copy is the one that the
    copy's prior and refiner name.

    Raises:
        UserError: ``folder`` holds anything but a model.
    """
    refuse_to_replace(folder, MODEL_CLASSES)  # before anything is rounded
    networks = {name: network.cpu() for name, network in pipeline.as_model().networks().items()}
    for network in networks.values():
        for name in _rounded(network):
            parameter = network.get_parameter(name)
            parameter.copy_(parameter.half().float())
    fingerprint = pipeline.tokenizer.fingerprint()
    for name in networks.keys() - {"tokenizer"}:
        networks[name].register_to_config(tokenizer_fingerprint=fingerprint)
    with replaced_model(folder, MODEL_CLASSES) as fresh:
        pipeline.save_pretrained(fresh)
        for name, network in networks.items():
            (path,) = (fresh / name).glob("*.safetensors")
            rounded = _rounded(network)
            tensors = load_file(path)
            save_file({key: t.half() if key in rounded else t for key, t in tensors.items()}, path, {"format": "pt"})


def _rounded(network: nn.Module) -> set[str]:
    """The names of the parameters that are rounded: all but the quantizer's."""
    return {name for name, _ in network.named_parameters() if not name.startswith("quantizer.")}
