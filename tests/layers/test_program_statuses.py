"""Statuses and bounds of small programs of every kind, against rationals: whatever is claimed has to be so."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from exact_programs import exact_optimum, odd_programs
from lp_cases import Data, boxed

from optrelax.layers import PDHG, Highs, InteriorPoint, LinearProgram, QuadraticProgram, Status
from optrelax.layers.programs import safe_bounds
from optrelax.layers.programs.arguments import flatten, gather
from optrelax.layers.programs.evaluation import kernels
from optrelax.layers.programs.interior import InteriorPrograms
from optrelax.layers.programs.quadratic_bounds import certify_quadratic
from optrelax.layers.programs.safe_bounds import certify_duals

f64 = torch.float64
SOLVERS = {
    "auto": "auto",
    "highs": Highs(workers=1),
    "interior": InteriorPoint(),
    "interior-torch": InteriorPrograms(compiled=False),
    "pdhg": PDHG(max_iterations=100),
}
SHAPES = ((3, 3, 1), (2, 4, 0), (4, 2, 2), (3, 0, 0))
WANTED = {math.inf: Status.INFEASIBLE, -math.inf: Status.UNBOUNDED}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statuses_are_right_and_bounds_below_the_optimum(shape: tuple[int, int, int], whole: bool) -> None:
    data = odd_programs(12, *shape, seed=1, whole=whole)
    exact = [exact_optimum(data.one(i)) for i in range(12)]
    for name, solver in SOLVERS.items():
        found = LinearProgram(solver, rounding="outward")(*data)
        for i, value in enumerate(exact):
            _check(found.status[i].item(), found.lower[i].item(), value, settled=name in ("auto", "highs"))


def _check(status: int, lower: float, exact: float | Fraction, settled: bool) -> None:
    right = WANTED.get(exact, Status.OPTIMAL) if isinstance(exact, float) else Status.OPTIMAL
    open_ = () if settled else (Status.NUMERICAL, Status.ITERATION_LIMIT)
    assert status in (right, *open_), (Status(status), exact)
    assert lower == -math.inf or Fraction(lower) <= exact


@pytest.mark.parametrize("name", ["auto", "interior"])
def test_statuses_of_a_batch_are_those_of_its_problems_alone(name: str) -> None:
    data = odd_programs(12, 3, 3, 1, seed=5, whole=False)
    layer = LinearProgram(SOLVERS[name])
    alone = [layer(*(part[i : i + 1] for part in data if part is not None)).status.item() for i in range(12)]
    assert layer(*data).status.tolist() == alone


@pytest.mark.parametrize("name", ["auto", "highs", "interior", "pdhg"])
def test_what_falls_by_less_than_rounding_has_a_nearest_bound_alone(name: str) -> None:
    """Equal columns whose costs differ: x0 - x1 falls for ever, at that difference."""
    A, b = torch.tensor([[-1.0, -1.0]], dtype=f64), torch.tensor([-1.0], dtype=f64)
    for rate, rounding in ((1e-15, "outward"), (1e-12, "nearest"), (1e-12, "outward"), (1e-9, "nearest")):
        c = torch.tensor([1.0, 1.0 + rate], dtype=f64)
        assert LinearProgram(SOLVERS[name], rounding=rounding)(c, A, b).lower == -math.inf
    near = LinearProgram(SOLVERS[name])(torch.tensor([1.0, 1.0 + 1e-15], dtype=f64), A, b).lower
    assert near == -math.inf or abs(near - 1) < 1e-9


def test_no_ray_is_unbounded_without_a_feasible_point() -> None:
    """x0 falls for ever, but x1 <= -1 and x1 >= 0."""
    data = Data(
        torch.tensor([[-1.0, 0.0]], dtype=f64),
        torch.tensor([[0.0, 1.0]], dtype=f64),
        torch.tensor([-1.0], dtype=f64),
        lower=torch.zeros(2, dtype=f64),
    )
    for solver in SOLVERS.values():
        assert LinearProgram(solver)(*data).status.item() != Status.UNBOUNDED


@pytest.mark.parametrize("quadratic", [False, True])
def test_the_compiled_pass_gives_what_the_operations_give(quadratic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever multipliers and points: NaN, infinite, of the wrong sign, outside the box."""
    data = boxed(40, 7, 9, 2, seed=4)
    assert data.b is not None
    generator = torch.Generator().manual_seed(0)
    x, y, v = (torch.randn(40, size, generator=generator, dtype=f64) for size in (9, 7, 2))
    x[::2], y[3, 0], y[4, 1], v[5, 0] = x[::2].clamp(0, 1), torch.nan, torch.inf, torch.nan
    b = torch.where(torch.arange(40).unsqueeze(-1) % 4 == 0, torch.inf, data.b)
    b[8], x[8] = 1e3, 0.5
    given = gather(*data._replace(b=b))
    flat = flatten(given, torch.Size([40]))
    flat = replace(flat, d=torch.where(torch.arange(40).unsqueeze(-1) == 8, flat.E.sum(-1) / 2, flat.d))
    rule, most = certify_duals, 39
    if quadratic:
        root = torch.randn(40, 9, 3, generator=generator, dtype=f64)
        flat, rule, most = replace(flat, P=root @ root.mT), certify_quadratic, 40
    compiled = rule(flat, x, y, v, "nearest", 1e-6)
    assert kernels().library is not None
    monkeypatch.setattr(safe_bounds, "evaluated", lambda *_: None)
    plain = rule(flat, x, y, v, "nearest", 1e-6)
    assert 0 < int(compiled.gap.isfinite().sum()) <= most
    for name in ("lower", "gap", "inequality", "equality", "reduced"):
        torch.testing.assert_close(getattr(compiled, name), getattr(plain, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("compiled", [True, False])
def test_singular_quadratic_programs_of_free_variables_have_bounds(rounding: str, compiled: bool) -> None:
    """min (x0 - x1 + 2 x2)^2 / 2 + c.x with c in P's range: neither curvature nor rows hold x."""
    row = torch.tensor([[1.0, -1.0, 2.0]], dtype=f64)
    solver = InteriorPoint() if compiled else InteriorPrograms(compiled=False)
    found = QuadraticProgram(solver, rounding=rounding)(row.mT @ row, 3 * row)
    assert found.status.item() == Status.OPTIMAL
    assert -4.5 - 1e-6 <= found.lower.item() <= -4.5


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_outward_bounds_of_free_variables_are_just_below_optima_known_exactly(rank: int) -> None:
    """Integers that satisfy the optimality conditions exactly, with rows that stand there twice or depend on others."""
    generator = torch.Generator().manual_seed(rank)

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).double()

    root, x, A, y = whole(-2, 3, 30, 4, rank), whole(-3, 4, 30, 4, 1), whole(-3, 4, 30, 4, 4), whole(0, 3, 30, 4, 1)
    A[:, 1], A[::2, 2] = A[:, 0], A[::2, 0] + A[::2, 3]
    P = root @ root.mT
    c = -(P @ x + A.mT @ y).squeeze(-1)
    exact = (c * x.squeeze(-1)).sum(-1) + (x * (P @ x)).sum((-1, -2)) / 2
    found = QuadraticProgram(rounding="outward")(P, c, A, (A @ x).squeeze(-1))
    assert bool((found.lower <= exact).all())
    # Where a row holds with equality and costs nothing, interior points keep half of their digits.
    assert int((exact - found.lower > 1e-5 * exact.abs().clamp(min=1)).sum()) <= 1
    assert bool((found.status[exact - found.lower > 1e-5 * exact.abs().clamp(min=1)] != Status.OPTIMAL).all())


@pytest.mark.parametrize("limit", [1e12, 1e20])
def test_reduced_costs_that_are_rounding_are_not_taken_to_far_ends(limit: float) -> None:
    """A row that says next to nothing implies an end far away, at which 1e-16 is a lot."""
    P = torch.tensor([[8.0, 0.0, 0.0, -2.0], [0.0, 12.0, -8.0, -4.0], [0.0, -8.0, 8.0, 2.0], [-2.0, -4.0, 2.0, 2.0]])
    c, A = (
        torch.tensor([0.9689030177042147, 2.3089870813785476, -0.7777670426684473, -1.255366432021331]),
        torch.ones(1, 4),
    )
    ends = torch.tensor([1.0, 0.0, 0.0, -torch.inf]), torch.tensor([1.0, 2.0, torch.inf, torch.inf])
    P, c, A, lower, upper = (part.double() for part in (P, c, A, *ends))
    found = QuadraticProgram()(P, c, A, torch.tensor([limit], dtype=f64), lower=lower, upper=upper)
    x = found.primal.detach()
    assert found.lower.item() <= (c @ x + x @ P @ x / 2).item() + 1e-9
