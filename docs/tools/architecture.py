"""Draws docs/figures/architecture.png: python docs/tools/architecture.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

FIGURE = Path(__file__).resolve().parent.parent / "figures" / "architecture.png"
INK, FAINT = "#1f2933", "#7b8794"
FILL = {"ground": "#e4ecf7", "layers": "#fde8d7", "use": "#e3f1e5", "top": "#f1e7f5"}

# left, bottom, width, height, name, what is in it, kind
ROOMS = (
    (0.2, 6.75, 9.6, 0.75, "cli", "commands, options, progress", "top"),
    (0.2, 5.65, 9.6, 0.75, "papers", "the tables of the literature, the barrier table", "top"),
    (0.2, 4.35, 3.1, 0.95, "training", "losses, recipes,\nruns that resume", "use"),
    (3.45, 4.35, 3.1, 0.95, "certification", "verdicts, attacks,\nproperties, comparison", "use"),
    (6.7, 4.35, 3.1, 0.95, "measurements", "tightness, continuity,\nsensitivity, landscape", "use"),
    (0.2, 3.05, 9.6, 0.95, "layers", "network LPs: problems, ascent, triangle, layerwise, alpha-CROWN\n"
     "programs: LP, QP, MILP, their solvers, safe bounds, gradients", "layers"),
    (0.2, 1.75, 4.7, 0.95, "relaxations", "the named choices,\ntheir memory, the registry", "ground"),
    (5.1, 1.75, 4.7, 0.95, "domains", "intervals, zonotopes, lines,\nback-substitution, windows", "ground"),
    (0.2, 0.45, 3.1, 0.95, "networks", "capture, graph, ops,\nactivations, files", "ground"),
    (3.45, 0.45, 2.1, 0.95, "regions", "boxes, balls", "ground"),
    (5.7, 0.45, 2.1, 0.95, "kernels", "C, Triton", "ground"),
    (7.95, 0.45, 1.85, 0.95, "data, output", "readers; tables,\nplots, journals", "ground"),
)  # fmt: skip
# Who asks whom, one step of the way of a bound: from the middle of one edge to another.
ARROWS = (
    (5.0, 6.75, 5.0, 6.4), (5.0, 5.65, 5.0, 5.3), (1.75, 4.35, 1.75, 4.0), (5.0, 4.35, 5.0, 4.0),
    (8.25, 4.35, 8.25, 4.0), (2.55, 3.05, 2.55, 2.7), (7.45, 3.05, 7.45, 2.7), (4.9, 2.22, 5.1, 2.22),
    (1.75, 1.75, 1.75, 1.4), (5.5, 1.75, 4.9, 1.4), (6.75, 1.75, 6.75, 1.4),
)  # fmt: skip


def draw(axes: Axes) -> None:
    """Rooms, a floor above what it stands on, and the way down."""
    for left, bottom, width, height, name, inside, kind in ROOMS:
        shape = FancyBboxPatch(
            (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=FILL[kind], ec=INK, lw=1.0
        )
        axes.add_patch(shape)
        middle = left + width / 2
        axes.text(middle, bottom + height - 0.22, name, ha="center", va="center", weight="bold", color=INK, size=11)
        axes.text(middle, bottom + (height - 0.38) / 2, inside, ha="center", va="center", color=INK, size=8.5)
    for x, y, to_x, to_y in ARROWS:
        axes.annotate("", (to_x, to_y), (x, y), arrowprops={"arrowstyle": "-|>", "color": FAINT, "lw": 1.4})
    axes.set(xlim=(0, 10), ylim=(0.3, 7.6))
    axes.axis("off")


if __name__ == "__main__":
    figure, axes = plt.subplots(figsize=(9, 6.4), layout="constrained")
    draw(axes)
    figure.savefig(FIGURE, dpi=110)
