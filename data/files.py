"""Writing files so that a reader never sees half of one: a temporary name beside the target, then a rename."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from scq.data.errors import DataError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at path, complete and on disk, when the block ends well, and not at all otherwise."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Deletes the temporary files that killed writers left in the directory."""
    for path in directory.glob(".*.tmp*"):
        path.unlink(missing_ok=True)


def to_json(value: Any) -> bytes:
    """The one way manifests are serialised: same value, same bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Writes the value as JSON, atomically."""
    with atomic_write(path) as file:
        file.write(to_json(value))


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


def sha256_of(path: Path) -> str:
    """The sha256 of a file as hexadecimal text, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
