"""The dual simplex method over one matrix: chosen by counted work, each answer its problem's and the first one's."""

from __future__ import annotations

import pytest
import torch
from lp_cases import Data, assignment, boxed, values
from random_programs import drawn

from optrelax.layers import DualSimplex, Highs, InteriorPoint, LinearProgram, Status
from optrelax.layers.programs import arguments, implied_bounds
from optrelax.layers.programs.lp_data import LPData
from optrelax.layers.solutions import LPSolution

f64 = torch.float64


def _shared(batch: int, seed: int = 0) -> Data:
    """Dense rows and equalities that all problems share, which differ in their sides only."""
    one = boxed(1, 14, 10, 2, seed)
    assert one.A is not None
    assert one.E is not None
    generator = torch.Generator().manual_seed(seed)
    A, E, inside = one.A[0], one.E[0], torch.rand(batch, 10, generator=generator, dtype=f64) * 0.2 + 0.4
    b = inside @ A.mT + torch.rand(batch, 14, generator=generator, dtype=f64)
    return Data(one.c[0], A, b, E, inside @ E.mT, one.lower, one.upper)


def _equal(first: LPSolution, second: LPSolution) -> None:
    for name in ("lower", "primal", "inequality", "equality", "status", "iterations"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("data", [_shared(20), assignment(20, 4)], ids=["sides", "assignment"])
def test_batches_over_one_matrix_are_its_own(data: Data) -> None:
    found = LinearProgram()(*data)
    assert found.solver == "DualSimplex"
    assert bool((found.status == Status.OPTIMAL).all())
    assert bool((found.gap <= 1e-12).all())
    torch.testing.assert_close(found.lower, values(data._replace(c=data.c.expand(20, -1))), rtol=1e-9, atol=1e-9)


def test_few_problems_and_those_with_matrices_of_their_own_are_not() -> None:
    few = _shared(4)
    assert LinearProgram()(*few).solver == "InteriorPoint"
    assert LinearProgram()(*boxed(20, 6, 8, 2)).solver == "InteriorPoint"


def test_unlike_problems_go_to_interior_points() -> None:
    """Costs of their own over dense rows: pivots cost more than what a few factors do."""
    data = _shared(20)
    given = data._replace(c=torch.randn(20, 10, generator=torch.Generator().manual_seed(1), dtype=f64))
    assert LinearProgram()(*given).solver == "InteriorPoint"
    pivoted, centred = LinearProgram(DualSimplex())(*given), LinearProgram(InteriorPoint())(*given)
    assert bool((pivoted.iterations > centred.iterations).any())
    torch.testing.assert_close(pivoted.lower, centred.lower, rtol=1e-7, atol=1e-7)
    _equal(LinearProgram(DualSimplex(work=1.0))(*given), centred)


def test_an_answer_depends_on_the_problem_and_the_first_alone() -> None:
    data, layer = _shared(20), LinearProgram(DualSimplex())
    assert data.b is not None
    assert data.d is not None
    order = torch.tensor([0, 7, 19, 3, 11])
    some = layer(*data._replace(b=data.b[order], d=data.d[order]))
    whole = layer(*data)
    for name in ("lower", "primal", "inequality", "equality", "status", "iterations"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[order]), name
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _equal(layer(*data), whole)
    finally:
        torch.set_num_threads(threads)


def test_equal_rows_and_rows_that_the_box_keeps_are_left_out_problem_by_problem() -> None:
    data = _shared(20)
    assert data.A is not None
    assert data.b is not None
    A, b = torch.cat([data.A, data.A[:6]]), torch.cat([data.b, data.b[:, :6]], -1)
    generator = torch.Generator().manual_seed(2)
    room = torch.rand(20, 20, generator=generator, dtype=f64) * (torch.rand(20, 20, generator=generator) < 0.5)
    b = (b + room).where(torch.rand(20, 20, generator=generator) > 0.2, 50.0)
    given = data._replace(A=A, b=b)
    found = LinearProgram(DualSimplex())(*given)
    assert found.solver == "DualSimplex"
    assert bool((found.gap <= 1e-12).all())
    assert bool((found.inequality.where(b >= 50, 0.0) == 0).all())
    wanted = values(given._replace(c=data.c.expand(20, -1)))
    torch.testing.assert_close(found.lower, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("place", [0, 5])
def test_what_has_no_optimum_is_told_by_the_rest(place: int) -> None:
    data = _shared(20)
    assert data.b is not None
    b = data.b.clone()
    b[place] = -100
    found, alone = (LinearProgram(DualSimplex())(*given) for given in (data._replace(b=b), data))
    assert found.solver == "DualSimplex, InteriorPoint for 1 of 20"
    assert found.status.tolist() == [Status.INFEASIBLE if i == place else Status.OPTIMAL for i in range(20)]
    others = torch.arange(20) != place
    torch.testing.assert_close(found.lower[others], alone.lower[others], rtol=1e-12, atol=1e-12)


def test_the_values_gradient_is_that_of_highs() -> None:
    data = _shared(20)
    leaves = [[part.clone().requires_grad_() for part in data if part is not None] for _ in range(2)]
    for solver, given in zip((DualSimplex(), Highs(workers=1)), leaves, strict=True):
        LinearProgram(solver)(*given).lower.sum().backward()
    for mine, theirs in zip(*leaves, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shared", [False, True])
def test_compiled_implied_bounds_are_those_of_pytorch(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [_flat(drawn(seed, shared=shared)[0], shared) for seed in range(60)]
    compiled = [implied_bounds.implied_box(data) for data in batches]
    monkeypatch.setattr(implied_bounds, "kernels", lambda: implied_bounds.native.Build(None, "none here"))
    finite = 0
    for data, ends in zip(batches, compiled, strict=True):
        for mine, theirs, given in zip(ends, implied_bounds.implied_box(data), (data.lower, data.upper), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)
            finite += int((mine.isfinite() & given.isinf()).sum())
    assert finite > 50


def _flat(data: Data, shared: bool) -> LPData:
    if shared:
        assert data.A is not None
        assert data.E is not None
        data = data._replace(A=data.A[0], E=data.E[0])
    given = arguments.gather(*data)
    return arguments.flatten(given, arguments.batch_shape(given))
