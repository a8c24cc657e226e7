"""InteriorPoint: the exact finish of network LPs, a batched primal-dual method on the crossing neurons alone.

Stable neurons are composed away: what is left are the input v in [-1, 1]^d (centred, scaled), and for each of the K
crossing neurons its pre-activation p = M v + N y + m and its value y inside the hull. One Newton system of size 2 K
an iteration (Mehrotra 1992). The
result only chooses a dual and a primal point, which are evaluated by the same sweeps as any other: an inaccurate
solve can be loose, never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.checks import require_range
from optrelax.layers.ascent.dual_ascent import DualAscent
from optrelax.layers.batched import join
from optrelax.layers.evaluation import best_points, evaluate
from optrelax.layers.network_solver import NetworkSolver, Points
from optrelax.layers.newton import Newton
from optrelax.layers.prices import in_float64
from optrelax.layers.problems import DualPoint, Problems
from optrelax.layers.reduction import reduce_problems, without_flat
from optrelax.memory_counts import newton
from optrelax.networks.ops import flatten_from
from optrelax.regions import require_box

if TYPE_CHECKING:
    from optrelax.layers.programs.interior import InteriorPrograms

_BYTES = 512 * 2**20  # of the problems in flight, where max_bytes does not say
_PROBLEMS = 32  # at a time at most: more pad more than they save


@dataclass(frozen=True)
class InteriorPoint(NetworkSolver):
    """Exact solver in float64 on any device, of network LPs and of general programs.

    `Triangle(solver=InteriorPoint())` starts from a few sweeps of `warm`, and works on the problems those leave open;
    `LinearProgram(InteriorPoint())` and `QuadraticProgram(InteriorPoint())` solve each problem of a batch in cache by a
    compiled kernel, where there is a C compiler, else all of them at once in PyTorch (`programs.interior`).
    Of network LPs a start is ignored, of programs the compiled kernel begins at it.

    Args:
        tol: certified relative gap that counts as OPTIMAL.
        max_iterations: Newton steps of a problem.
        max_bytes: most memory for the problems in flight; None: as the device has free.
        warm: the sweeps before, of network LPs.

    Raises:
        ValueError: for an option out of range.

    Sound: yes.  Exact: to a certified relative gap of `tol`, else the status is ITERATION_LIMIT.
    Source: Mehrotra 1992.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.2)
        >>> found = Triangle(solver=InteriorPoint()).solve(net, region, torch.eye(2))
        >>> bool((found.status == Status.OPTIMAL).all()), bool((found.gap <= 1e-5).all())
        (True, True)
    """

    tol: float = 1e-6
    max_iterations: int = 60
    max_bytes: int | None = None
    warm: DualAscent = field(default_factory=lambda: DualAscent(max_iterations=16))

    def __post_init__(self) -> None:
        require_range("InteriorPoint", "> 0", tol=self.tol)
        require_range("InteriorPoint", ">= 1", max_iterations=self.max_iterations)
        require_range("InteriorPoint", "positive", optional=True, max_bytes=self.max_bytes)

    def for_programs(self) -> InteriorPrograms:
        """The method for `LinearProgram` and `QuadraticProgram`, with the same options."""
        from optrelax.layers.programs.interior import InteriorPrograms

        return InteriorPrograms(self.tol, self.max_iterations, self.max_bytes or _BYTES)

    def solve(self, problems: Problems, starts: Sequence[DualPoint]) -> Points:
        """Both points of R problems, in float64 where any needed more than the first sweeps."""
        return self.finish(problems, self.warm.solve(problems, starts))

    def finish(self, problems: Problems, points: Points) -> Points:
        """Bring every problem whose gap is above `tol` to an optimum; of both points the better ones are kept."""
        require_box("InteriorPoint", problems.region, "DualAscent() takes any region")
        with torch.no_grad():
            found = evaluate(problems, points, self.tol)
            # Even a closed gap may hide a primal or dual point off the optimal face by more than the gap shows,
            # so float64 gradients want every problem that is not closed to rounding.
            open_ = (~(found.gap <= self.tol * 1e-3 * found.lower.abs().clamp_min(1))).nonzero()[:, 0]
            if not len(open_):
                return points
            order = _by_size(problems, open_)
            chunks = order.split(self._chunk(problems))
            parts = [self._finished(in_float64(problems.select(i)), points.select(i).to(torch.float64)) for i in chunks]
            return points.to(torch.float64).put(order, join(parts))

    def _finished(self, part: Problems, points: Points) -> Points:
        part = without_flat(part)
        reduced = reduce_problems(part)
        if reduced.M.shape[1] == 0:  # affine: the corner
            v, y, prices, steps = -reduced.c_v.sign(), reduced.middle, reduced.middle, 0 * points.iterations
        else:
            state = Newton(reduced, self.tol * 1e-3, self.max_iterations)
            state.run()
            v, y, prices, steps = state.v, state.y, state.nu, state.steps
        found = Points(reduced.dual_point(part, prices), reduced.primal_point(part, v, y), points.iterations + steps)
        return best_points(part, points, found)

    def bytes_needed(self, inputs: int, hidden: int, count: int) -> int:
        """Memory for `count` problems of these sizes, as if every neuron crossed."""
        whole = min(_PROBLEMS, count) * newton(inputs, hidden)
        return min(whole, max(self.max_bytes or _BYTES, newton(inputs, hidden)))

    def within(self, max_bytes: float) -> InteriorPoint:
        """With no more than this for the problems in flight."""
        return replace(self, max_bytes=max(1, int(min(max_bytes, self.max_bytes or max_bytes))))

    def _chunk(self, problems: Problems) -> int:
        """Problems in flight: K x d and K x K matrices and their copies, K at most every hidden neuron."""
        crossing = max(
            (int(flatten_from(h.free, 1).sum(1).max()) for h in problems.hulls.values() if h.free.numel()), default=1
        )
        crossing = max(1, crossing * len(problems.hulls))
        each = newton(problems.radius[0].numel(), crossing)
        budget = self.max_bytes if self.max_bytes is not None else _BYTES
        return max(1, min(_PROBLEMS, budget // each))


def _by_size(problems: Problems, index: Tensor) -> Tensor:
    """Problems ordered by their number of crossing neurons, so that chunks pad little."""
    if not problems.hulls:
        return index
    counts = sum(flatten_from(h.free[index], 1).sum(1) for h in problems.hulls.values())
    assert isinstance(counts, Tensor)
    return index[counts.argsort(stable=True)]
