"""JSON of unknown origin: a file may be damaged, edited by hand, or made by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from scq.engine.errors import DataError
from scq.engine.files import read_plain


def parse_json(text: str | bytes, where: str, advice: str, *, finite: bool = True) -> Any:
    """Parse JSON: UTF-8, no key twice, no depth that exhausts the stack.

    Args:
        where: what the message calls the text.
        advice: what to do about it, with which the message ends.
        finite: whether NaN and infinity, which Python's own writer knows, are refused.

    Raises:
        DataError: it is anything else.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        constants = _no_constant if finite else float
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=constants)
    except RecursionError as error:
        raise DataError(f"{where} is not valid JSON (it is nested too deeply): {advice}") from error
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON ({error}): {advice}") from error


def read_json(path: Path, advice: str) -> Any:
    """The value in a JSON file that the project wrote, in which measurements may be NaN or infinite.

    Raises:
        DataError: it cannot be read, or holds no JSON; the message ends with ``advice``.
    """
    try:
        text = read_plain(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {advice}") from error
    return parse_json(text, str(path), advice, finite=False)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
