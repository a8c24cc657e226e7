"""`optrelax measure series`: the measurements at every checkpoint of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from optrelax.cli.application import command, stderr
from optrelax.cli.inputs import (
    Clip,
    Data,
    DataDir,
    Device,
    Eps,
    Format,
    Json,
    Model,
    NoClip,
    Relaxations,
    Seed,
    Split,
    option,
    parse_number,
    read_data,
    read_device,
)
from optrelax.cli.measuring import Cells, Examples, Least, LineBudget, Lines, ResultFolder, bar, measures, show_measured

__all__ = ["series"]


@command(
    "series",
    measures,
    common=("data_dir", "relaxations", "subset", "out"),
    examples=("optrelax measure series runs/mnist-box --data mnist --eps 0.1 --out runs/series",),
)
def series(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|CHECKPOINT...",
            rich_help_panel="Network",
            help="Run of `train --keep-every`, or checkpoints.",
        ),
    ],
    data: Data,
    eps: Eps,
    data_dir: DataDir = None,
    relaxations: Relaxations = ["box", "hbox", "crown-ibp", "deepz", "crown"],  # noqa: B006, typer only reads it
    direction: Annotated[
        Literal["random", "gradient", "next"],
        option("--direction", group="Lines", metavar="WAY", help="random, gradient, or next checkpoint."),
    ] = "random",
    length: Annotated[
        float | None,
        option("--length", group="Lines", show_default="0.01, or all the way", help="In norms of the weights."),
    ] = None,
    lines: Lines = 4,
    examples: Examples = 4,
    step: Annotated[float, option("--step", group="Measure", help="Of steps: share of each weight's norm.")] = 1e-2,
    subset: Annotated[
        int, option("--subset", group="Data", metavar="N", min=1, help="N examples, for all but the lines.")
    ] = 100,
    tightness: Annotated[
        bool, option("--tightness/--no-tightness", group="Measure", help="The area over eps too.")
    ] = True,
    resolution: Annotated[float, option("--resolution", group="Measure", help="Width of a radius found.")] = 1e-3,
    points: Annotated[int, option("--points", group="Measure", min=1, help="Radii tried an example.")] = 16,
    least: Least = 1e-9,
    cells: Cells = 32,
    budget: LineBudget = 20000,
    clip: Clip = (0.0, 1.0),
    no_clip: NoClip = False,
    split: Split = "test",
    model: Model = None,
    out: Annotated[
        Path | None, option("--out", group="Output", metavar="DIR", help="Keep journal and pictures; resumes.")
    ] = None,
    table_format: Format = "csv",
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Jumps, predictiveness, tightness and certified accuracy by each relaxation at every checkpoint of a run.

    All relaxations and checkpoints share examples, random lines and steps. What the journal in DIR holds is not
    measured again, also where checkpoints or relaxations have been added since. --out draws all of it against epochs
    (PNG and SVG).
    """
    import optrelax as ox
    from optrelax.measurements.series_files import series_networks, series_paths

    radius = parse_number("--eps", eps)
    folder = ResultFolder.opened(out, table_format)
    x, labels, classes = read_data(data, data_dir, split)
    paths = series_paths(checkpoints)
    shape = tuple(x.shape[1:])
    networks = series_networks(checkpoints, shape, model=model, classes=classes, device=read_device(device))
    how: dict[str, Any] = {"direction": direction, "length": length, "lines": lines, "examples": examples}
    how |= {"step": step, "subset": min(subset, len(labels)), "tightness": tightness}
    how |= {"resolution": resolution, "points": points, "least": least, "cells": cells, "budget": budget}
    how |= {"clip": None if no_clip else clip, "seed": seed}
    how["journal"] = None if folder.path is None else folder.path / "journal.jsonl"
    try:
        with bar("series") as progress:
            result = ox.measure_series(networks, (x, labels), radius, relaxations, progress=progress, **how)
    except KeyboardInterrupt:
        again = "add --out DIR to be able to resume" if out is None else "repeat the command to go on"
        stderr().print(f"Interrupted; {again}.", markup=False, highlight=False)
        raise
    facts: dict[str, Any] = {"checkpoints": {str(epoch): str(path) for epoch, path in paths.items()}}
    facts |= {"data": data, "split": split, **result.summary()}
    title = f"run {checkpoints[0].stem}, data {data}, eps {radius:g}, lines: {direction}"
    pictures = folder.write({"table": result.table}, facts, {"series": result.figure(title)} if out else {})
    shown = ["epoch", "relaxation", "bound / unit", "loss / unit", "largest bound", "largest loss", "travel"]
    shown += ["predicted", "agreement", "certified", *(["area"] if tightness else []), "loss"]
    notes = [
        "jumps a unit of length, the norm of all weights; their sizes in logits and in the loss; travel: share of the "
        "loss's variation along the lines that jumps make",
        f"predicted, agreement: of a step of {step:g} straight down the gradient; certified: fraction at eps",
    ]
    if not result.table["complete"].drop_nulls().all():
        notes.append("a line ended at its --budget: counts are lower bounds")
    show_measured(
        facts, result.table.select(shown), {"bound / unit": 0, "loss / unit": 0}, title, notes, pictures, json
    )
