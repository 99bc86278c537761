"""How the C library allocates memory on a CPU."""

from __future__ import annotations

import ctypes
import os

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
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    taken = [mallopt(*choice) for variable, choice in _SETTINGS.items() if variable not in os.environ]
    return all(taken)
