"""Compiled code, kept on disk between processes where there is room for it.

numba's own cache needs a folder and sound files in it: without the first it refuses to compile at all, and a file that
was cut short ends every later run. Here a file that is missing, damaged, of other code or of another machine is one and
the same case, and so is a folder that cannot be written: the code is compiled anew.
"""

from __future__ import annotations

import hashlib
import inspect
import pickle
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from scq.engine.files import cache_folder, is_writable, write_file
from scq.engine.progress import say

_DIGEST_BYTES = 32


def njit(**options: Any) -> Callable[[Callable], Any]:
    """numba's ``njit``, with its code kept on disk."""

    def decorate(function: Callable) -> Any:
        dispatcher = numba.njit(**options)(function)
        dispatcher._cache = _KeptCode(function)  # where numba's own ``cache=True`` puts its own
        return dispatcher

    return decorate


class _KeptCode(NullCache):
    """The compiled variants of one function, a file each.

    A file is a digest and the code. The digest covers what the code was made from, too, so that no code is loaded but
    what would be compiled now, bit for bit.
    """

    def __init__(self, function: Callable):
        self._source = Path(inspect.getfile(function))
        self._name = f"{function.__qualname__}.{sys.implementation.cache_tag}"

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        target_context.refresh()
        file = self._file(sig, target_context.codegen())
        try:
            content = b"" if file is None else file.read_bytes()
            if content[:_DIGEST_BYTES] != self._digest(content[_DIGEST_BYTES:]):
                return None
            return CompileResult._rebuild(target_context, *pickle.loads(content[_DIGEST_BYTES:]))
        except OSError:
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        file = self._file(sig, data.codegen)
        code = dumps(data._reduce())
        try:
            if file is not None:
                write_file(file, self._digest(code) + code)
        except OSError as error:  # such as a full disk
            say(f"the solver's compiled code is not kept: {error.strerror}")

    def _file(self, sig: Any, codegen: Any) -> Path | None:
        folder = _folder(self._source.parent)
        variant = hashlib.sha256(repr((sig, codegen.magic_tuple())).encode()).hexdigest()
        return None if folder is None else folder / f"{self._name}.{variant[:16]}.scq"

    def _digest(self, code: bytes) -> bytes:
        return hashlib.sha256(f"{numba.__version__} {_sha256(self._source)} ".encode() + code).digest()


@cache
def _folder(source: Path) -> Path | None:
    """The first that can be written of NUMBA_CACHE_DIR, Python's own beside ``source``, and the user's; or None."""
    named = numba.config.CACHE_DIR
    wanted = [Path(named)] if named else []
    for folder in (*wanted, source / "__pycache__"):
        if is_writable(folder):
            return folder
    try:
        return cache_folder()
    except OSError:  # not even a temporary one
        return None


@cache
def _sha256(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()
