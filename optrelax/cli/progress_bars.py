"""Progress of long work on stderr: a bar on a terminal; elsewhere a line an epoch, or a hundred examples."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from rich.table import Column

from optrelax.certification.estimates import LONG
from optrelax.cli.application import stderr

if TYPE_CHECKING:
    from rich.console import Console

    from optrelax.certification import certifying as certification
    from optrelax.certification import contests
    from optrelax.measurements import stages
    from optrelax.papers import rows
    from optrelax.training import sweeps
    from optrelax.training import trainer as training

__all__ = [
    "certification_bar",
    "comparison_bar",
    "fetching_bar",
    "measurement_bar",
    "report_bar",
    "sweep_bar",
    "training_bar",
]


class Standing(NamedTuple):
    """How far the work is.

    shown: fields in the order in which they matter; ended: whether a part of it has; expected: seconds that all of it
    takes, told before it begins.
    """

    done: int
    total: int
    shown: Sequence[str]
    ended: bool = False
    expected: float | None = None


Progress = TypeVar("Progress")
Bar = Callable[[str], contextlib.AbstractContextManager[Callable[[Progress], None]]]


def _bar_of(standing: Callable[[Progress], Standing], every: int | None = 100) -> Bar[Progress]:
    """Makes bars by their titles: a context manager that gives the callback of the work.  every: as in `_bar`."""

    @contextlib.contextmanager
    def bar(title: str) -> Iterator[Callable[[Progress], None]]:
        with _bar(title, every) as draw:
            yield lambda progress: draw(*standing(progress))

    return bar


def _certification(progress: certification.CertificationProgress) -> Standing:
    """The verdicts so far."""
    shown = [f"{count} {verdict}" for verdict, count in progress.counts.items() if count]
    return Standing(progress.done, progress.total, shown, expected=progress.expected)


def _comparison(progress: contests.ComparisonProgress) -> Standing:
    """A run of each relaxation."""
    run = [f"run {progress.run + 1}"] if progress.run else []
    return Standing(progress.done, progress.total, [progress.relaxation, *run], expected=progress.expected)


def _measurement(progress: stages.MeasurementProgress) -> Standing:
    return Standing(progress.done, progress.total, [progress.stage])


def _sweep(progress: sweeps.SweepProgress) -> Standing:
    """The runs that have ended."""
    shown = [f"{progress.running} running", *([f"{progress.failed} failed"] if progress.failed else [])]
    return Standing(progress.done + progress.failed, progress.total, shown)


def _report(progress: rows.RowProgress) -> Standing:
    """The row that ended last."""
    failed = [f"{progress.failed} failed"] if progress.failed else []
    return Standing(progress.done + progress.failed, progress.total, [progress.name, *failed])


def _training(progress: training.TrainingProgress) -> Standing:
    """The epoch, loss, accuracies and eps so far; before the first step there are none."""
    done, total = (progress.epoch - 1) * progress.steps + progress.step, progress.epochs * progress.steps
    if progress.expected is not None:
        return Standing(done, total, [], expected=progress.expected)
    shown = [f"epoch {progress.epoch}/{progress.epochs}", f"eps {progress.eps:.3g}"]
    shown += [f"loss {progress.loss:.3f}", f"accuracy {100 * progress.natural_accuracy:.1f} %"]
    if progress.robust_accuracy is not None:
        shown.append(f"robust {100 * progress.robust_accuracy:.1f} %")
    if progress.unfinished is not None:
        gap = 0.0 if progress.median_gap is None else progress.median_gap
        shown.append(f"LPs: {100 * progress.unfinished:.1f} % unfinished, median gap {gap:.0e}")
    return Standing(done, total, shown, progress.step == progress.steps)


certification_bar = _bar_of(_certification)
comparison_bar = _bar_of(_comparison)
measurement_bar = _bar_of(_measurement)
sweep_bar = _bar_of(_sweep, every=1)
report_bar = _bar_of(_report, every=1)
training_bar = _bar_of(_training, every=None)
"""Callbacks for `certify`, `compare`, the measurements, `run_sweep`, `do_rows` and `train`."""


@contextlib.contextmanager
def fetching_bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A callback for `fetch_dataset` that draws a bar of megabytes a file."""
    with _bar(title, every=10) as draw:
        yield lambda file, done, total: draw(done // 2**20, -(-total // 2**20), ["MB", file])


class Draw(Protocol):
    """Shows how far the work is, by the fields of a `Standing`."""

    def __call__(
        self, done: int, total: int, shown: Sequence[str], ended: bool = False, expected: float | None = None
    ) -> None: ...


@contextlib.contextmanager
def _bar(title: str, every: int | None = 100) -> Iterator[Draw]:
    """Progress on stderr.  every: where nothing can be drawn over, a line after so many; None: where a part ended."""
    console = stderr()
    if console.is_terminal:
        with _drawn_bar(title, console) as draw:
            yield draw
    else:
        yield _ProgressLines(title, console, every)


class _ProgressLines:
    """Progress as lines, for files and pipes; the first as soon as it is known that more than seconds are left."""

    def __init__(self, title: str, console: Console, every: int | None) -> None:
        self.title, self.console, self.every = title, console, every
        self.begin, self.printed = time.monotonic(), 0
        self.first, self.since, self.told = -1, self.begin, False

    def __call__(
        self, done: int, total: int, shown: Sequence[str], ended: bool = False, expected: float | None = None
    ) -> None:
        if expected is not None and expected > LONG:
            told = f"{self.title}: {done}/{total}, takes about {_duration(expected)}, by a few examples"
            self.console.print(told, markup=False, highlight=False)
        if self.every is not None:
            if done < self.printed:  # the next run of several
                self.printed = 0
            ended = done > self.printed and (done // self.every > self.printed // self.every or done == total)
        left = self._left(done, total)
        if ended or (left > LONG and not self.told):
            self.printed, self.told = done, True
            seconds = time.monotonic() - self.begin
            line = [f"{self.title}: {done}/{total}", *shown, f"{seconds:.0f} s"]
            line += [f"about {_duration(left)} left"] if left > LONG else []
            self.console.print(", ".join(line), markup=False, highlight=False)

    def _left(self, done: int, total: int) -> float:
        """Seconds, at the rate since the first call; 0 where that is not known."""
        now = time.monotonic()
        if self.first < 0 or done < self.first:  # what a journal held took no time
            self.first, self.since = done, now
        spent = now - self.since
        return spent * (total - done) / (done - self.first) if done > self.first and spent > _KNOWN else 0.0


_KNOWN = 0.5  # seconds that tell a rate


def _duration(seconds: float) -> str:
    """In a unit of which there are more than one."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@contextlib.contextmanager
def _drawn_bar(title: str, console: Console) -> Iterator[Draw]:
    """A bar that fits the terminal: fields that have no room are left out, the bar and the time left never."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(_BAR),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[shown]}", table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, shown="")

        def draw(
            done: int, total: int, shown: Sequence[str], ended: bool = False, expected: float | None = None
        ) -> None:
            if expected is not None and expected > LONG:
                shown = [f"about {_duration(expected)}", *shown]
            fixed = _BAR + 2 * len(str(total)) + 1 + _TIME + 4  # a space between columns
            room = console.width - fixed
            name = title if len(title) <= room else title[: max(0, room - 1)] + "…"
            fields = _fitting(shown, room - len(name))
            bar.update(task, completed=done, total=total, description=name, shown=fields)

        yield draw


_BAR, _TIME = 20, 7  # columns of the bar and of the time left


def _fitting(fields: Sequence[str], room: int) -> str:
    """As many of the fields, from the first on, as have room."""
    for count in range(len(fields), 0, -1):
        if len(text := ", ".join(fields[:count])) <= room:
            return text
    return ""
