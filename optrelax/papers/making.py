"""From names of tables to reports: rows done or found, then written up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from optrelax.papers.frames import TableOutcomes
from optrelax.papers.plans import plan
from optrelax.papers.reports import WrittenReport, write_index, write_report
from optrelax.papers.rows import RowProgress, do_rows

__all__ = ["make_reports"]


def make_reports(
    tables: Sequence[str],
    budget: str,
    folder: Path,
    *,
    data_dir: Path | None = None,
    workers: int = 1,
    seed: int = 0,
    command: str = "",
    watch: Callable[[RowProgress], None] | None = None,
) -> list[WrittenReport]:
    """Make the reports of some tables in `folder`/TABLE; several share their networks and get an index.md.

    Trained networks and answers that `folder` holds are used again: a call that was interrupted goes on, row by row.
    workers: processes of one thread each.  seed: the first one.  command: shown in the reports.
    A row that fails is reported in `failed`, and the others go on.
    Raises ValueError for an unknown table or budget and for rows of other settings, FileNotFoundError for missing data.
    """
    if not tables:
        raise ValueError("paper: give at least one table")
    plans = [plan(table, budget, seed) for table in tables]
    rows = [row for one in plans for row in one.rows()]
    outcomes = do_rows(rows, folder, data_dir=data_dir, workers=workers, watch=watch)
    reports = [write_report(TableOutcomes(one, outcomes), folder, command) for one in plans]
    if len(reports) > 1:
        write_index(reports, folder, command)
    return reports
