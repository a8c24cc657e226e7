"""Every solver of linear programs: one contract, with SciPy's HiGHS and exact rational arithmetic as oracles."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from lp_cases import FAMILIES, MIXED, Data, assignment, boxed, covering, exact_value, free, packing, values
from scipy import sparse

from optrelax.layers import PDHG, Cvxpy, DualSimplex, Highs, InteriorPoint, LinearProgram, Status
from optrelax.layers.programs import arguments
from optrelax.layers.programs.auto import Auto
from optrelax.layers.programs.interior import InteriorPrograms
from optrelax.layers.programs.pdhg_steps import Scaled
from optrelax.layers.programs.quadratic import project
from optrelax.layers.programs.rays import proves_infeasible
from optrelax.layers.programs.sparse_bounds import sparse_bounds

SOLVERS = {
    "highs": Highs(workers=1),
    "highs-2": Highs(workers=2),
    "pdhg": PDHG(tol=1e-7),
    "interior": InteriorPoint(),
    "interior-torch": InteriorPrograms(compiled=False),
    "auto": Auto(),
    "simplex": DualSimplex(),
    "scs": Cvxpy("SCS", eps=1e-9, tol=1e-6),
    "clarabel": Cvxpy("CLARABEL", eps=1e-9, tol=1e-6),
}
# Relative error of the value that each is asked for here.
ERRORS = {
    "highs": 1e-9,
    "highs-2": 1e-9,
    "pdhg": 1e-7,
    "interior": 1e-8,
    "interior-torch": 1e-8,
    "auto": 1e-8,
    "simplex": 1e-8,
    "scs": 1e-6,
    "clarabel": 1e-6,
}


@pytest.fixture(params=SOLVERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("family", FAMILIES)
def test_optimum_equals_highs_of_scipy(name: str, family: str) -> None:
    data = FAMILIES[family]()
    wanted = values(data)
    found = LinearProgram(SOLVERS[name])(*data)
    exact = found.status == Status.OPTIMAL
    # The conic solvers stop early on rows of 1e-8 beside rows of 1e8: what they keep to `tol` there decides little.
    blind = family == "badly scaled" and name in ("scs", "clarabel")
    assert bool(exact.all()) or blind
    scale = wanted.abs().clamp(min=1)
    # SciPy's own value is good to its tolerance of 1e-7 in the reduced costs.
    assert bool((found.lower <= wanted + 1e-8 * scale).all())
    assert bool((wanted - found.lower <= ERRORS[name] * scale)[exact].all()) or blind
    assert bool((found.gap <= SOLVERS[name].tol * scale)[exact].all())
    assert bool((found.gap >= -1e-12 * scale).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_points_satisfy_the_constraints_and_duals_the_signs(name: str, family: str) -> None:
    data = FAMILIES[family]()
    found = LinearProgram(SOLVERS[name])(*data)
    tolerance = SOLVERS[name].tol
    x = found.primal
    assert bool((found.inequality >= 0).all())
    if data.A is not None and data.b is not None:
        assert bool(((data.A @ x.unsqueeze(-1)).squeeze(-1) <= data.b + tolerance * data.b.abs().clamp(min=1)).all())
    if data.E is not None and data.d is not None:
        miss = ((data.E @ x.unsqueeze(-1)).squeeze(-1) - data.d).abs()
        assert bool((miss <= tolerance * data.d.abs().clamp(min=1)).all())
    if data.lower is not None:
        assert bool((x >= data.lower).all())
    if data.upper is not None:
        assert bool((x <= data.upper).all())


def test_each_problem_keeps_its_own_status(name: str) -> None:
    found = LinearProgram(SOLVERS[name])(*MIXED)
    wanted = [Status.OPTIMAL, Status.INFEASIBLE, Status.UNBOUNDED, Status.OPTIMAL]
    assert found.status.tolist() == wanted
    exact = values(MIXED)
    assert exact.tolist()[1:3] == [np.inf, -np.inf]
    assert found.lower[1] == found.lower[2] == -torch.inf
    assert found.gap[1] == found.gap[2] == torch.inf
    torch.testing.assert_close(found.lower[[0, 3]], exact[[0, 3]], rtol=1e-6, atol=1e-6)
    assert bool(found.primal.isfinite().all())


def test_a_failing_problem_leaves_its_neighbours_alone(name: str) -> None:
    good = boxed(4, 6, 8, 2)
    assert good.b is not None
    alone = LinearProgram(SOLVERS[name])(*good)
    b = good.b.clone()
    b[2] = -1e3
    together = LinearProgram(SOLVERS[name])(*good._replace(b=b))
    rest = [0, 1, 3]
    assert together.status.tolist() == [0, 0, Status.INFEASIBLE, 0]
    torch.testing.assert_close(together.lower[rest], alone.lower[rest], rtol=1e-9, atol=1e-9)


def test_infeasible_equalities(name: str) -> None:
    E = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    d = torch.tensor([[1.0, 3.0], [1.0, 2.0]], dtype=torch.float64)
    found = LinearProgram(SOLVERS[name])(E[0], None, None, E, d, torch.zeros_like(d[0]), torch.ones_like(d[0]))
    assert found.status.tolist() == [Status.INFEASIBLE, Status.OPTIMAL]
    assert found.lower[1].item() == pytest.approx(1.0, rel=1e-6)


def test_batch_equals_stack_of_singles(name: str) -> None:
    data = boxed(4, 6, 8, 2, seed=6)
    layer = LinearProgram(SOLVERS[name])
    together = layer(*data)
    for i in range(4):
        single = layer(*data.one(i))
        assert single.lower.shape == ()
        torch.testing.assert_close(single.lower, together.lower[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(single.primal, together.primal[i], rtol=1e-6, atol=1e-6)


def test_the_same_twice(name: str) -> None:
    data = boxed(4, 6, 8, 2, seed=7)
    first, second = (LinearProgram(SOLVERS[name])(*data) for _ in range(2))
    for part in ("lower", "primal", "inequality", "equality", "gap", "iterations"):
        assert torch.equal(getattr(first, part), getattr(second, part))


def test_float32(name: str) -> None:
    data = boxed(4, 6, 8, 2).to(torch.float32)
    solver = PDHG(tol=1e-4) if name == "pdhg" else SOLVERS[name]
    found = LinearProgram(solver)(*data)
    assert {part.dtype for part in (found.lower, found.primal, found.gap)} == {torch.float32}
    exact = values(data)
    assert bool((found.lower.double() <= exact + 1e-6).all())
    assert bool((exact - found.lower.double() <= 2e-4).all())


def test_ill_conditioned_rows_stay_sound(name: str) -> None:
    """Nearly parallel rows, scales from 1e-6 to 1e6: loose at worst."""
    data = boxed(3, 5, 4, 0, seed=8)
    assert data.A is not None
    assert data.b is not None
    scale = torch.logspace(-6, 6, 5, dtype=torch.float64)
    A = data.A.clone()
    A[:, 1] = A[:, 0] * (1 + 1e-9)
    b = data.b.clone()
    b[:, 1] = b[:, 0]
    wanted = values(Data(data.c, A, b, lower=data.lower, upper=data.upper))
    scaled = Data(data.c, A * scale.unsqueeze(-1), b * scale, lower=data.lower, upper=data.upper)
    found = LinearProgram(SOLVERS[name])(*scaled)
    assert bool((found.lower <= wanted + 1e-7).all())
    if name in ("highs", "highs-2", "clarabel", "pdhg"):
        assert bool((found.lower >= wanted - 1e-4).all())


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e200])
def test_extreme_values_never_raise_nor_mislead(name: str, size: float) -> None:
    data = boxed(2, 3, 4, 1)
    assert data.A is not None
    assert data.b is not None
    wanted = values(data)
    for costs, rows in ((size, 1.0), (1.0, size)):
        found = LinearProgram(SOLVERS[name])(
            data.c * costs, data.A * rows, data.b * rows, data.E, data.d, data.lower, data.upper
        )
        assert not bool(found.lower.isnan().any())
        assert not bool(found.gap.isnan().any())
        if costs == 1.0:
            assert bool((found.lower <= wanted + 1e-7).all())
        else:
            assert bool((found.lower / costs <= wanted + 1e-7).all())


def test_small_problems_match_rational_arithmetic(name: str) -> None:
    from fractions import Fraction

    data = boxed(6, 3, 2, 0, seed=9)
    found = LinearProgram(SOLVERS[name])(*data)
    for i in range(6):
        one = data.one(i)
        assert one.A is not None
        assert one.b is not None
        rows = [
            ([Fraction(a) for a in row.tolist()], Fraction(side.item())) for row, side in zip(one.A, one.b, strict=True)
        ]
        for j in range(2):
            unit = [Fraction(int(j == k)) for k in range(2)]
            rows += [(unit, Fraction(1)), ([-u for u in unit], Fraction(0))]
        exact = exact_value([Fraction(v) for v in one.c.tolist()], rows, [])
        assert exact is not None
        assert float(exact) == pytest.approx(found.lower[i].item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
def test_free_variables_have_bounds_under_either_rounding(name: str, rounding: str) -> None:
    data = free(3, 6, 3)
    wanted = values(data)
    found = LinearProgram(SOLVERS[name], rounding=rounding)(*data)
    assert bool((found.status == Status.OPTIMAL).all())
    assert bool((found.lower <= wanted + 1e-8).all())
    assert bool((wanted - found.lower <= 1e-5).all())


@pytest.mark.parametrize("batch", [1, 2])
def test_a_cost_along_free_variables(name: str, batch: int) -> None:
    c, A = torch.ones(batch, 2, dtype=torch.float64), -torch.ones(1, 2, dtype=torch.float64)
    found = LinearProgram(SOLVERS[name])(c, A, torch.full((2, 1), 3.0, dtype=torch.float64)[:batch])
    assert found.status.tolist() == [Status.OPTIMAL] * batch
    torch.testing.assert_close(found.lower, torch.full((batch,), -3.0).double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.primal.sum(-1), torch.full((batch,), -3.0).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-8])
def test_rays_of_small_rows_condemn_no_feasible_problem(name: str, scale: float) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    # The first problem is 1e6 away from where a first-order method begins: it may run out of iterations.
    layer = LinearProgram(PDHG(tol=1e-7, max_iterations=1000) if name == "pdhg" else SOLVERS[name])
    equal = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    first = layer(torch.ones(2).double(), -scale * torch.ones(1, 2).double(), -one[0], equal, torch.zeros(1).double())
    second = layer(one[0], -scale * one, -one[0])
    for found in (first, second):
        assert int(found.status) not in (Status.INFEASIBLE, Status.UNBOUNDED)
        assert found.lower.item() <= (1 + 1e-9) / scale
    # The same rows the other way round: nothing lies between.
    sides = torch.tensor([-1.0, 0.5], dtype=torch.float64)
    assert layer(one[0], torch.cat([-scale * one, scale * one]), sides).status == Status.INFEASIBLE
    assert layer(-one[0], -scale * one, -one[0]).status == Status.UNBOUNDED


def test_infeasible_problems_of_free_variables_are_shown_by_exact_rays() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 7, 5, generator=generator, dtype=torch.float64)
    y = torch.rand(4, 7, generator=generator, dtype=torch.float64)
    # The last row cancels the others' combination: 0 <= -1 in sum, to rounding.
    A[:, -1] = -(y[:, :-1].unsqueeze(-1) * A[:, :-1]).sum(-2)
    b = torch.rand(4, 7, generator=generator, dtype=torch.float64)
    b[:, -1] = -(y[:, :-1] * b[:, :-1]).sum(-1) - 1
    c = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    found = LinearProgram(Highs(workers=1))(c, A, b)
    assert bool(((found.status == Status.INFEASIBLE) | (found.status == Status.NUMERICAL)).all())
    # Rows in general position: six of them always have an exact combination.
    ray = torch.cat([y[:, :-1], torch.ones(4, 1, dtype=torch.float64)], -1)
    flat = arguments.flatten(arguments.gather(c, A, b, None, None, None, None), torch.Size([4]))
    assert bool(proves_infeasible(flat, ray, ray[:, :0]).all())
    assert not bool(proves_infeasible(flat.map(lambda t: -t), ray, ray[:, :0]).any())


@pytest.mark.parametrize(("matrix", "side"), [("A", -1.0), ("E", 1.0)])
def test_a_row_of_zeros_that_cannot_hold(name: str, matrix: str, side: float) -> None:
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    rows = {matrix: zero, "b" if matrix == "A" else "d": side * one}
    found = LinearProgram(SOLVERS[name])(one, **rows, lower=-one, upper=one)
    assert found.status == Status.INFEASIBLE
    assert found.lower == -torch.inf
    harmless = LinearProgram(SOLVERS[name])(one, **{k: v * 0 for k, v in rows.items()}, lower=-one, upper=one)
    assert harmless.status == Status.OPTIMAL
    assert harmless.lower.item() == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize("limit", [1e8, 1e20, 1e30, torch.inf])
def test_sides_that_mean_no_limit(name: str, limit: float) -> None:
    data = boxed(3, 6, 5, 1)
    assert data.A is not None
    assert data.b is not None
    b = data.b.clone()
    b[0, 2], b[1, :4] = limit, limit
    # Without a limit: the row of zeros.
    A = torch.where((b > 1e7).unsqueeze(-1), 0.0, data.A)
    wanted = values(data._replace(A=A, b=b.clamp(max=1.0).where(b > 1e7, b)))
    leaf = b.clone().requires_grad_()
    found = LinearProgram(SOLVERS[name])(*data._replace(b=leaf))
    assert found.status.tolist() == [Status.OPTIMAL] * 3
    torch.testing.assert_close(found.lower, wanted, rtol=1e-6, atol=1e-6)
    found.lower.sum().backward()
    assert leaf.grad is not None
    assert bool((leaf.grad[b > 1e7].abs() < 1e-6).all())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_matrices_are_the_dense_ones_with_gradients_on_their_values(name: str, layout: str) -> None:
    data = boxed(2, 4, 5, 1)
    assert data.A is not None
    dense = data.A[0] * (data.A[0].abs() > 0.3)
    wide = torch.full((5,), 5.0, dtype=torch.float64)
    data = data._replace(A=dense, lower=-wide, upper=wide)
    leaf = dense.clone().requires_grad_()
    sparse_ = {"coo": dense.to_sparse(), "csr": dense.to_sparse_csr()}[layout]
    sparse_.requires_grad_()
    found, wanted = (LinearProgram(SOLVERS[name])(*data._replace(A=A)) for A in (sparse_, leaf))
    torch.testing.assert_close(found.lower, wanted.lower)
    found.lower.sum().backward()
    wanted.lower.sum().backward()
    assert sparse_.grad is not None
    assert leaf.grad is not None
    torch.testing.assert_close(sparse_.grad.to_dense() * (dense != 0), leaf.grad * (dense != 0))


def test_a_compiled_step_breaks_its_graph_at_the_layer() -> None:
    data = boxed(2, 4, 5, 1)

    def step(c: torch.Tensor) -> torch.Tensor:
        lower: torch.Tensor = LinearProgram(Highs())(2 * c, *data[1:]).lower
        return lower.sum()

    grads = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for function in (step, torch.compile(step, backend="eager")):
            c = data.c.clone().requires_grad_()
            function(c).backward()
            grads.append(c.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_highs_prints_nothing_while_it_is_made(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in versions whose constructor prints: here one that does."""
    import highspy

    class Loud(highspy.Highs):
        def __init__(self) -> None:
            import os

            os.write(1, b"Running HiGHS\n")
            super().__init__()

    monkeypatch.setattr(highspy, "Highs", Loud)
    LinearProgram(Highs())(*boxed(3, 4, 5, 1))
    print("mine")  # noqa: T201
    assert capfd.readouterr().out == "mine\n"


