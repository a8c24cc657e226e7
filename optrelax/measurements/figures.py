"""Figures of the measurements, in the look of `optrelax.output.plots`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optrelax.output.plots import add_legend, blank_figure, empty_figure, line_styles, tidy

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "certified_steps",
    "jump_panels",
    "landscape_curves",
    "landscape_maps",
    "panels",
    "sensitivity_panels",
    "series_panels",
    "tightness_curves",
]

Curve = tuple[list[float], list[float]]


def tightness_curves(
    curves: Mapping[str, Curve], areas: Mapping[str, float], *, title: str = "", reference: str = "", norm: str = "linf"
) -> Figure:
    """Certified fraction in percent against eps: a step curve each, the greatest area first.

    curves: radii ascending and the fraction certified beyond each.  norm: of eps.  reference: the curve drawn in grey,
    as a limit.
    """
    figure, axes = blank_figure(title)
    best_first = sorted((name for name in curves if name != reference), key=lambda name: -areas[name])
    for name, (colour, dash, marker) in zip(best_first, line_styles(best_first), strict=True):
        radii, fractions = curves[name]
        # A few marks a line, at different places, tell the lines apart in grey.
        every = (best_first.index(name) / len(best_first) * 0.2, 0.2)
        axes.step(
            radii,
            [100 * value for value in fractions],
            where="post",
            label=f"{name} ({areas[name]:.2f})",
            color=colour,
            linestyle=dash,
            marker=marker,
            markersize=5,
            markevery=every,
        )
    widest = max((curves[name][0][-1] for name in best_first), default=1.0)
    if reference in curves:
        radii, fractions = curves[reference]
        label = f"{reference}, an upper limit ({areas[reference]:.2f})"
        axes.step(radii, [100 * f for f in fractions], where="post", label=label, color="0.6", linewidth=1, zorder=1)
    axes.set(
        xlabel=f"eps ({norm}, units of the pixels)",
        ylabel="certified at eps (%)",
        xlim=(0, 1.05 * widest if widest > 0 else 1.0),
        ylim=(-2, 102),
    )
    add_legend(axes, len(curves))
    legend = axes.get_legend()
    assert legend is not None
    legend.set_title("relaxation (area × 100)")
    legend.get_title().set_fontsize(9)
    return figure


def certified_steps(radii: Sequence[float]) -> Curve:
    """Corners of a step curve: radii ascending from 0, and the fraction of all that is certified up to each."""
    positive, total = sorted(r for r in radii if r > 0), len(radii)
    left = len(positive)
    return [0.0, *positive], [left / total, *((left - 1 - i) / total for i in range(left))]


def panels(names: Sequence[str], title: str, *, width: float = 3.2, height: float = 2.3) -> tuple[Figure, list[Axes]]:
    """A figure with one pair of axes a name, at most three in a row."""
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = empty_figure(title, max(4.0, width * columns), max(2.8, 0.5 + height * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    every = [axes for row in grid for axes in row]
    for axes in every[len(names) :]:
        axes.remove()
    return figure, every[: len(names)]


def jump_panels(lines: pl.DataFrame, jumps: pl.DataFrame, line: int, *, title: str = "") -> Figure:
    """The loss along one line in weight space, a panel a relaxation; it breaks at each jump.

    Each jump has a stroke between its limits, in another colour, and a tick at the foot of the panel. Panels have
    scales of their own: relaxations differ in loss by orders of magnitude.
    """
    names = lines["relaxation"].unique(maintain_order=True).to_list()
    figure, axes_of = panels(names, title)
    for name, axes in zip(names, axes_of, strict=True):
        ours = (lines["relaxation"] == name) & (lines["line"] == line)
        at, loss = (100 * lines.filter(ours)["at"]).to_list(), lines.filter(ours)["loss"].to_list()
        found = jumps.filter((jumps["relaxation"] == name) & (jumps["line"] == line))
        places = (100 * found["at"]).to_list()
        xs, ys, strokes = _broken(at, loss, places)
        axes.plot(xs, ys, color="#0072B2", linewidth=1.2)
        for place, low, high in strokes:
            axes.plot([place, place], [low, high], color="#D55E00", linewidth=2.2, solid_capstyle="butt")
        axes.plot(
            places, [0.02] * len(places), "|", color="#D55E00", markersize=7, transform=axes.get_xaxis_transform()
        )
        count = f"{len(places)} jump{'s' * (len(places) != 1)}"
        axes.set_title(f"{name}: {count}", fontsize=9, loc="left")
        tidy(axes, grid=False)
        axes.ticklabel_format(useOffset=False)
        axes.locator_params(nbins=5)
    figure.supxlabel("step along the line (% of the weights' norm)", fontsize=9)
    figure.supylabel("certified loss", fontsize=9)
    return figure


def _broken(
    at: Sequence[float], loss: Sequence[float], places: Sequence[float]
) -> tuple[list[float], list[float], list[tuple[float, float, float]]]:
    """The line with a gap between the two limits of each jump, and the strokes that fill the gaps."""
    xs: list[float] = []
    ys: list[float] = []
    strokes = []
    left = sorted(places)
    for i, (x, y) in enumerate(zip(at, loss, strict=True)):
        if left and i and at[i - 1] <= left[0] <= x:
            strokes.append((left.pop(0), ys[-1], y))
            xs.append(x)
            ys.append(math.nan)
        xs.append(x)
        ys.append(y)
    return xs, ys, strokes


def sensitivity_panels(table: pl.DataFrame, *, title: str = "") -> Figure:
    """Relative change of the loss (above) and of its gradient (below) against the step, both logarithmic."""
    kinds = table["kind"].unique(maintain_order=True).to_list()
    names = table["relaxation"].unique(maintain_order=True).to_list()
    what = ("relative change", "gradient change")
    figure, axes_of = panels([f"{w}: {kind}" for w in what for kind in kinds], title, width=3.0)
    for place, axes in enumerate(axes_of):
        column, kind = what[place // len(kinds)], kinds[place % len(kinds)]
        for name, (colour, dash, marker) in zip(names, line_styles(names), strict=True):
            ours = table.filter((table["relaxation"] == name) & (table["kind"] == kind)).sort("step")
            style: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 4}
            axes.plot(ours["step"].to_list(), ours[column].to_list(), label=name, **style)
        axes.set(xscale="log", yscale="log")
        tidy(axes)
        axes.set_title(kind if kind == "gradient step" else f"{kind} steps", fontsize=9, loc="left")
        if place % len(kinds) == 0:
            label = "change of the loss / loss" if place == 0 else "change of the gradient\n/ its norm"
            axes.set_ylabel(label, fontsize=9)
    for row in range(2):
        # One scale a row, so that kinds compare.
        these = axes_of[row * len(kinds) : (row + 1) * len(kinds)]
        low, high = min(a.get_ylim()[0] for a in these), max(a.get_ylim()[1] for a in these)
        for axes in these:
            axes.set_ylim(low, high)
    handles, labels = axes_of[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside right center")
    figure.supxlabel("step (share of each weight tensor's norm)", fontsize=9)
    return figure


_SERIES = {
    "bound / unit": ("jumps of the bound\na unit of length", "count"),
    "largest bound": ("largest jump of the bound\n(logits)", "size"),
    "largest loss": ("largest jump of the loss", "size"),
    "travel": ("jumps' share of the loss's\nvariation (%)", "percent"),
    "predicted": ("change of the loss to what\nits gradient predicts", "ratio"),
    "agreement": ("cosine of the gradients\nbefore and after a step", "plain"),
    "certified": ("certified (%)", "percent"),
    "area": ("tightness (area × 100)", "plain"),
    "loss": ("certified loss", "log"),
}


def series_panels(table: pl.DataFrame, *, title: str = "") -> Figure:
    """Every quantity of a series against epochs, a line a relaxation; quantities that were not measured are left out.

    Sizes of jumps are logarithmic down to the smallest found, and linear to 0 below it.
    """
    from matplotlib.ticker import MaxNLocator

    names = table["relaxation"].unique(maintain_order=True).to_list()
    shown = [column for column in _SERIES if table[column].is_not_null().any()]
    figure, axes_of = panels(shown, title, width=3.0)
    for column, axes in zip(shown, axes_of, strict=True):
        heading, scale = _SERIES[column]
        factor = 100 if scale == "percent" else 1
        for name, (colour, dash, marker) in zip(names, line_styles(names), strict=True):
            ours = table.filter((table["relaxation"] == name) & table[column].is_not_null()).sort("epoch")
            style: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 4}
            # Many lie on the axis, at 0 jumps: their marks show whole.
            style["clip_on"] = scale not in ("count", "size")
            axes.plot(ours["epoch"].to_list(), (factor * ours[column]).to_list(), label=name, **style)
        _series_scale(axes, scale, table[column].drop_nulls().to_list())
        axes.set_title(heading, fontsize=9, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        tidy(axes)
    handles, labels = max((axes.get_legend_handles_labels() for axes in axes_of), key=lambda found: len(found[1]))
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside right center")
    figure.supxlabel("epoch", fontsize=9)
    return figure


def _series_scale(axes: Axes, scale: str, values: Sequence[float]) -> None:
    """The scale that a quantity of a series needs."""
    positive = [value for value in values if value > 0]
    if scale == "log" and positive:
        axes.set_yscale("log")
    elif scale == "size" and positive:
        axes.set_yscale("symlog", linthresh=min(positive), linscale=0.5)
        axes.set_ylim(bottom=0)
    elif scale in ("size", "count"):
        axes.set_ylim(bottom=0, top=None if positive else 1)
    elif scale == "percent":
        axes.set_ylim(-3, 103)
    elif scale == "ratio":
        # 1: the gradient says all; a jump may carry the ratio as far as it likes.
        axes.axhline(1, color="0.55", linewidth=1, zorder=1)
        if any(abs(value) > 2 for value in values):
            axes.set_yscale("symlog", linthresh=1)


def landscape_curves(points: pl.DataFrame, *, title: str = "") -> Figure:
    """The loss along one filter-normalised direction, a line a relaxation, on one logarithmic axis."""
    figure, axes = blank_figure(title)
    names = points["relaxation"].unique(maintain_order=True).to_list()
    for name, (colour, dash, _) in zip(names, line_styles(names), strict=True):
        ours = points.filter(points["relaxation"] == name).sort("a")
        axes.plot(ours["a"].to_list(), ours["loss"].to_list(), label=name, color=colour, linestyle=dash)
    axes.set(xlabel="step (1: as large as the weights)", ylabel="certified loss", yscale="log")
    # Curves fill the axes from side to side: the legend stands beside them, however few they are.
    add_legend(axes, max(len(names), 6))
    return figure


def landscape_maps(points: pl.DataFrame, *, title: str = "") -> Figure:
    """The loss over a plane of two filter-normalised directions, a map a relaxation, one logarithmic colour scale."""
    import numpy as np
    from matplotlib.colors import LogNorm

    names = points["relaxation"].unique(maintain_order=True).to_list()
    figure, axes_of = panels(names, title, height=2.7)
    losses = points["loss"].to_numpy()
    positive = losses[losses > 0]
    scale = LogNorm(positive.min(), positive.max()) if positive.size and positive.min() < positive.max() else None
    mesh = None
    for name, axes in zip(names, axes_of, strict=True):
        ours = points.filter(points["relaxation"] == name).sort("b", "a")
        a, b = (np.unique(ours[column].to_numpy()) for column in ("a", "b"))
        grid = ours["loss"].to_numpy().reshape(len(b), len(a))
        mesh = axes.pcolormesh(a, b, grid, norm=scale, cmap="cividis", shading="nearest", rasterized=True)
        if grid.min() < grid.max():
            axes.contour(
                a, b, np.log10(np.maximum(grid, 1e-300)), levels=6, colors="white", linewidths=0.5, linestyles="solid"
            )
        axes.plot([0], [0], marker="+", color="#D55E00", markersize=9)
        axes.set_title(name, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.set_aspect("equal")
    if mesh is not None:
        figure.colorbar(mesh, ax=axes_of, label="certified loss (one scale; white lines: each map's own levels)")
    figure.supxlabel("step along the first direction (1: as large as the weights)", fontsize=9)
    figure.supylabel("step along the second", fontsize=9)
    return figure
