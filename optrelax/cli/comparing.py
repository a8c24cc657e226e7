"""`optrelax compare`: LP against closed form, and MILP, on one network: bound, certified, time and gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from optrelax.cli.application import WorkError, command, print_json, say, show_table
from optrelax.cli.inputs import legal_range
from optrelax.cli.option_sets import BoundOptions, MilpOptions, NetworkOptions, OutputOptions, RadiusOptions
from optrelax.cli.options import Format, Relaxations, Rounding, option

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optrelax.certification.comparison import Comparison

__all__ = ["compare", "show_comparison"]

_EXAMPLES = 100  # a comparison of tightness needs no more; layerwise on whole test sets takes hours


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonOutput(OutputOptions):
    """Results, tables in Parquet."""

    table_format: Format = "parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleCount:
    """How many examples: a hundred, some, or all."""

    subset: Annotated[
        int | None,
        option("--subset", group="Data", metavar="N", min=1, show_default="100", help="N evenly spaced examples."),
    ] = None
    everything: Annotated[bool, option("--all", group="Data", help="All examples of the data set.")] = False

    def of(self, size: int) -> int | None:
        """Examples to take of that many, None for all."""
        if self.everything:
            if self.subset is not None:
                raise ValueError("--subset and --all exclude each other")
            return None
        return min(_EXAMPLES, size) if self.subset is None else self.subset


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingOptions:
    """How time is taken."""

    repeats: Annotated[int, option("--repeats", group="Run", min=1, help="Timed runs, after one that warms up.")] = 3
    patience: Annotated[
        float, option("--patience", group="Run", metavar="S", min=0, help="Fewer runs where they take longer.")
    ] = 30.0


@command(
    "compare",
    common=("data_dir", "relaxations", "subset", "out"),
    examples=("optrelax compare runs/demo/box --data digits --eps 0.02 --out runs/compared",),
)
def compare(
    *,
    asked: NetworkOptions,
    radius: RadiusOptions,
    relaxations: Relaxations = ["box", "crown", "triangle", "layerwise"],  # noqa: B006, typer only reads it
    count: ExampleCount,
    milp: MilpOptions,
    timing: TimingOptions,
    bound: BoundOptions,
    rounding: Rounding = "outward",
    results: ComparisonOutput,
) -> None:
    """Compare relaxations on one network: how tight, how many certified, how fast, how far from the LP's optimum.

    All bound the same margins over the same regions. LP layers start from pre-activation bounds of their own, box and
    fast-lin intersected; triangle:preactivation=crown starts from those of crown. --out keeps the table, a table an
    example, and the picture of tightness against time (PNG and SVG).
    """
    import optrelax as ox
    from optrelax.cli.progress_bars import comparison_bar

    eps = radius.value
    results.require_writable()
    inputs = asked.read()
    with comparison_bar("compare") as progress:
        result = ox.compare(
            inputs.network,
            (inputs.x, inputs.labels),
            eps,
            relaxations,
            milp=milp.solver,
            rounding=rounding,
            subset=count.of(len(inputs.labels)),
            progress=progress,
            **radius.settings,
            **bound.settings,
            **asdict(timing),
        )
    facts = {**asked.facts, **result.summary()}
    title = f"{asked.title}, eps {facts['eps']:g}"
    frames = {"table": result.table, "examples": result.examples}
    pictures = results.write(frames, facts, lambda: {"tightness": _drawn(result, title)})
    if results.json:
        print_json(facts | {"pictures": [str(path) for path in pictures]})
        return
    show_comparison(result, _title(facts, inputs.x.shape[1:]))
    say(*(f"tightness against time: {path}" for path in pictures))


def _drawn(result: Comparison, title: str) -> Figure:
    if not result.table["mean bound"].is_finite().any():
        raise WorkError("compare: no relaxation has a finite mean bound, so there is nothing to draw")
    return result.figure(title)


def show_comparison(result: Comparison, title: str) -> None:
    """The table for people, and what its columns mean."""
    from optrelax.certification.comparison import DECIMALS

    say(title)
    show_table(result.shown(), DECIMALS)
    say(result.legend)


def _title(facts: Mapping[str, Any], shape: Sequence[int]) -> str:
    within = legal_range(shape, facts["clip"])
    return (
        f"{facts['checkpoint']} on {facts['data']}: {facts['examples']} examples, accuracy "
        f"{100 * facts['accuracy']:.2f} %, {facts['norm']} eps {facts['eps']:g}, {within}, {facts['dtype']}"
    )
