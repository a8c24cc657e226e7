"""Figures of the reports, made from stored rows, in the look of `optrelax.output.plots`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optrelax.output.plots import blank_figure, empty_figure, line_styles, tidy
from optrelax.papers.frames import TableOutcomes
from optrelax.papers.plans import FIVE, Line

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

__all__ = [
    "accuracy_dots",
    "jump_lines",
    "loosened_map",
    "main_names",
    "paradox",
    "properties_scatter",
    "sensitivity_lines",
    "tightness_lines",
]


def tightness_lines(found: TableOutcomes, names: Sequence[str], title: str) -> Figure | None:
    """Certified fraction against eps of the named relaxations, and the attack's limit."""
    from optrelax.measurements.figures import certified_steps, tightness_curves

    curves: dict[str, tuple[list[float], list[float]]] = {}
    areas: dict[str, float] = {}
    for line in _named(found, names):
        answer = found.answer(line.tight)
        if answer is None:
            continue
        attack = {"attack": "attack"} if "attack" not in curves else {}
        for label, column in {line.label: line.relaxation, **attack}.items():
            radii = [row[f"radius:{column}"] for row in answer["radii"]]
            curves[label] = certified_steps(radii)
            areas[label] = 100 * sum(radii) / len(radii)
    if len(curves) < 2:
        return None
    return tightness_curves(curves, areas, title=title, reference="attack")


def _named(found: TableOutcomes, names: Sequence[str]) -> list[Line]:
    return [line for line in found.plan.lines if line.label in names]


def jump_lines(found: TableOutcomes, names: Sequence[str], title: str) -> Figure | None:
    """The loss along the first line of each named relaxation, with its jumps."""
    import polars as pl

    from optrelax.measurements.figures import jump_panels

    samples: list[dict[str, object]] = []
    jumps: list[dict[str, object]] = []
    for line in _named(found, names):
        answer = found.answer(line.jumps)
        if answer is not None:
            samples += answer["samples"]
            jumps += answer["jumps"]
    if not samples:
        return None
    words, whole = ("relaxation", "cause"), ("line",)
    schema = {
        name: pl.String if name in words else pl.Int64 if name in whole else pl.Float64
        for name in ("relaxation", "line", "at", "bound", "loss", "cause")
    }
    frame = pl.DataFrame(samples, infer_schema_length=None)
    return jump_panels(frame, pl.DataFrame(jumps, schema=schema), 0, title=title)


def sensitivity_lines(found: TableOutcomes, names: Sequence[str], title: str) -> Figure | None:
    """Change of loss and gradient against the size of the step."""
    import polars as pl

    from optrelax.measurements.figures import sensitivity_panels

    rows = [row for line in _named(found, names) for row in (found.answer(line.steps) or {}).get("table", [])]
    return sensitivity_panels(pl.DataFrame(rows, infer_schema_length=None), title=title) if rows else None


def paradox(summary: pl.DataFrame, title: str) -> Figure:
    """Certified accuracy after training against tightness on a fixed network: here, and as published."""
    figure = empty_figure(title, 8.4, 3.8)
    left, right = figure.subplots(1, 2)
    for axes, suffix, name in ((left, "", "here"), (right, " (paper)", "published")):
        tidy(axes)
        for row, (colour, _, marker) in zip(summary.to_dicts(), line_styles(summary["relaxation"]), strict=True):
            x, y = row[f"tightness{suffix}"], row[f"certified %{suffix}"]
            if x is not None and y is not None:
                axes.plot(
                    [x], [y], marker=marker, color=colour, markersize=8, linestyle="none", label=row["relaxation"]
                )
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel("tightness on a fixed network (area × 100)")
        axes.margins(0.15)
    # One height scale: a fall of a few points must not look like a collapse, nor the other way round.
    for axes in (left, right):
        axes.set_ylim(-3, 103)
    left.set_ylabel("certified after training (%)")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside right center")
    return figure


def accuracy_dots(found: TableOutcomes, frame: pl.DataFrame, title: str) -> Figure:
    """Accuracy, accuracy under attack, certified accuracies: a row a network, dots with different marks.

    A published certified accuracy, where there is one, is a hollow diamond. Bars: certified by any, over seeds.
    """
    rows = frame.to_dicts()
    figure = empty_figure(title, 7.4, 1.2 + 0.27 * len(rows))
    axes = figure.add_subplot()
    tidy(axes)
    marks: Mapping[str, tuple[str, str, str]] = {
        "accuracy %": ("o", "#000000", "accuracy"),
        "under attack %": ("|", "#CC79A7", "under attack (upper limit)"),
        "certified % by any": ("s", "#0072B2", "certified by any"),
        "certified %": ("x", "#D55E00", "certified by its own bound"),
        "certified % (paper)": ("D", "#009E73", "certified, published"),
    }
    for column, (mark, colour, label) in marks.items():
        if column not in frame.columns:
            continue
        points = [(row[column], -i) for i, row in enumerate(rows) if row[column] is not None]
        style: dict[str, Any] = {"marker": mark, "color": colour, "linestyle": "none", "markersize": 7, "label": label}
        if mark == "D":
            style |= {"markerfacecolor": "none"}
        if points:
            axes.plot([x for x, _ in points], [y for _, y in points], **style)
    for i, row in enumerate(rows):
        if row.get("lowest") is not None:  # over seeds
            axes.hlines(-i, row["lowest"], row["highest"], color=marks["certified % by any"][1], linewidth=1.5)
    names = [" · ".join(filter(None, (row.get("network"), row["trained by"]))) for row in rows]
    axes.set_yticks([-i for i in range(len(rows))], names)
    axes.set(xlabel="% of the test images", xlim=(-2, 102), ylim=(-len(rows) + 0.4, 0.6))
    if handles := axes.get_legend_handles_labels()[0]:
        figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure


