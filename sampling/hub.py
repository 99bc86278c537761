"""Models on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError

from engine.errors import UserError


def is_hub_name(name: str) -> bool:
    """Two words and no such folder here, nor one that it could have been in."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(name).parent.exists()


def upload(folder: Path, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    hub = HfApi(token=token)
    repository = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload from scq"))


def from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError, HFValidationError) as error:  # no network, no such model, no access
        raise UserError(f"no model in {name}: no such folder, and not on the hub ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