@pytest.mark.parametrize("place", [0, 2])
def test_what_highs_refuses_fails_alone(place: int) -> None:
    """HiGHS takes 1e20 for infinite: it refuses such a lower bound, or such a cost."""
    data = boxed(4, 0, 3, 0)._replace(A=torch.ones(1, 3).double(), b=torch.full((4, 1), 1e26).double())
    assert data.lower is not None
    assert data.upper is not None
    lower, upper = data.lower.repeat(4, 1), data.upper.repeat(4, 1)
    lower[place, 0], upper[place, 0] = 1e25, 2e25
    costs = data.c.clone()
    costs[place, 1] = 1e25
    rest = [i for i in range(4) if i != place]
    for broken in (data._replace(lower=lower, upper=upper), data._replace(c=costs)):
        assert broken.lower is not None
        assert broken.upper is not None
        found = LinearProgram(Highs(workers=1))(*broken)
        assert found.status[rest].tolist() == [Status.OPTIMAL] * 3
        torch.testing.assert_close(found.lower[rest], data.c.clamp(max=0).sum(-1)[rest])
        ends = torch.stack([broken.c * broken.lower, broken.c * broken.upper])
        exact = ends.amin(0).sum(-1)[place]
        assert found.lower[place] <= exact + 1e-12 * exact.abs()


