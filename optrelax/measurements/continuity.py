"""Continuity in the weights: the jumps of a bound and of the certified loss along lines in weight space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.analysis import Net
from optrelax.frozen import field_values
from optrelax.measurements.jump_tables import jump_table, relaxation_table, sample_table
from optrelax.measurements.line_searches import OWNER, SearchedLine, search_line
from optrelax.measurements.questions import MarginProblem, ask, require_positive
from optrelax.measurements.stages import DEFAULT, MeasuredTable, ReportProgress, reporter
from optrelax.measurements.weight_lines import (
    Direction,
    MovingWeights,
    Weights,
    given_direction,
    gradient_of,
    length_of,
    moving,
    random_direction,
    scaled,
)
from optrelax.regions import Region
from optrelax.relaxations import NamedRelaxations, Relaxation

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

__all__ = ["Continuity", "measure_continuity"]


@dataclass(frozen=True, slots=True, eq=False)
class Continuity(MeasuredTable):
    """Result of `measure_continuity`: jumps along lines in weight space, one row a relaxation.

    A unit of length is the norm of all weights: a line of length 0.01 changes them by 1 %.

    Example:
        >>> net, x = ox.models.fc(2, 4, 2, seed=0), torch.full((1, 2), 0.5)
        >>> found = ox.measure_continuity(net, (x, net(x).argmax(1)), 0.1, "box", lines=1, examples=1, cells=4)
        >>> found.jumps.columns
        ['relaxation', 'line', 'at', 'bound', 'loss', 'cause']
    """

    table: pl.DataFrame
    """relaxation; lines, length: of all lines together, in units; bound jumps, loss jumps: found on them; bound / unit,
    loss / unit; largest bound, largest loss: sizes, in logits and in the loss's units; mean bound, mean loss: of a
    jump, so that number times mean is what jumps make a unit; travel: share of the loss's total variation on these
    lines that jumps make; causes: what switched; listed: where arXiv 2102.06700 says that it may jump; verdict;
    evaluations; complete: the budget sufficed."""
    jumps: pl.DataFrame
    """relaxation, line, at (in units from the start), bound (largest jump of any margin's bound, with its sign), loss,
    cause."""
    lines: pl.DataFrame
    """relaxation, line, at, loss, bound (mean over examples of the smallest margin's): samples, and both limits of
    every jump."""
    settings: Mapping[str, object]
    """JSON-ready."""

    def figure(self, title: str = "", line: int = 0) -> Figure:
        """The loss along one line, a panel a relaxation, jumps marked by both limits."""
        from optrelax.measurements.figures import jump_panels

        return jump_panels(self.lines, self.jumps, line, title=title)


def measure_continuity(
    net: Net,
    data: object,
    eps: float,
    relaxations: NamedRelaxations = DEFAULT,
    *,
    direction: Direction | Mapping[str, Tensor] | Net = "gradient",
    length: float | None = None,
    lines: int = 4,
    examples: int = 4,
    clip: tuple[float, float] | None = (0.0, 1.0),
    norm: str = "linf",
    least: float = 1e-9,
    cells: int = 32,
    budget: int = 20000,
    seed: int = 0,
    progress: ReportProgress | None = None,
) -> Continuity:
    """Find the jumps of each relaxation's bounds, and of the certified loss on them, as the weights move along lines.

    Every event at which the relaxation can switch (a pre-activation bound at a kink, a tie between lines) is located
    between samples and closed in on to floating-point resolution, in float64; a jump is the difference of the two
    neighbouring values, so both one-sided limits are values of the function. Jumps of another cause (a user's own
    relaxation) are found where they outweigh the smooth change between samples.

    Args:
        net: moved in float64 during the measurement and put back bit for bit.
        data: as for `certify`.
        eps: as for `certify`.
        relaxations: as for `compare`.
        direction: "gradient" (down the relaxation's own loss on the line's examples), "random", a mapping from
            parameter names to tensors, or another network of the same shape: the line then ends there.
        length: of a line, in norms of all weights, default 0.01; along a mapping, or to another network, in lengths of
            that way, default 1.
        lines: each from the same weights.
        examples: of each line's own, evenly spaced.
        clip: as for `certify`.
        norm: as for `certify`.
        least: smallest jump that counts, times max(1, |value|). Over boxes LP layers are solved by an interior-point
            method where they have the default solver, and `settings["solvers"]` says so; their jumps must exceed their
            certified gap and 1e-5.
        cells: of the grid that begins each search.
        budget: evaluations a line at most.
        seed: of random directions.
        progress: called as the lines go on.

    Returns:
        Tables of relaxations, jumps and lines.

    Raises:
        ValueError: for bad input or a bound that is not finite.
        UnsupportedOpError: as `capture`.

    Example:
        >>> net, x = ox.models.fc(2, 4, 2, seed=0), torch.full((1, 2), 0.5)
        >>> found = ox.measure_continuity(net, (x, net(x).argmax(1)), 0.1, "box", lines=1, examples=1, cells=4)
        >>> found.table["bound jumps"].item()  # Box is continuous in the weights
        0
    """
    require_positive(OWNER, length=length, least=least, cells=cells, budget=budget, lines=lines, examples=examples)
    fixed = not isinstance(direction, str)
    count = 1 if fixed else lines
    question = ask(OWNER, net, data, relaxations, eps, clip, count * examples, norm)
    rows: list[SearchedLine] = []
    with moving(question.network) as weights:
        size = length_of(weights.origin)
        if size == 0:
            raise ValueError(f"{OWNER}: all weights are 0, and a unit of length is their norm")
        precise = {name: _precise(relaxation, question.region) for name, relaxation in question.relaxations.items()}
        stages = [(name, i) for name in precise for i in range(count)]
        for done, (name, i) in enumerate(stages):
            relaxation = precise[name]
            part = question.part(slice(i * examples, (i + 1) * examples))
            way = _direction(part, weights, relaxation, direction, seed + i)
            if length_of(way) == 0:
                raise ValueError(f"{OWNER}: the direction has norm 0, so there is no line along it")
            reach = 1.0 if length is None and fixed else (length if length is not None else 0.01)
            line = search_line(part, weights, relaxation, way, reach, least, cells, budget)
            rows.append(replace(line, name=name, line=i, unit=length_of(way) / size))
            reporter(progress)(name, done + 1, len(stages))
    settings = question.settings() | {"direction": "given" if fixed else direction, "length": reach, "lines": count}
    settings |= {"examples a line": examples, "least": least, "cells": cells, "budget": budget, "seed": seed}
    settings["solvers"] = {name: repr(field_values(one)["solver"]) for name, one in precise.items() if one.solves}
    return Continuity(relaxation_table(question, rows), jump_table(rows), sample_table(rows), settings)


def _precise(relaxation: Relaxation, region: Region) -> Relaxation:
    """Over boxes an LP layer with the default solver gets the precise one: a jump must stand out from the gaps."""
    from optrelax.layers import DualAscent, InteriorPoint

    if region.as_box is not None and relaxation.solves and field_values(relaxation)["solver"] == DualAscent():
        return relaxation.changed(solver=InteriorPoint())
    return relaxation


def _direction(
    part: MarginProblem,
    weights: MovingWeights,
    relaxation: Relaxation,
    direction: Direction | Mapping[str, Tensor] | Net,
    seed: int,
) -> Weights:
    if isinstance(direction, str):
        if direction == "random":
            generator = torch.Generator().manual_seed(seed)
            return random_direction(weights.origin, generator, OWNER)
        if direction != "gradient":
            raise ValueError(
                f"{OWNER}: direction must be 'gradient', 'random', tensors or a network, got {direction!r}"
            )
        weights.shift(tuple(torch.zeros_like(w) for w in weights.origin))
        lower = relaxation.lower_bounds(part.network, part.region, part.rows)
        _, gradient = gradient_of(lower, weights.parameters)
        return scaled(tuple(-g for g in gradient), weights.origin, OWNER)
    return given_direction(part.network, direction, weights.origin, OWNER)
