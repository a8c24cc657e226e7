"""Options that several commands take: each once, with its group in the help, its units and what it names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

__all__ = [
    "BatchSize",
    "Checkpoint",
    "Data",
    "DataDir",
    "Device",
    "Format",
    "Json",
    "Model",
    "Out",
    "Precision",
    "Relaxations",
    "Rounding",
    "Seed",
    "Subset",
    "option",
]


def option(*names: str, group: str, **settings: Any) -> Any:
    """An option in a group of the help."""
    return typer.Option(*names, rich_help_panel=group, **settings)


Checkpoint = Annotated[
    Path,
    typer.Argument(
        rich_help_panel="Network",
        help="Run folder, safetensors, ONNX, state_dict or npz.",
    ),
]
Model = Annotated[
    str | None,
    option("--model", group="Network", metavar="NAME", help="For a state_dict: conv, or module:function."),
]
Data = Annotated[
    str,
    option("--data", group="Data", metavar="NAME", help="Such as mnist, or FILE.npz of x, labels."),
]
DataDir = Annotated[
    Path | None,
    option("--data-dir", group="Data", metavar="DIR", envvar="OPTRELAX_DATA", help="Of the files; or OPTRELAX_DATA."),
]
Subset = Annotated[
    int | None,
    option("--subset", group="Data", metavar="N", min=1, show_default="all", help="N evenly spaced examples."),
]
Relaxations = Annotated[
    list[str],
    option(
        "--relaxation",
        "--relaxations",
        group="Bound",
        metavar="NAME",
        help="`optrelax relaxations` lists them.",
    ),
]
Precision = Annotated[
    Literal["float64", "float32"],
    option("--precision", group="Bound", metavar="TYPE", help="float64 or float32."),
]
Rounding = Annotated[
    Literal["outward", "nearest"],
    option("--rounding", group="Bound", metavar="WAY", help="outward (real arithmetic) or nearest."),
]
BatchSize = Annotated[
    int | None,
    option("--batch-size", group="Run", min=1, show_default="by the network", help="Examples at a time."),
]
Out = Annotated[Path | None, option("--out", group="Output", metavar="DIR", help="Keep tables, summary, pictures.")]
Format = Annotated[
    Literal["csv", "json", "parquet"],
    option("--format", group="Output", metavar="KIND", help="Of DIR's tables: csv, json, parquet."),
]
Json = Annotated[bool, option("--json", group="Output", help="JSON on standard output, nothing else.")]
Seed = Annotated[int, option("--seed", group="Run", min=0, help="Of everything random.")]
Device = Annotated[str, option("--device", group="Run", metavar="NAME", help="cpu, cuda or cuda:1.")]
