"""`optrelax paper`: the published tables, measured again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optrelax.cli.application import app, print_json, stderr, stdout
from optrelax.cli.inputs import DataDir, Json, Subset

if TYPE_CHECKING:
    from optrelax.barrier import BarrierRow, Batch

__all__ = ["barrier"]

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
    from optrelax.barrier import ROWS, barrier_frame, run_barrier
    from optrelax.errors import suggest
    from optrelax.tables import require_writable, rich_table, write_frame

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
