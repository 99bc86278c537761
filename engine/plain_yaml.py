"""YAML as YAML 1.2 has it, read by declared types: a text field gets the text that was typed.

PyYAML reads YAML 1.1, where ``12:30:00`` is 45000, ``007`` is 7 and ``yes`` is true, before anybody has asked what the
value is for.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from scq.engine.errors import UserError, first_line
from scq.engine.files import open_plain

LARGEST_BYTES = 2**20  # of a file; a config of ours has a few kilobytes
_PLAIN, _MERGE = "tag:scq:plain", "tag:yaml.org,2002:merge"
_KEPT = ("map", "seq", "str")
_SCALARS = [f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")]  # as !!int in a file
_NULLS = frozenset(["", "~", "null", "Null", "NULL"])
_BOOLS = {word: value for value in (True, False) for word in (str(value), str(value).lower(), str(value).upper())}
_INT = re.compile(r"[-+]?[0-9]+")
_OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class _Plain(str):
    """A scalar without quotes, whose type is not known yet."""


class _Loader(yaml.SafeLoader):
    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return _MERGE if value == "<<" else _PLAIN
        return super().resolve(kind, value, implicit)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _LoaderWithoutAliases(_Loader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few lines of them grow to any size
            raise yaml.composer.ComposerError(None, None, "it has an alias (*)", self.peek_event().start_mark)
        return super().compose_node(parent, index)


_Loader.yaml_constructors = {
    **{f"tag:yaml.org,2002:{name}": yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{name}"] for name in _KEPT},
    **{tag: lambda loader, node: _Plain(loader.construct_scalar(node)) for tag in (_PLAIN, *_SCALARS)},
    None: yaml.SafeLoader.construct_undefined,
}


class _Dumper(yaml.SafeDumper):
    def represent_text(self, text: str) -> yaml.ScalarNode:
        # In quotes, too: numbers of YAML 1.2, and line breaks that PyYAML would write as they are and read as others.
        style = None if scalar(text) == text and text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


def scalar(text: str) -> Any:
    """What a scalar without quotes is: null, a bool, a number, or else the text itself (YAML 1.2's core schema)."""
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    try:
        if _INT.fullmatch(text):
            return int(text)
        if _OTHER_BASE.fullmatch(text):
            return int(text, 0)
    except ValueError:  # thousands of digits
        return text
    if _FLOAT.fullmatch(text):
        return float(text)
    if found := _NOT_FINITE.fullmatch(text):
        return float(f"{found[1] or ''}{found[2] or 'nan'}")
    return text


def typed(value: Any, declared: Any) -> Any:
    """Give every scalar the type that is declared for it, through dataclasses, lists and mappings."""
    if isinstance(value, _Plain):
        return str(value) if declared is str and value not in _NULLS else scalar(str(value))
    if isinstance(value, dict):
        return {str(key): typed(each, declared_type(declared, str(key))) for key, each in value.items()}
    if isinstance(value, list):
        return [typed(each, declared_type(declared, "")) for each in value]
    return value


def declared_type(schema: Any, key: str) -> Any:
    """The declared type of a field of a dataclass, of a mapping's values or of a list's entries; Any if there is none.

    Args:
        key: of the field; of several parts, as ``section.key``, for a field of a field.
    """
    for part in key.split("."):
        if dataclasses.is_dataclass(schema):
            known = {each.name for each in dataclasses.fields(schema)}
            schema = typing.get_type_hints(schema).get(part, Any) if part in known else Any
        else:
            arguments = typing.get_args(schema)
            schema = arguments[-1] if typing.get_origin(schema) in (list, dict) else Any
    if isinstance(schema, types.UnionType) and (other := [each for each in schema.__args__ if each is not type(None)]):
        return other[0] if len(other) == 1 else Any
    return schema


def parse_text(text: str, declared: Any) -> Any:
    """The value of ``key=TEXT``: the text as typed where text is declared, else what it says as YAML.

    Raises:
        yaml.YAMLError: it looks like a list, a mapping or a quoted text, and is none.
    """
    if declared is str:
        return text
    if declared in (int, float, bool) or not text.startswith(("[", "{", "'", '"')):
        return scalar(text)
    return typed(yaml.load(text, _Loader), declared)


def read_yaml(path: Path, schema: Any, aliases: bool = True) -> dict[str, Any]:
    """The mapping in a YAML file, as plain values of the types that ``schema`` declares.

    Args:
        schema: a dataclass.
        aliases: False refuses them, in a file that somebody else may have written.

    Raises:
        UserError: the file cannot be read or is no such mapping; the message names it.
    """
    try:
        with open_plain(path) as file:
            text = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from error
    if len(text) > LARGEST_BYTES:
        raise UserError(f"config {path} is larger than {LARGEST_BYTES} bytes")
    try:
        loaded = yaml.load(text.decode(), _Loader if aliases else _LoaderWithoutAliases)
        found = typed({} if loaded is None else loaded, schema)
    except RecursionError as error:
        raise UserError(f"config {path} is not valid YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # a ValueError of bytes that are no text, or of !!int "x"
        raise UserError(f"config {path} is not valid YAML: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"config {path} must hold a mapping of keys to values")
    return found


def write_yaml(value: dict[str, Any]) -> str:
    """Plain values as YAML that any reader, of 1.1 or 1.2, reads alike."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings that is no mapping itself, with its full key."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
