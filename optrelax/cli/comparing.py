"""`optrelax compare`: LP against closed form, and MILP, on one network: bound, certified, time and gap."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from optrelax.cli.application import WorkError, command, print_json, stdout
from optrelax.cli.inputs import (
    BatchSize,
    Checkpoint,
    Clip,
    Data,
    DataDir,
    Device,
    Eps,
    Format,
    Json,
    Milp,
    Model,
    NoClip,
    Norm,
    Out,
    Precision,
    Relaxations,
    Rounding,
    Split,
    TimeLimit,
    option,
    parse_number,
    read_dtype,
    read_inputs,
)

if TYPE_CHECKING:
    from optrelax.certification.comparison import Comparison

__all__ = ["compare", "show_comparison"]

_EXAMPLES = 100  # a comparison of tightness needs no more; layerwise on whole test sets takes hours


@command(
    "compare",
    common=("data_dir", "relaxations", "subset", "out"),
    examples=("optrelax compare runs/demo/box --data digits --eps 0.02 --out runs/compared",),
)
def compare(
    checkpoint: Checkpoint,
    data: Data,
    eps: Eps,
    data_dir: DataDir = None,
    relaxations: Relaxations = ["box", "crown", "triangle", "layerwise"],  # noqa: B006, typer only reads it
    subset: Annotated[
        int | None,
        option("--subset", group="Data", metavar="N", min=1, show_default="100", help="N evenly spaced examples."),
    ] = None,
    everything: Annotated[bool, option("--all", group="Data", help="All examples of the data set.")] = False,
    milp: Milp = False,
    time_limit: TimeLimit = 60.0,
    repeats: Annotated[int, option("--repeats", group="Run", min=1, help="Timed runs, after one that warms up.")] = 3,
    patience: Annotated[
        float, option("--patience", group="Run", metavar="S", min=0, help="Fewer runs where they take longer.")
    ] = 30.0,
    norm: Norm = "linf",
    clip: Clip = (0.0, 1.0),
    no_clip: NoClip = False,
    split: Split = "test",
    model: Model = None,
    precision: Precision = "float64",
    rounding: Rounding = "outward",
    batch_size: BatchSize = None,
    out: Out = None,
    table_format: Format = "parquet",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Compare relaxations on one network: how tight, how many certified, how fast, how far from the LP's optimum.

    All bound the same margins over the same regions. LP layers start from pre-activation bounds of their own, box and
    fast-lin intersected; triangle:preactivation=crown starts from those of crown. --out keeps the table, a table an
    example, and the picture of tightness against time (PNG and SVG).
    """
    from optrelax.output.tables import require_writable

    radius = parse_number("--eps", eps)
    if out is not None:
        require_writable(out)
    inputs = read_inputs(checkpoint, data, data_dir, model=model, device=device, split=split)
    result = _compared(
        inputs.network,
        (inputs.x, inputs.labels),
        radius,
        relaxations,
        clip=None if no_clip else clip,
        norm=norm,
        milp=_milp(time_limit) if milp else False,
        rounding=rounding,
        dtype=read_dtype(precision),
        subset=_count(subset, everything, len(inputs.labels)),
        batch_size=batch_size,
        repeats=repeats,
        patience=patience,
    )
    facts = {"checkpoint": str(checkpoint), "data": inputs.name, "split": split, **result.summary()}
    pictures = [] if out is None else _write(result, facts, out, table_format)
    if json:
        print_json(facts | {"pictures": [str(path) for path in pictures]})
        return
    show_comparison(result, _title(facts))
    for path in pictures:
        stdout().print(f"tightness against time: {path}", markup=False, highlight=False, soft_wrap=True)


def _count(subset: int | None, everything: bool, size: int) -> int | None:
    """Examples to take, None for all."""
    if everything:
        if subset is not None:
            raise ValueError("--subset and --all exclude each other")
        return None
    return min(_EXAMPLES, size) if subset is None else subset


def _compared(network: Any, data: Any, eps: float, relaxations: list[str], **options: Any) -> Comparison:
    """The work itself, under a bar."""
    import optrelax as ox
    from optrelax.cli.progress_bars import comparison_bar

    with comparison_bar("compare") as progress:
        return ox.compare(network, data, eps, relaxations, progress=progress, **options)


def show_comparison(result: Comparison, title: str) -> None:
    """The table for people, and what its columns mean."""
    from optrelax.certification.comparison import DECIMALS
    from optrelax.output.tables import rich_table

    console = stdout()
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(rich_table(result.shown(), decimals=DECIMALS))
    console.print(result.legend, markup=False, highlight=False, soft_wrap=True)


def _title(facts: Mapping[str, Any]) -> str:
    clip = facts["clip"]
    within = f"pixels in [{clip[0]:g}, {clip[1]:g}]" if clip else "pixels unlimited"
    return (
        f"{facts['checkpoint']} on {facts['data']}: {facts['examples']} examples, accuracy "
        f"{100 * facts['accuracy']:.2f} %, {facts['norm']} eps {facts['eps']:g}, {within}, {facts['dtype']}"
    )


def _write(result: Comparison, facts: Mapping[str, Any], folder: Path, ending: str) -> list[Path]:
    """Tables, summary and picture; returns the paths of the picture."""
    from optrelax.output.plots import write_figure
    from optrelax.output.tables import write_frame, write_json
    from optrelax.training.runs import versions

    write_frame(result.table, folder / f"table.{ending}")
    write_frame(result.examples, folder / f"examples.{ending}")
    write_json({**facts, "versions": versions()}, folder / "summary.json")
    if not result.table["mean bound"].is_finite().any():
        raise WorkError("compare: no relaxation has a finite mean bound, so there is nothing to draw")
    title = f"network {Path(facts['checkpoint']).stem}, data {facts['data']}, eps {facts['eps']:g}"
    return write_figure(result.figure(title), folder / "tightness.png")


def _milp(time_limit: float) -> Any:
    from optrelax.layers.milp import Milp

    return Milp(time_limit=time_limit)
