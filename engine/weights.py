"""Reading the weights of networks that others have trained."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from scq.engine.errors import NotFiniteError, UserError, first_line, require_finite

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights may be stored as


def read_weights(path: Path, what: str) -> dict[str, Tensor]:
    """A state dict from a .safetensors or .pth file, read without unpickling any code.

    Args:
        what: what error messages call the weights, in the plural ("the Inception weights").

    Raises:
        UserError: the file is missing, cannot be read, or holds something other than a state dict of finite weights.
    """
    if not path.is_file():
        raise UserError(f"{what} {path} do not exist")
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            _refuse_compressed(path)
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file fails in as many ways as there are formats
        raise UserError(f"{what} {path} cannot be read as a state dict: {first_line(error)}") from error
    return sound_weights(weights, f"{what} {path}")


def sound_weights(weights: Any, what: str) -> dict[str, Tensor]:
    """``weights``, if they are a state dict: names, and finite floating tensors, beside which a counter may stand.

    Raises:
        UserError: they are not; the message begins with ``what``, in the plural.
    """
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise UserError(f"{what} are not a state dict (names to tensors)")
    for name, value in weights.items():
        counter = value.dtype == torch.int64 and value.ndim == 0
        if not counter and value.dtype not in _FLOATING:
            raise UserError(f"{what} are damaged: {name} is {value.dtype}, not floating")
        if value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
            raise UserError(f"{what} are damaged: {name} claims a size of {tuple(value.shape)} that it does not have")
        try:
            require_finite(name, value)
        except NotFiniteError as error:
            raise UserError(f"{what} are damaged: {error}") from error
    return weights


def _refuse_compressed(path: Path) -> None:
    """torch never compresses; whoever does may have a few bytes become more than memory holds."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise UserError("it is compressed; save it with torch.save")
