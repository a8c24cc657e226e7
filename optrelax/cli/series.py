"""`optrelax measure series`: the measurements at every checkpoint of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from optrelax.cli.application import command, stderr
from optrelax.cli.inputs import (
    Data,
    DataDir,
    Device,
    Json,
    Model,
    Relaxations,
    Seed,
    parse_number,
    read_data,
    read_device,
)
from optrelax.cli.measuring import Clip, Eps, Folder, Format, NoClip, Split, bar, measures, show_measured

__all__ = ["series"]


@command("series", measures)
def series(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|CHECKPOINT...",
            show_default=False,
            help="A run folder with networks kept by `train --keep-every`, or several checkpoints.",
        ),
    ],
    data: Data,
    eps: Eps,
    data_dir: DataDir = None,
    relaxations: Relaxations = ["box", "hbox", "crown-ibp", "deepz", "crown"],  # noqa: B006, typer only reads it
    direction: Annotated[
        str,
        typer.Option(
            "--direction",
            help="Of the lines: random; gradient: down each relaxation's own certified loss; next: one line to the "
            "next checkpoint.",
        ),
    ] = "random",
    length: Annotated[
        float | None,
        typer.Option(
            "--length",
            show_default="0.01, or all the way",
            help="Of a line, in norms of all weights; to the next checkpoint, the share of the way.",
        ),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", min=1, help="A checkpoint, each with examples of its own.")] = 4,
    examples: Annotated[int, typer.Option("--examples", min=1, help="A line, evenly spaced in the data.")] = 4,
    step: Annotated[float, typer.Option("--step", help="Share of each weight tensor's norm, of the steps.")] = 1e-2,
    subset: Annotated[
        int, typer.Option("--subset", metavar="N", min=1, help="N evenly spaced examples, for all but the lines.")
    ] = 100,
    tightness: Annotated[
        bool, typer.Option("--tightness/--no-tightness", help="Whether to measure the area of the curve over eps too.")
    ] = True,
    resolution: Annotated[
        float, typer.Option("--resolution", help="Of that: width to which each radius is found, in pixel units.")
    ] = 1e-3,
    points: Annotated[int, typer.Option("--points", min=1, help="Of that: radii tried an example.")] = 16,
    least: Annotated[
        float, typer.Option("--least", help="Smallest jump that counts, times max(1, |value|), in logits.")
    ] = 1e-9,
    cells: Annotated[int, typer.Option("--cells", min=1, help="Of the grid that begins each search for jumps.")] = 32,
    budget: Annotated[int, typer.Option("--budget", min=1, help="Evaluations a line at most.")] = 20000,
    clip: Clip = (0.0, 1.0),
    no_clip: NoClip = False,
    split: Split = "test",
    model: Model = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", show_default=False, help="Folder of journal, table and pictures; resumes there."
        ),
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
    if direction not in ("random", "gradient", "next"):
        raise ValueError(f"--direction must be random, gradient or next, got {direction!r}")
    folder = Folder.opened(out, table_format)
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
    title = f"{checkpoints[0].stem} on {data}, eps {radius:g}, lines: {direction}"
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
