"""`optrelax measure`: tightness of relaxations on a fixed network, and what they make of the loss in weight space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optrelax.cli.application import app, command, print_json, stdout
from optrelax.cli.inputs import (
    Checkpoint,
    Data,
    DataDir,
    Device,
    Json,
    Model,
    Relaxations,
    Seed,
    parse_number,
    read_dtype,
    read_inputs,
)

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

__all__ = ["continuity", "tightness"]

measures = typer.Typer(help="Tightness, continuity, sensitivity and loss landscape.", no_args_is_help=True)
app.add_typer(measures, name="measure")

Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", show_default=False, help="Folder for tables, summary and pictures."),
]
Format = Annotated[str, typer.Option("--format", help="Of the tables in DIR: csv, json or parquet.")]
Clip = Annotated[tuple[float, float], typer.Option("--clip", metavar="LOW HIGH", help="Legal range of a pixel.")]
NoClip = Annotated[bool, typer.Option("--no-clip", help="Pixels may take any value.")]
Split = Annotated[str, typer.Option("--split", help="Which part of the data set: test or train.")]
Precision = Annotated[str, typer.Option("--precision", help="Of the bounds: float64 or float32.")]


@measures.callback()
def _measures() -> None:
    """The properties of a relaxation that shape certified training (arXiv 2102.06700), on any network."""


@command("tightness", measures)
def tightness(
    checkpoint: Checkpoint,
    data: Data,
    data_dir: DataDir = None,
    relaxations: Relaxations = ["box", "hbox", "crown-ibp", "deepz", "crown"],  # noqa: B006, typer only reads it
    subset: Annotated[int, typer.Option("--subset", metavar="N", min=1, help="N evenly spaced examples.")] = 100,
    limit: Annotated[
        str | None,
        typer.Option("--limit", show_default="width of --clip", help="Largest eps, in units of the pixels; 8/255."),
    ] = None,
    resolution: Annotated[
        float, typer.Option("--resolution", help="Width to which each radius is found, in units of the pixels.")
    ] = 1e-4,
    points: Annotated[
        int, typer.Option("--points", min=1, help="Radii tried an example, where bounds are not monotone in eps.")
    ] = 64,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="EPS",
            show_default="median attacked radius",
            help="Where gap (logits) and propagation tightness (%) are measured.",
        ),
    ] = None,
    milp: Annotated[
        bool, typer.Option("--milp", help="The exact radii too, by a MILP solver (HiGHS); small networks.")
    ] = False,
    time_limit: Annotated[
        float, typer.Option("--time-limit", metavar="S", min=0.001, help="Seconds a MILP question.")
    ] = 60.0,
    rounding: Annotated[
        str, typer.Option("--rounding", help="nearest: as in training; outward: bounds hold in real arithmetic.")
    ] = "nearest",
    confidence: Annotated[float, typer.Option("--confidence", help="Of the interval over examples.")] = 0.95,
    clip: Clip = (0.0, 1.0),
    no_clip: NoClip = False,
    split: Split = "test",
    model: Model = None,
    precision: Precision = "float64",
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, show_default="by the network", help="Examples at a time.")
    ] = None,
    out: Out = None,
    table_format: Format = "csv",
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Certified robustness against eps on a fixed network: the area under each relaxation's curve, times 100.

    Each example's largest certified eps is found by bisection or, where bounds are not monotone in eps, by a scan;
    the area is their mean. Interval: bootstrap over examples. --out keeps tables and the curves (PNG and SVG).
    """
    import optrelax as ox

    numbers = {
        name: None if text is None else parse_number(f"--{name}", text) for name, text in (("limit", limit), ("at", at))
    }
    if rounding not in ("outward", "nearest"):
        raise ValueError(f"--rounding must be outward or nearest, got {rounding!r}")
    folder = _Folder.opened(out, table_format)
    inputs = read_inputs(checkpoint, data, data_dir, model=model, device=device, split=split)
    with _bar("tightness") as progress:
        result = ox.measure_tightness(
            inputs.network,
            (inputs.x, inputs.labels),
            relaxations,
            clip=None if no_clip else clip,
            resolution=resolution,
            points=points,
            milp=_milp(time_limit) if milp else False,
            rounding=rounding,  # type: ignore[arg-type]
            dtype=read_dtype(precision),
            subset=min(subset, len(inputs.labels)),
            batch_size=batch_size,
            confidence=confidence,
            seed=seed,
            progress=progress,
            **numbers,
        )
    facts = {"checkpoint": str(checkpoint), "data": inputs.name, "split": split, **result.summary()}
    title = f"{Path(checkpoint).stem} on {inputs.name}, {result.examples.height} examples"
    pictures = folder.write(
        {"table": result.table, "examples": result.examples}, facts, {"tightness": result.figure(title)}
    )
    shown = result.table.rename({"area": "area × 100"})
    decimals = {"area × 100": 2, "low": 2, "high": 2, "median radius": 4, "gap": 3, "propagation %": 1, "bounds": 1}
    notes = [
        f"low, high: {100 * confidence:g} % interval of the area over examples; radii within {resolution:g}",
        f"gap (logits) and propagation tightness at eps {result.settings['at']:.4g}",
    ]
    _show(facts, shown, decimals, title, notes, pictures, json)


Eps = Annotated[str, typer.Option("--eps", help="Radius in the maximum norm, in units of the pixels; 0.1 or 8/255.")]


