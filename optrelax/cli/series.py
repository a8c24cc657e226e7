"""`optrelax measure series`: the measurements at every checkpoint of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from optrelax.cli.application import command, stderr
from optrelax.cli.continuity import LineOptions, over_budget
from optrelax.cli.inputs import read_device
from optrelax.cli.measuring import Compared, measures
from optrelax.cli.option_sets import DataOptions, OutputOptions, RadiusOptions
from optrelax.cli.options import Device, Model, Seed, option

if TYPE_CHECKING:
    from optrelax.measurements.series import Series

__all__ = ["series"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesOutput(OutputOptions):
    """Results with a journal."""

    out: Annotated[
        Path | None, option("--out", group="Output", metavar="DIR", help="Keep journal and pictures; resumes.")
    ] = None

    @property
    def journal(self) -> Path | None:
        """What is measured, as it comes."""
        return None if self.out is None else self.out / "journal.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesMeasures:
    """What is measured beside the jumps, and on how many examples; fields of `measure_series` by their names."""

    step: Annotated[float, option("--step", group="Measure", help="Of steps: share of each weight's norm.")] = 1e-2
    subset: Annotated[
        int, option("--subset", group="Data", metavar="N", min=1, help="N examples, for all but the lines.")
    ] = 100
    tightness: Annotated[bool, option("--tightness/--no-tightness", group="Measure", help="The area over eps too.")] = (
        True
    )
    resolution: Annotated[float, option("--resolution", group="Measure", help="Width of a radius found.")] = 1e-3
    points: Annotated[int, option("--points", group="Measure", min=1, help="Radii tried an example.")] = 16


@command(
    "series",
    measures,
    common=("data_dir", "relaxations", "subset", "out"),
    examples=("optrelax measure series runs/mnist-box --data mnist --eps 0.1 --out OUT",),
)
def series(
    *,
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|CHECKPOINT...",
            rich_help_panel="Network",
            help="Run of `train --keep-every`, or checkpoints.",
        ),
    ],
    examples_of: DataOptions,
    radius: RadiusOptions,
    compared: Compared,
    direction: Annotated[
        Literal["random", "gradient", "next"],
        option("--direction", group="Lines", metavar="WAY", help="random, gradient, or next checkpoint."),
    ] = "random",
    along: LineOptions,
    beside: SeriesMeasures,
    model: Model = None,
    results: SeriesOutput,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Jumps, predictiveness, tightness and certified accuracy by each relaxation at every checkpoint of a run.

    All relaxations and checkpoints share examples, random lines and steps. What the journal in DIR holds is not
    measured again, also where checkpoints or relaxations have been added since. --out draws all of it against epochs
    (PNG and SVG).
    """
    from optrelax.measurements.series_files import series_networks, series_paths

    eps = radius.value
    results.require_writable()
    x, labels, classes = examples_of.examples()
    paths, shape = series_paths(checkpoints), tuple(x.shape[1:])
    networks = series_networks(checkpoints, shape, model=model, classes=classes, device=read_device(device))
    how = asdict(along) | asdict(beside) | radius.settings | {"direction": direction, "seed": seed}
    how["subset"] = min(beside.subset, len(labels))
    result = _measured(networks, (x, labels), eps, compared.relaxations, results, **how)
    facts: dict[str, object] = {"checkpoints": {str(epoch): str(path) for epoch, path in paths.items()}}
    facts |= {**examples_of.facts, **result.summary()}
    title = f"run {checkpoints[0].stem}, data {examples_of.data}, {radius.norm} eps {eps:g}, lines: {direction}"
    pictures = results.write({"table": result.table}, facts, lambda: {"series": result.figure(title)})
    shown = ["epoch", "relaxation", "bound / unit", "loss / unit", "largest bound", "largest loss", "travel"]
    shown += ["predicted", "agreement", "certified", *(["area"] if beside.tightness else []), "loss"]
    notes = [
        "jumps a unit of length, the norm of all weights; their sizes in logits and in the loss; travel: share of the "
        "loss's variation along the lines that jumps make",
        f"predicted, agreement: of a step of {beside.step:g} straight down the gradient; certified: fraction at eps",
        *over_budget(result.table),
    ]
    results.show(facts, result.table.select(shown), title, notes, pictures, {"bound / unit": 0, "loss / unit": 0})


def _measured(
    networks: Any, data: object, eps: float, relaxations: list[str], results: SeriesOutput, **how: Any
) -> Series:
    """The work itself, under a bar; a word about resuming after Ctrl-C."""
    import optrelax as ox
    from optrelax.cli.progress_bars import measurement_bar

    try:
        with measurement_bar("series") as progress:
            return ox.measure_series(
                networks, data, eps, relaxations, progress=progress, journal=results.journal, **how
            )
    except KeyboardInterrupt:
        again = "add --out DIR to be able to resume" if results.out is None else "repeat the command to go on"
        stderr().print(f"Interrupted; {again}.", markup=False, highlight=False)
        raise
