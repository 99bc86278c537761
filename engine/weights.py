"""Reading the weights of networks that others have trained."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from scq.engine.errors import UserError


def read_weights(path: Path, what: str) -> dict[str, Tensor]:
    """A state dict from a .safetensors or .pth file, read without unpickling any code.

    Args:
        what: what error messages call the weights, in the plural ("the Inception weights").

    Raises:
        UserError: the file is missing, cannot be read, or holds something other than a state dict.
    """
    if not path.is_file():
        raise UserError(f"{what} {path} do not exist")
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file fails in as many ways as there are formats
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{what} {path} cannot be read as a state dict: {first_line}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{what} {path} are not a state dict (names to tensors)")
    return weights
