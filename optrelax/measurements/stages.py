"""How far a measurement has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["MeasurementProgress", "ReportProgress"]


@dataclass(frozen=True, slots=True)
class MeasurementProgress:
    """Steps of one stage."""

    stage: str
    done: int
    total: int


ReportProgress = Callable[[MeasurementProgress], None]
