"""What a solve returns: one frozen record a batch, one status a problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from optrelax.enclosures import Bounds

_LISTED = 100
"""Most statuses that a solution's repr lists one by one."""


class Status(IntEnum):
    """How the solve of one problem ended; tensors of statuses are int8, so `sol.status == Status.OPTIMAL` is a mask.

    OPTIMAL is never a solver's word: the certified gap is within the solver's tolerance.

    Example:
        >>> found = LinearProgram()(torch.tensor([1.0]), lower=torch.tensor([0.0]), upper=torch.tensor([1.0]))
        >>> Status(int(found.status)).name
        'OPTIMAL'
    """

    OPTIMAL = 0
    """The certified gap is at most tol * max(1, |lower|)."""
    ITERATION_LIMIT = 1
    """Stopped by the iteration limit; `lower` is valid, perhaps loose."""
    TIME_LIMIT = 2
    """Stopped by the time limit; `lower` is valid, perhaps loose."""
    INFEASIBLE = 3
    """No point satisfies the constraints, or contradictory pre-activation bounds; `lower` is -inf."""
    UNBOUNDED = 4
    """The objective falls without limit; `lower` is -inf."""
    NUMERICAL = 5
    """The solver failed, or its answer did not stand up to the check; `lower` is valid, perhaps -inf."""


def named(status: Tensor) -> object:
    """The names of status codes, nested as the tensor is."""
    if status.dim() == 0:
        return Status(int(status)).name
    return [named(part) for part in status]


def _described(solution: LPSolution | Solution) -> str:
    """Fields as their types print them, statuses by name."""
    shown = [f for f in fields(solution) if f.repr]
    status = named(solution.status) if solution.status.numel() <= _LISTED else _counted(solution.status)
    listed = {f.name: getattr(solution, f.name) for f in shown} | {"status": status}
    parts = (f"{name}={value if name == 'status' else repr(value)}" for name, value in listed.items())
    return f"{type(solution).__name__}({', '.join(parts)})"


def _counted(status: Tensor) -> str:
    return ", ".join(f"{int((status == s).sum())} {s.name}" for s in Status if bool((status == s).any()))


class UnsolvedError(RuntimeError):
    """A solve was asked to raise unless every problem is OPTIMAL, and some were not."""


def require_optimal(owner: str, status: Int8[Tensor, "*batch"]) -> None:
    """UnsolvedError that counts the statuses unless every problem is OPTIMAL."""
    wrong = status != Status.OPTIMAL
    if bool(wrong.any()):
        counts = [(s.name, int((status == s).sum())) for s in Status if s != Status.OPTIMAL]
        listed = ", ".join(f"{count} {name}" for name, count in counts if count)
        first = wrong.nonzero()[0].tolist()
        raise UnsolvedError(f"{owner}: {listed} of {status.numel()} problem(s) (first at {first})")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LPSolution:
    """Values, points and certificates of a batch of linear programs min c.x, A x <= b, E x = d, lower <= x <= upper.

    Sound: `lower` never exceeds the optimal value, whatever the solver did.  Gradient: `lower` (and `primal`, on
    request) by the rules of the `LinearProgram` that made it; the other fields carry none.

    Example:
        >>> c, ones = torch.tensor([-1.0, -2.0]), torch.ones(2)
        >>> found = LinearProgram(Highs())(c, A=ones[None], b=ones[:1] / 2, lower=0 * ones, upper=ones)
        >>> found.lower, found.inequality  # the price of the row
        (tensor(-1.), tensor([2.]))
    """

    lower: Float[Tensor, "*batch"]
    """Safe lower bound on the optimal value, from the duals below; -inf where there is none."""
    primal: Float[Tensor, "*batch n"]
    """Best point found, inside the variables' bounds; finite for every status."""
    inequality: Float[Tensor, "*batch m"]
    """y >= 0, the multipliers of A x <= b in L = c.x + y.(A x - b) + v.(E x - d)."""
    equality: Float[Tensor, "*batch p"]
    """v, the multipliers of E x = d."""
    gap: Float[Tensor, "*batch"]
    """Absolute: objective of a feasible point minus `lower`, a trace below 0 by rounding; inf without a point."""
    status: Int8[Tensor, "*batch"]
    """One `Status` code a problem."""
    iterations: Int[Tensor, "*batch"]
    """Iterations of the solver, one count a problem (-1 where the solver does not say)."""
    solver: str = ""
    """Who solved: what `solver="auto"` chose."""
    regularity: Callable[[], Tensor] | None = field(default=None, repr=False)
    """What `regular` evaluates."""

    @property
    def regular(self) -> Bool[Tensor, "*batch"] | None:
        """Where the argmin's KKT system is regular, so that `primal` has the argmin's own derivative.

        Elsewhere it is the least-norm one.  Evaluated when asked for; None where no KKT system gives a derivative, as
        under no_grad.
        """
        return None if self.regularity is None else self.regularity()

    def __repr__(self) -> str:
        return _described(self)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Solution:
    """Bounds of a batch of network specifications by linear programming, k rows an example.

    Sound: `lower` never exceeds the optimal value, at any iteration count.  Gradient: of `lower`, by the layer's rule.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.1)
        >>> found = Triangle().solve(net, region, torch.eye(2))
        >>> found.lower.shape, bool((found.gap >= 0).all())
        (torch.Size([1, 2]), True)
    """

    lower: Float[Tensor, "*batch k"]
    """Safe lower bound of each row; -inf where there is none."""
    gap: Float[Tensor, "*batch k"]
    """Absolute: objective of a feasible point minus `lower`, a trace below 0 by rounding; inf without a point."""
    status: Int8[Tensor, "*batch k"]
    """One `Status` code a problem."""
    iterations: Int[Tensor, "*batch k"]
    """Iterations of the solver, one count a problem."""
    warm: Any = field(default=None, repr=False)
    """Opaque state from which a later solve of the same examples may start."""
    preactivation: Mapping[str, Bounds] | None = field(default=None, repr=False)
    """Pre-activation bounds by node, where the method computes them."""

    def __repr__(self) -> str:
        return _described(self)
