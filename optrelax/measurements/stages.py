"""How far a measurement has come, and what all of them give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

__all__ = ["DEFAULT", "MeasuredTable", "MeasurementProgress", "ReportProgress", "reporter"]

DEFAULT = ("box", "hbox", "crown-ibp", "deepz", "crown")
"""The five relaxations of the paper's table, from loose to tight."""


class MeasuredTable:
    """A result that is a table and the settings it was made with; its subclass has both as fields."""

    __slots__ = ()

    table: pl.DataFrame
    settings: Mapping[str, object]

    def summary(self) -> dict[str, object]:
        """Settings and table, JSON-ready."""
        return {**self.settings, "table": self.table.to_dicts()}


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
