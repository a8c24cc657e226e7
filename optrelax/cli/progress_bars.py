"""Progress of long work: a bar on stderr, which a pipe or a file does not see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from optrelax.cli.application import stderr

if TYPE_CHECKING:
    from optrelax.certification import Progress

__all__ = ["certification_bar"]


@contextlib.contextmanager
def certification_bar(title: str) -> Iterator[Callable[[Progress], None]]:
    """A callback for `certify` that draws a bar with the verdicts so far."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[verdicts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=stderr(), transient=True) as bar:
        task = bar.add_task(title, total=None, verdicts="")

        def update(progress: Progress) -> None:
            shown = ", ".join(f"{count} {verdict}" for verdict, count in progress.counts.items() if count)
            bar.update(task, completed=progress.done, total=progress.total, verdicts=shown)

        yield update
