"""The general batched linear-program layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from optrelax.checks import require_range
from optrelax.layers.programs import arguments
from optrelax.layers.programs.answers import admitted
from optrelax.layers.programs.argmin import KKT, PrimalGradient, Regularity
from optrelax.layers.programs.certificates import carry, certify, has_no_value, in_dtype, judge
from optrelax.layers.programs.lp_data import Answer, LPData, ProgramSolver, solver_of_programs
from optrelax.layers.programs.lp_gradients import (
    EnvelopeGradient,
    LagrangianPoint,
    NoRule,
    ValueGradient,
    attach_value,
    wants_gradient,
)
from optrelax.layers.programs.presolve import contradictions
from optrelax.layers.programs.safe_bounds import Certificate
from optrelax.layers.solutions import LPSolution, Status, require_optimal
from optrelax.rounding import Rounding, check_rounding
from optrelax.uncompiled import uncompiled

if TYPE_CHECKING:
    from optrelax.layers.programs.modelled import ModelledProgram


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
        self.solver = _auto() if solver == "auto" else solver
        self._solver = solver_of_programs(self._owner, self.solver, self._quadratic)
        require_range(self._owner, "> 0", optional=True, feasibility=feasibility)
        self.rounding = rounding
        self.value_gradient: ValueGradient = value_gradient or EnvelopeGradient()
        self.primal_gradient = primal_gradient
        self.feasibility = self._solver.tol if feasibility is None else feasibility
        self.throw = throw

    @classmethod
    def from_cvxpy(
        cls, problem: object, parameters: Sequence[object], variables: Sequence[object], **options: object
    ) -> ModelledProgram:
        """A layer `layer(*parameters) -> variables` of a CVXPY problem; see `ModelledProgram`.

        `options` are the program's: `solver`, `primal_gradient`, ... Of a linear program give
        `primal_gradient=Regularised(strength)` where gradients of the variables are wanted.
        """
        from optrelax.layers.programs.modelled import ModelledProgram

        return ModelledProgram(cls._of_problem(problem, **options), problem, parameters, variables)

    @classmethod
    def _of_problem(cls, problem: object, **options: Any) -> LinearProgram:
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
        return self._solve(arguments.gather(c, A, b, E, d, lower, upper, owner=self._owner, sparse=sparse), start)

    def _solve(self, given: dict[str, Tensor], start: LPSolution | None) -> LPSolution:
        if torch.is_autocast_enabled(given["c"].device.type):
            raise RuntimeError(f"{self._owner}: autocast is not supported; leave the autocast region for this call")
        batch = arguments.batch_shape(given, self._owner)
        graph = arguments.flatten(given, batch)
        data = graph.detach()
        answer = self._answer(self._solver, graph if self._solver.differentiates else data, start)
        certificate, status = self._judged(data, answer)
        answer, certificate, status = self._retried(data, answer, certificate, status)
        solution = self._solution(list(given.values()), graph, answer, certificate, status, batch)
        if self.throw:
            require_optimal(self._owner, solution.status)
        return solution

    def _judged(self, data: LPData, answer: Answer) -> tuple[Certificate, Tensor]:
        certificate = certify(data, answer, self.rounding, self.feasibility)
        return certificate, judge(answer.status, certificate, self._solver.tol)

    def _retried(
        self, data: LPData, answer: Answer, certificate: Certificate, status: Tensor
    ) -> tuple[Answer, Certificate, Tensor]:
        """The same with what was left unsettled solved by the solver's fallback."""
        open_ = (status == Status.NUMERICAL) | (status == Status.ITERATION_LIMIT)
        fallback = self._solver.fallback(data) if bool(open_.any()) else None
        if fallback is None:
            return answer, certificate, status
        some, index = data.select(open_), open_.nonzero().squeeze(-1)
        rest = self._answer(fallback, some, None)
        proof, verdict = self._judged(some, rest)
        name = f"{answer.solver}, {type(fallback).__name__} for {len(index)} of {len(status)}"
        answer = replace(answer.put(index, rest), solver=name)
        return answer, certificate.put(index, proof), status.index_put((index,), verdict)

    def _answer(self, solver: ProgramSolver, data: LPData, start: LPSolution | None) -> Answer:
        if data.size[0] == 0:
            return Answer.empty(data)
        warm = None if start is None else Answer.of(start, data)
        settled = contradictions(data)
        if settled is None:
            return self._within(solver, data, warm)
        contradicts, boxed = settled
        answer = self._within(solver, boxed, warm)
        return replace(answer, status=torch.where(contradicts, int(Status.INFEASIBLE), answer.status))

    def _within(self, solver: ProgramSolver, data: LPData, warm: Answer | None) -> Answer:
        """A solver's answer with its point, without NaN, inside the variables' bounds."""
        answer = admitted(solver, data, solver.solve(data, warm))
        x = answer.primal.nan_to_num(0.0, 0.0, 0.0)
        return replace(answer, primal=x if self._solver.differentiates else x.clamp(data.lower, data.upper))

    def _solution(
        self,
        given: Sequence[Tensor],
        graph: LPData,
        answer: Answer,
        certificate: Certificate,
        status: Tensor,
        batch: torch.Size,
    ) -> LPSolution:
        dtype, valueless = graph.c.dtype, has_no_value(status)
        lower = torch.where(valueless, -torch.inf, in_dtype(certificate.lower, dtype, self.rounding))
        primal, regularity = self._point(graph, answer, certificate, status, batch)
        return LPSolution(
            lower=self._value(lower, given, graph, answer, certificate, batch),
            primal=self._explained(_shaped(primal.to(dtype), batch), given),
            inequality=_shaped(certificate.inequality.to(dtype), batch),
            equality=_shaped(certificate.equality.to(dtype), batch),
            gap=_shaped(torch.where(valueless, torch.inf, certificate.gap.to(dtype)), batch),
            status=_shaped(status, batch),
            iterations=_shaped(answer.iterations, batch),
            solver=answer.solver or type(self.solver).__name__,
            regularity=regularity,
        )

    def _value(
        self,
        lower: Tensor,
        given: Sequence[Tensor],
        graph: LPData,
        answer: Answer,
        certificate: Certificate,
        batch: torch.Size,
    ) -> Tensor:
        """The bounds with their gradient."""
        live = lower.isfinite() & (answer.status != Status.NUMERICAL)
        value = _shaped(lower, batch)
        if answer.objective is not None:
            return carry(value, _shaped(torch.where(live, answer.objective, 0.0), batch))
        if not wants_gradient(given):
            return value
        every = bool(live.all())

        def sane(part: Tensor) -> Tensor:
            return _shaped((part if every else torch.where(live.unsqueeze(-1), part, 0.0)).to(lower.dtype), batch)

        saddle = LagrangianPoint(
            primal=sane(answer.primal),
            inequality=sane(certificate.inequality),
            equality=sane(certificate.equality),
            reduced=sane(certificate.reduced),
            lower=_shaped(graph.lower.detach(), batch),
            upper=_shaped(graph.upper.detach(), batch),
            live=_shaped(live, batch),
        )
        return attach_value(value, self.value_gradient, saddle, given)

    def _point(
        self, graph: LPData, answer: Answer, certificate: Certificate, status: Tensor, batch: torch.Size
    ) -> tuple[Tensor, Regularity | None]:
        """(the points with the derivative that was asked for, where its system is regular)."""
        if self.primal_gradient is None:
            return (answer.primal.detach() if answer.objective is None else answer.primal), None
        duals = torch.cat([certificate.inequality, certificate.equality], -1)
        primal = self.primal_gradient.primal(graph, answer.primal.detach(), duals, status)
        regularity = None
        if isinstance(self.primal_gradient, KKT) and torch.is_grad_enabled():
            regularity = Regularity(graph.detach(), answer.primal.detach(), duals, batch)
        return primal, regularity

    def _explained(self, primal: Tensor, given: Sequence[Tensor]) -> Tensor:
        """A point without a gradient rule: its backward pass says which option gives one."""
        if self.primal_gradient is not None or self._solver.differentiates or not torch.is_grad_enabled():
            return primal
        wanted = [tensor for tensor in given if tensor.requires_grad]
        return NoRule.apply(primal, self._owner, *wanted) if wanted else primal


def _auto() -> object:
    from optrelax.layers.programs.auto import Auto

    return Auto()


def _shaped(tensor: Tensor, batch: torch.Size) -> Tensor:
    return tensor if len(batch) == 1 else tensor.reshape(batch + tensor.shape[1:])
