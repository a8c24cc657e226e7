"""`optrelax sweep`: many training runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from optrelax.cli.application import command, fail, print_json, show_table
from optrelax.cli.options import DataDir, Json, option
from optrelax.cli.progress_bars import sweep_bar

if TYPE_CHECKING:
    import polars as pl

__all__ = ["sweep"]


@command(
    "sweep",
    common=("seeds", "settings", "budget", "data_dir", "out", "workers"),
    examples=(
        "optrelax sweep digits-fc-small-box digits-fc-small-crown --seeds 0 1",
        "optrelax sweep digits-fc-small-box --settings eps=0.02,0.05 --workers 2",
    ),
)
def sweep(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE...", rich_help_panel="Recipe", help="`optrelax train --list` shows all."),
    ],
    seeds: Annotated[list[int], option("--seeds", group="Recipe", help="One run each.")] = [0],  # noqa: B006, typer only reads it
    settings: Annotated[
        list[str],
        option("--settings", group="Recipe", metavar="NAME=V,V", help="Of the recipes, such as eps=0.1,0.3."),
    ] = [],  # noqa: B006
    budget: Annotated[
        Literal["full", "cpu", "smoke"], option("--budget", group="Recipe", metavar="SIZE", help="full, cpu or smoke.")
    ] = "full",
    data_dir: DataDir = None,
    out: Annotated[Path, option("--out", group="Output", metavar="DIR", help="A folder a run, and sweep.csv.")] = Path(
        "runs/sweep"
    ),
    workers: Annotated[int, option("--workers", group="Run", min=1, help="Runs at the same time.")] = 2,
    threads: Annotated[int, option("--threads", group="Run", min=1, help="Of each; they decide its last bits.")] = 1,
    cluster: Annotated[
        Literal["local", "slurm"], option("--cluster", group="Run", metavar="WHERE", help="local or slurm.")
    ] = "local",
    partition: Annotated[str | None, option("--partition", group="Run", help="Of the SLURM cluster.")] = None,
    json: Json = False,
) -> None:
    """Train every combination of recipes, seeds and settings, several at once; the same call again goes on.

    A run that is lost with its worker is started again where it stopped, twice at most. Needs submitit:
    pip install 'optrelax[sweep]'.
    """
    from optrelax.output.tables import require_writable
    from optrelax.training.sweeps import Sweep, run_sweep

    made = Sweep(recipes=tuple(recipes), seeds=tuple(seeds), settings=_settings(settings), budget=budget)
    require_writable(out)
    options: dict[str, object] = {} if partition is None else {"slurm_partition": partition}
    with sweep_bar(f"{len(made.runs())} runs") as watch:
        table = run_sweep(
            made,
            out,
            data_dir=data_dir,
            workers=workers,
            threads=threads,
            cluster=cluster,
            options=options,
            watch=watch,
        )
    _show(table, json)
    if failed := table["error"].is_not_null().sum():
        raise fail(f"{failed} of {table.height} runs failed; see sweep.csv and the logs in {out / 'jobs'}")


def _show(table: pl.DataFrame, json: bool) -> None:
    """A row a run."""
    if json:
        print_json(table.to_dicts())
        return
    shown = table if table["error"].is_not_null().any() else table.drop("error")
    decimals = {"loss": 4, "accuracy %": 2, "robust %": 2, "seconds": 0}
    show_table(shown.drop("recipe", "seed"), decimals)


def _settings(given: list[str]) -> dict[str, tuple[object, ...]]:
    """{"eps": (0.1, 0.3)} from ["eps=0.1,0.3"]."""
    found: dict[str, tuple[object, ...]] = {}
    for item in given:
        name, equals, values = item.partition("=")
        if not (equals and name and values):
            raise ValueError(f"--settings must be NAME=VALUE,VALUE..., got {item!r}")
        found[name] = tuple(_value(value) for value in values.split(","))
    return found


def _value(text: str) -> object:
    """A number, a fraction such as 8/255, true or false, or the word itself."""
    if text in ("true", "false"):
        return text == "true"
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if slash else int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text
