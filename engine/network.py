"""Networks as diffusers saves them, whose folders are checked before anything is built or read.

A model may come from others. Its config and the header of its weights are compared before either takes memory or time.
"""

from __future__ import annotations

import glob
import inspect
import stat
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from scq.engine.checks import one_of, shown
from scq.engine.errors import NotFiniteError, UserError, first_line, require_finite
from scq.engine.files import real_path
from scq.engine.folders import replaced_model
from scq.engine.plain_json import parse_json

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"  # the latter before a variant, a shard's number and a suffix
LARGEST_CONFIG = 1 << 24  # bytes; a prior for 100,000 classes holds their names
FLOATING = ("F16", "BF16", "F32", "F64")  # what floating weights may be stored as, in safetensors' words
OTHERS = {torch.int64: ("I64",), torch.int32: ("I32",), torch.bool: ("BOOL",)}  # and counters and flags
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Network(ModelMixin, ConfigMixin):
    """Base of the project's networks: a diffusers model whose folder is checked while it is loaded."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        subfolder: str = "",
        variant: str | None = None,
        use_safetensors: bool | None = True,
        **options: Any,
    ) -> Self:
        """Load the network in a folder, in eval mode.

        Args:
            pretrained_model_name_or_path: the folder, or the name of a model on the Hugging Face hub.
            dtype: to compute in, or its name; what `KeepsFloat32` stays in float32. ``torch_dtype`` is the older name.
            subfolder: of the folder.
            variant: of the weights' file, as ``save_pretrained`` was given it.
            use_safetensors: must not be False, because nothing else is read.
            options: further ones of diffusers.

        Raises:
            UserError: there is no such network, its config is of another class or out of range, or its weights are
                not those that the config implies: names, shapes and types; or one of them is not finite.
        """
        if use_safetensors is False:
            raise UserError("use_safetensors=False would read files that can run code; leave it out")
        dtype = as_dtype(dtype if dtype is not None else torch_dtype)
        folder = _local(str(pretrained_model_name_or_path), options) / (subfolder or "")
        check_folder(cls, folder, variant)
        try:
            network = super().from_pretrained(folder, variant=variant, use_safetensors=True, **options)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder} cannot be loaded: {first_line(error)}") from error
        require_sound_weights(network, folder)
        return network if dtype is None else nn.Module.to(network, dtype)

    def save_pretrained(self, save_directory: str | Path, *, variant: str | None = None, **options: Any) -> None:
        """Save the network so that ``save_directory`` is never seen half-written; all other files in it stay.

        Args:
            variant: of the weights' file, beside which those of other variants stay.
            options: further ones of diffusers.

        Raises:
            UserError: the folder holds anything but a network of this class, or cannot be written.
        """
        folder = real_path(save_directory)
        index = f"{WEIGHTS}.safetensors.index{f'.{variant}' if variant else ''}.json"
        old = {path.name for path in weight_files(folder, variant)} | {index}
        with replaced_model(
            folder, [type(self).__name__], keeps=lambda path: path.name not in old and not (fresh / path).exists()
        ) as fresh:
            self.save_files(fresh, variant=variant, **options)

    def save_files(self, folder: Path, **options: Any) -> None:
        """Write the network's files into an empty folder, for a caller that replaces more than one network at once."""
        super().save_pretrained(folder, **options)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files with a network's weights in its folder: one, the shards of a large network, or none."""
    name = WEIGHTS if variant is None else f"{WEIGHTS}.{variant}"
    whole = folder / f"{name}.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob(f"{glob.escape(name)}-*-of-*.safetensors"))


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype to compute in, which may be given by its name.

    Raises:
        UserError: it is none of DTYPES.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype | str) else dtype
    return DTYPES[one_of("dtype", name, DTYPES)]


