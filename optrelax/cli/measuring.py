"""`optrelax measure`: the group, and the tightness of relaxations on a fixed network."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import typer

from optrelax.cli.application import Group, app, command
from optrelax.cli.inputs import parse_number
from optrelax.cli.option_sets import (
    BoundOptions,
    MilpOptions,
    NetworkOptions,
    OutputOptions,
    RegionOptions,
)
from optrelax.cli.options import Relaxations, Rounding, Seed, option

__all__ = ["Compared", "Examples", "measures", "tightness"]

measures = typer.Typer(help="Tightness, continuity, sensitivity and loss landscape.", cls=Group, no_args_is_help=True)
app.add_typer(measures, name="measure")

Examples = Annotated[int, option("--examples", group="Measure", min=1, help="Evenly spaced in the data.")]
FIVE = ("box", "hbox", "crown-ibp", "deepz", "crown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The relaxations that are measured side by side."""

    relaxations: Relaxations = field(default_factory=lambda: list(FIVE))


@measures.callback()
def _measures() -> None:
    """The properties of a relaxation that shape certified training (arXiv 2102.06700), on any network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RadiusSearchOptions:
    """How far and how finely radii are searched; fields of `measure_tightness` by their names."""

    limit: Annotated[
        str | None,
        option("--limit", group="Region", metavar="X", show_default="width of --clip", help="Largest eps."),
    ] = None
    resolution: Annotated[float, option("--resolution", group="Measure", help="Width of a radius found.")] = 1e-4
    points: Annotated[int, option("--points", group="Measure", min=1, help="Radii tried, where not monotone.")] = 64
    at: Annotated[
        str | None,
        option("--at", group="Measure", metavar="EPS", show_default="median attacked", help="Where gaps are measured."),
    ] = None

    @property
    def settings(self) -> dict[str, Any]:
        """Numbers read.  ValueError where one is none."""
        radii = {"limit": self.limit, "at": self.at}
        read = {name: None if text is None else parse_number(f"--{name}", text) for name, text in radii.items()}
        return asdict(self) | read


@command(
    "tightness",
    measures,
    common=("data_dir", "relaxations", "subset", "out"),
    examples=("optrelax measure tightness runs/demo/box --data digits --out runs/tightness",),
)
def tightness(
    *,
    seed: Seed = 0,
    asked: NetworkOptions,
    compared: Compared,
    subset: Annotated[
        int, option("--subset", group="Data", metavar="N", min=1, help="N evenly spaced examples.")
    ] = 100,
    search: RadiusSearchOptions,
    milp: MilpOptions,
    rounding: Rounding = "nearest",
    confidence: Annotated[float, option("--confidence", group="Measure", help="Of the interval over examples.")] = 0.95,
    region: RegionOptions,
    bound: BoundOptions,
    results: OutputOptions,
) -> None:
    """Certified robustness against eps on a fixed network: the area under each relaxation's curve, times 100.

    Each example's largest certified eps is found by bisection or, where bounds are not monotone in eps, by a scan;
    the area is their mean. Interval: bootstrap over examples. --out keeps tables and the curves (PNG and SVG).
    """
    import optrelax as ox
    from optrelax.cli.progress_bars import measurement_bar

    radii = search.settings
    results.require_writable()
    inputs = asked.read()
    with measurement_bar("tightness") as progress:
        result = ox.measure_tightness(
            inputs.network,
            (inputs.x, inputs.labels),
            compared.relaxations,
            **radii,
            milp=milp.solver,
            rounding=rounding,
            subset=min(subset, len(inputs.labels)),
            confidence=confidence,
            **region.settings,
            **bound.settings,
            seed=seed,
            progress=progress,
        )
    facts = asked.facts | result.summary()
    title = f"{asked.title}, {result.examples.height} examples"
    frames = {"table": result.table, "examples": result.examples}
    pictures = results.write(frames, facts, lambda: {"tightness": result.figure(title)})
    decimals = {"area × 100": 2, "low": 2, "high": 2, "median radius": 4, "gap": 3, "propagation %": 1, "bounds": 1}
    notes = [
        f"low, high: {100 * confidence:g} % interval of the area over examples; radii within {search.resolution:g}",
        f"gap (logits) and propagation tightness at eps {result.settings['at']:.4g}",
    ]
    results.show(facts, result.table.rename({"area": "area × 100"}), title, notes, pictures, decimals)
