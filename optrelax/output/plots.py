"""Plots that read in colour, to colour-blind eyes, and in grey: each line has its own colour, dash and marker.

Figures are made without pyplot, so no global state of matplotlib is touched and no window opens.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optrelax.output.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Point",
    "add_legend",
    "blank_figure",
    "certified_against_eps",
    "empty_figure",
    "line_styles",
    "tidy",
    "tightness_against_time",
    "write_figure",
]

Dash = str | tuple[int, tuple[int, ...]]

# Okabe and Ito 2008 without yellow (too light on white): told apart by the common forms of colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_DASHES: tuple[Dash, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
# One relaxation, one look, in every figure: its place here decides. The first seven have a colour each.
_PLACES = (
    *("box", "crown", "triangle", "deepz", "layerwise", "crown-ibp", "hbox"),
    *("alpha-crown", "fast-lin", "hzono", "crown-0", "crown-1", "crown-soft", "crown-ibp-soft", "cauchy"),
    *("hbox-diag", "hbox-diag-c", "hbox-switch", "deepz-box", "deepz-diag", "deepz-diag-c", "deepz-switch"),
    *("deepz-soft", "deepz-slanted", "crown-0-c", "crown-1-c", "crown-0-tria", "crown-1-tria", "crown-0-tria-c"),
    *("crown-1-tria-c", "box-widen", "box-round"),
)


@dataclass(frozen=True, slots=True)
class Point:
    """One relaxation on one network: what it costs and what it gives."""

    name: str
    seconds: float
    """An example, all margins; > 0."""
    bound: float
    """Mean over examples of the worst margin's lower bound, in logits."""


