"""How the C library hands out memory on a CPU."""

from __future__ import annotations

import ctypes
import os

# mallopt(3)'s parameters, each with its environment variable and our value
_SETTINGS = {
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),  # bytes free at the heap's top before they are given back
    "MALLOC_TOP_PAD_": (-2, 2**26),  # bytes by which the heap grows beyond what is asked for
    "MALLOC_MMAP_MAX_": (-4, 0),  # allocations that may be mapped on their own
}


def keep_freed_memory() -> bool:
    """Let glibc keep the memory of freed tensors for the next ones; for the whole process.

    As it comes, glibc maps each large tensor anew and gives it back when it is freed. Every training step then touches
    fresh pages, which the kernel fills with zeros first: on virtual machines up to a quarter of a step. In exchange a
    process stays as large as it once was. The user's own ``MALLOC_...`` variables win.

    Returns:
        whether the C library took it; False where it is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    taken = [mallopt(*choice) for variable, choice in _SETTINGS.items() if variable not in os.environ]
    return all(taken)
