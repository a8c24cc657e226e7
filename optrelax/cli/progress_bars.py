"""Progress of long work: a bar on stderr, which a pipe or a file does not see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from optrelax.cli.application import stderr

if TYPE_CHECKING:
    from optrelax.certification import certifying as certification
    from optrelax.certification import comparison
    from optrelax.measurements import stages
    from optrelax.papers import rows
    from optrelax.training import sweeps
    from optrelax.training import trainer as training

__all__ = ["certification_bar", "comparison_bar", "measurement_bar", "report_bar", "training_bar"]


@contextlib.contextmanager
def certification_bar(title: str) -> Iterator[Callable[[certification.Progress], None]]:
    """A callback for `certify` that draws a bar with the verdicts so far."""
    with _bar(title) as draw:

        def update(progress: certification.Progress) -> None:
            shown = ", ".join(f"{count} {verdict}" for verdict, count in progress.counts.items() if count)
            draw(progress.done, progress.total, shown)

        yield update


@contextlib.contextmanager
def comparison_bar(title: str) -> Iterator[Callable[[comparison.Progress], None]]:
    """A callback for `compare` that draws a bar a run of each relaxation."""
    with _bar(title) as draw:

        def update(progress: comparison.Progress) -> None:
            run = f", run {progress.run + 1}" if progress.run else ""
            draw(progress.done, progress.total, f"{progress.relaxation}{run}")

        yield update


@contextlib.contextmanager
def measurement_bar(title: str) -> Iterator[Callable[[stages.Progress], None]]:
    """A callback for the measurements that draws a bar a stage."""
    with _bar(title) as draw:
        yield lambda progress: draw(progress.done, progress.total, progress.stage)


@contextlib.contextmanager
def sweep_bar(title: str) -> Iterator[Callable[[sweeps.SweepProgress], None]]:
    """A callback for `run_sweep` that draws a bar with the runs that have ended."""
    with _bar(title) as draw:

        def update(progress: sweeps.SweepProgress) -> None:
            shown = f"{progress.running} running" + (f", {progress.failed} failed" if progress.failed else "")
            draw(progress.done + progress.failed, progress.total, shown)

        yield update


@contextlib.contextmanager
def report_bar(title: str) -> Iterator[Callable[[rows.RowProgress], None]]:
    """A callback for `do_rows` that draws a bar with the row that ended last."""
    with _bar(title) as draw:

        def update(progress: rows.RowProgress) -> None:
            failed = f", {progress.failed} failed" if progress.failed else ""
            draw(progress.done + progress.failed, progress.total, f"{progress.name}{failed}")

        yield update


@contextlib.contextmanager
def training_bar(title: str) -> Iterator[Callable[[training.Progress], None]]:
    """A callback for `train` that draws a bar with the epoch, loss, accuracies and eps so far."""
    with _bar(title) as draw:

        def update(progress: training.Progress) -> None:
            shown = [
                f"epoch {progress.epoch}/{progress.epochs}",
                f"loss {progress.loss:.3f}",
                f"accuracy {100 * progress.natural_accuracy:.1f} %",
            ]
            if progress.robust_accuracy is not None:
                shown.append(f"robust {100 * progress.robust_accuracy:.1f} %")
            if progress.unfinished is not None:
                gap = 0.0 if progress.median_gap is None else progress.median_gap
                shown.append(f"LPs: {100 * progress.unfinished:.1f} % unfinished, median gap {gap:.0e}")
            shown.append(f"eps {progress.eps:.3g}")
            done = (progress.epoch - 1) * progress.steps + progress.step
            draw(done, progress.epochs * progress.steps, ", ".join(shown))

        yield update


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar that is drawn by (done, total, text beside it), and gone afterwards."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = stderr()
    # Where nothing can be drawn over, a bar that goes would leave an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, shown="")
        yield lambda done, total, shown: bar.update(task, completed=done, total=total, shown=shown)
