"""`optrelax measure series`: the measurements at every checkpoint of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from optrelax.cli.application import command, stderr
from optrelax.cli.inputs import (
    Data,
    DataDir,
    Device,
    Model,
    Norm,
    Radius,
    Seed,
    Split,
    option,
    read_data,
    read_device,
)
from optrelax.cli.measuring import Compared, LineOptions, Results, bar, measures, over_budget

__all__ = ["series"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsOfSeries(Results):
    """Results with a journal."""

    out: Annotated[
        Path | None, option("--out", group="Output", metavar="DIR", help="Keep journal and pictures; resumes.")
    ] = None


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
    data: Data,
    radius: Radius,
    norm: Norm = "linf",
    data_dir: DataDir = None,
    compared: Compared,
    direction: Annotated[
        Literal["random", "gradient", "next"],
        option("--direction", group="Lines", metavar="WAY", help="random, gradient, or next checkpoint."),
    ] = "random",
    along: LineOptions,
    step: Annotated[float, option("--step", group="Measure", help="Of steps: share of each weight's norm.")] = 1e-2,
    subset: Annotated[
        int, option("--subset", group="Data", metavar="N", min=1, help="N examples, for all but the lines.")
    ] = 100,
    tightness: Annotated[
        bool, option("--tightness/--no-tightness", group="Measure", help="The area over eps too.")
    ] = True,
    resolution: Annotated[float, option("--resolution", group="Measure", help="Width of a radius found.")] = 1e-3,
    points: Annotated[int, option("--points", group="Measure", min=1, help="Radii tried an example.")] = 16,
    split: Split = "test",
    model: Model = None,
    results: ResultsOfSeries,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Jumps, predictiveness, tightness and certified accuracy by each relaxation at every checkpoint of a run.

    All relaxations and checkpoints share examples, random lines and steps. What the journal in DIR holds is not
    measured again, also where checkpoints or relaxations have been added since. --out draws all of it against epochs
    (PNG and SVG).
    """
    import optrelax as ox
    from optrelax.measurements.series_files import series_networks, series_paths

    eps = radius.value
    results.require_writable()
    x, labels, classes = read_data(data, data_dir, split)
    paths = series_paths(checkpoints)
    shape = tuple(x.shape[1:])
    networks = series_networks(checkpoints, shape, model=model, classes=classes, device=read_device(device))
    how = asdict(along) | {"direction": direction, "step": step, "subset": min(subset, len(labels))}
    how |= {"tightness": tightness, "resolution": resolution, "points": points, "clip": radius.range, "seed": seed}
    how["norm"] = norm
    how["journal"] = None if results.out is None else results.out / "journal.jsonl"
    try:
        with bar("series") as progress:
            result = ox.measure_series(networks, (x, labels), eps, compared.relaxations, progress=progress, **how)
    except KeyboardInterrupt:
        again = "add --out DIR to be able to resume" if results.out is None else "repeat the command to go on"
        stderr().print(f"Interrupted; {again}.", markup=False, highlight=False)
        raise
    facts: dict[str, Any] = {"checkpoints": {str(epoch): str(path) for epoch, path in paths.items()}}
    facts |= {"data": data, "split": split, **result.summary()}
    title = f"run {checkpoints[0].stem}, data {data}, {norm} eps {eps:g}, lines: {direction}"
    pictures = results.write({"table": result.table}, facts, lambda: {"series": result.figure(title)})
    shown = ["epoch", "relaxation", "bound / unit", "loss / unit", "largest bound", "largest loss", "travel"]
    shown += ["predicted", "agreement", "certified", *(["area"] if tightness else []), "loss"]
    notes = [
        "jumps a unit of length, the norm of all weights; their sizes in logits and in the loss; travel: share of the "
        "loss's variation along the lines that jumps make",
        f"predicted, agreement: of a step of {step:g} straight down the gradient; certified: fraction at eps",
        *over_budget(result.table),
    ]
    results.show(facts, result.table.select(shown), title, notes, pictures, {"bound / unit": 0, "loss / unit": 0})
