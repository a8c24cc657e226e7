"""Tables of a terminal, whose words and numbers are whole at any width."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Column, Table

_ANY = 10_000  # columns

__all__ = ["FittedTable"]


class FittedTable(Table):
    """Takes the first of three forms that fits: as it is; text broken at spaces; no lines between columns either.

    The last is printed however wide it is, by a console that does not crop (`soft_wrap=True`).
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Any]:
        """Render in the form that fits."""
        form, most = self, options.max_width
        if Measurement.get(console, options.update(width=_ANY), self).maximum > most:
            form = self._with_widths(most)
            if (form.width or 0) > most:
                form = self._plain()._with_widths(most)
        return Table.__rich_console__(form, console, options)

    def _plain(self) -> FittedTable:
        form = copy(self)
        form.box, form.padding, form.show_edge = box.SIMPLE_HEAD, (0, 0, 0, 0), False
        return form

    def _with_widths(self, total: int) -> FittedTable:
        """Columns as wide as their longest word, then from the left as their longest cell, while `total` lasts."""
        form = copy(self)
        widths = [_longest(column, words=True) for column in self.columns]
        beside = self._extra_width + len(widths) * (self.padding[1] + self.padding[3])
        spare = max(0, total - beside - sum(widths))
        for i, column in enumerate(self.columns):
            more = min(spare, _longest(column, words=False) - widths[i])
            widths[i], spare = widths[i] + more, spare - more
        form.columns = [replace(column, width=width) for column, width in zip(self.columns, widths, strict=True)]
        form.width = beside + sum(widths)
        return form


def _longest(column: Column, words: bool) -> int:
    cells = [str(cell) for cell in (column.header, *column.cells)]
    return max(len(part) for cell in cells for part in (cell.split() if words else [cell]) or [""])
