"""Continuity in the weights: the jumps of a bound and of the certified loss along lines in weight space."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optrelax.analysis import Net
from optrelax.measurements.jumps import Jump, JumpFinder, LineJumps, Sample
from optrelax.measurements.questions import MarginProblem, ask
from optrelax.measurements.stages import MeasurementProgress, ReportProgress
from optrelax.measurements.switches import CAUSES, sources, switch_functions
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
from optrelax.networks.graph import Network
from optrelax.regions import InputBox, Region
from optrelax.relaxations import Relaxation
from optrelax.relaxations.jumps import EVERYWHERE, Jumps
from optrelax.training.losses import certified_cross_entropy

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

__all__ = ["DEFAULT", "Continuity", "measure_continuity"]

DEFAULT = ("box", "hbox", "crown-ibp", "deepz", "crown")
OTHER = "other"
_OWNER = "measure_continuity"
_SOLVED = 1e-5  # what an LP's bound may be off by where its pre-activation bounds are themselves LP optima, relative


@dataclass(frozen=True, slots=True, eq=False)
class Continuity:
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
    settings: Mapping[str, Any]
    """JSON-ready."""

    def summary(self) -> dict[str, Any]:
        """Settings and table, JSON-ready."""
        return {**self.settings, "table": self.table.to_dicts()}

    def figure(self, title: str = "", line: int = 0) -> Figure:
        """The loss along one line, a panel a relaxation, jumps marked by both limits."""
        from optrelax.measurements.figures import jump_panels

        return jump_panels(self.lines, self.jumps, line, title=title)


def measure_continuity(
    net: Net,
    data: Any,
    eps: float,
    relaxations: Relaxation | str | Sequence[Relaxation | str] | Mapping[str, Relaxation | str] = DEFAULT,
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
    _require(length=length, least=least, cells=cells, budget=budget, lines=lines, examples=examples)
    fixed = not isinstance(direction, str)
    count = 1 if fixed else lines
    question = ask(_OWNER, net, data, relaxations, eps, clip, count * examples, norm)
    rows: list[_Line] = []
    with moving(question.network) as weights:
        size = length_of(weights.origin)
        if size == 0:
            raise ValueError(f"{_OWNER}: all weights are 0, and a unit of length is their norm")
        precise = {name: _precise(relaxation, question.region) for name, relaxation in question.relaxations.items()}
        stages = [(name, i) for name in precise for i in range(count)]
        for done, (name, i) in enumerate(stages):
            relaxation = precise[name]
            part = question.part(slice(i * examples, (i + 1) * examples))
            way = _direction(part, weights, relaxation, direction, seed + i)
            if length_of(way) == 0:
                raise ValueError(f"{_OWNER}: the direction has norm 0, so there is no line along it")
            reach = 1.0 if length is None and fixed else (length if length is not None else 0.01)
            line = _search(part, weights, relaxation, way, reach, least, cells, budget)
            rows.append(replace(line, name=name, line=i, unit=length_of(way) / size))
            if progress is not None:
                progress(MeasurementProgress(name, done + 1, len(stages)))
    settings = question.settings() | {
        "direction": direction if isinstance(direction, str) else "given",
        "length": reach,
        "lines": count,
        "examples a line": examples,
        "least": least,
        "cells": cells,
        "budget": budget,
        "seed": seed,
        "solvers": {name: repr(relaxation.solver) for name, relaxation in precise.items() if relaxation.solves},
    }
    return Continuity(_table(question, rows), _jumps(rows), _samples(rows), settings)


def _require(**numbers: Any) -> None:
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{_OWNER}: {name} must be positive and finite, got {value}")


def _precise(relaxation: Any, region: Region) -> Any:
    """Over boxes an LP layer with the default solver gets the precise one: a jump must stand out from the gaps."""
    from optrelax.layers import DualAscent, InteriorPoint

    if isinstance(region, InputBox) and relaxation.solves and relaxation.solver == DualAscent():
        return replace(relaxation, solver=InteriorPoint())
    return relaxation


def _direction(
    part: MarginProblem,
    weights: MovingWeights,
    relaxation: Any,
    direction: Direction | Mapping[str, Tensor] | Net,
    seed: int,
) -> Weights:
    if isinstance(direction, str):
        if direction == "random":
            generator = torch.Generator().manual_seed(seed)
            return random_direction(weights.origin, generator, _OWNER)
        if direction != "gradient":
            raise ValueError(
                f"{_OWNER}: direction must be 'gradient', 'random', tensors or a network, got {direction!r}"
            )
        weights.shift(tuple(torch.zeros_like(w) for w in weights.origin))
        lower = relaxation.lower_bounds(part.network, part.region, part.rows)
        _, gradient = gradient_of(lower, weights.parameters)
        return scaled(tuple(-g for g in gradient), weights.origin, _OWNER)
    return given_direction(part.network, direction, weights.origin, _OWNER)


@dataclass(frozen=True, slots=True, eq=False)
class _Line:
    """What one line of one relaxation holds."""

    found: LineJumps
    causes: Tensor  # int [e], of every switch function
    margins: int  # values are that many margins' bounds, then the loss
    examples: int
    least: float
    name: str = ""
    line: int = 0
    unit: float = 1.0

    def cause(self, jump: Jump) -> str:
        """What switched at a jump."""
        changed = jump.left.differs(jump.right)
        kinds = sorted({int(k) for k in self.causes[changed]}) if changed.numel() else []
        return ", ".join(CAUSES[k] for k in kinds) or OTHER

    def bound(self, sample: Sample) -> float:
        """Mean over examples of the smallest margin's bound."""
        return float(sample.values[:-1].reshape(self.examples, -1).amin(1).mean())

    def bound_jump(self, jump: Jump) -> float:
        """The largest jump of a margin's bound, with its sign; 0 where none counts."""
        sizes = jump.size[:-1]
        return float(sizes[sizes.abs().argmax()])


