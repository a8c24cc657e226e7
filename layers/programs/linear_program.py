"""The general batched linear-program layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from optrelax.layers.programs import lp_data
from optrelax.layers.programs.argmin import KKT, PrimalGradient, Regularity
from optrelax.layers.programs.lp_data import Answer, LPData, ProgramSolver
from optrelax.layers.programs.lp_gradients import EnvelopeGradient, LagrangianPoint, ValueGradient, attach_value
from optrelax.layers.programs.quadratic_bounds import certify_quadratic
from optrelax.layers.programs.safe_bounds import Certificate, certify_duals
from optrelax.layers.solutions import LPSolution, Status, require_optimal
from optrelax.rounding import Rounding, check_rounding, down
from optrelax.uncompiled import uncompiled

if TYPE_CHECKING:
    from optrelax.layers.programs.modelled import ModelledProgram


@runtime_checkable
class OffersPrograms(Protocol):
    """A solver of several kinds of problems, general programs among them."""

    def for_programs(self) -> ProgramSolver:
        """The solver of general programs."""


def _programs(owner: str, solver: object, quadratic: bool) -> ProgramSolver:
    """The solver of general programs that was given, or that a solver of several kinds has; TypeError for others."""
    offers = isinstance(solver, OffersPrograms) and not isinstance(solver, type)
    made = solver.for_programs() if offers else solver  # type: ignore[attr-defined]
    if not isinstance(made, ProgramSolver):
        raise TypeError(f"{owner}: solver must be a solver object such as Highs() or PDHG(), got {solver!r}")
    if quadratic and not made.quadratic:
        raise TypeError(
            f"{owner}: {type(made).__name__} solves linear programs only; InteriorPoint() takes quadratic ones"
        )
    return made


class LinearProgram(nn.Module):
    """min c.x subject to A x <= b, E x = d, lower <= x <= upper, for any leading batch shape.

    Shapes: c [*batch, n], A [*batch, m, n], b [*batch, m], E [*batch, p, n], d [*batch, p], lower and upper
    [*batch, n]; leading shapes broadcast. A and b, E and d, lower, upper may be None.

    Args:
        solver: a `ProgramSolver`, or "auto": `Auto()`.
        rounding: "outward" includes floating point in `lower`; "nearest" evaluates it in float64 and rounds it to the
            nearest float.
        value_gradient: rule of `lower`; None: `EnvelopeGradient()`.
        primal_gradient: rule of `primal`, such as `Regularised(strength)`; None: `primal` is detached, as an LP's
            argmin sits at a vertex, so that its derivative is 0 or does not exist.
        feasibility: what a point may violate, relative; None: the solver's `tol`.
        throw: whether to raise UnsolvedError unless all problems are OPTIMAL.

    Raises:
        TypeError: for what is no solver, and other dtypes than float32 and float64.
        ValueError: for shapes, dtypes, devices that do not fit and for NaN.
        RuntimeError: under autocast, and from the backward pass under create_graph=True.
        UnsolvedError: with throw=True unless all are OPTIMAL.

    Sound: `LPSolution.lower` is computed from the multipliers alone (Neumaier & Shcherbina 2004; see `safe_bounds`),
    so it never exceeds the optimal value, whatever the solver did. It needs finite bounds on the variables, or rows
    that imply them, or reduced costs of the right sign; it is -inf where it has none of these, and always for an
    infeasible problem.
    Exact: as the solver; `gap` (absolute) says how far. A point counts as feasible, and `gap` is finite, if it lies in
    the variables' bounds and A x - b <= feasibility * max(1, |b|), |E x - d| <= feasibility * max(1, |d|), row by row;
    what it violates is charged at its multiplier. OPTIMAL: gap <= solver.tol * max(1, |lower|).
    Gradient: of `lower`, in all seven arguments; shared arguments get the sum over the batch. It is 0, never NaN, where
    the problem is INFEASIBLE or UNBOUNDED, the bound is -inf, or the solver failed.

    Example:
        >>> c = torch.tensor([[-1.0, -2.0], [1.0, -1.0]], requires_grad=True)  # two problems at once
        >>> A, b, ones = torch.ones(1, 2), torch.ones(1), torch.ones(2)
        >>> found = LinearProgram()(c, A, b, lower=0 * ones, upper=ones)
        >>> found.lower.detach().round(decimals=4)
        tensor([-2., -1.])
        >>> found.lower.sum().backward()
        >>> c.grad.round(decimals=4) + 0.0  # the solutions
        tensor([[0., 1.],
                [0., 1.]])
    """

    _owner = "LinearProgram"
    _quadratic = False
    _sparse = True

    def __init__(
        self,
        solver: object = "auto",
        *,
        rounding: Rounding = "nearest",
        value_gradient: ValueGradient | None = None,
        primal_gradient: PrimalGradient | None = None,
        feasibility: float | None = None,
        throw: bool = False,
    ) -> None:
        """`solver`: "auto" chooses by counted work (`LPSolution.solver` says what), or a solver object.

        `feasibility` defaults to solver.tol, in the units of max(1, |b|).
        """
        super().__init__()
        check_rounding(self._owner, rounding)
        self.solver = self._default() if solver == "auto" else solver
        self._solver = _programs(self._owner, self.solver, self._quadratic)
        if feasibility is not None and not feasibility > 0:
            raise ValueError(f"{self._owner}: feasibility must be > 0, got {feasibility}")
        self.rounding = rounding
        self.value_gradient: ValueGradient = value_gradient or EnvelopeGradient()
        self.primal_gradient = primal_gradient
        self.feasibility = self._solver.tol if feasibility is None else feasibility
        self.throw = throw

    @classmethod
    def from_cvxpy(
        cls, problem: Any, parameters: Sequence[Any], variables: Sequence[Any], **options: Any
    ) -> ModelledProgram:
        """A layer `layer(*parameters) -> variables` of a CVXPY problem; see `ModelledProgram`.

        `options` are the program's: `solver`, `primal_gradient`, ... Of a linear program give
        `primal_gradient=Regularised(strength)` where gradients of the variables are wanted.
        """
        from optrelax.layers.programs.modelled import ModelledProgram

        return ModelledProgram(cls._of_problem(problem, **options), problem, parameters, variables)

    @classmethod
    def _of_problem(cls, problem: Any, **options: Any) -> LinearProgram:
        return cls(**options)

    def extra_repr(self) -> str:
        """The options, for the module's repr."""
        return f"{self.solver!r}, rounding={self.rounding!r}, feasibility={self.feasibility:g}"

    @uncompiled
    def forward(
        self,
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
        """Solve the batch; `start` is the solution of a nearby batch of the same shape, for solvers that warm-start."""
        sparse = self._sparse and self._solver.sparse and self.primal_gradient is None
        return self._solve(lp_data.gather(c, A, b, E, d, lower, upper, owner=self._owner, sparse=sparse), start)

    def _default(self) -> object:
        from optrelax.layers.programs.auto import Auto

        return Auto()

    def _solve(self, given: dict[str, Tensor], start: LPSolution | None) -> LPSolution:
        if torch.is_autocast_enabled(given["c"].device.type):
            raise RuntimeError(f"{self._owner}: autocast is not supported; leave the autocast region for this call")
        batch = lp_data.batch_shape(given, self._owner)
        graph = lp_data.flatten(given, batch)
        data = graph.detach()
        crossed = data.lower > data.upper
        answer = self._answer(graph if self._solver.differentiates else data, crossed, start)
        certificate = _certify(data, answer, self.rounding, self.feasibility)
        status = _judge(answer.status, certificate, self._solver.tol)
        solution = self._solution(list(given.values()), graph, answer, certificate, status, batch)
        if self.throw:
            require_optimal(self._owner, solution.status)
        return solution

    def _answer(self, data: LPData, crossed: Tensor, start: LPSolution | None) -> Answer:
        size = data.size[0]
        if size == 0:
            return _empty_answer(data)
        warm = None if start is None else _warm(start, data)
        # Contradictory bounds and rows of zeros are settled here; the solver gets what it can work with.
        false_b, false_d = _false_rows(data)
        if not bool(crossed.any()) and false_b is None and false_d is None:
            return self._within(self._solver.solve(data, warm), data)
        false_b = torch.zeros_like(data.b, dtype=torch.bool) if false_b is None else false_b
        false_d = torch.zeros_like(data.d, dtype=torch.bool) if false_d is None else false_d
        middle = torch.where(crossed, data.lower / 2 + data.upper / 2, 0.0).detach()
        boxed = replace(
            data,
            lower=torch.where(crossed, middle, data.lower),
            upper=torch.where(crossed, middle, data.upper),
            b=torch.where(false_b, 0.0, data.b),
            d=torch.where(false_d, 0.0, data.d),
        )
        contradicts = (crossed.any(-1) | false_b.any(-1)) | false_d.any(-1)
        answer = self._within(self._solver.solve(boxed, warm), boxed)
        infeasible = torch.full_like(answer.status, Status.INFEASIBLE)
        return replace(answer, status=torch.where(contradicts, infeasible, answer.status))

    def _within(self, answer: Answer, data: LPData) -> Answer:
        """The answer without NaN, its point inside the variables' bounds."""
        x, y, v = (part.nan_to_num(0.0, 0.0, 0.0) for part in (answer.primal, answer.inequality, answer.equality))
        x = x if self._solver.differentiates else x.clamp(data.lower, data.upper)
        return replace(answer, primal=x, inequality=y, equality=v)

    def _solution(
        self,
        given: Sequence[Tensor],
        graph: LPData,
        answer: Answer,
        certificate: Certificate,
        status: Tensor,
        batch: torch.Size,
    ) -> LPSolution:
        dtype = graph.c.dtype
        lower = _to_dtype(certificate.lower, dtype, self.rounding)
        lower = torch.where(_no_value(status), -torch.inf, lower)
        live = lower.isfinite() & (answer.status != Status.NUMERICAL)
        every = bool(live.all())

        def sane(part: Tensor) -> Tensor:
            return _shaped((part if every else torch.where(live.unsqueeze(-1), part, 0.0)).to(dtype), batch)

        saddle = LagrangianPoint(
            primal=sane(answer.primal),
            inequality=sane(certificate.inequality),
            equality=sane(certificate.equality),
            reduced=sane(certificate.reduced),
            lower=_shaped(graph.lower.detach(), batch),
            upper=_shaped(graph.upper.detach(), batch),
            live=_shaped(live, batch),
        )
        value = _shaped(lower, batch)
        if answer.objective is None:
            value = attach_value(value, self.value_gradient, saddle, given)
        else:
            value = _carry(value, _shaped(torch.where(live, answer.objective, 0.0), batch))
        primal = answer.primal if answer.objective is not None else answer.primal.detach()
        if self.primal_gradient is not None:
            duals = torch.cat([certificate.inequality, certificate.equality], -1)
            primal = self.primal_gradient.primal(graph, primal.detach(), duals, status)
        regularity = None
        if isinstance(self.primal_gradient, KKT) and torch.is_grad_enabled():
            regularity = Regularity(graph.detach(), answer.primal.detach(), duals, batch)
        gap = torch.where(_no_value(status), torch.inf, certificate.gap.to(dtype))
        return LPSolution(
            lower=value,
            primal=self._explained(_shaped(primal.to(dtype), batch), given),
            inequality=_shaped(certificate.inequality.to(dtype), batch),
            equality=_shaped(certificate.equality.to(dtype), batch),
            gap=_shaped(gap, batch),
            status=_shaped(status, batch),
            iterations=_shaped(answer.iterations, batch),
            solver=answer.solver or type(self.solver).__name__,
            regularity=regularity,
        )

    def _explained(self, primal: Tensor, given: Sequence[Tensor]) -> Tensor:
        """A point without a gradient rule: its backward pass says which option gives one."""
        if self.primal_gradient is not None or self._solver.differentiates or not torch.is_grad_enabled():
            return primal
        wanted = [tensor for tensor in given if tensor.requires_grad]
        return _NoRule.apply(primal, self._owner, *wanted) if wanted else primal


class _NoRule(torch.autograd.Function):
    """Identity in a point; differentiating it is an error that names the cure."""

    @staticmethod
    def forward(ctx: Any, primal: Tensor, owner: str, *data: Tensor) -> Tensor:
        ctx.owner = owner
        return primal.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        cure = "KKT()" if ctx.owner == "QuadraticProgram" else "Regularised(strength)"
        raise RuntimeError(
            f"{ctx.owner}: primal has no gradient rule; give primal_gradient={cure}, or use primal.detach()"
        )


def _false_rows(data: LPData) -> tuple[Tensor | None, Tensor | None]:
    """Rows of zeros that cannot hold, of A and of E; None where there are none."""
    found: list[Tensor | None] = []
    for matrix, wrong in ((data.A, data.b < 0), (data.E, data.d != 0)):
        rows = lp_data.zero_rows(matrix) if wrong.numel() and matrix.shape[-2] else None
        false = None if rows is None or not bool(rows.any()) else rows & wrong
        found.append(false if false is not None and bool(false.any()) else None)
    return found[0], found[1]


def _certify(data: LPData, answer: Answer, rounding: Rounding, feasibility: float) -> Certificate:
    if data.P is not None:
        return certify_quadratic(data, answer.primal, answer.inequality, answer.equality, rounding, feasibility)
    # A solver that differentiates itself may leave the variables' bounds by its tolerance.
    primal = answer.primal
    primal = primal if answer.objective is None else primal.detach().clamp(data.lower, data.upper)
    return certify_duals(data, primal, answer.inequality, answer.equality, rounding, feasibility)


def _judge(claimed: Tensor, certificate: Certificate, tol: float) -> Tensor:
    """Final statuses: OPTIMAL exactly where the certificate says so, [B]."""
    proved = certificate.lower.isfinite() & (certificate.gap <= tol * certificate.lower.abs().clamp(min=1))
    # A claim of optimality that the certificate does not bear out is a numerical failure.
    unproved = torch.where(claimed == Status.OPTIMAL, torch.full_like(claimed, Status.NUMERICAL), claimed)
    return torch.where(proved & (claimed != Status.INFEASIBLE), torch.full_like(claimed, Status.OPTIMAL), unproved)


def _no_value(status: Tensor) -> Tensor:
    return (status == Status.INFEASIBLE) | (status == Status.UNBOUNDED)


def _to_dtype(value: Tensor, dtype: torch.dtype, rounding: Rounding) -> Tensor:
    """float64 to `dtype`; rounded down under "outward"."""
    near = value.to(dtype)
    if rounding == "outward" and dtype != torch.float64:
        near = torch.where(near.double() > value, down(near), near)
    # A finite float64 may round up to inf in float32.
    return torch.where(near == torch.inf, torch.full_like(near, torch.finfo(dtype).max), near)


def _carry(value: Tensor, objective: Tensor) -> Tensor:
    """`value` with the gradient of `objective`."""
    zero = objective - objective.detach()
    return torch.where(value.isfinite(), value + zero, value)


def _shaped(tensor: Tensor, batch: torch.Size) -> Tensor:
    return tensor.reshape(batch + tensor.shape[1:])


def _empty_answer(data: LPData) -> Answer:
    empty = torch.zeros(0, dtype=torch.int8, device=data.c.device)
    primal = data.c.detach().clone()
    return Answer(primal, data.b.detach().clone(), data.d.detach().clone(), empty, empty.long())


def _warm(start: LPSolution, data: LPData) -> Answer:
    """A former solution as a starting point; ValueError where its shapes are another problem's."""
    size, n, m, p = data.size

    def flat(name: str, width: int) -> Tensor:
        tensor: Tensor = getattr(start, name).detach()
        if tensor.numel() != size * width or tensor.shape[-1] != width:
            raise ValueError(
                f"LinearProgram: start.{name} has shape {tuple(tensor.shape)}, "
                f"the batch has {size} problem(s) with {width}"
            )
        return tensor.reshape(size, width).to(data.c)

    points = flat("primal", n), flat("inequality", m), flat("equality", p)
    return Answer(*points, start.status.reshape(size), start.iterations.reshape(size))
