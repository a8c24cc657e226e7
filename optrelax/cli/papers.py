"""`optrelax paper`: the published tables, measured again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optrelax.cli.application import app, fail, print_json, stderr, stdout
from optrelax.cli.inputs import DataDir, Json, Seed, Subset
from optrelax.cli.progress_bars import report_bar

if TYPE_CHECKING:
    from optrelax.papers.barrier import BarrierRow, Batch

__all__ = ["barrier", "everything", "properties", "table1", "table2", "table3", "table4"]

papers = typer.Typer(help="Published tables, measured again beside their figures.", no_args_is_help=True)
app.add_typer(papers, name="paper")


@papers.callback()
def _papers() -> None:
    """Published tables, measured again beside their figures."""


@papers.command("barrier")
def barrier(
    weights: Annotated[
        Path, typer.Option("--weights", metavar="DIR", show_default=False, help="Folder of the networks (npz files).")
    ],
    data_dir: DataDir = None,
    subset: Subset = None,
    row: Annotated[
        list[str] | None,
        typer.Option("--row", metavar="NETWORK@EPS", show_default="all", help="One row of the table; repeatable."),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, show_default=True, help="Processes of one thread each.")
    ] = 2,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")] = 100,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", show_default=False, help="Folder of journal and table; resumes there."),
    ] = None,
    json: Json = False,
) -> None:
    """Exact layerwise LP (LP-ALL) on the networks of Salman et al. (2019) and MNIST's test images.

    Cheap bounds and an attack decide what they can, layerwise LPs the rest; the verdict is exactly LP-ALL's, and what
    the tolerance leaves open is counted as undecided. Errors in percent, as published.
    """
    from optrelax.errors import suggest
    from optrelax.output.tables import require_writable, rich_table, write_frame
    from optrelax.papers.barrier import ROWS, barrier_frame, run_barrier

    rows: tuple[BarrierRow, ...] = ROWS
    if row:
        known = {r.key: r for r in ROWS}
        for key in row:
            if key not in known:
                raise ValueError(f"--row: no row {key!r}; {suggest(key, known)}")
        rows = tuple(known[key] for key in row)
    if not weights.is_dir():
        raise ValueError(f"--weights: {weights} is no folder; it must hold {rows[0].network}.npz and the others")
    if out is not None:
        require_writable(out)
    begin = time.perf_counter()
    from rich.progress import Progress

    with Progress(console=stderr(), transient=True) as bar:
        task = bar.add_task("barrier", total=None)

        def update(batch: Batch, finished: int, total: int) -> None:
            bar.update(task, completed=finished, total=total, description=f"barrier {batch.row}")

        batches = run_barrier(
            weights,
            data_dir,
            rows=rows,
            subset=subset,
            batch_size=batch_size,
            workers=workers,
            journal=None if out is None else out / "barrier.jsonl",
            progress=update,
        )
    seconds = time.perf_counter() - begin
    frame = barrier_frame(batches, rows)
    if out is not None:
        write_frame(frame, out / "barrier.csv")
    if json:
        print_json({"rows": frame.to_dicts(), "seconds": seconds, "workers": workers})
        return
    stdout().print(rich_table(frame, title="errors in percent", decimals={"LP-ALL": 2, "LP-ALL published": 2}))
    images = sum(len(batch.images) for batch in batches)
    stdout().print(f"{images} images, {workers} worker(s); this run took {seconds:.1f} s")


# --- the tables of arXiv 2102.06700 -------------------------------------------------------------------------------

Budget = Annotated[
    str,
    typer.Option(
        "--budget",
        metavar="smoke|cpu|full",
        help="Seconds on the digits; all tables in under an hour of two cores; the paper's own epochs and grids.",
    ),
]
Out = Annotated[
    Path,
    typer.Option("--out", metavar="DIR", help="Reports in DIR/TABLE, networks in DIR/runs, rows in DIR/rows."),
]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Rows at the same time, a process of one thread each.")]
_OUT = Path("runs/paper")


@papers.command("table1")
def table1(
    budget: Budget = "smoke",
    data_dir: DataDir = None,
    out: Out = _OUT,
    workers: Workers = 2,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Tightness, continuity, sensitivity and certified training of five relaxations, beside the published table."""
    _make("table1", ["table1"], budget, data_dir, out, workers, seed, json)


@papers.command("table2")
def table2(
    budget: Budget = "smoke",
    data_dir: DataDir = None,
    out: Out = _OUT,
    workers: Workers = 2,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Certified accuracy of training by six methods, for data sets and networks."""
    _make("table2", ["table2"], budget, data_dir, out, workers, seed, json)


@papers.command("table3")
def table3(
    budget: Budget = "smoke",
    data_dir: DataDir = None,
    out: Out = _OUT,
    workers: Workers = 2,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Every modified relaxation: trained with, and its three properties."""
    _make("table3", ["table3"], budget, data_dir, out, workers, seed, json)


@papers.command("table4")
def table4(
    budget: Budget = "smoke",
    data_dir: DataDir = None,
    out: Out = _OUT,
    workers: Workers = 2,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Training with loosened Box: omega times F, means over seeds, as a heat map."""
    _make("table4", ["table4"], budget, data_dir, out, workers, seed, json)


@papers.command("properties")
def properties(
    budget: Budget = "smoke",
    data_dir: DataDir = None,
    out: Out = _OUT,
    workers: Workers = 2,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Tightness, continuity and sensitivity of every relaxation, LPs included, on one network."""
    _make("properties", ["properties"], budget, data_dir, out, workers, seed, json)


@papers.command("all")
def everything(
    budget: Budget = "smoke",
    data_dir: DataDir = None,
    out: Out = _OUT,
    workers: Workers = 2,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """All of table1 to table4 and properties, with shared networks and one index.md."""
    from optrelax.papers.plans import TABLES

    _make("all", list(TABLES), budget, data_dir, out, workers, seed, json)


def _make(
    name: str,
    tables: list[str],
    budget: str,
    data_dir: Path | None,
    out: Path,
    workers: int,
    seed: int,
    json: bool,
) -> None:
    """Make the reports; exit code 1 where a row failed. The same command again goes on where it stopped."""
    from optrelax.output.tables import require_writable
    from optrelax.papers.making import make_reports
    from optrelax.papers.plans import plan

    for table in tables:
        plan(table, budget, seed)
    require_writable(out)
    # Folders of this machine mean nothing to a reader.
    data = "" if data_dir is None or budget == "smoke" else " --data-dir DATA"
    first = "" if seed == 0 else f" --seed {seed}"
    shown = f"optrelax paper {name} --budget {budget}{data} --out {out.name} --workers {workers}{first}"
    with report_bar(name) as watch:
        reports = make_reports(
            tables, budget, out, data_dir=data_dir, workers=workers, seed=seed, command=shown, watch=watch
        )
    failed = {row: error for report in reports for row, error in report.failed.items()}
    if json:
        print_json([report.summary() for report in reports])
    else:
        for report in reports:
            stdout().print(f"{report.title}: {report.folder / 'report.html'}", soft_wrap=True, highlight=False)
    if failed:
        row, error = next(iter(failed.items()))
        raise fail(f"{len(failed)} row(s) failed, {row} first: {error}; the reports list them")
