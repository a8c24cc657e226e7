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

__all__ = [
    "Clip",
    "Eps",
    "Folder",
    "Format",
    "NoClip",
    "Out",
    "Split",
    "bar",
    "continuity",
    "landscape",
    "measures",
    "sensitivity",
    "show_measured",
    "tightness",
]

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

    largest = None if limit is None else parse_number("--limit", limit)
    where = None if at is None else parse_number("--at", at)
    if rounding not in ("outward", "nearest"):
        raise ValueError(f"--rounding must be outward or nearest, got {rounding!r}")
    folder = Folder.opened(out, table_format)
    inputs = read_inputs(checkpoint, data, data_dir, model=model, device=device, split=split)
    with bar("tightness") as progress:
        result = ox.measure_tightness(
            inputs.network,
            (inputs.x, inputs.labels),
            relaxations,
            clip=None if no_clip else clip,
            limit=largest,
            resolution=resolution,
            points=points,
            at=where,
            milp=_milp(time_limit) if milp else False,
            rounding=rounding,  # type: ignore[arg-type]
            dtype=read_dtype(precision),
            subset=min(subset, len(inputs.labels)),
            batch_size=batch_size,
            confidence=confidence,
            seed=seed,
            progress=progress,
        )
    facts = {"checkpoint": str(checkpoint), "data": inputs.name, "split": split, **result.summary()}
    title = f"{Path(checkpoint).stem} on {inputs.name}, {result.examples.height} examples"
    pictures = folder.write(
        {"table": result.table, "examples": result.examples}, facts, {"tightness": result.figure(title)} if out else {}
    )
    shown = result.table.rename({"area": "area × 100"})
    decimals = {"area × 100": 2, "low": 2, "high": 2, "median radius": 4, "gap": 3, "propagation %": 1, "bounds": 1}
    notes = [
        f"low, high: {100 * confidence:g} % interval of the area over examples; radii within {resolution:g}",
        f"gap (logits) and propagation tightness at eps {result.settings['at']:.4g}",
    ]
    show_measured(facts, shown, decimals, title, notes, pictures, json)


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
        typer.Option(
            "--length",
            show_default="0.01, or all the way",
            help="Of a line, in norms of all weights; with --to, the share of the way.",
        ),
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
    from optrelax.networks.checkpoint_files import read_network

    radius = parse_number("--eps", eps)
    if direction not in ("gradient", "random"):
        raise ValueError(f"--direction must be gradient or random, got {direction!r}")
    folder = Folder.opened(out, table_format)
    inputs = read_inputs(checkpoint, data, data_dir, model=model, device=device, split=split)
    way: Any = direction
    if to is not None:
        shape = tuple(inputs.x.shape[1:])
        way = read_network(to, model=model, input_shape=shape, classes=inputs.classes, device=device)
    with bar("continuity") as progress:
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
    columns = ["relaxation", "bound jumps", "loss jumps", "bound / unit", "loss / unit", "largest bound"]
    columns += ["largest loss", "travel", "causes", "listed", "verdict"]
    notes = [
        f"{lines if to is None else 1} line(s), {result.table['length'][0]:.3g} norms of the weights in all; "
        "sizes of jumps in logits and in the loss; travel: share of the loss's total variation that jumps make",
        "causes are of a ReLU: l, u the bounds of a pre-activation; listed: where arXiv 2102.06700 expects jumps",
    ]
    if not result.table["complete"].all():
        notes.append("a line ended at its --budget: counts are lower bounds")
    decimals = {"bound / unit": 0, "loss / unit": 0}
    show_measured(facts, result.table.select(columns), decimals, title, notes, pictures, json)


