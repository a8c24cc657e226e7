"""`optrelax measure continuity`: jumps of bounds and of the certified loss along lines in weight space."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from optrelax.cli.application import command
from optrelax.cli.measuring import Compared, Examples, measures
from optrelax.cli.option_sets import NetworkOptions, OutputOptions, RadiusOptions
from optrelax.cli.options import Seed, option

if TYPE_CHECKING:
    import polars as pl

__all__ = ["LineOptions", "continuity", "over_budget"]


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


@command(
    "continuity",
    measures,
    common=("data_dir", "relaxations", "out"),
    examples=("optrelax measure continuity runs/demo/box --data digits --eps 0.02",),
)
def continuity(
    *,
    seed: Seed = 0,
    asked: NetworkOptions,
    radius: RadiusOptions,
    compared: Compared,
    direction: Annotated[
        Literal["gradient", "random"],
        option("--direction", group="Lines", metavar="WAY", help="gradient (down the loss) or random."),
    ] = "gradient",
    to: Annotated[
        Path | None, option("--to", group="Lines", metavar="CHECKPOINT", help="One line to this network.")
    ] = None,
    along: LineOptions,
    results: OutputOptions,
) -> None:
    """Jumps of bounds and of the certified loss as the weights move along lines: number and size per unit length.

    Every event at which a relaxation can switch is located and closed in on to floating-point resolution, in float64.
    A unit of length is the norm of all weights. --out keeps jumps, lines, and the loss with its jumps (PNG and SVG).
    """
    import optrelax as ox
    from optrelax.cli.progress_bars import measurement_bar

    eps = radius.value
    results.require_writable()
    inputs = asked.read()
    way: Any = direction if to is None else asked.network(to, inputs)
    with measurement_bar("continuity") as progress:
        result = ox.measure_continuity(
            inputs.network,
            (inputs.x, inputs.labels),
            eps,
            compared.relaxations,
            direction=way,
            seed=seed,
            progress=progress,
            **radius.settings,
            **asdict(along),
        )
    facts = asked.facts | {"to": None if to is None else str(to)} | result.summary()
    title = f"{asked.title}, {radius.norm} eps {eps:g}, direction: {direction if to is None else to}"
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