def properties_scatter(frame: pl.DataFrame, title: str) -> Figure | None:
    """Certified accuracy after training against tightness; marks say whether the paper lists jumps."""
    rows = [row for row in frame.to_dicts() if row["area"] is not None and row["certified % by any"] is not None]
    if not rows:
        return None
    figure, axes = blank_figure(title)
    figure.set_size_inches(8.4, 5.2)
    rows.sort(key=lambda row: -row["certified % by any"])
    looks = line_styles([row["relaxation"] for row in rows])
    for row, (colour, _, mark) in zip(rows, looks, strict=True):
        continuous = row["listed"] == "none"
        style: dict[str, Any] = {"color": colour, "marker": mark, "markersize": 7, "linestyle": "none"}
        style |= {} if continuous else {"markerfacecolor": "none"}
        axes.plot([row["area"]], [row["certified % by any"]], label=row["relaxation"], **style)
        if row.get("lowest") is not None:  # over seeds
            axes.vlines(row["area"], row["lowest"], row["highest"], color=colour, linewidth=1.2)
    axes.set(xlabel="tightness on the fixed network (area × 100)", ylabel="certified by any bound, after training (%)")
    axes.margins(0.12)
    heading = "best first; hollow: may jump,\nby the paper's list"
    figure.legend(frameon=False, fontsize=7, title=heading, title_fontsize=7, loc="outside right center")
    return figure


def loosened_map(frame: pl.DataFrame, title: str) -> Figure | None:
    """Certified accuracy over omega and the grid F, means over seeds, with the continuous widening beside.

    Under a mean of several seeds stand the lowest and the highest.
    """
    import numpy as np
    import polars as pl

    loose = frame.filter(pl.col("omega").is_not_null())
    omegas = sorted(set(loose["omega"].to_list()))
    grids = sorted(set(loose["F"].drop_nulls().to_list()))
    if loose["certified % by any"].null_count() == loose.height:
        return None
    columns = [("C", None), *(("DC", grid) for grid in grids)]
    labels = ["continuous\n(C)", *(f"F = {grid:g}" for grid in grids)]
    figure = empty_figure(title, 9.4, 1.6 + 0.5 * len(omegas))
    plain = frame.filter(pl.col("training") == "box").to_dicts()[0]
    panels = (("accuracy %", "natural accuracy (%)"), ("certified % by any", "certified by any bound (%)"))
    for axes, (column, name) in zip(figure.subplots(1, 2), panels, strict=True):
        cells = {(row["training"], row["omega"], row["F"]): row[column] for row in loose.to_dicts()}
        spreads = {
            (row["training"], row["omega"], row["F"]): (row["lowest"], row["highest"])
            for row in loose.to_dicts()
            if column == "certified % by any" and row.get("lowest") is not None
        }
        values = [[cells.get((kind, omega, grid)) for kind, grid in columns] for omega in omegas]
        shown = np.array([[np.nan if v is None else v for v in line] for line in values], dtype=float)
        top = max(v for v in (*shown.flat, plain[column] or 0.0, 1.0) if not math.isnan(v))
        mesh = axes.pcolormesh(shown, cmap="cividis", vmin=0, vmax=top, edgecolors="white", linewidth=1)
        figure.colorbar(mesh, ax=axes, label="%")
        for i, j in np.ndindex(shown.shape):
            text = "–" if np.isnan(shown[i, j]) else f"{shown[i, j]:.1f}"
            if low_high := spreads.get((columns[j][0], omegas[i], columns[j][1])):
                text += "\n{:.1f} – {:.1f}".format(*low_high)
            colour = "black" if shown[i, j] > 0.55 * top else "white"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(np.arange(len(columns)) + 0.5, labels, fontsize=8)
        axes.set_yticks(np.arange(len(omegas)) + 0.5, [f"{omega:g}" for omega in omegas], fontsize=8)
        axes.set_ylabel("omega", fontsize=9)
        box = "" if plain[column] is None else f"; Box itself: {plain[column]:.1f}"
        axes.set_title(f"{name}{box}", fontsize=9, loc="left")
        axes.tick_params(length=0)
    return figure


def main_names(found: TableOutcomes) -> list[str]:
    """The relaxations that figures with room for a few show: the paper's five, and the LPs where measured."""
    labels = [line.label for line in found.plan.lines]
    lps = [name for name in labels if name.startswith(("triangle", "layerwise"))]
    return [name for name in (*FIVE, *lps) if name in labels]