def test_highs_time_limit_is_a_status_of_one_problem() -> None:
    data = boxed(2, 150, 200, 0)
    found = LinearProgram(Highs(time_limit=0.0, workers=1))(*data)
    assert found.status.tolist() == [Status.TIME_LIMIT, Status.TIME_LIMIT]
    assert bool((found.lower <= values(data) + 1e-8).all())


def test_highs_time_limit_is_not_used_up_by_earlier_problems() -> None:
    generator = np.random.default_rng(0)
    matrix = sparse.csc_matrix(generator.normal(size=(60, 80)))
    sides = np.full(60, -np.inf), np.ones(60), np.zeros(80), np.ones(80)
    c = generator.normal(size=(80, 80))
    free_run = Highs(workers=1).solve_sparse(c, matrix, *sides)
    limit = free_run.seconds.sum() / 2
    assert limit > 2 * free_run.seconds.max()
    found = Highs(workers=1, time_limit=limit).solve_sparse(c, matrix, *sides)
    assert found.status.tolist() == [Status.OPTIMAL] * 80


def test_highs_solves_many_objectives_over_one_sparse_polyhedron() -> None:
    data = boxed(1, 12, 9, 3, seed=11)
    assert data.A is not None
    assert data.b is not None
    assert data.E is not None
    assert data.d is not None
    matrix = sparse.csc_matrix(torch.cat([data.A[0], data.E[0]]).numpy())
    upper = torch.cat([data.b[0], data.d[0]]).numpy()
    # Two-sided rows: the first is also held from below.
    lower = np.concatenate([np.full(12, -np.inf), data.d[0].numpy()])
    lower[0] = upper[0] - 1.0
    c = np.random.default_rng(0).normal(size=(7, 9))
    ends = np.zeros(9), np.ones(9)
    found = Highs(workers=2).solve_sparse(c, matrix, lower, upper, *ends)
    assert found.status.tolist() == [Status.OPTIMAL] * 7
    below = Data(
        torch.from_numpy(c),
        torch.cat([data.A[0], -data.A[0, :1]]),
        torch.cat([data.b[0], -torch.from_numpy(lower[:1])]),
        data.E[0],
        data.d[0],
        data.lower,
        data.upper,
    )
    wanted = values(below).numpy()
    np.testing.assert_allclose(found.objective, wanted, rtol=1e-9, atol=1e-9)
    for rounding in ("nearest", "outward"):
        safe = sparse_bounds(c, matrix, lower, upper, *ends, found.duals, rounding)
        assert (safe <= wanted + 1e-9).all()
        assert (safe >= wanted - 1e-8).all()
        # Multipliers that would hold an infinite side are dropped.
        wrong = found.duals.copy()
        wrong[:, 1:12] -= 2 * (wrong[:, 1:12] == 0)
        assert (sparse_bounds(c, matrix, lower, upper, *ends, wrong, rounding) == safe).all()
        noise = np.random.default_rng(1).normal(size=found.duals.shape)
        assert (sparse_bounds(c, matrix, lower, upper, *ends, found.duals + noise, rounding) <= wanted).all()
    assert (found.seconds > 0).all()
    with pytest.raises(ValueError, match="row_lower has shape"):
        Highs().solve_sparse(c, matrix, lower[:3], upper, *ends)
    with pytest.raises(ValueError, match="holds NaN"):
        Highs().solve_sparse(c * np.nan, matrix, lower, upper, *ends)


