"""How the C library allocates memory on a CPU: a training keeps what it frees, a server gives it back."""

from __future__ import annotations

import ctypes
import os
from typing import Any

# Environment variable -> (parameter number of mallopt(3), our value).
_SETTINGS = {
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),  # free bytes at the top of the heap before they are given back
    "MALLOC_TOP_PAD_": (-2, 2**26),  # extra bytes whenever the heap grows
    "MALLOC_MMAP_MAX_": (-4, 0),  # how many allocations may have a memory mapping of their own
}


def keep_freed_memory() -> bool:
    """Let glibc keep the memory of freed tensors for later ones, in the whole process.

    By default, glibc maps each large tensor anew and unmaps it when it is freed. Every training step then touches fresh
    pages, which the kernel must zero first; on virtual machines this takes up to a quarter of a step. The price is that
    the process never shrinks. ``MALLOC_...`` variables that the user has set take precedence.

    Returns:
        whether the C library accepted the settings; False if it is not glibc.
    """
    mallopt = _function_of_libc("mallopt")
    if mallopt is None:
        return False
    taken = [mallopt(*choice) for variable, choice in _SETTINGS.items() if variable not in os.environ]
    return all(taken)


def give_back_freed_memory() -> bool:
    """Return the heap's free pages to the system, those between pages in use, too.

    By default, glibc returns only what is free at the heap's end. After a few large requests to a server, that may be
    little.

    Returns:
        whether the C library can do so; False if it is not glibc.
    """
    trim = _function_of_libc("malloc_trim")
    if trim is None:
        return False
    trim(0)
    return True


def _function_of_libc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
