"""Memory that a process gives back and asks for again in every step: kept instead, where the C library allows.

A tensor of some megabytes is mapped anew by every allocation, and the kernel clears each page at its first touch. A
step of CROWN on 784-100-100-10, batch 100, spends a quarter of its time there.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_pages"]

# glibc, malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_pages() -> bool:
    """Let this process keep the memory it frees, for its next tensors; True where that could be set (glibc).

    A setting of the whole process, which then holds its peak until it ends: for programs (the `optrelax` command
    calls it), not for libraries. Bounds and gradients are the same, bit for bit.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
