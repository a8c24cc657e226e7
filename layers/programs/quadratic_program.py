"""The batched convex quadratic-program layer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from optrelax.layers.programs import arguments
from optrelax.layers.programs.argmin import KKT, PrimalGradient
from optrelax.layers.programs.convexity import require_convex
from optrelax.layers.programs.linear_program import LinearProgram
from optrelax.layers.programs.lp_gradients import ValueGradient
from optrelax.layers.solutions import LPSolution
from optrelax.rounding import Rounding
from optrelax.uncompiled import uncompiled


class QuadraticProgram(LinearProgram):
    """min x.P x / 2 + c.x subject to A x <= b, E x = d, lower <= x <= upper, for any leading batch shape.

    P is symmetric and positive semidefinite: checked to rounding (1e-9 of its size), and assumed by the bound.
    Shapes: P [*batch, n, n], the rest as for `LinearProgram`.

    Args:
        solver: as for `LinearProgram`, one that takes P.
        rounding: as for `LinearProgram`.
        value_gradient: as for `LinearProgram`.
        primal_gradient: rule of `primal`; None leaves it without.
        feasibility: as for `LinearProgram`.
        throw: as for `LinearProgram`.

    Raises:
        TypeError: as `LinearProgram`, and for a solver of linear programs only.
        ValueError: as `LinearProgram`, and for a P that is not symmetric or has a negative eigenvalue.

    Sound: `lower` is the bound of the multipliers and of the point's tangent (see `quadratic_bounds`), never above the
    optimal value, whatever the solver did, under either rounding.
    Exact: as the solver; `gap`, feasibility and OPTIMAL as for `LinearProgram`.
    Gradient: of `lower` by the envelope theorem, in all eight arguments, x x^T / 2 for P. `primal` is differentiable by
    default (`KKT()`): by the KKT system of the constraints that hold with equality; where that is singular (the argmin
    is not unique, or active rows depend on each other) it is the least-norm derivative, and `LPSolution.regular` says
    so. Source: Amos & Kolter 2017 (OptNet).

    Example:
        >>> c = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
        >>> P, ones = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        >>> found = QuadraticProgram()(P, c, lower=0 * ones, upper=2 * ones)
        >>> found.primal.detach().round(decimals=4)  # c negated, where the box allows it
        tensor([1., 2.], dtype=torch.float64)
        >>> found.primal.sum().backward()
        >>> c.grad.round(decimals=4) + 0.0
        tensor([-1.,  0.], dtype=torch.float64)
    """

    _owner = "QuadraticProgram"
    _quadratic = True

    def __init__(
        self,
        solver: object = "auto",
        *,
        rounding: Rounding = "nearest",
        value_gradient: ValueGradient | None = None,
        primal_gradient: PrimalGradient | None = KKT(),  # noqa: B008
        feasibility: float | None = None,
        throw: bool = False,
    ) -> None:
        """`solver`: "auto" is `Auto()`."""
        super().__init__(
            solver,
            rounding=rounding,
            value_gradient=value_gradient,
            primal_gradient=primal_gradient,
            feasibility=feasibility,
            throw=throw,
        )

    @uncompiled
    def forward(  # type: ignore[override]
        self,
        P: Float[Tensor, "*#batch n n"],
        c: Float[Tensor, "*#batch n"],
        A: Float[Tensor, "*#batch m n"] | None = None,
        b: Float[Tensor, "*#batch m"] | None = None,
        E: Float[Tensor, "*#batch p n"] | None = None,
        d: Float[Tensor, "*#batch p"] | None = None,
        lower: Float[Tensor, "*#batch n"] | None = None,
        upper: Float[Tensor, "*#batch n"] | None = None,
        *,
        start: LPSolution | None = None,
    ) -> LPSolution:
        """Solve the batch; `start` is for solvers that warm-start."""
        given = arguments.gather(c, A, b, E, d, lower, upper, P, self._owner)
        require_convex(self._owner, given["P"].detach())
        return self._solve(given, start)
