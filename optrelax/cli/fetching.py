"""`optrelax data`: the data sets, and their files from where they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optrelax.cli.application import command, print_json, say, show_table
from optrelax.cli.options import DataDir, Json, option

__all__ = ["data"]


@command(
    "data",
    common=("to",),
    examples=("optrelax data", "optrelax data mnist --to DATA"),
)
def data(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", rich_help_panel="Data", help="Of a data set; none lists them all.")
    ] = None,
    to: Annotated[
        Path | None, option("--to", group="Data", metavar="DIR", show_default="none", help="Where to put its files.")
    ] = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """List the data sets, or fetch the files of one into DIR/NAME.

    Every file is compared with its published SHA-256, one that is there already too; nothing is unpickled or run.
    Where nothing may be fetched, the error says what to put where by hand.
    """
    if name is not None and to is not None:
        _fetch(name, to, json)
    elif name is None and to is None:
        _list(data_dir, json)
    else:
        raise ValueError("data: NAME and --to DIR fetch a data set; neither lists all")


def _fetch(name: str, to: Path, json: bool) -> None:
    from optrelax.cli.progress_bars import fetching_bar
    from optrelax.data.datasets import fetch_dataset

    with fetching_bar(name) as progress:
        done = fetch_dataset(name, to, progress)
    if json:
        print_json({"name": name, "files": done})
        return
    say(*(f"{path}: {what}" for path, what in done.items()))
    advice = f"--data {name} --data-dir {to}" if done else f"--data {name}; its files come with scikit-learn"
    say(f"To use it: {advice}")


def _list(data_dir: Path | None, json: bool) -> None:
    import polars as pl

    from optrelax.data.datasets import overview

    rows = overview(data_dir)
    if json:
        print_json(rows)
        return
    show_table(pl.DataFrame(rows))
    say("optrelax data NAME --to DIR fetches one.")
