"""The manifest.json of a set of shards or tokens: read as strictly as a file of unknown origin deserves.

What `parse_manifest` returns has every field that a reader needs, with values of the right type and range. A reader may
index it without a second look, and a damaged manifest ends in one line.
"""

import hashlib
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from scq.engine.errors import DataError, UserError
from scq.engine.plain_json import parse_json

MANIFEST = "manifest.json"
IMAGES, TOKENS = "scq-images-1", "scq-tokens-1"
_MANY = 2**48  # more bytes or images than any set has


@dataclass(frozen=True)
class _Rule:
    """What a value of a manifest must be, in words and as a test; a missing one is an error if it is needed."""

    words: str
    holds: Callable[[Any], bool]
    needed: bool = True


def _whole(least: int = 0, most: int = _MANY) -> _Rule:
    return _Rule(f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most)


def _or_null(rule: _Rule) -> _Rule:
    return _Rule(f"{rule.words}, or null", lambda v: v is None or rule.holds(v), rule.needed)


def _optional(rule: _Rule) -> _Rule:
    return _Rule(rule.words, rule.holds, needed=False)


def _is_names(value: Any) -> bool:
    texts = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return texts and len(set(value)) == len(value)


def _is_files(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"bytes", "names_and_sizes"}
        and type(value["bytes"]) is int
        and _SHA256.holds(value["names_and_sizes"])
    )


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(type(count) is int and count > 0 for count in value.values())


_TEXT = _Rule("text", lambda v: isinstance(v, str))
_SHA256 = _Rule("a sha256 in hexadecimal", lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) is not None)
_NAMES = _Rule("a list of different names", _is_names)
_SHARD = {"name": _TEXT, "images": _whole(), "sha256": _SHA256}
_SCHEMAS: dict[str, dict[str, Any]] = {
    IMAGES: {
        "source": {"format": _TEXT, "name": _optional(_or_null(_TEXT)), "split": _or_null(_TEXT)},
        "protocol": {"crop": _TEXT, "size": _or_null(_whole(1, 2**16))},
        "class_names": _NAMES,
        "num_images": _whole(1),
        "image_size": _or_null(_whole(1, 2**16)),
        "pillow": _TEXT,
        "skipped": [{"key": _TEXT, "reason": _TEXT}],
        # Sets that were packed before lack these two.
        "source_files": _optional(_Rule("the bytes of the source's files, and a sha256", _is_files)),
        "passed_over": _optional(_Rule("counts by kind", _is_counts)),
        "index_sha256": _optional(_SHA256),  # of the index's rows; sets that were packed before lack it
        "shards": [{**_SHARD, "bytes": _whole()}],
    },
    TOKENS: {
        "fingerprint": _TEXT,
        "codebook_size": _whole(1, 2**32),
        "grid": _Rule(
            "two whole numbers of at least 1",
            lambda v: isinstance(v, list) and len(v) == 2 and all(type(n) is int and 1 <= n <= 2**16 for n in v),
        ),
        "views": _whole(1, 2**16),
        "num_classes": _whole(0, 2**31),
        "class_names": _optional(_NAMES),  # sets that were written before lack it
        "num_images": _whole(1),
        # Of the three files of a shard, older sets have a digest of the tokens alone.
        "shards": [{**_SHARD, "labels_sha256": _optional(_SHA256), "keys_sha256": _optional(_SHA256)}],
    },
}
# What a process that writes tokens says of its own part while the set is unfinished.
_PART = {**{key: rule for key, rule in _SCHEMAS[TOKENS].items() if key != "num_images"}} | {
    "finished": _Rule("true or false", lambda v: isinstance(v, bool))
}


def parse_manifest(text: bytes, where: str, kind: str, part: bool = False) -> dict[str, Any]:
    """Parse and check a manifest.json.

    Args:
        where: what error messages call the file.
        kind: the value that 'format' must have: IMAGES or TOKENS.
        part: whether this is one process's part of an unfinished set of tokens.

    Raises:
        DataError: the text is not JSON, describes a set of another kind, lacks a field, or has one that cannot be.
    """
    manifest = parse_json(text, where, _ADVICE)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != kind:
        raise DataError(f"{where} has the format {reprlib.repr(found)}, not '{kind}'")
    _check(manifest, _PART if part else _SCHEMAS[kind], where, "")
    shards = manifest["shards"]
    for shard in shards:
        require_plain_name(shard["name"], where)
    if len({shard["name"] for shard in shards}) < len(shards):
        raise DataError(f"{where} names a shard twice: {_ADVICE}")
    total = sum(shard["images"] for shard in shards)
    if not part and total != manifest["num_images"]:
        raise DataError(f"{where} counts {manifest['num_images']} images in all, but {total} in its shards: {_ADVICE}")
    if kind == TOKENS and len(manifest.get("class_names", ())) not in (0, manifest["num_classes"]):
        raise DataError(f"{where} names other classes than it counts, {manifest['num_classes']}: {_ADVICE}")
    return manifest


_ADVICE = "the set is damaged, write it again"


def _check(value: Any, schema: Any, where: str, path: str) -> None:
    """Raise DataError unless the value is what the schema says: a rule, fields with a schema each, or a list."""
    if isinstance(schema, _Rule):
        good, words = schema.holds(value), schema.words
    else:
        good, words = isinstance(value, type(schema)), "a list" if isinstance(schema, list) else "an object"
    if not good:
        raise DataError(f"{where} says that {path or 'it'} is {reprlib.repr(value)}; it must be {words}: {_ADVICE}")
    if isinstance(schema, list):
        for number, item in enumerate(value):
            _check(item, schema[0], where, f"{path}[{number}]")
    if isinstance(schema, dict):
        for key, rule in schema.items():
            name = f"{path}.{key}" if path else key
            if key in value:
                _check(value[key], rule, where, name)
            elif not isinstance(rule, _Rule) or rule.needed:
                raise DataError(f"{where} does not say what {name} is: {_ADVICE}")


def require_plain_name(name: str, where: str) -> None:
    """Make sure that a name is a plain file name: a manifest must not lead to other folders.

    Raises:
        DataError: it is not; ``where`` is what the message calls the manifest.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", name):
        raise DataError(
            f"{where} names the file {reprlib.repr(name)}, which is not a plain file name: the manifest was tampered "
            "with"
        )


def contents_fingerprint(manifest: dict[str, Any]) -> str:
    """A fingerprint of a set's contents: the sha256 over the sha256 of its shards, wherever the set is stored."""
    return hashlib.sha256("".join(shard["sha256"] for shard in manifest["shards"]).encode()).hexdigest()


class Classes(NamedTuple):
    """What the labels of a set, or of a model, stand for.

    Attributes:
        where: what messages call it.
        number: the number of classes; 0 if there are none.
        names: by label; empty where an older version did not write them down.
    """

    where: str
    number: int
    names: Sequence[str]


def refuse_other_classes(ours: Classes, theirs: Classes, advice: str) -> None:
    """Make sure that a label means the same in both: the names are compared, or where one side has none, the numbers.

    Raises:
        UserError: it does not; the message ends with ``advice``.
    """
    difference = None
    if ours.number != theirs.number:
        difference = f"{ours.where} has {ours.number} classes, but {theirs.where} has {theirs.number}"
    for label, (mine, other) in enumerate(zip(ours.names, theirs.names, strict=False)):
        if difference is None and mine != other:
            named = reprlib.repr(mine), reprlib.repr(other)
            difference = f"label {label} is {named[0]} in {ours.where}, but {named[1]} in {theirs.where}"
    if difference is not None:
        raise UserError(f"{difference}, so labels differ in meaning: {advice}")
