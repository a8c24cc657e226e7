"""The search for jumps along one line in weight space, by one relaxation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optrelax.measurements.jumps import Jump, JumpFinder, LineJumps, Sample
from optrelax.measurements.questions import MarginProblem
from optrelax.measurements.switches import CAUSES, sources, switch_functions
from optrelax.measurements.weight_lines import MovingWeights, Weights
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import Relaxation
from optrelax.relaxations.jumps import EVERYWHERE
from optrelax.training.loss_terms import certified_cross_entropy

__all__ = ["OTHER", "OWNER", "SearchedLine", "search_line"]

OWNER = "measure_continuity"
OTHER = "other"
"""The cause of a jump at which no switch was seen."""
_SOLVED = 1e-5  # what an LP's bound may be off by where its pre-activation bounds are themselves LP optima, relative


@dataclass(frozen=True, slots=True, eq=False)
class SearchedLine:
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


def search_line(
    part: MarginProblem,
    weights: MovingWeights,
    relaxation: Relaxation,
    way: Weights,
    reach: float,
    least: float,
    cells: int,
    budget: int,
) -> SearchedLine:
    """All jumps between the weights and `reach` times `way` from them."""
    causes: list[Tensor] = []

    def evaluate(t: float) -> Sample:
        weights.move(way, t)
        lower, noise, bounds = _bounds(relaxation, part.network, part.region, part.rows)
        if not bool(lower.isfinite().all()):
            raise ValueError(f"{OWNER}: a bound at {t:g} along the line is not finite")
        parts = [switch_functions(part.network, b) for b in bounds]
        if not causes:
            causes.append(
                torch.cat([p[1] for p in parts]) if parts else torch.zeros(0, dtype=torch.int64, device="cpu")
            )
        switches = torch.cat([p[0] for p in parts]) if parts else torch.zeros(0, dtype=torch.float64, device="cpu")
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
    return SearchedLine(found, causes[0], part.rows.shape[1], part.rows.shape[0], least)


def _bounds(relaxation: Any, network: Network, region: Region, rows: Tensor) -> tuple[Tensor, Tensor, list[Any]]:
    """Bounds [n, k], what they may be off by, and the pre-activation bounds that lines were chosen on."""
    if not relaxation.solves:
        lower = relaxation.lower_bounds(network, region, rows).double()
        return lower, torch.zeros_like(lower), list(sources(relaxation, network, region))
    solution = relaxation.solve_flat(network, region, rows)
    lower = solution.lower.double()
    noise = solution.gap.double().clamp(0, 1e3) + _SOLVED * lower.abs().clamp_min(1)
    if solution.preactivation is None:
        return lower, noise, list(sources(relaxation, network, region))
    return lower, noise, [solution.preactivation, *sources(relaxation.preactivation, network, region)]