def _search(
    part: MarginProblem,
    weights: MovingWeights,
    relaxation: Any,
    way: Weights,
    reach: float,
    least: float,
    cells: int,
    budget: int,
) -> _Line:
    causes: list[Tensor] = []

    def evaluate(t: float) -> Sample:
        weights.move(way, t)
        lower, noise, bounds = _bounds(relaxation, part.network, part.region, part.rows, relaxation.solves)
        if not bool(lower.isfinite().all()):
            raise ValueError(f"{_OWNER}: a bound at {t:g} along the line is not finite")
        parts = [switch_functions(part.network, b) for b in bounds]
        if not causes:
            causes.append(torch.cat([p[1] for p in parts]) if parts else torch.zeros(0, dtype=torch.int64))
        switches = torch.cat([p[0] for p in parts]) if parts else torch.zeros(0, dtype=torch.float64)
        values = torch.cat([lower.flatten(), certified_cross_entropy(lower)[None]])
        # The loss's slope in all margins of an example is at most 1.
        noise = torch.cat([noise.flatten(), noise.amax(1).mean()[None]])
        return Sample(t, values, switches, noise)

    with torch.no_grad():
        # A step is resolved as far as the largest weight that moves, and t itself, are.
        largest = max(float(w.abs().max()) for w in weights.origin)
        step = max(float(d.abs().max()) for d in way)
        resolution = 8 * torch.finfo(torch.float64).eps * max(reach, largest / max(step, 1e-300))
        known = relaxation.jumps
        finder = JumpFinder(evaluate, least, resolution, cells, budget, known is None or EVERYWHERE in known)
        found = finder.run(0.0, reach)
    return _Line(found, causes[0], part.rows.shape[1], part.rows.shape[0], least)


def _bounds(
    relaxation: Any, network: Network, region: Region, rows: Tensor, solves: bool
) -> tuple[Tensor, Tensor, list[Any]]:
    """Bounds [n, k], what they may be off by, and the pre-activation bounds that lines were chosen on."""
    if not solves:
        lower = relaxation.lower_bounds(network, region, rows).double()
        return lower, torch.zeros_like(lower), list(sources(relaxation, network, region))
    solution = relaxation.solve_flat(network, region, rows)
    lower = solution.lower.double()
    noise = solution.gap.double().clamp(0, 1e3) + _SOLVED * lower.abs().clamp_min(1)
    if solution.preactivation is None:
        return lower, noise, list(sources(relaxation, network, region))
    return lower, noise, [solution.preactivation, *sources(relaxation.preactivation, network, region)]


# --- tables -------------------------------------------------------------------------------------------------------


