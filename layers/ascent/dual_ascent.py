"""DualAscent: batched, matrix-free ascent on the dual of the triangle LP, with a certified gap.

One backward and one forward sweep an iteration, no autograd graph. The primal point is recovered by averaging what
the Lagrangian's minimisers chose: the input's corner, and at each activation whether the coefficient took the upper
line; an averaged choice pushed through the hulls is feasible, and it closes the gap where an average of inputs alone
cannot (neurons whose coefficient is 0 at the optimum lie between the lines). See docs/lp-layers.md for what was tried.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from optrelax.checks import require_choice, require_range
from optrelax.layers.ascent import composed_ascent
from optrelax.layers.ascent.layer_ascent import LayerAscent, layers_of, part
from optrelax.layers.ascent.schedule import climbed, finished, rates
from optrelax.layers.batched import join
from optrelax.layers.evaluation import best_dual
from optrelax.layers.network_solver import NetworkSolver, Points
from optrelax.layers.problems import DualPoint, PrimalPoint, Problems
from optrelax.layers.sweeps import Backward, backward_sweep, forward_sweep, primal_sweep
from optrelax.memory import Limit
from optrelax.memory_counts import ascent


@dataclass(frozen=True)
class DualAscent(NetworkSolver):
    """First-order ascent on the dual of network LPs: the fast default of `Triangle` and `Layerwise`.

    Args:
        tol: certified relative gap (of max(1, |lower|)) at which a problem is finished and leaves the batch.
        max_iterations: sweeps at most.
        threshold: also stop where the sign of value - threshold is certain; None: never.
        step: first step of Adam on the weights.
        decay: its factor an iteration.
        floor: its least share of the first.
        check_every: iterations between two evaluations of the primal point.
        max_bytes: most memory for the problems in flight; None: 64 MiB in sweeps, chunks that fit a processor's cache,
            and at most 256 MiB for examples' own matrices.
        exact: bring what is left to a certified relative gap of 1e-6 (or `tol`, if smaller).
        precision: "same" iterates in the region's type; "float32" iterates in float32 and evaluates both points once
            more in the region's type, so that bound and gap are as good as if every sweep had been made in it.

    Raises:
        TypeError: for an option of another type.
        ValueError: for an option out of range.

    Sound: every iterate is a bound, at any iteration count including 0 (which gives the better of CROWN's and
    Fast-Lin's bound on the same pre-activation bounds); stopping early only loosens it.
    Exact: to `tol` where the status is OPTIMAL; with exact=True every problem is finished by an interior-point method
    (`InteriorPoint`) in float64.  Deterministic.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.2)
        >>> layers = [Triangle(solver=DualAscent(max_iterations=n)) for n in (0, 50)]
        >>> none, many = (layer.solve(net, region, torch.eye(2)) for layer in layers)
        >>> bool((many.lower >= none.lower).all()), bool((many.gap <= none.gap).all())
        (True, True)
    """

    tol: float = 1e-4
    max_iterations: int = 200
    threshold: float | None = None
    step: float = 0.5
    decay: float = 0.95
    floor: float = 0.01
    check_every: int = 4
    max_bytes: Limit = None
    exact: bool = False
    precision: Literal["same", "float32"] = "same"

    def __post_init__(self) -> None:
        for name in ("tol", "step", "decay", "floor", "threshold", "max_iterations", "check_every"):
            given, whole = getattr(self, name), name in ("max_iterations", "check_every")
            if given is None and name == "threshold":
                continue
            try:  # numbers of NumPy and PyTorch too
                object.__setattr__(self, name, operator.index(given) if whole else float(given))
            except (TypeError, ValueError):
                wanted = "an integer" if whole else "a number"
                raise TypeError(f"DualAscent: {name} must be {wanted}, got {given!r}") from None
        require_range("DualAscent", "> 0", tol=self.tol, step=self.step)
        require_range("DualAscent", "in (0, 1]", decay=self.decay)
        require_range("DualAscent", "in [0, 1]", floor=self.floor)
        require_range("DualAscent", ">= 0", max_iterations=self.max_iterations)
        require_choice("DualAscent", "precision", self.precision, "same", "float32")
        require_range("DualAscent", ">= 1", check_every=self.check_every)
        require_range("DualAscent", "positive", optional=True, max_bytes=self.max_bytes)

    @property
    def products(self) -> bool:  # type: ignore[override]
        """Its sweeps take them; the interior-point method behind exact=True does not."""
        return not self.exact

    @property
    def aim(self) -> float:
        return min(self.tol, 1e-6) if self.exact else self.tol

    def solve(self, problems: Problems, starts: Sequence[DualPoint]) -> Points:
        """Both points of R problems, from the best of several dual points (each a bound already)."""
        with torch.no_grad():
            dtype = torch.float32 if self.precision == "float32" else problems.rows.dtype
            # An ascent knows no multipliers of pre-activation bounds.
            given, first = problems.to(dtype), [DualPoint(s.alpha, s.beta).to(dtype) for s in starts]
            found = composed_ascent.solve(self, given, first)
            if found is None:
                found = self._in_chunks(given, first)
            if self.exact:
                from optrelax.layers.interior_point import InteriorPoint

                found = InteriorPoint(tol=self.aim).finish(problems, found)
            return found

    def _in_chunks(self, problems: Problems, starts: list[DualPoint]) -> Points:
        """Layer by layer where boxes and hulls allow it, else by general sweeps."""
        size, layers = self._chunk(problems), layers_of(problems)

        def ascent(index: Tensor | slice) -> LayerAscent | _SweepAscent:
            first = [s.select(index) for s in starts]
            if layers is None:
                return _SweepAscent(self, problems.select(index), first)
            return LayerAscent(self, part(layers, index), first)

        if size >= problems.count:
            return ascent(slice(None)).run()
        chunks = torch.arange(problems.count, device=problems.rows.device).split(size)
        return join([ascent(index).run() for index in chunks])

    def _chunk(self, problems: Problems) -> int:
        """Problems in flight."""
        entries = sum(shape.numel() for shape in _shapes(problems))
        each = ascent().of(values=entries) * problems.rows.element_size()
        budget = self.max_bytes if self.max_bytes is not None else 64 * 2**20
        return max(1, int(min(problems.count, budget // each))) if problems.count else 1


def _shapes(problems: Problems) -> list[torch.Size]:
    return [problems.region.shape[1:], *(h.free.shape[1:] for h in problems.hulls.values())]


class _SweepAscent:
    """One chunk on its way: the live problems, their weights, Adam's moments, the averages, and the best of each."""

    def __init__(self, options: DualAscent, problems: Problems, starts: list[DualPoint]) -> None:
        self.options, self.problems = options, problems
        self.live = torch.arange(problems.count, device=problems.rows.device)
        self.dual, back = best_dual(problems, starts)
        self.moment, self.square = self.dual.combine(torch.zeros_like), self.dual.combine(torch.zeros_like)
        self.mean = _choices(back).combine(torch.clone)
        self.lower, self.objective = back.value, torch.full_like(back.value, torch.inf)
        # Results of all problems of the chunk; live ones are written back when they leave.
        self.best = self.found = Points(self.dual, _choices(back), torch.zeros_like(self.live))

    def run(self) -> Points:
        """Both points of every problem."""
        options = self.options
        for step in range(options.max_iterations + 1):
            back = backward_sweep(self.problems, self.dual)
            better = back.value > self.lower
            self.lower = torch.where(better, back.value, self.lower)
            self.best = replace(self.best, dual=self.dual.where(better, self.best.dual))
            gradient, now = forward_sweep(self.problems, self.dual, back), rates(options, step)
            self.mean = self.mean.combine(lambda mean, new, share=now.average: mean.lerp_(new, share), _choices(back))
            last = step == options.max_iterations
            if last or step % options.check_every == 0:
                done = self._check(step)
                if last or bool(done.all()):
                    break
                if 5 * int(done.sum()) >= len(done):
                    gradient = self._leave(done, gradient)
            move = partial(climbed, correction=now.correction, step=now.step)
            self.dual = self.dual.combine(move, gradient, self.moment, self.square)
        return self.found.put(self.live, self.best)

    def _check(self, step: int) -> Tensor:
        """Evaluate the averaged primal point, keep the best; which problems are finished."""
        # A corner is the centre plus or minus the radius: it may leave the box by an ulp.
        point = replace(self.mean, x=self.problems.region.into_hull(self.mean.x))
        objective = primal_sweep(self.problems, point).objective
        better = objective < self.objective
        self.objective = torch.where(better, objective, self.objective)
        primal = point.where(better, self.best.primal)
        self.best = replace(self.best, primal=primal, iterations=torch.full_like(self.live, step))
        return finished(self.options, self.lower, self.objective)

    def _leave(self, done: Tensor, gradient: DualPoint) -> DualPoint:
        """Let finished problems leave, once they are a fifth of the batch; the gradient of the others."""
        self.found = self.found.put(self.live, self.best)
        keep = (~done).nonzero()[:, 0]
        self.live, self.lower, self.objective = self.live[keep], self.lower[keep], self.objective[keep]
        self.problems, self.best, self.mean = self.problems.select(keep), self.best.select(keep), self.mean.select(keep)
        self.dual, self.moment, self.square = (of.select(keep) for of in (self.dual, self.moment, self.square))
        return gradient.select(keep)


def _choices(back: Backward) -> PrimalPoint:
    """What the Lagrangian's minimiser chose: the input's corner, and where coefficients took the upper line."""
    return PrimalPoint(back.corner, {name: 1 - on_lower for name, on_lower in back.on_lower.items()})
