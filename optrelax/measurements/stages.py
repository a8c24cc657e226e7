"""How far a measurement has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Progress", "Watch"]


@dataclass(frozen=True, slots=True)
class Progress:
    """Steps of one stage."""

    stage: str
    done: int
    total: int


Watch = Callable[[Progress], None]
