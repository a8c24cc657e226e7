"""The quadratic-program layer: sound bounds, values of Clarabel, gradients of finite differences and of cvxpylayers."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from lp_cases import FAMILIES, MIXED, Data, boxed, free
from torch import Tensor

from optrelax.layers import Highs, InteriorPoint, QuadraticProgram, Status
from optrelax.layers.programs import arguments
from optrelax.layers.programs.active_set import ActiveSet
from optrelax.layers.programs.convexity import require_convex
from optrelax.layers.programs.interior import InteriorPrograms
from optrelax.layers.programs.lp_data import Answer, LPData, ProgramSolver

SOLVERS = {"interior": InteriorPoint(), "torch": InteriorPrograms(compiled=False)}
f64 = torch.float64


def hessian(batch: int, n: int, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(batch, n, rank, generator=generator, dtype=f64)
    return root @ root.mT


def optimum(P: Tensor, data: Data) -> tuple[float, np.ndarray]:
    """One problem by Clarabel through cvxpy."""
    import cvxpy as cp

    n = data.c.shape[-1]
    x = cp.Variable(n)
    rows = [] if data.A is None or data.b is None else [data.A.numpy() @ x <= data.b.numpy()]
    rows += [] if data.E is None or data.d is None else [data.E.numpy() @ x == data.d.numpy()]
    rows += [] if data.lower is None else [x >= data.lower.numpy()]
    finite = None if data.upper is None else data.upper.isfinite().numpy()
    rows += [] if finite is None or not finite.any() else [x[finite] <= data.upper.numpy()[finite]]  # type: ignore[union-attr]
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, cp.psd_wrap(P.numpy())) / 2 + data.c.numpy() @ x), rows)
    problem.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    return float(problem.value), np.asarray(x.value)


@pytest.fixture(params=SOLVERS)
def solver(request: pytest.FixtureRequest) -> ProgramSolver | InteriorPoint:
    return SOLVERS[str(request.param)]


@pytest.mark.parametrize("family", ["feasible", "degenerate", "covering", "assignment", "free"])
@pytest.mark.parametrize("rank", ["full", "half", "none"])
def test_optimum_equals_clarabels(solver: ProgramSolver, family: str, rank: str) -> None:
    data = free(3, 6, 3) if family == "free" else FAMILIES[family]()
    batch, n = data.c.shape
    P = hessian(batch, n, {"full": n, "half": max(1, n // 2), "none": 0}[rank])
    wanted = torch.tensor([optimum(P[i], data.one(i))[0] for i in range(batch)], dtype=f64)
    for rounding in ("nearest", "outward"):
        found = QuadraticProgram(solver, rounding=rounding)(P, *data)
        exact = found.status == Status.OPTIMAL
        # Outward rounding has no bound where a flat P meets variables without bounds.
        assert bool(exact.all()) or (rounding == "outward" and family in ("free", "covering", "packing"))
        scale = wanted.abs().clamp(min=1)
        assert bool((found.lower <= wanted + 1e-8 * scale).all())
        assert bool((wanted - found.lower <= 1e-6 * scale)[exact].all())
        assert bool((found.gap[exact] >= -1e-9).all())


@dataclass(frozen=True)
class Liar(ProgramSolver):
    primal: Tensor
    inequality: Tensor
    tol: float = 1e-6
    quadratic = True

    def solve(self, data: LPData, start: Answer | None) -> Answer:
        status = torch.zeros(data.size[0], dtype=torch.int8)
        return Answer(self.primal, self.inequality, torch.zeros(data.size[0], 0, dtype=f64), status, status.long())


def rational(values: Tensor) -> list[Fraction]:
    return [Fraction(v) for v in values.tolist()]


@pytest.mark.parametrize("seed", range(20))
def test_outward_bounds_of_any_point_are_below_the_exact_function(seed: int) -> None:
    """Against rationals, at random feasible points: whatever point and multipliers the solver claims."""
    generator = torch.Generator().manual_seed(seed)
    # Integer factors, so that P is exactly semidefinite.
    root = torch.randint(-3, 4, (4, 2 + seed % 3), generator=generator).to(f64)
    P, data = root @ root.mT, boxed(1, 3, 4, 0, seed=seed)
    claim = torch.randn(1, 4, generator=generator, dtype=f64) * 3
    layer = QuadraticProgram(Liar(claim, torch.rand(1, 3, generator=generator, dtype=f64)), rounding="outward")
    lower = Fraction(layer(P, *data).lower.item())
    assert data.A is not None
    assert data.b is not None
    c, A, b = rational(data.c[0]), [rational(a) for a in data.A[0]], rational(data.b[0])
    points = torch.rand(400, 4, generator=generator, dtype=f64)
    values = []
    for point in points:
        x = rational(point)
        if all(sum(p * q for p, q in zip(a, x, strict=True)) <= side for a, side in zip(A, b, strict=True)):
            Px = [sum(p * q for p, q in zip(rational(row), x, strict=True)) for row in P]
            values.append(
                sum(p * q for p, q in zip(c, x, strict=True)) + sum(p * q for p, q in zip(Px, x, strict=True)) / 2
            )
    assert values
    assert lower <= min(values)


def test_an_unconstrained_problem_is_its_linear_system(solver: ProgramSolver) -> None:
    P, c = hessian(3, 5, 8), torch.randn(3, 5, dtype=f64)
    wanted = -torch.linalg.solve(P, c)
    for rounding in ("nearest", "outward"):
        found = QuadraticProgram(solver, rounding=rounding)(P, c)
        assert bool((found.status == Status.OPTIMAL).all())
        torch.testing.assert_close(found.primal, wanted, rtol=1e-6, atol=1e-6)
        exact = (c * wanted).sum(-1) / 2
        assert bool((found.lower <= exact + 1e-12 * exact.abs()).all())


def test_each_problem_keeps_its_own_status(solver: ProgramSolver) -> None:
    flat = torch.zeros(2, 2, dtype=f64)
    assert QuadraticProgram(solver)(flat, *MIXED).status.tolist() == [0, Status.INFEASIBLE, Status.UNBOUNDED, 0]
    curved = QuadraticProgram(solver)(torch.eye(2, dtype=f64), *MIXED)
    assert curved.status.tolist() == [0, Status.INFEASIBLE, 0, 0]
    assert curved.primal.isfinite().all()


@pytest.mark.parametrize("p", [0, 1])
def test_gradients_of_value_and_argmin_are_those_of_finite_differences(p: int) -> None:
    data, root = boxed(1, 3, 4, p, seed=5), hessian(1, 4, 4, seed=1)
    layer = QuadraticProgram(InteriorPoint(tol=1e-9))
    parts = [None if t is None else t.clone().requires_grad_() for t in (root, *data)]

    def value(P: Tensor, *rest: Tensor) -> Tensor:
        lower: Tensor = layer((P + P.mT) / 2, *rest).lower
        return lower

    def argmin(P: Tensor, *rest: Tensor) -> Tensor:
        primal: Tensor = layer((P + P.mT) / 2, *rest).primal
        return primal

    for function in (value, argmin):
        assert torch.autograd.gradcheck(function, parts, eps=1e-4, rtol=1e-3, atol=1e-4)


def test_the_argmins_gradient_is_that_of_cvxpylayers() -> None:
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    data, P = boxed(3, 4, 5, 1, seed=2), hessian(3, 5, 5)
    assert data.A is not None
    assert data.E is not None
    x, root = cp.Variable(5), cp.Parameter((5, 5))
    c, A, b, E, d = cp.Parameter(5), cp.Parameter((4, 5)), cp.Parameter(4), cp.Parameter((1, 5)), cp.Parameter(1)
    objective = cp.Minimize(cp.sum_squares(root @ x) / 2 + c @ x)
    problem = cp.Problem(objective, [A @ x <= b, E @ x == d, x >= 0, x <= 1])
    theirs = CvxpyLayer(problem, [root, c, A, b, E, d], [x])
    square = torch.linalg.cholesky(P).mT.contiguous()
    weights = torch.randn(3, 5, dtype=f64)
    grads = []
    for kind in ("ours", "theirs"):
        leaves = [t.detach().clone().requires_grad_() for t in (square, *data[:5]) if t is not None]
        if kind == "ours":
            out = QuadraticProgram(throw=True)(leaves[0].mT @ leaves[0], *leaves[1:], *data[5:]).primal
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = theirs(*leaves, solver_args={"solve_method": "CLARABEL"})[0]
        (out * weights).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_shared_data_get_the_sum_and_failures_nothing() -> None:
    P, A = torch.eye(2, dtype=f64).requires_grad_(), MIXED.A
    assert A is not None
    leaf = A.clone().requires_grad_()
    found = QuadraticProgram()(P, *MIXED._replace(A=leaf))
    (found.primal.sum() + found.lower.exp().reciprocal().sum()).backward()
    assert P.grad is not None
    assert leaf.grad is not None
    assert bool(P.grad.isfinite().all())
    assert bool(leaf.grad.isfinite().all())
    total = torch.zeros_like(A)
    for i in (0, 2, 3):
        one = A.clone().requires_grad_()
        QuadraticProgram()(torch.eye(2, dtype=f64), *MIXED.one(i)._replace(A=one)).primal.sum().backward()
        assert one.grad is not None
        total += one.grad
    alone = A.clone().requires_grad_()
    QuadraticProgram()(torch.eye(2, dtype=f64), *MIXED._replace(A=alone)).primal.sum().backward()
    torch.testing.assert_close(alone.grad, total, rtol=1e-5, atol=1e-6)


def test_a_singular_system_has_the_least_norm_derivative_and_says_so() -> None:
    """min (x0 + x1 - c)^2 / 2: the argmin is a line; the least-norm derivative moves along (1, 1)."""
    P = torch.ones(1, 2, 2, dtype=f64)
    c = torch.tensor([[-1.0, -1.0]], dtype=f64, requires_grad=True)
    wide = torch.full((2,), 9.0, dtype=f64)
    found = QuadraticProgram()(P, c, lower=-wide, upper=wide)
    assert found.primal.sum().item() == pytest.approx(1.0, abs=1e-6)
    found.primal.sum().backward()
    assert c.grad is not None
    torch.testing.assert_close(c.grad, torch.full((1, 2), -0.5, dtype=f64))
    assert found.regular is not None
    assert found.regular.tolist() == [False]
    both = QuadraticProgram()(P + torch.stack([torch.zeros(2, 2), torch.eye(2)]).double(), c, lower=-wide, upper=wide)
    assert both.regular is not None
    assert both.regular.tolist() == [False, True]
    kept = pickle.loads(pickle.dumps(replace(both, lower=both.lower.detach(), primal=both.primal.detach())))  # noqa: S301
    assert kept.regular.tolist() == [False, True]
    assert QuadraticProgram(primal_gradient=None)(P, c, lower=-wide, upper=wide).regular is None


def test_matrices_are_convex_to_rounding_in_any_batch() -> None:
    """Least eigenvalues of -0.9e-9 and -1.1e-9 of the largest entry; what is refused spoils no other verdict."""
    n, exact = 40, hessian(3, 40, 40)
    for M in (exact, exact[0], hessian(3, n, 7), 0 * exact, exact[:0]):
        require_convex("QuadraticProgram", M)
    for part, fine in ((0.9e-9, True), (1.1e-9, False)):
        P = torch.diag_embed(torch.tensor([[1.0] * n, [4.0] * n], dtype=f64))
        P[1, -1, -1] = -4 * part
        skew = torch.eye(n, dtype=f64).repeat(2, 1, 1)
        skew[1, 3, 5] = part
        for matrices, message in ((P, "must be positive semidefinite"), (skew, "must be symmetric")):
            if fine:
                require_convex("QuadraticProgram", matrices)
                continue
            with pytest.raises(ValueError, match=message):
                require_convex("QuadraticProgram", matrices)


def test_bad_matrices_and_solvers_are_errors() -> None:
    c = torch.ones(2, dtype=f64)
    with pytest.raises(ValueError, match="QuadraticProgram: P must be symmetric"):
        QuadraticProgram()(torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=f64), c)
    with pytest.raises(ValueError, match="P must be positive semidefinite, its least eigenvalue is -1"):
        QuadraticProgram()(torch.diag(torch.tensor([1.0, -1.0], dtype=f64)), c)
    with pytest.raises(ValueError, match=r"P has shape \(3, 3\), wanted \[\*batch, 2, 2\]"):
        arguments.gather(c, None, None, None, None, None, None, torch.eye(3, dtype=f64), "QuadraticProgram")
    with pytest.raises(TypeError, match=r"Highs solves linear programs only; InteriorPoint\(\) takes quadratic ones"):
        QuadraticProgram(Highs())


def test_empty_batches_and_float32() -> None:
    data = boxed(3, 4, 5, 1)
    P = hessian(3, 5, 5)
    empty = QuadraticProgram()(P[:0], data.c[:0], lower=data.lower, upper=data.upper)
    assert empty.lower.shape == (0,)
    single, double = (
        QuadraticProgram()(*(t.to(d) if t is not None else t for t in (P, *data))) for d in (torch.float32, f64)
    )
    assert single.lower.dtype == single.primal.dtype == torch.float32
    torch.testing.assert_close(single.lower.double(), double.lower, rtol=1e-5, atol=1e-5)


def test_the_default_solver_has_its_public_name() -> None:
    one = torch.ones(1, dtype=f64)
    names = [QuadraticProgram(solver)(torch.eye(1, dtype=f64), one).solver for solver in ("auto", InteriorPoint())]
    assert names == ["InteriorPoint"] * 2


def test_what_interior_points_leave_open_is_settled_by_active_sets() -> None:
    """A flat direction that falls; rows that exclude each other; "no limit" as 1e8 beside open ends."""
    flat = torch.ones(2, 2, dtype=f64)
    none = torch.zeros(0, 2, dtype=f64)
    A = torch.tensor([[[3.0, 3, 2, -1], [-1, -1, -1, -1], [3, 3, -1, 1], [2, 2, 3, -3]]], dtype=f64)
    P = torch.tensor([[2.0, 2, 1, 4], [2, 8, 2, 4], [1, 2, 6, 2], [4, 4, 2, 8]], dtype=f64)
    c, b = torch.tensor([0.0, 0, -2, -3], dtype=f64), torch.tensor([7.0, -2, 1, 1e8], dtype=f64)
    ends = torch.tensor([[0.0, 0, 0, 1], [torch.inf, torch.inf, 5, 1]], dtype=f64)
    for solver in (ActiveSet(), "auto"):
        layer = QuadraticProgram(solver, rounding="outward")
        assert layer(flat, torch.tensor([1.0, -1.0], dtype=f64)).status == Status.UNBOUNDED
        rows = torch.cat([flat[:1], -flat[:1], none])
        assert layer(flat, flat[0], rows, torch.tensor([0.0, -1.0], dtype=f64)).status == Status.INFEASIBLE
        found = layer(P, c, A, b, lower=ends[0], upper=ends[1])
        assert found.status == Status.OPTIMAL
        assert Fraction(found.lower.item()) <= Fraction(47, 12)
        torch.testing.assert_close(found.lower, torch.tensor([47 / 12], dtype=f64), rtol=1e-6, atol=0)


def test_a_tolerance_below_what_rounding_leaves_spoils_no_point():
    """A step that ended on a bound itself would take the bound for none."""
    generator = torch.Generator().manual_seed(6)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for _ in range(40):
        c, A, E = draw(8, 4), draw(8, 3, 4), draw(8, 1, 4)
        inside = torch.rand(8, 4, 1, generator=generator, dtype=torch.float64)
        root = draw(8, 4, 4)
        P = root.mT @ root + 0.1 * torch.eye(4, dtype=torch.float64)
        sides = (A @ inside).squeeze(-1) + 0.3, E, (E @ inside).squeeze(-1)
        found = QuadraticProgram(InteriorPoint(tol=1e-13))(P, c, A, *sides, torch.zeros_like(c), torch.ones_like(c))
        assert (found.status == Status.OPTIMAL).all()
        assert (found.primal >= 0).all()
        assert (found.primal <= 1).all()
