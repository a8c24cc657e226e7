"""Loss landscape: slices of the certified loss around a checkpoint, by many relaxations on one scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optrelax.analysis import Net
from optrelax.checks import require_range
from optrelax.measurements.questions import ask, require_positive
from optrelax.measurements.stages import DEFAULT, ReportProgress, reporter
from optrelax.measurements.weight_lines import filter_normalised, moving
from optrelax.relaxations import NamedRelaxations
from optrelax.training.loss_terms import certified_cross_entropy

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

__all__ = ["Landscape", "measure_landscape"]

_OWNER = "measure_landscape"


@dataclass(frozen=True, slots=True, eq=False)
class Landscape:
    """Result of `measure_landscape`: the certified loss at every point of a slice, all relaxations on the same one.

    Example:
        >>> net, x = ox.models.fc(2, 4, 2, seed=0), torch.full((1, 2), 0.5)
        >>> found = ox.measure_landscape(net, (x, net(x).argmax(1)), 0.1, "box", dimensions=1, points=3, examples=1)
        >>> found.points["a"].to_list()
        [-0.5, 0.0, 0.5]
    """

    points: pl.DataFrame
    """relaxation, a, b (steps along the two directions; b is 0 on a line), loss."""
    settings: Mapping[str, object]
    """JSON-ready."""

    def summary(self) -> dict[str, object]:
        """Settings, and by relaxation the loss at the centre, least, greatest, and the roughness: the mean absolute
        second difference along a to the mean absolute first one, 0 on a straight line."""
        return {**self.settings, "table": self.table().to_dicts()}

    def table(self) -> pl.DataFrame:
        """What `summary` says, one row a relaxation."""
        import polars as pl

        rows = []
        for name in self.points["relaxation"].unique(maintain_order=True):
            ours = self.points.filter(pl.col("relaxation") == name)
            center = ours.filter((pl.col("a") == 0) & (pl.col("b") == 0))["loss"].item()
            rows.append(
                {
                    "relaxation": name,
                    "center": center,
                    "least": ours["loss"].min(),
                    "greatest": ours["loss"].max(),
                    "roughness": _roughness(ours),
                }
            )
        return pl.DataFrame(rows)

    def figure(self, title: str = "") -> Figure:
        """Curves on one logarithmic axis for a line; maps on one logarithmic colour scale for a plane."""
        from optrelax.measurements.figures import landscape_curves, landscape_maps

        draw = landscape_curves if self.settings["dimensions"] == 1 else landscape_maps
        return draw(self.points, title=title)


def _roughness(points: pl.DataFrame) -> float:
    first, second = [], []
    for b in points["b"].unique(maintain_order=True):
        loss = torch.tensor(
            points.filter(points["b"] == b).sort("a")["loss"].to_list(), dtype=torch.float64, device="cpu"
        )
        first.append(loss.diff().abs())
        second.append(loss.diff().diff().abs())
    slope = float(torch.cat(first).mean())
    return float(torch.cat(second).mean()) / slope if slope > 0 else 0.0


def measure_landscape(
    net: Net,
    data: object,
    eps: float,
    relaxations: NamedRelaxations = DEFAULT,
    *,
    dimensions: int = 2,
    radius: float = 0.5,
    points: int = 21,
    examples: int = 16,
    clip: tuple[float, float] | None = (0.0, 1.0),
    norm: str = "linf",
    seed: int = 0,
    progress: ReportProgress | None = None,
) -> Landscape:
    """The certified loss on some examples over a line or a plane of weights through the network's own.

    Directions are random and filter-normalised: each filter's (row's) step is as long as the filter, biases stay, so
    a step of 1 is as large as the weights. All relaxations see the same directions and examples.

    Args:
        net: moved in float64 during the measurement and put back bit for bit.
        data: as for `certify`.
        eps: as for `certify`.
        relaxations: as for `compare`.
        dimensions: 1 or 2.
        radius: largest step either way.
        points: along each direction, odd, so that the network itself is one of them.
        examples: evenly spaced.
        clip: as for `certify`.
        norm: as for `certify`.
        seed: of the directions.
        progress: called as points are done.

    Returns:
        A table of points.

    Raises:
        ValueError: for bad input.
        UnsupportedOpError: for a network that cannot be bounded.

    Source: Li et al. 2018.

    Example:
        >>> net, x = ox.models.fc(2, 4, 2, seed=0), torch.full((1, 2), 0.5)
        >>> found = ox.measure_landscape(net, (x, net(x).argmax(1)), 0.1, ["box", "crown"], points=3, examples=1)
        >>> found.points.height  # two relaxations, 3 x 3 points
        18
    """
    if dimensions not in (1, 2):
        raise ValueError(f"{_OWNER}: dimensions must be 1 or 2, got {dimensions}")
    require_positive(_OWNER, radius=radius)
    if points < 3 or points % 2 == 0:
        raise ValueError(f"{_OWNER}: points must be odd and at least 3, got {points}")
    require_range(_OWNER, "at least 1", examples=examples)
    question = ask(_OWNER, net, data, relaxations, eps, clip, examples, norm)
    half = points // 2
    steps = [radius * i / half for i in range(-half, half + 1)]
    places = [(a, b) for b in (steps if dimensions == 2 else [0.0]) for a in steps]
    rows: list[tuple[str, float, float, float]] = []
    with moving(question.network) as weights, torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        first, second = (filter_normalised(weights.origin, generator) for _ in range(2))
        for done, (a, b) in enumerate(places):
            weights.shift(tuple(a * d + b * e for d, e in zip(first, second, strict=True)))
            for name, relaxation in question.relaxations.items():
                lower = relaxation.lower_bounds(question.network, question.region, question.rows)
                rows.append((name, a, b, float(certified_cross_entropy(lower))))
            reporter(progress)("landscape", done + 1, len(places))
    import polars as pl

    frame = pl.DataFrame(rows, schema=["relaxation", "a", "b", "loss"], orient="row")
    order = {name: i for i, name in enumerate(question.relaxations)}
    frame = frame.sort(pl.col("relaxation").replace_strict(order), "b", "a", maintain_order=True)
    settings = question.settings() | {"dimensions": dimensions, "radius": radius, "points": points, "seed": seed}
    return Landscape(frame, settings)
