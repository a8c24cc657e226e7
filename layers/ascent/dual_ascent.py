"""DualAscent: batched, matrix-free ascent on the dual of the triangle LP, with a certified gap.

One backward and one forward sweep an iteration, no autograd graph. The primal point is recovered by averaging what
the Lagrangian's minimisers chose: the input's corner, and at each activation whether the coefficient took the upper
line; an averaged choice pushed through the hulls is feasible, and it closes the gap where an average of inputs alone
cannot (neurons whose coefficient is 0 at the optimum lie between the lines). See docs/lp-layers.md for what was tried.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from optrelax.layers.ascent import composed_ascent
from optrelax.layers.ascent.dense_ascent import Chain, DenseAscent, chain, part
from optrelax.layers.problems import (
    Backward,
    DualPoint,
    Feasible,
    PrimalPoint,
    Problems,
    Weights,
    backward_sweep,
    forward_sweep,
    primal_sweep,
)
from optrelax.layers.solutions import Status
from optrelax.memory import Limit


@dataclass(frozen=True, slots=True)
class Answer:
    """What a solver of network LPs returns: a dual point, a primal point and their values, R of each."""

    dual: DualPoint
    primal: PrimalPoint
    lower: Tensor
    """Dual value at `dual` (nearest rounding)."""
    objective: Tensor
    """Objective of the feasible `primal`; inf where there is none."""
    status: Tensor
    iterations: Tensor
    sweeps: tuple[Backward, Feasible] | None = field(default=None, kw_only=True)
    """What evaluated exactly these points, where it was kept: a gradient rule needs it once more."""


@dataclass(frozen=True)
class DualAscent:
    """First-order ascent on the dual of network LPs: the fast default of `Triangle` and `Layerwise`.

    Sound: every iterate is a bound, at any iteration count including 0 (which gives the better of CROWN's and
    Fast-Lin's bound on the same pre-activation bounds); stopping early only loosens it.
    Exact: to `tol` where the status is OPTIMAL; with exact=True every problem is finished by an interior-point method
    (`InteriorPoint`) in float64.  Deterministic.
    tol: certified relative gap (of max(1, |lower|)) at which a problem is finished and leaves the batch.
    max_iterations: sweeps at most.  threshold: also stop where the sign of value - threshold is certain; None: never.
    step, decay, floor: first step of Adam on the weights, its factor an iteration, and its least share of the first.
    check_every: iterations between two evaluations of the primal point.
    max_bytes: most memory for the problems in flight; None: 64 MiB in sweeps, chunks that fit a processor's cache,
    and at most 256 MiB for examples' own matrices.
    exact: bring what is left to a certified relative gap of 1e-6 (or `tol`, if smaller).
    precision: "same" iterates in the region's type; "float32" iterates in float32 and evaluates both points once more
    in the region's type, so that bound and gap are as good as if every sweep had been made in it.
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
        for name, low in (("tol", 0.0), ("step", 0.0)):
            value = getattr(self, name)
            if not value > low:
                raise ValueError(f"DualAscent: {name} must be > {low:g}, got {value}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"DualAscent: decay must lie in (0, 1], got {self.decay}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"DualAscent: floor must lie in [0, 1], got {self.floor}")
        if self.max_iterations < 0:
            raise ValueError(f"DualAscent: max_iterations must be >= 0, got {self.max_iterations}")
        if self.precision not in ("same", "float32"):
            raise ValueError(f"DualAscent: precision must be 'same' or 'float32', got {self.precision!r}")
        if self.check_every < 1:
            raise ValueError(f"DualAscent: check_every must be >= 1, got {self.check_every}")
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise ValueError(f"DualAscent: max_bytes must be positive, got {self.max_bytes}")

    def solve_network(self, problems: Problems, starts: list[DualPoint]) -> Answer:
        """Solve R problems from the best of several dual points (each a bound already)."""
        with torch.no_grad():
            dtype = torch.float32 if self.precision == "float32" else problems.rows.dtype
            given = problems.to(dtype)
            if (found := composed_ascent.solve(self, given, [s.to(dtype) for s in starts])) is not None:
                answer = self._evaluated_within(problems, *found)
            elif (layers := chain(given)) is None:
                answer = self._by_sweeps(problems, starts)
            else:
                answer = self._densely(problems, layers, [s.to(dtype) for s in starts])
            if self.exact:
                from optrelax.layers.interior_point import InteriorPoint

                answer = InteriorPoint(tol=min(self.tol, 1e-6)).finish(problems, answer)
            return answer

    def _by_sweeps(self, problems: Problems, starts: list[DualPoint]) -> Answer:
        """By the sweeps of the network, matrix-free."""
        size = self._chunk(problems)
        parts = []
        for first in range(0, max(1, problems.count), size):
            index = torch.arange(first, min(first + size, problems.count), device=problems.rows.device)
            whole = size >= problems.count
            chunk = problems if whole else problems.select(index)
            parts.append(self._ascend(chunk, [s if whole else s.select(index) for s in starts]))
        return parts[0] if len(parts) == 1 else join(parts)

    def _densely(self, problems: Problems, layers: Chain, starts: list[DualPoint]) -> Answer:
        """By dense products; both points of every problem are evaluated by the network's sweeps in its own type."""
        parts = []
        size = self._chunk(problems)
        if size >= problems.count:
            return self._evaluated(problems, *DenseAscent(self, layers, starts).run())
        for index in torch.arange(problems.count, device=problems.rows.device).split(size):
            found = DenseAscent(self, part(layers, index), [s.select(index) for s in starts]).run()
            parts.append(self._evaluated(problems.select(index), *found))
        return join(parts)

    def _evaluated_within(self, problems: Problems, dual: DualPoint, primal: PrimalPoint, iterations: Tensor) -> Answer:
        """As `_evaluated`, in chunks where memory was given."""
        size = self._chunk(problems)
        if self.max_bytes is None or size >= problems.count:
            return self._evaluated(problems, dual, primal, iterations)
        every = torch.arange(problems.count, device=problems.rows.device)
        return join(
            [
                self._evaluated(problems.select(index), dual.select(index), primal.select(index), iterations[index])
                for index in every.split(size)
            ]
        )

    def _evaluated(self, problems: Problems, dual: DualPoint, primal: PrimalPoint, iterations: Tensor) -> Answer:
        """The answer that points found in another type or form are."""
        dtype = problems.rows.dtype
        dual, primal = dual.to(dtype), primal.to(dtype)
        # Rounding may take an input out of the box by half an ulp.
        primal = PrimalPoint(torch.minimum(torch.maximum(primal.x, problems.lower), problems.upper), primal.tau)
        back, feasible = backward_sweep(problems, dual), primal_sweep(problems, primal)
        status = statuses(back.value, feasible.objective, self.tol)
        return Answer(dual, primal, back.value, feasible.objective, status, iterations, sweeps=(back, feasible))

    def _ascend(self, problems: Problems, starts: list[DualPoint]) -> Answer:
        dtype = problems.rows.dtype
        if self.precision == "same" or dtype == torch.float32:
            return _Ascent(self, problems, starts).run()
        found = _Ascent(self, problems.to(torch.float32), [s.to(torch.float32) for s in starts]).run()
        return self._evaluated(problems, found.dual, found.primal, found.iterations)

    def _chunk(self, problems: Problems) -> int:
        """Problems in flight: about ten vectors of every node's size each."""
        entries = sum(shape.numel() for shape in _shapes(problems))
        each = 10 * entries * problems.rows.element_size()
        budget = self.max_bytes if self.max_bytes is not None else 64 * 2**20
        return max(1, int(min(problems.count, budget // each))) if problems.count else 1


def _shapes(problems: Problems) -> list[torch.Size]:
    return [problems.lower.shape[1:], *(h.free.shape[1:] for h in problems.hulls.values())]


def statuses(lower: Tensor, objective: Tensor, tol: float) -> Tensor:
    """OPTIMAL where the certified gap is within tol * max(1, |lower|), else ITERATION_LIMIT."""
    optimal = objective - lower <= tol * lower.abs().clamp_min(1)
    return torch.where(optimal, int(Status.OPTIMAL), int(Status.ITERATION_LIMIT)).to(torch.int8)


def join(parts: list[Answer]) -> Answer:
    """Answers of consecutive chunks as one."""

    def cat(maps: list[Weights]) -> Weights:
        return {name: torch.cat([m[name] for m in maps]) for name in maps[0]}

    return Answer(
        DualPoint(cat([p.dual.alpha for p in parts]), cat([p.dual.beta for p in parts])),
        PrimalPoint(torch.cat([p.primal.x for p in parts]), cat([p.primal.tau for p in parts])),
        *(torch.cat([getattr(p, name) for p in parts]) for name in ("lower", "objective", "status", "iterations")),
    )


class _Ascent:
    """One chunk on its way: the live problems, their weights, Adam's moments and the averages."""

    def __init__(self, options: DualAscent, problems: Problems, starts: list[DualPoint]) -> None:
        self.options, self.problems = options, problems
        device, count = problems.rows.device, problems.count
        self.live = torch.arange(count, device=device)
        start, back = self._best_start(starts)
        corner = back.corner
        self.weights = {("alpha", n): a for n, a in start.alpha.items()} | {
            ("beta", n): b for n, b in start.beta.items()
        }
        self.moments: dict[Any, Tensor] = {}
        self.squares: dict[Any, Tensor] = {}
        self.x = corner.clone()
        self.taken = {n: t.clone() for n, t in back.taken.items()}
        self.total = 0.0
        # Results of all problems of the chunk; live ones are written back at every check.
        self.best = back.value.clone()
        self.best_weights = {key: w.clone() for key, w in self.weights.items()}
        self.objective = torch.full_like(back.value, torch.inf)
        self.best_x = corner.clone()
        self.best_taken = {n: t.clone() for n, t in self.taken.items()}
        self.iterations = torch.zeros(count, dtype=torch.int64, device=device)
        self.done = torch.zeros(count, dtype=torch.bool, device=device)
        self.live_best = self.best.clone()
        self.live_weights = dict(self.weights)

    def _best_start(self, starts: list[DualPoint]) -> tuple[DualPoint, Backward]:
        """Problem by problem the start with the greatest bound."""
        best = DualPoint(
            {n: a.expand(self.problems.count, *a.shape[1:]) for n, a in starts[0].alpha.items()},
            {n: b.expand(self.problems.count, *b.shape[1:]) for n, b in starts[0].beta.items()},
        )
        back = backward_sweep(self.problems, best)
        for other in starts[1:]:
            found = backward_sweep(self.problems, other)
            better = found.value > back.value

            def pick(new: Tensor, old: Tensor, better: Tensor = better) -> Tensor:
                return torch.where(better.reshape(-1, *[1] * (old.dim() - 1)), new, old)

            best = DualPoint(
                {n: pick(other.alpha[n], a) for n, a in best.alpha.items()},
                {n: pick(other.beta[n], b) for n, b in best.beta.items()},
            )
            back = Backward(
                torch.maximum(found.value, back.value),
                {n: pick(found.coefficients[n], a) for n, a in back.coefficients.items()},
                {n: pick(found.taken[n], t) for n, t in back.taken.items()},
                pick(found.input, back.input),
                pick(found.corner, back.corner),
            )
        return best, back

    def run(self) -> Answer:
        options = self.options
        for step in range(options.max_iterations + 1):
            dual = self._dual()
            back = backward_sweep(self.problems, dual)
            self._keep_best(back.value)
            ascent = forward_sweep(self.problems, dual, back)
            self._average(step, back)
            last = step == options.max_iterations
            look = last or step % options.check_every == 0
            if look:
                self._check(step)
                if last or bool(self.done[self.live].all()):
                    break
            self._adam(step, ascent.alpha, ascent.beta)
            if look:
                self._compact()
        return self._answer()

    def _dual(self) -> DualPoint:
        return DualPoint(
            {n: w for (kind, n), w in self.weights.items() if kind == "alpha"},
            {n: w for (kind, n), w in self.weights.items() if kind == "beta"},
        )

    def _keep_best(self, value: Tensor) -> None:
        better = value > self.live_best
        self.live_best = torch.where(better, value, self.live_best)
        for key, w in self.weights.items():
            mask = better.reshape(-1, *[1] * (w.dim() - 1))
            self.live_weights[key] = torch.where(mask, w, self.live_weights[key])

    def _average(self, step: int, back: Backward) -> None:
        """Weighted means of the minimisers' choices; weight (step + 1)^4 forgets the start."""
        weight = float(step + 1) ** 4
        self.total += weight
        rate = weight / self.total
        self.x.lerp_(back.corner, rate)
        for name, taken in back.taken.items():
            self.taken[name].lerp_(taken, rate)

    def _adam(self, step: int, alpha: Mapping[str, Tensor], beta: Mapping[str, Tensor]) -> None:
        options = self.options
        # Short memories: the active lines change within a few iterations (docs/lp-layers.md compares).
        first, second = 0.7, 0.9
        rate = options.step * max(options.decay**step, options.floor)
        scale = rate / (1 - first ** (step + 1))
        tiny = torch.finfo(self.live_best.dtype).tiny ** 0.5
        for key, w in self.weights.items():
            g = alpha[key[1]] if key[0] == "alpha" else beta[key[1]]
            m = self.moments.get(key)
            if m is None:
                self.moments[key] = m = torch.zeros_like(g)
                self.squares[key] = torch.zeros_like(g)
            v = self.squares[key]
            m.lerp_(g, 1 - first)
            v.mul_(second).addcmul_(g, g, value=1 - second)
            size = (v / (1 - second ** (step + 1))).sqrt_().add_(tiny)
            self.weights[key] = torch.addcdiv(w, m, size, value=scale).clamp_(0, 1)

    def _check(self, step: int) -> None:
        """Evaluate the averaged primal point, write back what is best, mark what is finished."""
        # A corner is the centre plus or minus the radius: it may leave the box by an ulp.
        x = self.x.clamp(self.problems.lower, self.problems.upper)
        point = PrimalPoint(x, {n: 1 - t for n, t in self.taken.items()})
        objective = primal_sweep(self.problems, point).objective
        index = self.live
        better = objective < self.objective[index]
        improved = index[better]
        self.objective[improved] = objective[better]
        self.best_x[improved] = x[better]
        for name, t in self.taken.items():
            self.best_taken[name][improved] = t[better]
        self.best[index] = self.live_best
        for key, w in self.live_weights.items():
            self.best_weights[key][index] = w
        self.iterations[index] = step
        self.done[index] = self._finished(index)
        self.live_best = self.best[index]

    def _finished(self, index: Tensor) -> Tensor:
        low, high = self.best[index], self.objective[index]
        done = high - low <= self.options.tol * low.abs().clamp_min(1)
        if self.options.threshold is not None:
            done = done | (low > self.options.threshold) | (high <= self.options.threshold)
        return done

    def _compact(self) -> None:
        """Let finished problems leave once they are a fifth of the batch."""
        done = self.done[self.live]
        if int(done.sum()) * 5 < done.numel():
            return
        keep = (~done).nonzero()[:, 0]
        self.live = self.live[keep]
        self.problems = self.problems.select(keep)
        self.weights = {k: w[keep] for k, w in self.weights.items()}
        self.moments = {k: w[keep] for k, w in self.moments.items()}
        self.squares = {k: w[keep] for k, w in self.squares.items()}
        self.x = self.x[keep]
        self.taken = {n: t[keep] for n, t in self.taken.items()}
        self.live_best = self.best[self.live]
        self.live_weights = {k: w[self.live] for k, w in self.best_weights.items()}

    def _answer(self) -> Answer:
        dual = DualPoint(
            {n: w for (kind, n), w in self.best_weights.items() if kind == "alpha"},
            {n: w for (kind, n), w in self.best_weights.items() if kind == "beta"},
        )
        status = statuses(self.best, self.objective, self.options.tol)
        primal = PrimalPoint(self.best_x, {n: 1 - t for n, t in self.best_taken.items()})
        return Answer(dual, primal, self.best, self.objective, status, self.iterations)
