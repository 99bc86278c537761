"""Models on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from scq.engine.network import from_hub

# Folders in which this project's commands and its users keep models and data; they are not taken for users of the hub.
LOCAL_FOLDERS = frozenset(
    ["runs", "model", "models", "checkpoints", "out", "output", "outputs", "shards", "tokens", "samples", "tmp", "home"]
    + ["configs", "data", "docs", "examples", "sampling"]
)
MODEL_FILES = ["*.json", "*.safetensors", "*.md"]  # nothing that would have to be unpickled


def is_hub_name(name: str) -> bool:
    """Whether a name means a model on the hub: it has the form user/model, and ``user`` is neither an existing folder
    nor one of LOCAL_FOLDERS."""
    words = re.fullmatch(r"([\w-][\w.-]*)/[\w-][\w.-]*", name)
    return words is not None and words[1].lower() not in LOCAL_FOLDERS and not Path(name).parent.exists()


def local_folder(name: str | Path, **access: Any) -> Path:
    """The folder ``name``, or the local copy of the hub's model of that name, which is downloaded if need be.

    Args:
        access: token, revision and cache_dir, as diffusers' ``from_pretrained`` takes them.

    Raises:
        UserError: the name is one for the hub, which has no such model or refuses access.
    """
    return from_hub(str(name), "model", MODEL_FILES, **access) if is_hub_name(str(name)) else Path(name)


def upload(folder: Path, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Upload a model's folder to the hub and return the address of the commit; see `SoftConvexPipeline.push_to_hub`."""
    hub = HfApi(token=token)
    repository = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload from scq"))
