"""The manifest.json of a set of shards or tokens: parsed, checked, and reduced to a fingerprint of the contents."""

import hashlib
import json
import re
from typing import Any

from scq.engine.errors import DataError


def parse_manifest(text: bytes, where: str, kind: str) -> dict[str, Any]:
    """Parse a manifest.json.

    Args:
        where: what error messages call the file.
        kind: the value that 'format' must have.

    Raises:
        DataError: the text is not JSON, or describes a set of another kind.
    """
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise DataError(f"'{where}' is not valid JSON ({error}): the set is damaged, write it again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != kind:
        raise DataError(f"'{where}' has the format '{found}', not '{kind}'")
    return manifest


def require_plain_name(name: str, where: str) -> None:
    """Make sure that a name is a plain file name: a manifest must not lead to other folders.

    Raises:
        DataError: it is not; ``where`` is what the message calls the manifest.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise DataError(
            f"{where} names the file '{name}', which is not a plain file name: the manifest was tampered with"
        )


def contents_fingerprint(manifest: dict[str, Any]) -> str:
    """A fingerprint of a set's contents: the sha256 over the sha256 of its shards, wherever the set is stored."""
    return hashlib.sha256("".join(shard["sha256"] for shard in manifest["shards"]).encode()).hexdigest()
