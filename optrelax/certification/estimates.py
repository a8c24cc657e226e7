"""How long work will take, before its first batch: a few examples are timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FEW", "LONG", "expected_seconds"]

LONG = 10.0
"""Seconds of work that are worth a word beforehand."""
FEW = 8
"""Examples beside which a trial of one would be long: their first batch tells."""
_MOMENT = 1.0  # seconds of trying beforehand, or one example


def expected_seconds(work: Callable[[Tensor], object], positions: Tensor, size: int, times: float = 1.0) -> float:
    """Seconds that work on all positions takes, batches of a size together, so many times.

    The first example is timed alone; where that is quick and the rest is long, lots that double tell more of batches,
    after a second try of the first, as the first one ever loads what the work needs.
    Raises what the work raises.
    """
    if not len(positions):
        return 0.0
    lot, begin, expected = 1, time.perf_counter(), 0.0
    for trial in range(64):
        part = positions[:lot]
        start = time.perf_counter()
        work(part)
        expected = (time.perf_counter() - start) / len(part) * len(positions) * times
        known = lot >= min(size, len(positions)) or expected <= LONG
        if known or time.perf_counter() - begin > _MOMENT / 2:
            break
        lot *= 2 if trial else 1
    return expected