@command("continuity", measures)
def continuity(
    checkpoint: Checkpoint,
    data: Data,
    eps: Eps,
    data_dir: DataDir = None,
    relaxations: Relaxations = ["box", "hbox", "crown-ibp", "deepz", "crown"],  # noqa: B006, typer only reads it
    direction: Annotated[
        str, typer.Option("--direction", help="gradient: down each relaxation's own certified loss; or random.")
    ] = "gradient",
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="CHECKPOINT", show_default=False, help="One line to this network instead."),
    ] = None,
    length: Annotated[
        float | None,
        typer.Option("--length", show_default="0.01, or all the way", help="Of a line, in norms of all weights."),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", min=1, help="Each with examples of its own.")] = 4,
    examples: Annotated[int, typer.Option("--examples", min=1, help="A line, evenly spaced in the data.")] = 4,
    least: Annotated[
        float, typer.Option("--least", help="Smallest jump that counts, times max(1, |value|), in logits.")
    ] = 1e-9,
    cells: Annotated[int, typer.Option("--cells", min=1, help="Of the grid that begins each search.")] = 32,
    budget: Annotated[int, typer.Option("--budget", min=1, help="Evaluations a line at most.")] = 20000,
    clip: Clip = (0.0, 1.0),
    no_clip: NoClip = False,
    split: Split = "test",
    model: Model = None,
    out: Out = None,
    table_format: Format = "csv",
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Jumps of bounds and of the certified loss as the weights move along lines: number and size per unit length.

    Every event at which a relaxation can switch is located and closed in on to floating-point resolution, in float64.
    A unit of length is the norm of all weights. --out keeps jumps, lines, and the loss with its jumps (PNG and SVG).
    """
    import optrelax as ox
    from optrelax.checkpoint_files import read_network

    radius = parse_number("--eps", eps)
    if direction not in ("gradient", "random"):
        raise ValueError(f"--direction must be gradient or random, got {direction!r}")
    folder = _Folder.opened(out, table_format)
    inputs = read_inputs(checkpoint, data, data_dir, model=model, device=device, split=split)
    way: Any = direction
    if to is not None:
        shape = tuple(inputs.x.shape[1:])
        way = read_network(to, model=model, input_shape=shape, classes=inputs.classes, device=device)
    with _bar("continuity") as progress:
        result = ox.measure_continuity(
            inputs.network,
            (inputs.x, inputs.labels),
            radius,
            relaxations,
            direction=way,
            length=length,
            lines=lines,
            examples=examples,
            clip=None if no_clip else clip,
            least=least,
            cells=cells,
            budget=budget,
            seed=seed,
            progress=progress,
        )
    facts = {"checkpoint": str(checkpoint), "to": None if to is None else str(to), "data": inputs.name, "split": split}
    facts |= result.summary()
    title = f"{Path(checkpoint).stem} on {inputs.name}, eps {radius:g}, direction: {direction if to is None else to}"
    pictures = folder.write(
        {"table": result.table, "jumps": result.jumps, "lines": result.lines},
        facts,
        {f"line{i}": result.figure(title, i) for i in range(1 if to is not None else lines)} if out else {},
    )
    columns = ["relaxation", "bound jumps", "loss jumps", "loss / unit", "mean loss", "largest loss", "travel"]
    columns += ["causes", "listed", "verdict"]
    notes = [
        f"{lines if to is None else 1} line(s), {result.table['length'][0]:.3g} norms of the weights in all; "
        "sizes in units of the loss; travel: share of its total variation that jumps make",
        "causes are of a ReLU: l, u the bounds of a pre-activation; listed: where arXiv 2102.06700 expects jumps",
    ]
    if not result.table["complete"].all():
        notes.append("a line ended at its --budget: counts are lower bounds")
    _show(facts, result.table.select(columns), {"loss / unit": 0}, title, notes, pictures, json)


@dataclass(frozen=True, slots=True)
class _Folder:
    """Where results go, if anywhere."""

    path: Path | None
    ending: str

    @classmethod
    def opened(cls, path: Path | None, ending: str) -> _Folder:
        """Check everything about the output before the work starts."""
        from optrelax.errors import suggest
        from optrelax.tables import FORMATS, require_writable

        if ending not in FORMATS:
            raise ValueError(f"--format: unknown format {ending!r}; {suggest(ending, FORMATS)}")
        return cls(None if path is None else require_writable(path), ending)

    def write(
        self, frames: Mapping[str, pl.DataFrame], facts: Mapping[str, Any], figures: Mapping[str, Figure]
    ) -> list[Path]:
        """Tables, summary and pictures; returns the paths of the pictures."""
        from optrelax.plots import write_figure
        from optrelax.runs import versions
        from optrelax.tables import write_frame, write_json

        if self.path is None:
            return []
        for name, frame in frames.items():
            write_frame(frame, self.path / f"{name}.{self.ending}")
        write_json({**facts, "versions": versions()}, self.path / "summary.json")
        return [path for name, figure in figures.items() for path in write_figure(figure, self.path / f"{name}.png")]


def _show(
    facts: Mapping[str, Any],
    table: pl.DataFrame,
    decimals: Mapping[str, int],
    title: str,
    notes: list[str],
    pictures: list[Path],
    json: bool,
) -> None:
    """JSON for programs; the table, what its columns mean and where the pictures lie for people."""
    from optrelax.tables import rich_table

    if json:
        print_json({**facts, "pictures": [str(path) for path in pictures]})
        return
    console = stdout()
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(rich_table(table, decimals=decimals))
    for line in [*notes, *(f"picture: {path}" for path in pictures)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _bar(title: str) -> Any:
    from optrelax.cli.progress_bars import measurement_bar

    return measurement_bar(title)


def _milp(time_limit: float) -> Any:
    from optrelax.layers.milp import Milp

    return Milp(time_limit=time_limit)
