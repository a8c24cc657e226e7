"""`optrelax paper`: the published tables, measured again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from optrelax.cli.application import Group, app, command, fail, print_json, say, show_table, stderr
from optrelax.cli.options import DataDir, Json, Seed, Subset, option
from optrelax.cli.progress_bars import report_bar

if TYPE_CHECKING:
    from optrelax.papers.barrier import BarrierRow, StageOutcomes

__all__ = ["barrier"]

papers = typer.Typer(help="Published tables, measured again beside their figures.", cls=Group, no_args_is_help=True)
app.add_typer(papers, name="paper")


@papers.callback()
def _papers() -> None:
    """Published tables, measured again beside their figures."""


@command(
    "barrier",
    papers,
    common=("data_dir", "subset", "out"),
    examples=("optrelax paper barrier --weights DIR --data-dir DATA --subset 200 --out OUT",),
)
def barrier(
    weights: Annotated[Path, option("--weights", group="Network", metavar="DIR", help="Of the networks (npz files).")],
    data_dir: DataDir = None,
    subset: Subset = None,
    rows: Annotated[
        list[str] | None,
        option(
            "--row", "--rows", group="Network", metavar="NETWORK@EPS", show_default="all", help="Rows of the table."
        ),
    ] = None,
    workers: Annotated[int, option("--workers", group="Run", min=1, help="Processes of one thread each.")] = 2,
    batch_size: Annotated[int, option("--batch-size", group="Run", min=1, help="Images at a time.")] = 100,
    out: Annotated[
        Path | None, option("--out", group="Output", metavar="DIR", help="Keep journal and table; resumes there.")
    ] = None,
    json: Json = False,
) -> None:
    """Exact layerwise LP (LP-ALL) on the networks of Salman et al. (2019) and MNIST's test images.

    Cheap bounds and an attack decide what they can, layerwise LPs the rest; the verdict is exactly LP-ALL's, and what
    the tolerance leaves open is counted as undecided. Errors in percent, as published.
    """
    from optrelax.output.tables import require_writable, write_frame
    from optrelax.papers.barrier import barrier_frame

    wanted = _rows(rows or ())
    if not weights.is_dir():
        raise ValueError(f"--weights: {weights} is no folder; it must hold {wanted[0].network}.npz and the others")
    if out is not None:
        require_writable(out)
    begin = time.perf_counter()
    journal = None if out is None else out / "barrier.jsonl"
    batches = _run_barrier(
        weights, data_dir, rows=wanted, subset=subset, batch_size=batch_size, workers=workers, journal=journal
    )
    seconds = time.perf_counter() - begin
    frame = barrier_frame(batches, wanted)
    if out is not None:
        write_frame(frame, out / "barrier.csv")
    if json:
        print_json({"rows": frame.to_dicts(), "seconds": seconds, "workers": workers})
        return
    show_table(frame, {"LP-ALL": 2, "LP-ALL published": 2}, title="errors in percent")
    images = sum(len(batch.images) for batch in batches)
    say(f"{images} images, {workers} worker(s); this run took {seconds:.1f} s")


def _rows(keys: Sequence[str]) -> tuple[BarrierRow, ...]:
    """Rows of the barrier table by their keys, all where none is named; ValueError for one that is not there."""
    from optrelax.errors import suggest
    from optrelax.papers.barrier import ROWS

    known = {row.key: row for row in ROWS}
    for key in keys:
        if key not in known:
            raise ValueError(f"--row: no row {key!r}; {suggest(key, known)}")
    return tuple(known[key] for key in keys) if keys else ROWS


def _run_barrier(weights: Path, data_dir: Path | None, **how: Any) -> list[StageOutcomes]:
    """The work itself, under a bar."""
    from rich.progress import Progress

    from optrelax.papers.barrier import run_barrier

    with Progress(console=stderr(), transient=True) as bar:
        task = bar.add_task("barrier", total=None)

        def update(batch: StageOutcomes, finished: int, total: int) -> None:
            bar.update(task, completed=finished, total=total, description=f"barrier {batch.row}")

        return run_barrier(weights, data_dir, progress=update, **how)


# --- the tables of arXiv 2102.06700 -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """How large a report is made, and where."""

    budget: Annotated[
        Literal["smoke", "cpu", "full"],
        option("--budget", group="Run", metavar="SIZE", help="smoke (seconds), cpu (an hour in all) or full."),
    ] = "smoke"
    data_dir: DataDir = None
    out: Annotated[
        Path, option("--out", group="Output", metavar="DIR", help="Reports in DIR/TABLE; resumes there.")
    ] = Path("runs/paper")
    workers: Annotated[int, option("--workers", group="Run", min=1, help="Rows at a time, a process each.")] = 2
    seed: Seed = 0
    json: Json = False

    def command(self, name: str) -> str:
        """The command that makes the report again; folders of this machine mean nothing to its reader."""
        data = "" if self.data_dir is None or self.budget == "smoke" else " --data-dir DATA"
        seed = "" if self.seed == 0 else f" --seed {self.seed}"
        return (
            f"optrelax paper {name} --budget {self.budget}{data} --out {self.out.name} --workers {self.workers}{seed}"
        )


_TABLES = {
    "table1": "Tightness, continuity, sensitivity and certified training of five relaxations.",
    "table2": "Certified accuracy of training by six methods, for data sets and networks.",
    "table3": "Every modified relaxation: trained with, and its three properties.",
    "table4": "Training with loosened Box: omega times F, means over seeds, as a heat map.",
    "properties": "Tightness, continuity and sensitivity of every relaxation, LPs too.",
    "all": "All of table1 to table4 and properties, with shared networks and one index.md.",
}


def _register(name: str, about: str) -> None:
    """One command a table."""

    def table(*, options: ReportOptions) -> None:
        from optrelax.papers.plans import TABLES

        _make(name, list(TABLES) if name == "all" else [name], options)

    table.__doc__ = about
    example = f"optrelax paper {name} --budget cpu --data-dir DATA --out runs/paper"
    command(name, papers, common=("budget", "data_dir", "out"), examples=(example,))(table)


for _name, _about in _TABLES.items():
    _register(_name, _about)


def _make(name: str, tables: list[str], options: ReportOptions) -> None:
    """Make the reports; exit code 1 where a row failed. The same command again goes on where it stopped."""
    from optrelax.output.tables import require_writable
    from optrelax.papers.making import make_reports
    from optrelax.papers.plans import plan

    for table in tables:
        plan(table, options.budget, options.seed)
    require_writable(options.out)
    with report_bar(name) as watch:
        reports = make_reports(
            tables,
            options.budget,
            options.out,
            data_dir=options.data_dir,
            workers=options.workers,
            seed=options.seed,
            command=options.command(name),
            watch=watch,
        )
    failed = {row: error for report in reports for row, error in report.failed.items()}
    if options.json:
        print_json([report.summary() for report in reports])
    else:
        say(*(f"{report.title}: {report.folder / 'report.html'}" for report in reports))
    if failed:
        row, error = next(iter(failed.items()))
        raise fail(f"{len(failed)} row(s) failed, {row} first: {error}; the reports list them")