@pytest.mark.parametrize("family", ["feasible", "degenerate", "equalities", "covering", "packing"])
def test_pdhg_stopped_early_is_only_looser(family: str) -> None:
    data = FAMILIES[family]()
    wanted = values(data)
    before = torch.full_like(wanted, -torch.inf)
    for limit in (0, 1, 2, 5, 10, 40, 41, 100, 400, 2000):
        found = LinearProgram(PDHG(tol=1e-9, max_iterations=limit))(*data)
        assert bool((found.lower <= wanted + 1e-8).all())
        assert bool((found.lower >= before - 1e-12).all())
        assert bool((found.iterations <= limit).all())
        before = found.lower
    assert bool((wanted - before <= 1e-4).all())
    loose = [LinearProgram(PDHG(tol=tol))(*data).lower for tol in (1e-1, 1e-3, 1e-6)]
    assert bool((loose[0] <= loose[1] + 1e-12).all())
    assert bool((loose[1] <= loose[2] + 1e-12).all())


def test_pdhg_starts_warm() -> None:
    data = boxed(5, 20, 30, 3)
    layer = LinearProgram(PDHG())
    cold = layer(*data)
    again = layer(*data, start=cold)
    assert bool((again.iterations == 0).all())
    near = data._replace(c=data.c * 1.0001)
    assert layer(*near, start=cold).iterations.sum() < layer(*near).iterations.sum()
    with pytest.raises(ValueError, match=r"start\.primal has shape"):
        layer(*boxed(4, 20, 30, 3), start=cold)