@command("sensitivity", measures)
def sensitivity(
    checkpoint: Checkpoint,
    data: Data,
    eps: Eps,
    data_dir: DataDir = None,
    relaxations: Relaxations = ["box", "hbox", "crown-ibp", "deepz", "crown"],  # noqa: B006, typer only reads it
    steps: Annotated[
        list[float], typer.Option("--steps", metavar="SIZE", help="Shares of each weight tensor's norm; several.")
    ] = [1e-4, 1e-3, 1e-2],  # noqa: B006, typer only reads it
    draws: Annotated[int, typer.Option("--draws", min=1, help="Of the random direction.")] = 8,
    ascent: Annotated[int, typer.Option("--ascent", min=1, help="Sub-steps of the adversarial step.")] = 5,
    examples: Annotated[int, typer.Option("--examples", min=1, help="Evenly spaced in the data.")] = 16,
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
    """Change of the certified loss and of its gradient under small steps of the weights, relative to their size.

    Random steps, adversarial ones (up the loss) and straight ones down the gradient; local Lipschitz constants are
    per norm of the weights. Small networks also get the degrees of the bound as a rational function of a step.
    """
    import optrelax as ox

    radius = parse_number("--eps", eps)
    folder = Folder.opened(out, table_format)
    inputs = read_inputs(checkpoint, data, data_dir, model=model, device=device, split=split)
    with bar("sensitivity") as progress:
        result = ox.measure_sensitivity(
            inputs.network,
            (inputs.x, inputs.labels),
            radius,
            relaxations,
            steps=steps,
            draws=draws,
            ascent=ascent,
            examples=examples,
            clip=None if no_clip else clip,
            seed=seed,
            progress=progress,
        )
    facts = {"checkpoint": str(checkpoint), "data": inputs.name, "split": split, **result.summary()}
    title = f"{Path(checkpoint).stem} on {inputs.name}, {examples} examples, eps {radius:g}"
    pictures = folder.write({"table": result.table}, facts, {"sensitivity": result.figure(title)} if out else {})
    columns = ["relaxation", "kind", "step", "loss", "relative change", "bound change", "gradient change"]
    columns += ["predicted", "agreement", "loss Lipschitz", "gradient Lipschitz"]
    notes = [
        "changes: to the loss, of the mean smallest margin's bound in logits, and to the norm of the loss's gradient; "
        "Lipschitz constants per norm of the weights",
        "a small loss is nearly exp(-margin), so its relative change grows with margins: compare bounds, or losses of "
        "like size",
    ]
    known = [f"{name} {pair[0]}/{pair[1]}" for name, pair in result.settings["degrees"].items() if pair is not None]
    if known:
        notes.append(f"degrees along a line in weight space (numerator/denominator, at most): {', '.join(known)}")
    show_measured(facts, result.table.select(columns), {}, title, notes, pictures, json)


@command("landscape", measures)
def landscape(
    checkpoint: Checkpoint,
    data: Data,
    eps: Eps,
    data_dir: DataDir = None,
    relaxations: Relaxations = ["box", "hbox", "crown-ibp", "deepz", "crown"],  # noqa: B006, typer only reads it
    dimensions: Annotated[int, typer.Option("--dimensions", min=1, max=2, help="1: a line; 2: a plane.")] = 2,
    radius: Annotated[
        float, typer.Option("--radius", help="Largest step either way; 1 is as large as the weights, filter by filter.")
    ] = 0.5,
    points: Annotated[int, typer.Option("--points", min=3, help="Along each direction, odd.")] = 21,
    examples: Annotated[int, typer.Option("--examples", min=1, help="Evenly spaced in the data.")] = 16,
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
    """The certified loss around a checkpoint, along random filter-normalised directions, on one scale.

    All relaxations see the same directions and examples. --out keeps the points and the picture (PNG and SVG).
    """
    import optrelax as ox

    ball = parse_number("--eps", eps)
    folder = Folder.opened(out, table_format)
    inputs = read_inputs(checkpoint, data, data_dir, model=model, device=device, split=split)
    with bar("landscape") as progress:
        result = ox.measure_landscape(
            inputs.network,
            (inputs.x, inputs.labels),
            ball,
            relaxations,
            dimensions=dimensions,
            radius=radius,
            points=points,
            examples=examples,
            clip=None if no_clip else clip,
            seed=seed,
            progress=progress,
        )
    facts = {"checkpoint": str(checkpoint), "data": inputs.name, "split": split, **result.summary()}
    title = f"{Path(checkpoint).stem} on {inputs.name}, {examples} examples, eps {ball:g}"
    table = result.table()
    pictures = folder.write(
        {"table": table, "points": result.points}, facts, {"landscape": result.figure(title)} if out else {}
    )
    notes = ["loss at the network itself, least and greatest of the slice; roughness: second to first differences"]
    show_measured(facts, table, {}, title, notes, pictures, json)


@dataclass(frozen=True, slots=True)
class Folder:
    """Where results go, if anywhere."""

    path: Path | None
    ending: str

    @classmethod
    def opened(cls, path: Path | None, ending: str) -> Folder:
        """Check everything about the output before the work starts."""
        from optrelax.errors import suggest
        from optrelax.output.tables import FORMATS, require_writable

        if ending not in FORMATS:
            raise ValueError(f"--format: unknown format {ending!r}; {suggest(ending, FORMATS)}")
        return cls(None if path is None else require_writable(path), ending)

    def write(
        self, frames: Mapping[str, pl.DataFrame], facts: Mapping[str, Any], figures: Mapping[str, Figure]
    ) -> list[Path]:
        """Tables, summary and pictures; returns the paths of the pictures."""
        from optrelax.output.plots import write_figure
        from optrelax.output.tables import write_frame, write_json
        from optrelax.training.runs import versions

        if self.path is None:
            return []
        for name, frame in frames.items():
            write_frame(frame, self.path / f"{name}.{self.ending}")
        write_json({**facts, "versions": versions()}, self.path / "summary.json")
        return [path for name, figure in figures.items() for path in write_figure(figure, self.path / f"{name}.png")]


def show_measured(
    facts: Mapping[str, Any],
    table: pl.DataFrame,
    decimals: Mapping[str, int],
    title: str,
    notes: list[str],
    pictures: list[Path],
    json: bool,
) -> None:
    """JSON for programs; the table, what its columns mean and where the pictures lie for people."""
    from optrelax.output.tables import rich_table

    if json:
        print_json({**facts, "pictures": [str(path) for path in pictures]})
        return
    console = stdout()
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(rich_table(table, decimals=decimals))
    for line in [*notes, *(f"picture: {path}" for path in pictures)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def bar(title: str) -> Any:
    """A progress bar for a measurement."""
    from optrelax.cli.progress_bars import measurement_bar

    return measurement_bar(title)


def _milp(time_limit: float) -> Any:
    from optrelax.layers.milp import Milp

    return Milp(time_limit=time_limit)