def check_folder(network: type[Network], folder: Path, variant: str | None = None) -> None:
    """Make sure that a folder holds a network of a class, and the weights that its config implies.

    Only the config and the header of the weights are read, and no memory is taken for weights.

    Raises:
        UserError: it does not.
    """
    config = _read_config(network, folder / CONFIG)
    weights = weight_files(folder, variant)
    if not weights:
        raise UserError(f"{folder} holds no {WEIGHTS}{f'.{variant}' if variant else ''}.safetensors")
    found = {name: about for path in weights for name, about in _header(path).items()}
    try:
        with torch.device("meta"):
            wanted = network(**config).state_dict()
    except (ValueError, TypeError, RuntimeError, OverflowError, ArithmeticError, AssertionError) as error:
        raise UserError(f"{folder / CONFIG} describes no {network.__name__}: {first_line(error)}") from error
    for name, tensor in wanted.items():
        if name not in found:
            raise UserError(f"{folder} lacks {name}; its weights are not those of this {network.__name__}, or damaged")
        shape, kind = found[name]
        if shape != tuple(tensor.shape):
            raise UserError(f"{folder}: {name} has shape {shape}, but {CONFIG} implies {tuple(tensor.shape)}")
        allowed = FLOATING if tensor.is_floating_point() else OTHERS[tensor.dtype]
        if kind not in allowed:
            raise UserError(f"{folder}: {name} is {kind}; it must be {' or '.join(allowed)}")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise UserError(f"{folder} holds {unknown[0]}, which is no part of this {network.__name__}")


def require_sound_weights(network: nn.Module, source: Path) -> None:
    """Make sure that all weights of a network are finite; this costs one pass over them.

    Raises:
        UserError: one is not.
    """
    try:
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                require_finite(name, tensor)
    except NotFiniteError as error:
        raise UserError(f"{source} is damaged: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The object in a config of a model, which is data: nothing else is opened or looked up because of it.

    Raises:
        UserError: there is no such file, it has over LARGEST_CONFIG bytes, or it does not hold a JSON object.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path} is not a file")  # a pipe would be waited for
        if about.st_size > LARGEST_CONFIG:
            raise UserError(f"{path} has {about.st_size} bytes; a config has at most {LARGEST_CONFIG}")
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    config = parse_json(text, str(path), "the model is damaged, fetch or export it again", finite=False)
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold an object, not {type(config).__name__}")
    return config


def _read_config(network: type[Network], path: Path) -> dict[str, Any]:
    """The arguments of a network in its config."""
    config = read_config(path)
    if (name := config.get("_class_name")) != network.__name__:
        raise UserError(f"{path} is of class {shown(name)}, not {network.__name__!r}")
    known = [name for name in inspect.signature(network.__init__).parameters if name != "self"]
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := sorted(arguments.keys() - set(known)):
        raise UserError(f"{path} has an unknown key {shown(unknown[0])}; there are: {', '.join(known)}")
    return arguments


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape and the type of every tensor in a safetensors file; the library checks that the file is as long as they
    need."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
            return {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be loaded: {first_line(error)}") from error


def _local(name: str, options: dict[str, Any]) -> Path:
    """The folder of that name, or the local copy of the hub's model, for which the options of access are used up."""
    access = ("token", "revision", "cache_dir", "local_files_only", "force_download")
    given = {key: value for key in access if (value := options.pop(key, None)) is not None}
    if Path(name).is_dir():
        return Path(name)
    return from_hub(name, "network", ["*.json", "*.safetensors"], **given)


def from_hub(name: str, what: str, files: list[str], **access: Any) -> Path:
    """The local copy of a model on the Hugging Face hub, which is downloaded if need be.

    Args:
        what: what the message calls it.
        files: patterns of the names of its files.
        access: see huggingface_hub's ``snapshot_download``.

    Raises:
        UserError: the hub has no such model, refuses access, or cannot be reached.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=files, **access))
    except (OSError, ValueError, HFValidationError) as error:
        raise UserError(f"no {what} in {name}: no such folder, and not on the hub ({first_line(error)})") from error