@pytest.mark.parametrize("n", [8, 80])
def test_interior_points_start_warm_and_from_a_bad_start_again(n: int) -> None:
    """n: side by side, and one by one."""
    data = boxed(5, n, n, 1, seed=3)
    layer = LinearProgram(InteriorPoint())
    cold = layer(*data)
    near = data._replace(c=data.c * (1 + 1e-4))
    warm, fresh = layer(*near, start=cold), layer(*near)
    assert float(warm.iterations.double().mean()) < 0.8 * float(fresh.iterations.double().mean())
    torch.testing.assert_close(warm.lower, fresh.lower, rtol=1e-7, atol=1e-7)
    far = replace(cold, primal=cold.primal * 1e9, inequality=cold.inequality * 1e12 + 1, equality=cold.equality - 1e12)
    again = layer(*data, start=far)
    assert bool((again.status == Status.OPTIMAL).all())
    torch.testing.assert_close(again.lower, cold.lower, rtol=1e-7, atol=1e-7)


def test_a_problem_is_solved_alike_whoever_its_neighbours_are() -> None:
    """Lanes of one register share nothing: neither infeasible, nor unbounded, nor badly scaled neighbours matter."""
    data = boxed(24, 6, 8, 2, seed=9)
    assert data.b is not None
    layer = LinearProgram(InteriorPoint())
    alone = layer(*data)
    b, c, odd = data.b.clone(), data.c.clone(), torch.arange(24) % 3 == 1
    b[odd], c[odd] = -1e3, 1e12 * c[odd]
    mixed = layer(*data._replace(b=b, c=c))
    for part in ("lower", "primal", "inequality", "equality", "iterations"):
        assert torch.equal(getattr(alone, part)[~odd], getattr(mixed, part)[~odd])


