"""How far a measurement has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["MeasurementProgress", "ReportProgress", "reporter"]


@dataclass(frozen=True, slots=True)
class MeasurementProgress:
    """Steps of one stage."""

    stage: str
    done: int
    total: int


ReportProgress = Callable[[MeasurementProgress], None]


def reporter(progress: ReportProgress | None) -> Callable[[str, int, int], None]:
    """What a measurement tells of its stages: name, steps done, steps in all; nothing where nobody asked."""

    def tell(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(MeasurementProgress(stage, done, total))

    return tell
