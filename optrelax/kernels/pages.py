"""Memory that a process gives back and asks for again in every step: kept instead, where the C library allows.

A tensor of some megabytes is mapped anew by every allocation, and the kernel clears each page at its first touch. A
step of CROWN on 784-100-100-10, batch 100, spends a quarter of its time there.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from typing import Any

from torch import Tensor

__all__ = ["huge_pages", "keep_pages"]

# glibc, malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_HUGE = 2**22
"""Bytes from which huge pages pay: two of the usual ones."""


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


def huge_pages(fresh: Tensor) -> Tensor:
    """A tensor that nothing was written to yet, in huge pages where Linux has them: one touch clears 2 MiB.

    Written through, 52 MB so take 4 ms instead of 23, most of which the kernel spends on 13,000 faults.
    """
    size = fresh.numel() * fresh.element_size()
    advise = _advise() if fresh.device.type == "cpu" and size >= _HUGE else None
    if advise is not None:
        first = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # What it answers says whether pages are faster, not whether they are right.
        advise(first, fresh.data_ptr() + size - first, mmap.MADV_HUGEPAGE)
    return fresh


@functools.cache
def _advise() -> Any:
    """The C library's `madvise`; None where it knows no huge pages."""
    advise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None
    if advise is not None:
        advise.argtypes, advise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return advise
