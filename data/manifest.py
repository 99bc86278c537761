"""The manifest.json of a set of shards or tokens: read, checked, and what names its contents."""

import hashlib
import json
import re
from typing import Any

from scq.engine.errors import DataError


def parse_manifest(text: bytes, where: str, kind: str) -> dict[str, Any]:
    """Parses a manifest.json and checks its kind (the value of 'format'). Raises DataError naming the file."""
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise DataError(f"'{where}' is not valid JSON ({error}): the set is damaged, write it again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != kind:
        raise DataError(f"'{where}' describes '{found}', not '{kind}'")
    return manifest


def require_plain_name(name: str, where: str) -> None:
    """Raises DataError unless the name is a plain file name: a manifest must not lead to other folders."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise DataError(
            f"{where} names the file '{name}', which is not a plain file name: the manifest was tampered with"
        )


def contents_fingerprint(manifest: dict[str, Any]) -> str:
    """A name for the contents of a set: sha256 over its shards' sha256, independent of where the set lies."""
    return hashlib.sha256("".join(shard["sha256"] for shard in manifest["shards"]).encode()).hexdigest()