def test_transforms_of_torch_func_are_refused_in_one_sentence() -> None:
    data = boxed(3, 2, 4, 0)

    def value(c: torch.Tensor) -> torch.Tensor:
        lower: torch.Tensor = LinearProgram()(c, lower=data.lower, upper=data.upper).lower
        return lower.sum()

    for transform in (torch.vmap(value), torch.func.grad(value)):
        with pytest.raises(RuntimeError, match=r"LinearProgram: vmap and the other transforms .* leading dimensions"):
            transform(data.c)


def test_pdhg_problems_stop_by_themselves() -> None:
    """An easy problem stops where it would stop alone, however hard its neighbours are."""
    data = boxed(6, 20, 30, 3, seed=12)
    easy = data._replace(c=data.c * torch.tensor([0.0, 0, 0, 1, 1, 1], dtype=torch.float64).unsqueeze(-1))
    found = LinearProgram(PDHG())(*easy)
    assert bool((found.status == Status.OPTIMAL).all())
    assert found.iterations[:3].max() < found.iterations[3:].min()
    for i in range(6):
        assert LinearProgram(PDHG())(*easy.one(i)).iterations == found.iterations[i]


def test_pdhg_without_restarts_is_slower_but_sound() -> None:
    data = boxed(4, 20, 30, 3)
    wanted = values(data)
    plain = LinearProgram(PDHG(restart="never", max_iterations=1000))(*data)
    fast = LinearProgram(PDHG(max_iterations=1000))(*data)
    assert bool((plain.lower <= wanted + 1e-9).all())
    assert (wanted - fast.lower).max() < (wanted - plain.lower).max()