def certified_against_eps(
    eps: Sequence[float],
    certified: Mapping[str, Sequence[float]],
    *,
    title: str = "",
    reference: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Certified accuracy in percent against the radius, one step curve a relaxation, the best first.

    Between two radii it stands at what holds there: what is certified at the larger one; of the references, which are
    limits, what is left at the smaller one.
    eps: radii in units of the pixels.  certified: fractions in [0, 1] by relaxation, one a radius.
    reference: further lines without markers, in grey, such as the accuracy under attack.
    Raises ValueError where a line has another length than eps, or no line is given.
    """
    lines = {**certified, **(reference or {})}
    if not certified or not len(eps):
        raise ValueError("certified_against_eps: needs at least one radius and one line")
    for name, values in lines.items():
        if len(values) != len(eps):
            raise ValueError(f"certified_against_eps: {name} has {len(values)} values for {len(eps)} radii")
    figure, axes = blank_figure(title)
    best_first = sorted(certified.items(), key=lambda item: -sum(item[1]))
    for (name, values), (colour, dash, marker) in zip(best_first, line_styles(dict(best_first)), strict=True):
        percent = [100 * value for value in values]
        look: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 5}
        axes.step(eps, percent, where="pre", label=name, linewidth=1.3, **look)
    for i, (name, values) in enumerate((reference or {}).items()):
        percent = [100 * value for value in values]
        axes.step(
            eps, percent, where="post", label=name, color="0.55", linestyle=_DASHES[i % len(_DASHES)], linewidth=1
        )
    axes.set(xlabel="eps (maximum norm, units of the pixels)", ylabel="certified accuracy (%)", ylim=(-2, 102))
    if len(eps) <= 7:
        axes.set_xticks(list(eps))
    add_legend(axes, len(lines))
    return figure


def tightness_against_time(
    points: Sequence[Point], *, title: str = "", exact: float | None = None, exact_label: str = "exact (MILP)"
) -> Figure:
    """Mean bound against time: up and to the left is better.

    Bounds are shown by their distance to the tightest value drawn, on a scale that is logarithmic far from it: LPs
    differ from CROWN by hundredths of a logit where Box is tens of logits away.
    exact: the mean of the exact worst margins, drawn as a line that no sound bound crosses.  exact_label: what it is.
    Raises ValueError without points, or for a time that is not positive.
    """
    if not points:
        raise ValueError("tightness_against_time: needs at least one point")
    for point in points:
        if not point.seconds > 0:
            raise ValueError(f"tightness_against_time: {point.name} took {point.seconds} s; a time must be > 0")
    figure, axes = blank_figure(title)
    _log_time(axes, [1e3 * point.seconds for point in points])
    _distance_scale(axes, [point.bound for point in points] + ([] if exact is None else [exact]))
    best_first = sorted(points, key=lambda point: -point.bound)
    looks = line_styles([point.name for point in best_first])
    for i, (point, (colour, _, marker)) in enumerate(zip(best_first, looks, strict=True)):
        place = [1e3 * point.seconds], [point.bound]
        # White edges, the tightest on top: points that lie together stay apart.
        look: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markersize": 8,
            "markeredgecolor": "white",
            "zorder": 9 - 0.1 * i,
        }
        axes.plot(*place, label=point.name, linestyle="none", **look)
    if exact is not None:
        axes.axhline(exact, color="0.55", linestyle="--", linewidth=1, label=exact_label)
    axes.set_xlabel("time (ms an example)")
    add_legend(axes, len(points) + (exact is not None))
    return figure


def _log_time(axes: Axes, times: Sequence[float]) -> None:
    """Logarithmic, with plain numbers; 1, 2 and 5 of each decade where decades alone would be too few."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    wide = max(times) > 30 * min(times)
    axes.set_xlim(min(times) / 1.6, 1.6 * max(times))
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _distance_scale(axes: Axes, bounds: Sequence[float]) -> None:
    """Height by the distance to the largest bound: linear near it, logarithmic far away; ticks say the distance."""
    import numpy as np
    from matplotlib.ticker import FixedFormatter, FixedLocator

    top = max(bounds)
    distances = sorted({top - bound for bound in bounds} - {0.0})
    axes.set_ylabel("mean lower bound of the worst margin (logits)")
    if not distances:
        return
    # The nearest neighbour stands visibly below the top, whatever its distance; a thousandth of the range at least.
    unit = max(distances[0], distances[-1] / 1000)
    axes.set_yscale("function", functions=(lambda y: np.arcsinh((y - top) / unit), lambda h: top + unit * np.sinh(h)))
    decades = range(math.floor(math.log10(unit)), math.ceil(math.log10(distances[-1])) + 1)
    nice = [m * 10.0**k for k in decades for m in (1, 2, 5)]
    ticks = [0.0, *(d for d in nice if unit / 2 <= d <= 1.3 * distances[-1])]
    if len(ticks) > 9:
        ticks = [d for d in ticks if d == 0 or math.isclose(math.log10(d), round(math.log10(d)))]
    axes.yaxis.set_major_locator(FixedLocator([top - d for d in ticks]))
    labels = [f"{top:.4g}".replace("-", "\u2212") if d == 0 else f"{d:g} lower" for d in ticks]
    axes.yaxis.set_major_formatter(FixedFormatter(labels))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    height = math.asinh(distances[-1] / unit)
    axes.set_ylim(top - unit * math.sinh(1.08 * height), top + unit * math.sinh(0.08 * height))


def write_figure(figure: Figure, path: str | os.PathLike[str], *, svg: bool = True) -> list[Path]:
    """Write a figure as PNG (150 dots an inch) and, beside it, as SVG; returns the paths.

    path: ends in .png.  Raises ValueError for another ending, OSError where it cannot be written.
    """
    from matplotlib import rc_context

    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"write_figure: {path.name} must end in .png; the SVG is written beside it")
    written = []
    for target in [path, path.with_suffix(".svg")] if svg else [path]:
        # Text as text, and no date or random ids in the SVG: the same figure makes the same bytes.
        with replacing(target) as temporary, rc_context({"svg.fonttype": "none", "svg.hashsalt": "optrelax"}):
            metadata = {"Date": None} if target.suffix == ".svg" else None
            figure.savefig(temporary, dpi=150, metadata=metadata)
        written.append(target)
    return written


def empty_figure(title: str, width: float = 6.4, height: float = 4.2) -> Figure:
    """A figure that belongs to no window, without axes, its title at the left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def tidy(axes: Axes, *, grid: bool = True, small: bool = True) -> None:
    """No frame above and at the right, a light grid behind everything, and small numbers."""
    if grid:
        axes.grid(True, color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if small:
        axes.tick_params(which="both", labelsize=8)


def blank_figure(title: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes and a light grid; it belongs to no window."""
    figure = empty_figure("")
    axes = figure.add_subplot()
    tidy(axes, small=False)
    if title:
        axes.set_title(title, fontsize=11, loc="left")
    return figure, axes


def line_styles(names: Iterable[str]) -> list[tuple[str, Dash, str]]:
    """Colour, dash and marker of each name: a relaxation's own in every figure, what is free for other names.

    Dash and marker together repeat after 55 lines only.
    """
    given = list(names)
    free = iter(i for i in itertools.count() if i >= len(_PLACES) or _PLACES[i] not in given)
    places = [_PLACES.index(name) if name in _PLACES else next(free) for name in given]
    return [(_COLOURS[i % len(_COLOURS)], _DASHES[i % len(_DASHES)], _MARKERS[i % len(_MARKERS)]) for i in places]


def add_legend(axes: Axes, lines: int) -> None:
    """Inside the axes for a few lines; beside them for many, where it would cover the data."""
    if lines <= 5:
        axes.legend(frameon=False, fontsize=9)
    else:
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
