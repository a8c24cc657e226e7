"""Figures of the measurements, in the look of `optrelax.plots`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from optrelax.plots import add_legend, blank_figure, line_styles

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["jump_panels", "panels", "tightness_curves"]

Curve = tuple[list[float], list[float]]


def tightness_curves(
    curves: Mapping[str, Curve], areas: Mapping[str, float], *, title: str = "", reference: str = ""
) -> Figure:
    """Certified fraction in percent against eps: a step curve each, the greatest area first.

    curves: radii ascending and the fraction certified beyond each.  reference: the curve drawn in grey, as a limit.
    """
    figure, axes = blank_figure(title)
    best_first = sorted((name for name in curves if name != reference), key=lambda name: -areas[name])
    for name, (colour, dash, marker) in zip(best_first, line_styles(len(best_first)), strict=True):
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
        xlabel="eps (maximum norm, units of the pixels)",
        ylabel="certified at eps (%)",
        xlim=(0, 1.05 * widest if widest > 0 else 1.0),
        ylim=(-2, 102),
    )
    add_legend(axes, len(curves))
    legend = axes.get_legend()
    assert legend is not None
    legend.set_title("relaxation (area × 100)", {"size": 9})
    return figure


def panels(names: Sequence[str], title: str, *, width: float = 3.2, height: float = 2.3) -> tuple[Figure, list[Axes]]:
    """A figure with one pair of axes a name, at most three in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(4.0, width * columns), max(2.8, 0.5 + height * rows)), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
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
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
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
