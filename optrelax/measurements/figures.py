"""Figures of the measurements, in the look of `optrelax.plots`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from optrelax.plots import add_legend, blank_figure, line_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["tightness_curves"]

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
