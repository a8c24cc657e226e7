"""`optrelax measure`: tightness of relaxations on a fixed network, and what they make of the loss in weight space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from optrelax.cli.application import Group, app, command, print_json, stdout
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
    Out,
    Precision,
    Relaxations,
    Rounding,
    Seed,
    Split,
    TimeLimit,
    option,
    parse_number,
    read_dtype,
    read_inputs,
)

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

__all__ = [
    "Cells",
    "Examples",
    "Least",
    "LineBudget",
    "Lines",
    "ResultFolder",
    "bar",
    "continuity",
    "landscape",
    "measures",
    "sensitivity",
    "show_measured",
    "tightness",
]

measures = typer.Typer(help="Tightness, continuity, sensitivity and loss landscape.", cls=Group, no_args_is_help=True)
app.add_typer(measures, name="measure")

# What lines in weight space are asked by, here and for a series of checkpoints.
Lines = Annotated[int, option("--lines", group="Lines", min=1, help="Each with examples of its own.")]
Examples = Annotated[int, option("--examples", group="Measure", min=1, help="Evenly spaced in the data.")]
Least = Annotated[float, option("--least", group="Lines", help="Least jump counted, times max(1, |value|).")]
Cells = Annotated[int, option("--cells", group="Lines", min=1, help="Of the grid that begins a search.")]
LineBudget = Annotated[int, option("--budget", group="Lines", min=1, help="Evaluations a line at most.")]


@measures.callback()
def _measures() -> None:
    """The properties of a relaxation that shape certified training (arXiv 2102.06700), on any network."""


@command(
    "tightness",
    measures,
    common=("data_dir", "relaxations", "subset", "out"),
    examples=("optrelax measure tightness runs/demo/box --data digits --out runs/tightness",),
)
def tightness(
    checkpoint: Checkpoint,
    data: Data,
    data_dir: DataDir = None,
    relaxations: Relaxations = ["box", "hbox", "crown-ibp", "deepz", "crown"],  # noqa: B006, typer only reads it
    subset: Annotated[
        int, option("--subset", group="Data", metavar="N", min=1, help="N evenly spaced examples.")
    ] = 100,
    limit: Annotated[
        str | None,
        option("--limit", group="Region", metavar="X", show_default="width of --clip", help="Largest eps."),
    ] = None,
    resolution: Annotated[float, option("--resolution", group="Measure", help="Width of a radius found.")] = 1e-4,
    points: Annotated[int, option("--points", group="Measure", min=1, help="Radii tried, where not monotone.")] = 64,
    at: Annotated[
        str | None,
        option("--at", group="Measure", metavar="EPS", show_default="median attacked", help="Where gaps are measured."),
    ] = None,
    milp: Milp = False,
    time_limit: TimeLimit = 60.0,
    rounding: Rounding = "nearest",
    confidence: Annotated[float, option("--confidence", group="Measure", help="Of the interval over examples.")] = 0.95,
    clip: Clip = (0.0, 1.0),
    no_clip: NoClip = False,
    split: Split = "test",
    model: Model = None,
    precision: Precision = "float64",
    batch_size: BatchSize = None,
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
    folder = ResultFolder.opened(out, table_format)
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
            rounding=rounding,
            dtype=read_dtype(precision),
            subset=min(subset, len(inputs.labels)),
            batch_size=batch_size,
            confidence=confidence,
            seed=seed,
            progress=progress,
        )
    facts = {"checkpoint": str(checkpoint), "data": inputs.name, "split": split, **result.summary()}
    title = f"network {Path(checkpoint).stem}, data {inputs.name}, {result.examples.height} examples"
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


@command(
    "continuity",
    measures,
    common=("data_dir", "relaxations", "out"),
    examples=("optrelax measure continuity runs/demo/box --data digits --eps 0.02",),
)
def continuity(
    checkpoint: Checkpoint,
    data: Data,
    eps: Eps,
    data_dir: DataDir = None,
    relaxations: Relaxations = ["box", "hbox", "crown-ibp", "deepz", "crown"],  # noqa: B006, typer only reads it
    direction: Annotated[
        Literal["gradient", "random"],
        option("--direction", group="Lines", metavar="WAY", help="gradient (down the loss) or random."),
    ] = "gradient",
    to: Annotated[
        Path | None, option("--to", group="Lines", metavar="CHECKPOINT", help="One line to this network.")
    ] = None,
    length: Annotated[
        float | None,
        option("--length", group="Lines", show_default="0.01, or all the way", help="In norms of the weights."),
    ] = None,
    lines: Lines = 4,
    examples: Examples = 4,
    least: Least = 1e-9,
    cells: Cells = 32,
    budget: LineBudget = 20000,
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
    folder = ResultFolder.opened(out, table_format)
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
    along = direction if to is None else to
    title = f"network {Path(checkpoint).stem}, data {inputs.name}, eps {radius:g}, direction: {along}"
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


@command(
    "sensitivity",
    measures,
    common=("data_dir", "relaxations", "out"),
    examples=("optrelax measure sensitivity runs/demo/box --data digits --eps 0.02",),
)
def sensitivity(
    checkpoint: Checkpoint,
    data: Data,
    eps: Eps,
    data_dir: DataDir = None,
    relaxations: Relaxations = ["box", "hbox", "crown-ibp", "deepz", "crown"],  # noqa: B006, typer only reads it
    steps: Annotated[
        list[float], option("--steps", group="Measure", metavar="SIZE", help="Shares of each weight's norm.")
    ] = [1e-4, 1e-3, 1e-2],  # noqa: B006, typer only reads it
    draws: Annotated[int, option("--draws", group="Measure", min=1, help="Of the random direction.")] = 8,
    ascent: Annotated[int, option("--ascent", group="Measure", min=1, help="Sub-steps of the adversarial step.")] = 5,
    examples: Examples = 16,
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
    folder = ResultFolder.opened(out, table_format)
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
    title = f"network {Path(checkpoint).stem}, data {inputs.name}, {examples} examples, eps {radius:g}"
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


@command(
    "landscape",
    measures,
    common=("data_dir", "relaxations", "out"),
    examples=("optrelax measure landscape runs/demo/box --data digits --eps 0.02 --out runs/landscape",),
)
def landscape(
    checkpoint: Checkpoint,
    data: Data,
    eps: Eps,
    data_dir: DataDir = None,
    relaxations: Relaxations = ["box", "hbox", "crown-ibp", "deepz", "crown"],  # noqa: B006, typer only reads it
    dimensions: Annotated[
        int, option("--dimensions", group="Measure", min=1, max=2, help="1: a line; 2: a plane.")
    ] = 2,
    radius: Annotated[
        float, option("--radius", group="Measure", help="Largest step; 1: as large as the weights.")
    ] = 0.5,
    points: Annotated[int, option("--points", group="Measure", min=3, help="Along each direction, odd.")] = 21,
    examples: Examples = 16,
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
    folder = ResultFolder.opened(out, table_format)
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
    title = f"network {Path(checkpoint).stem}, data {inputs.name}, {examples} examples, eps {ball:g}"
    table = result.table()
    pictures = folder.write(
        {"table": table, "points": result.points}, facts, {"landscape": result.figure(title)} if out else {}
    )
    notes = ["loss at the network itself, least and greatest of the slice; roughness: second to first differences"]
    show_measured(facts, table, {}, title, notes, pictures, json)


@dataclass(frozen=True, slots=True)
class ResultFolder:
    """Where results go, if anywhere."""

    path: Path | None
    ending: str

    @classmethod
    def opened(cls, path: Path | None, ending: str) -> ResultFolder:
        """Check everything about the output before the work starts."""
        from optrelax.output.tables import require_writable

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
