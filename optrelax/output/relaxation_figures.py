"""Relaxations of one neuron, drawn from the very lines that bounds are computed with."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optrelax.checks import require_number
from optrelax.networks.activations import Activation, Hull, Line, relu
from optrelax.relaxations import Relaxation, name_of, names, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["neuron_hull", "relaxation_panels"]

_BELOW, _ABOVE = (
    "#0072B2",
    "#D55E00",
)  # of the plots' palette; dashed and solid, for eyes without colours
_COLUMNS = 4


def neuron_hull(
    relaxation: Relaxation | str, l: Tensor, u: Tensor, activation: Activation | None = None
) -> Hull | None:
    """The lines that a relaxation puts around an activation (default: ReLU) over [l, u], two a side.

    A side with one line states it twice. The LP layers and alpha-crown take the hull itself; Box the image of [l, u].
    l, u alike, of any shape; lines alike.  None for a relaxation that is not made of lines over [l, u], such as
    `box-widen`, which moves the ends first, or an intersection.
    """
    return resolve(relaxation).neuron_hull(activation or relu(), l, u)


def relaxation_panels(
    lower: float = -1.0,
    upper: float = 2.0,
    relaxations: Sequence[Relaxation | str] | None = None,
    *,
    activation: Activation | None = None,
    title: str | None = None,
) -> Figure:
    """What each relaxation makes of one neuron whose pre-activation lies in [lower, upper].

    One panel for all relaxations with equal lines there: the activation, the lines below and above, what lies between
    them, and its area. relaxations: names or objects; default: every sound one that is made of lines, registered ones
    too. activation: default ReLU.  title: default says what is drawn.
    Raises ValueError unless lower < upper are finite, and for a relaxation that is not made of lines.
    """
    for what, value in (("lower", lower), ("upper", upper)):
        require_number("relaxation_panels", what, value)
    if not (math.isfinite(lower) and math.isfinite(upper) and lower < upper):
        raise ValueError(f"relaxation_panels: needs finite lower < upper, got {lower:g} and {upper:g}")
    function = activation or relu()
    groups = _grouped(relaxations, lower, upper, function)
    headings = [textwrap.wrap(", ".join(named), 30, break_on_hyphens=False) for _, named in groups]
    figure, every = _panels([len(lines) + 1 for lines in headings])
    if title is None:
        title = f"One {function.name} neuron, pre-activation in [{lower:g}, {upper:g}]"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    for axes, (hull, _), heading in zip(every, groups, headings, strict=True):
        area = _draw(axes, hull, function, lower, upper)
        axes.set_title("\n".join([*heading, f"area {area:.2f}"]), fontsize=8.5, loc="left")
    # One scale, so that areas compare by eye.
    bottom, top = min(axes.get_ylim()[0] for axes in every), max(axes.get_ylim()[1] for axes in every)
    for axes in every:
        axes.set_ylim(bottom, top)
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    return figure


def _grouped(
    relaxations: Sequence[Relaxation | str] | None, lower: float, upper: float, activation: Activation
) -> list[tuple[Hull, list[str]]]:
    """Relaxations with equal lines together, in the order given."""
    l, u = (torch.tensor(end, dtype=torch.float64) for end in (lower, upper))
    groups: dict[tuple[float, ...], tuple[Hull, list[str]]] = {}
    for relaxation in names() if relaxations is None else relaxations:
        found = resolve(relaxation)
        name = relaxation if isinstance(relaxation, str) else name_of(relaxation)
        hull = neuron_hull(found, l, u, activation)
        if hull is None or (relaxations is None and not found.sound):
            if relaxations is not None:
                raise ValueError(f"relaxation_panels: {name} is not made of lines over [lower, upper]; choose another")
            continue
        key = tuple(round(float(t), 12) for line in (*hull.below, *hull.above) for t in line)
        groups.setdefault(key, (hull, []))[1].append(name)
    if not groups:
        raise ValueError("relaxation_panels: needs at least one relaxation")
    return list(groups.values())


def _panels(headings: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """A figure of its own with one pair of axes for each heading of so many lines, four in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(headings)
    columns = min(_COLUMNS, count)
    tallest = [max(headings[i : i + columns]) for i in range(0, count, columns)]
    height = 0.8 + sum(1.8 + 0.16 * lines for lines in tallest)
    figure = Figure(figsize=(max(4.8, 2.5 * columns), height), layout="constrained")
    FigureCanvasAgg(figure)
    every = list(figure.subplots(len(tallest), columns, squeeze=False).flat)
    for axes in every[count:]:
        axes.remove()
    return figure, every[:count]


def _draw(axes: Axes, hull: Hull, activation: Activation, lower: float, upper: float) -> float:
    """The activation a little beyond [lower, upper], the lines and what they enclose within it; returns its area."""
    floor, ceiling = _distinct(hull.below), _distinct(hull.above)
    xs = sorted({lower, upper, *_breaks(floor, lower, upper), *_breaks(ceiling, lower, upper)})
    low = [max(s * x + i for s, i in floor) for x in xs]
    high = [min(s * x + i for s, i in ceiling) for x in xs]
    heights = [b - a for a, b in zip(low, high, strict=True)]
    area = sum((x1 - x0) * (h0 + h1) / 2 for x0, x1, h0, h1 in zip(xs, xs[1:], heights, heights[1:], strict=False))
    beyond = 0.15 * (upper - lower)
    grid = torch.linspace(lower - beyond, upper + beyond, 129, dtype=torch.float64).tolist()
    points = sorted({*grid, *activation.breaks})
    values = activation(torch.tensor(points, dtype=torch.float64)).tolist()
    # Wide and grey, so that a line that runs along it is seen.
    axes.plot(points, values, color="0.5", linewidth=4, label=activation.name)
    styles: list[tuple[list[tuple[float, float]], dict[str, Any]]] = [
        (ceiling, {"color": _ABOVE, "linestyle": "-", "label": "lines above"}),
        (floor, {"color": _BELOW, "linestyle": (0, (4, 2)), "label": "lines below"}),
    ]
    for lines, style in styles:
        for slope, intercept in lines:
            ends = [slope * x + intercept for x in (lower, upper)]
            axes.plot([lower, upper], ends, linewidth=1.6, **style)
            style.pop("label", None)  # one entry in the legend for both lines of a side
    axes.fill_between(xs, low, high, color="0.88", linewidth=0, zorder=0.5, label="what they allow")
    axes.set_xlim(lower - beyond, upper + beyond)
    ticks = [lower, upper]
    for at in activation.breaks:  # but where labels would run into each other
        if lower < at < upper and min(abs(at - other) for other in ticks) > 0.15 * (upper - lower):
            ticks.append(at)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.set_xlabel("pre-activation", fontsize=8)
    axes.locator_params(axis="y", nbins=4)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return area


def _distinct(lines: tuple[Line, Line]) -> list[tuple[float, float]]:
    """Slopes and intercepts as numbers, a line that is stated twice once."""
    return list(dict.fromkeys((float(slope), float(intercept)) for slope, intercept in lines))


def _breaks(lines: list[tuple[float, float]], lower: float, upper: float) -> list[float]:
    """Where the two lines of a side meet, within [lower, upper]."""
    if len(lines) < 2 or lines[0][0] == lines[1][0]:
        return []
    (s0, i0), (s1, i1) = lines
    meeting = (i0 - i1) / (s1 - s0)
    return [meeting] if lower < meeting < upper else []