def _counted(line: _Line, what: str) -> list[Jump]:
    """Jumps of the bound, or of the loss, that exceed their threshold."""
    chosen = slice(None, -1) if what == "bound" else slice(-1, None)
    kept = []
    for jump in line.found.jumps:
        size = torch.maximum(jump.left.values.abs(), jump.right.values.abs()).clamp_min(1)
        threshold = line.least * size + jump.left.noise + jump.right.noise
        if bool((jump.size.abs() > threshold)[chosen].any()):
            kept.append(jump)
    return kept


def _table(question: MarginProblem, rows: Sequence[_Line]) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame(
        [
            _summed(name, relaxation, [r for r in rows if r.name == name])
            for name, relaxation in question.relaxations.items()
        ]
    )


def _summed(name: str, relaxation: Any, lines: Sequence[_Line]) -> dict[str, Any]:
    length = sum(line.unit * (line.found.samples[-1].t - line.found.samples[0].t) for line in lines)
    bound = [(line, jump) for line in lines for jump in _counted(line, "bound")]
    sizes = [float(jump.size[:-1].abs().max()) for _, jump in bound]
    loss = [float(jump.size[-1].abs()) for line in lines for jump in _counted(line, "loss")]
    travel = sum(_variation(line) for line in lines)
    causes = sorted({line.cause(jump) for line, jump in bound})
    listed = relaxation.jumps
    return {
        "relaxation": name,
        "lines": len(lines),
        "length": length,
        "bound jumps": len(bound),
        "loss jumps": len(loss),
        "bound / unit": len(bound) / length,
        "loss / unit": len(loss) / length,
        "largest bound": max(sizes, default=0.0),
        "largest loss": max(loss, default=0.0),
        "mean bound": sum(sizes) / len(sizes) if sizes else 0.0,
        "mean loss": sum(loss) / len(loss) if loss else 0.0,
        "travel": sum(loss) / travel if travel > 0 else 0.0,
        "causes": "; ".join(causes),
        "listed": None if listed is None else ("; ".join(sorted(listed)) or "none"),
        "verdict": _verdict([line.cause(jump) for line, jump in bound], listed),
        "evaluations": sum(line.found.evaluations for line in lines),
        "complete": all(line.found.complete for line in lines),
    }


def _variation(line: _Line) -> float:
    """Total variation of the loss over samples and jump limits."""
    values = [s.values[-1] for s in _all_samples(line)]
    return float(sum((b - a).abs() for a, b in itertools.pairwise(values)))


def _verdict(causes: Sequence[str], listed: Jumps) -> str:
    """Whether what was found fits the paper's list."""
    if listed is None:
        return "jumps" if causes else "none met"
    if not causes:
        return "none met, though listed" if listed else "none, as listed"
    if EVERYWHERE in listed:
        return "jumps, as listed"
    parts = [cause.split(", ") for cause in causes]
    if all(part in listed for each in parts for part in each):
        return "jumps, as listed"
    # Events of later layers may coincide with the switch that moved their bounds.
    fits = all(any(part in listed for part in each) for each in parts)
    return "jumps, a listed cause among each one's" if fits else "CONTRADICTS the list"


def _all_samples(line: _Line) -> list[Sample]:
    samples = [*line.found.samples, *(side for jump in line.found.jumps for side in (jump.left, jump.right))]
    return sorted(samples, key=lambda sample: sample.t)


def _jumps(rows: Sequence[_Line]) -> pl.DataFrame:
    import polars as pl

    schema = {
        "relaxation": pl.String,
        "line": pl.Int64,
        "at": pl.Float64,
        "bound": pl.Float64,
        "loss": pl.Float64,
        "cause": pl.String,
    }
    found = [
        (line.name, line.line, line.unit * jump.at, line.bound_jump(jump), float(jump.size[-1]), line.cause(jump))
        for line in rows
        for jump in line.found.jumps
    ]
    return pl.DataFrame(found, schema=schema, orient="row")


def _samples(rows: Sequence[_Line]) -> pl.DataFrame:
    import polars as pl

    schema = {"relaxation": pl.String, "line": pl.Int64, "at": pl.Float64, "loss": pl.Float64, "bound": pl.Float64}

    def each() -> Iterator[tuple[Any, ...]]:
        for line in rows:
            for sample in _all_samples(line):
                yield line.name, line.line, line.unit * sample.t, float(sample.values[-1]), line.bound(sample)

    return pl.DataFrame(list(each()), schema=schema, orient="row")