def test_equilibration_bounds_the_norm() -> None:
    data = boxed(3, 7, 9, 2)
    assert data.A is not None
    A = data.A * torch.logspace(-4, 4, 7, dtype=torch.float64).unsqueeze(-1)
    gathered = arguments.gather(*data._replace(A=A))
    scaled = Scaled.of(arguments.flatten(gathered, arguments.batch_shape(gathered)))
    norms = torch.linalg.matrix_norm(scaled.K, 2)
    assert bool((norms <= 1 + 1e-9).all())
    assert bool((norms >= 0.2).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pdhg_on_a_gpu_equals_the_cpu(dtype: torch.dtype) -> None:
    data = boxed(8, 20, 30, 3).to(dtype)
    tol = 1e-4 if dtype == torch.float32 else 1e-7
    here = LinearProgram(PDHG(tol=tol))(*data)
    there = LinearProgram(PDHG(tol=tol))(*(None if part is None else part.cuda() for part in data))
    assert there.lower.is_cuda
    torch.testing.assert_close(there.lower.cpu(), here.lower, rtol=2 * tol, atol=2 * tol)
    exact = LinearProgram(Highs())(*(None if part is None else part.cuda() for part in data))
    assert exact.lower.is_cuda


def test_cvxpy_gradient_is_that_of_the_value() -> None:
    """cvxpylayers' derivative of c.x*, where vertices are not degenerate, is the envelope's."""
    grads = []
    for solver in (Highs(), Cvxpy(eps=1e-9, layer=True), Cvxpy("CLARABEL", eps=1e-9, layer=True)):
        leaves = [None if part is None else part.clone().requires_grad_() for part in boxed(3, 5, 6, 1)]
        solution = LinearProgram(solver)(*leaves)
        solution.lower.sum().backward()
        grads.append([leaf.grad for leaf in leaves if leaf is not None])
    for other in grads[1:]:
        for mine, theirs in zip(grads[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["SCS", "CLARABEL"])
def test_cvxpy_derivatives_survive_failing_neighbours(solver: Literal["SCS", "CLARABEL"]) -> None:
    grads = []
    for rows in ([0, 1, 2, 3], [0, 3]):
        A = MIXED.A.clone().requires_grad_() if MIXED.A is not None else None
        assert A is not None
        part = MIXED._replace(c=MIXED.c[rows], A=A, b=MIXED.b[rows] if MIXED.b is not None else None)
        part = part._replace(upper=MIXED.upper[rows] if MIXED.upper is not None else None)
        found = LinearProgram(Cvxpy(solver, eps=1e-9, tol=1e-6, layer=True))(*part)
        assert found.status.tolist() == [[0, 3, 4, 0], [0, 0]][len(grads)]
        assert bool(found.primal.isfinite().all())
        found.lower.sum().backward()
        grads.append(A.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


def test_cvxpy_mixes_infinite_bounds_in_a_batch() -> None:
    data = packing(3, 4, 5)
    upper = torch.tensor([[torch.inf] * 5, [1.0] * 5, [torch.inf, 1.0, 1.0, torch.inf, 1.0]], dtype=torch.float64)
    data = data._replace(upper=upper)
    found = LinearProgram(Cvxpy(eps=1e-9))(*data)
    torch.testing.assert_close(found.lower, values(data), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Highs(threads=0), "Highs: threads must be >= 1, got 0"),
        (lambda: Highs(workers=0), "Highs: workers must be >= 1, got 0"),
        (lambda: Highs(time_limit=-1.0), "Highs: time_limit must be >= 0"),
        (lambda: Highs(tol=0.0), "Highs: tol must be > 0"),
        (lambda: DualSimplex(tol=0.0), "DualSimplex: tol must be > 0"),
        (lambda: DualSimplex(work=0.0), "DualSimplex: work must be > 0"),
        (lambda: PDHG(tol=-1.0), "PDHG: tol must be > 0"),
        (lambda: PDHG(max_iterations=-1), "PDHG: max_iterations must be >= 0"),
        (lambda: PDHG(check_every=0), "PDHG: check_every must be >= 1"),
        (lambda: Cvxpy(eps=0.0), "Cvxpy: eps must be > 0"),
        (lambda: Cvxpy(tol=-1.0), "Cvxpy: tol must be >= 0"),
        (lambda: Cvxpy(workers=0), "Cvxpy: workers must be >= 1"),
    ],
)
def test_bad_options_raise_at_once(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_options_are_type_errors() -> None:
    for kind in (Highs, PDHG, Cvxpy):
        with pytest.raises(TypeError):
            kind(tole=1)


@pytest.mark.parametrize("family", ["feasible", "degenerate", "equalities", "assignment", "covering", "packing"])
@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_projection_satisfies_its_variational_inequality(family: str, strength: float) -> None:
    """x projects t on P exactly if (t - x).z <= (t - x).x for every z of P: an LP, solved by SciPy's HiGHS."""
    data = FAMILIES[family]()
    gathered = arguments.gather(*data)
    flat = arguments.flatten(gathered, arguments.batch_shape(gathered))
    target = -flat.c / strength
    found = project(flat, target)
    assert bool(found.solved.all())
    normal = target - found.x
    farthest = -values(data._replace(c=-normal))
    size = (1 + target.abs().amax(-1)) * (1 + found.x.abs().amax(-1))
    assert bool(((farthest - (normal * found.x).sum(-1)).abs() <= 1e-7 * size).all())


def test_projection_reports_infeasible_problems() -> None:
    gathered = arguments.gather(*MIXED)
    flat = arguments.flatten(gathered, arguments.batch_shape(gathered))
    found = project(flat, -flat.c)
    assert found.solved.tolist() == [True, False, True, True]
    assert bool(found.x.isfinite().all())


def test_assignment_and_covering_are_what_they_claim() -> None:
    """The cases' own promises: dependent rows, and no implied upper bounds."""
    dependent = assignment(1, 4)
    assert dependent.E is not None
    assert torch.linalg.matrix_rank(dependent.E) == len(dependent.E) - 1
    cover = covering(1, 5, 7)
    assert cover.A is not None
    assert cover.upper is None
    assert bool((cover.A <= 0).all())


@pytest.mark.parametrize("steps", range(3, 7))
def test_auto_keeps_what_is_proved_whatever_the_solver_says(steps: int) -> None:
    """A point whose gap is below the tolerance, though the method wanted more of itself, needs no second solver."""
    interior = InteriorPoint(max_iterations=steps)
    c, A = torch.tensor([-1.0, -2.0, -0.5]).double(), torch.tensor([[1.0, 1.0, 1.0], [1.0, 3.0, 0.0]]).double()
    given = {"c": c, "A": A, "b": torch.tensor([2.0, 3.0]).double(), "lower": 0 * c, "upper": 0 * c + 1}
    alone, found = LinearProgram(interior)(**given), LinearProgram(Auto(interior=interior))(**given)
    assert found.status == Status.OPTIMAL
    assert (alone.status == Status.OPTIMAL) == (found.solver == "InteriorPoint")
