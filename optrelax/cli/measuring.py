"""`optrelax measure`: tightness of relaxations on a fixed network, and what they make of the loss in weight space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from optrelax.cli.application import Group, app, command, print_json, stdout
from optrelax.cli.inputs import (
    Asked,
    BatchSize,
    Format,
    Json,
    Milp,
    Norm,
    Out,
    Pixels,
    Precision,
    Radius,
    Relaxations,
    Rounding,
    TimeLimit,
    option,
    parse_number,
    read_dtype,
)

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

__all__ = [
    "Compared",
    "LineOptions",
    "Results",
    "bar",
    "continuity",
    "landscape",
    "measures",
    "sensitivity",
    "tightness",
]

measures = typer.Typer(help="Tightness, continuity, sensitivity and loss landscape.", cls=Group, no_args_is_help=True)
app.add_typer(measures, name="measure")

Examples = Annotated[int, option("--examples", group="Measure", min=1, help="Evenly spaced in the data.")]
FIVE = ("box", "hbox", "crown-ibp", "deepz", "crown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The relaxations that are measured side by side."""

    relaxations: Relaxations = field(default_factory=lambda: list(FIVE))


@dataclass(frozen=True, slots=True, kw_only=True)
class LineOptions:
    """Lines in weight space, for one network or a series of checkpoints."""

    length: Annotated[
        float | None,
        option("--length", group="Lines", show_default="0.01, or all the way", help="In norms of the weights."),
    ] = None
    lines: Annotated[int, option("--lines", group="Lines", min=1, help="Each with examples of its own.")] = 4
    examples: Examples = 4
    least: Annotated[float, option("--least", group="Lines", help="Least jump counted, times max(1, |value|).")] = 1e-9
    cells: Annotated[int, option("--cells", group="Lines", min=1, help="Of the grid that begins a search.")] = 32
    budget: Annotated[int, option("--budget", group="Lines", min=1, help="Evaluations a line at most.")] = 20000


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Where results go, if anywhere: a folder, or JSON on standard output."""

    out: Out = None
    table_format: Format = "csv"
    json: Json = False

    def require_writable(self) -> None:
        """Check the folder before the work starts."""
        from optrelax.output.tables import require_writable

        if self.out is not None:
            require_writable(self.out)

    def write(
        self, frames: Mapping[str, pl.DataFrame], facts: Mapping[str, Any], draw: Callable[[], Mapping[str, Figure]]
    ) -> list[Path]:
        """Tables, summary and pictures in the folder; returns the paths of the pictures."""
        from optrelax.output.plots import write_figure
        from optrelax.output.tables import write_frame, write_json
        from optrelax.training.runs import versions

        if self.out is None:
            return []
        for name, frame in frames.items():
            write_frame(frame, self.out / f"{name}.{self.table_format}")
        write_json({**facts, "versions": versions()}, self.out / "summary.json")
        return [path for name, figure in draw().items() for path in write_figure(figure, self.out / f"{name}.png")]

    def show(
        self,
        facts: Mapping[str, Any],
        table: pl.DataFrame,
        title: str,
        notes: list[str],
        pictures: list[Path],
        decimals: Mapping[str, int] | None = None,
    ) -> None:
        """JSON for programs; the table, what its columns mean and where the pictures lie for people."""
        from optrelax.output.tables import rich_table

        if self.json:
            print_json({**facts, "pictures": [str(path) for path in pictures]})
            return
        console = stdout()
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        console.print(rich_table(table, decimals=decimals or {}))
        for line in [*notes, *(f"picture: {path}" for path in pictures)]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


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
    *,
    asked: Asked,
    compared: Compared,
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
    pixels: Pixels,
    norm: Norm = "linf",
    precision: Precision = "float64",
    batch_size: BatchSize = None,
    results: Results,
) -> None:
    """Certified robustness against eps on a fixed network: the area under each relaxation's curve, times 100.

    Each example's largest certified eps is found by bisection or, where bounds are not monotone in eps, by a scan;
    the area is their mean. Interval: bootstrap over examples. --out keeps tables and the curves (PNG and SVG).
    """
    import optrelax as ox

    radii: dict[str, Any] = {"resolution": resolution, "points": points}
    radii |= {"limit": None if limit is None else parse_number("--limit", limit)}
    radii |= {"at": None if at is None else parse_number("--at", at)}
    results.require_writable()
    inputs = asked.read()
    with bar("tightness") as progress:
        result = ox.measure_tightness(
            inputs.network,
            (inputs.x, inputs.labels),
            compared.relaxations,
            **radii,
            clip=pixels.range,
            norm=norm,
            milp=_milp(time_limit) if milp else False,
            rounding=rounding,
            dtype=read_dtype(precision),
            subset=min(subset, len(inputs.labels)),
            batch_size=batch_size,
            confidence=confidence,
            seed=asked.seed,
            progress=progress,
        )
    facts = asked.facts | result.summary()
    title = f"{asked.title}, {result.examples.height} examples"
    frames = {"table": result.table, "examples": result.examples}
    pictures = results.write(frames, facts, lambda: {"tightness": result.figure(title)})
    decimals = {"area × 100": 2, "low": 2, "high": 2, "median radius": 4, "gap": 3, "propagation %": 1, "bounds": 1}
    notes = [
        f"low, high: {100 * confidence:g} % interval of the area over examples; radii within {resolution:g}",
        f"gap (logits) and propagation tightness at eps {result.settings['at']:.4g}",
    ]
    results.show(facts, result.table.rename({"area": "area × 100"}), title, notes, pictures, decimals)


@command(
    "continuity",
    measures,
    common=("data_dir", "relaxations", "out"),
    examples=("optrelax measure continuity runs/demo/box --data digits --eps 0.02",),
)
def continuity(
    *,
    asked: Asked,
    radius: Radius,
    norm: Norm = "linf",
    compared: Compared,
    direction: Annotated[
        Literal["gradient", "random"],
        option("--direction", group="Lines", metavar="WAY", help="gradient (down the loss) or random."),
    ] = "gradient",
    to: Annotated[
        Path | None, option("--to", group="Lines", metavar="CHECKPOINT", help="One line to this network.")
    ] = None,
    along: LineOptions,
    results: Results,
) -> None:
    """Jumps of bounds and of the certified loss as the weights move along lines: number and size per unit length.

    Every event at which a relaxation can switch is located and closed in on to floating-point resolution, in float64.
    A unit of length is the norm of all weights. --out keeps jumps, lines, and the loss with its jumps (PNG and SVG).
    """
    import optrelax as ox
    from optrelax.networks.checkpoint_files import read_network

    eps = radius.value
    results.require_writable()
    inputs = asked.read()
    way: Any = direction
    if to is not None:
        shape, device = tuple(inputs.x.shape[1:]), asked.device
        way = read_network(to, model=asked.model, input_shape=shape, classes=inputs.classes, device=device)
    with bar("continuity") as progress:
        result = ox.measure_continuity(
            inputs.network,
            (inputs.x, inputs.labels),
            eps,
            compared.relaxations,
            direction=way,
            clip=radius.range,
            norm=norm,
            seed=asked.seed,
            progress=progress,
            **asdict(along),
        )
    facts = asked.facts | {"to": None if to is None else str(to)} | result.summary()
    title = f"{asked.title}, {norm} eps {eps:g}, direction: {direction if to is None else to}"
    count = along.lines if to is None else 1
    frames = {"table": result.table, "jumps": result.jumps, "lines": result.lines}
    pictures = results.write(frames, facts, lambda: {f"line{i}": result.figure(title, i) for i in range(count)})
    columns = ["relaxation", "bound jumps", "loss jumps", "bound / unit", "loss / unit", "largest bound"]
    columns += ["largest loss", "travel", "causes", "listed", "verdict"]
    notes = [
        f"{count} line(s), {result.table['length'][0]:.3g} norms of the weights in all; "
        "sizes of jumps in logits and in the loss; travel: share of the loss's total variation that jumps make",
        "causes are of a ReLU: l, u the bounds of a pre-activation; listed: where arXiv 2102.06700 expects jumps",
        *over_budget(result.table),
    ]
    results.show(facts, result.table.select(columns), title, notes, pictures, {"bound / unit": 0, "loss / unit": 0})


def over_budget(table: pl.DataFrame) -> list[str]:
    """What to say where a line was not searched to its end."""
    complete = table["complete"].drop_nulls().all()
    return [] if complete else ["a line ended at its --budget: counts are lower bounds"]


@command(
    "sensitivity",
    measures,
    common=("data_dir", "relaxations", "out"),
    examples=("optrelax measure sensitivity runs/demo/box --data digits --eps 0.02",),
)
def sensitivity(
    *,
    asked: Asked,
    radius: Radius,
    norm: Norm = "linf",
    compared: Compared,
    steps: Annotated[
        list[float], option("--steps", group="Measure", metavar="SIZE", help="Shares of each weight's norm.")
    ] = [1e-4, 1e-3, 1e-2],  # noqa: B006, typer only reads it
    draws: Annotated[int, option("--draws", group="Measure", min=1, help="Of the random direction.")] = 8,
    ascent: Annotated[int, option("--ascent", group="Measure", min=1, help="Sub-steps of the adversarial step.")] = 5,
    examples: Examples = 16,
    results: Results,
) -> None:
    """Change of the certified loss and of its gradient under small steps of the weights, relative to their size.

    Random steps, adversarial ones (up the loss) and straight ones down the gradient; local Lipschitz constants are
    per norm of the weights. Small networks also get the degrees of the bound as a rational function of a step.
    """
    import optrelax as ox

    eps = radius.value
    results.require_writable()
    inputs = asked.read()
    with bar("sensitivity") as progress:
        result = ox.measure_sensitivity(
            inputs.network,
            (inputs.x, inputs.labels),
            eps,
            compared.relaxations,
            steps=steps,
            draws=draws,
            ascent=ascent,
            examples=examples,
            clip=radius.range,
            norm=norm,
            seed=asked.seed,
            progress=progress,
        )
    facts = asked.facts | result.summary()
    title = f"{asked.title}, {examples} examples, {norm} eps {eps:g}"
    pictures = results.write({"table": result.table}, facts, lambda: {"sensitivity": result.figure(title)})
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
    results.show(facts, result.table.select(columns), title, notes, pictures)


@command(
    "landscape",
    measures,
    common=("data_dir", "relaxations", "out"),
    examples=("optrelax measure landscape runs/demo/box --data digits --eps 0.02 --out OUT",),
)
def landscape(
    *,
    asked: Asked,
    ball: Radius,
    norm: Norm = "linf",
    compared: Compared,
    dimensions: Annotated[
        int, option("--dimensions", group="Measure", min=1, max=2, help="1: a line; 2: a plane.")
    ] = 2,
    radius: Annotated[
        float, option("--radius", group="Measure", help="Largest step; 1: as large as the weights.")
    ] = 0.5,
    points: Annotated[int, option("--points", group="Measure", min=3, help="Along each direction, odd.")] = 21,
    examples: Examples = 16,
    results: Results,
) -> None:
    """The certified loss around a checkpoint, along random filter-normalised directions, on one scale.

    All relaxations see the same directions and examples. --out keeps the points and the picture (PNG and SVG).
    """
    import optrelax as ox

    eps = ball.value
    results.require_writable()
    inputs = asked.read()
    with bar("landscape") as progress:
        result = ox.measure_landscape(
            inputs.network,
            (inputs.x, inputs.labels),
            eps,
            compared.relaxations,
            dimensions=dimensions,
            radius=radius,
            points=points,
            examples=examples,
            clip=ball.range,
            norm=norm,
            seed=asked.seed,
            progress=progress,
        )
    facts, table = asked.facts | result.summary(), result.table()
    title = f"{asked.title}, {examples} examples, {norm} eps {eps:g}"
    frames = {"table": table, "points": result.points}
    pictures = results.write(frames, facts, lambda: {"landscape": result.figure(title)})
    notes = ["loss at the network itself, least and greatest of the slice; roughness: second to first differences"]
    results.show(facts, table, title, notes, pictures)


def bar(title: str) -> Any:
    """A progress bar for a measurement."""
    from optrelax.cli.progress_bars import measurement_bar

    return measurement_bar(title)


def _milp(time_limit: float) -> Any:
    from optrelax.layers.milp import Milp

    return Milp(time_limit=time_limit)
