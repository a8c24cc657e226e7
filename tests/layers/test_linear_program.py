"""The linear-program layer: its bounds hold for any multipliers, its gradients are those of the value."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lp_cases import MIXED, Data, boxed, covering, exact_value, packing, values
from torch import Tensor

from optrelax.layers import (
    PDHG,
    EnvelopeGradient,
    FixedDualGradient,
    Highs,
    LinearProgram,
    Regularised,
    Status,
)
from optrelax.layers.programs.arguments import batch_shape, flatten, gather
from optrelax.layers.programs.implied_bounds import implied_box
from optrelax.layers.programs.lp_data import Answer, LPData, ProgramSolver
from optrelax.layers.programs.lp_gradients import outer_sum
from optrelax.layers.programs.rays import proves_infeasible
from optrelax.layers.programs.safe_bounds import certify_duals, dual_bound
from optrelax.layers.solutions import UnsolvedError

NAMES = ("c", "A", "b", "E", "d", "lower", "upper")


@dataclass(frozen=True)
class Liar(ProgramSolver):
    """A solver that answers what it is told to, and says that it is optimal."""

    primal: Tensor
    inequality: Tensor
    equality: Tensor
    tol: float = 1e-6

    def solve(self, data: LPData, start: Answer | None) -> Answer:
        size = data.size[0]
        status = torch.zeros(size, dtype=torch.int8)
        parts = (self.primal, self.inequality, self.equality)
        return Answer(*(part.expand(size, -1) for part in parts), status, status.long())


def flat(data: Data) -> LPData:
    gathered = gather(*data)
    return flatten(gathered, batch_shape(gathered))


def leaves(data: Data) -> list[Tensor | None]:
    return [None if part is None else part.clone().requires_grad_() for part in data]


# Bounds


entries = st.one_of(
    st.integers(-8, 8).map(lambda k: k / 4),
    st.floats(-1e3, 1e3, allow_nan=False),
    st.floats(allow_nan=False, allow_infinity=False),
)
multipliers = st.one_of(st.just(0.0), st.floats(-10, 10), st.floats(allow_nan=True, allow_infinity=True))


@st.composite
def small_problems(draw: st.DrawFn, p: int = 1) -> tuple[Data, list[float]]:
    """Two or three variables in a box, up to three rows, and multipliers that have nothing to do with them."""
    n, m = draw(st.integers(2, 3)), draw(st.integers(0, 3))
    p = draw(st.integers(0, p))

    def array(*shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        values = draw(st.lists(entries, min_size=size, max_size=size))
        return torch.tensor(values, dtype=torch.float64).reshape(shape)

    ends = torch.stack([array(n), array(n)]).sort(0).values
    wrong = draw(st.lists(multipliers, min_size=m + p, max_size=m + p))
    return Data(array(n), array(m, n), array(m), array(p, n), array(p), ends[0], ends[1]), wrong


def rational(tensor: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in tensor.tolist()]


def exact(data: Data) -> Fraction | None:
    """The optimal value in rationals; None where infeasible."""
    assert data.A is not None
    assert data.b is not None
    assert data.E is not None
    assert data.d is not None
    assert data.lower is not None
    assert data.upper is not None
    n = data.c.shape[-1]
    rows = [(rational(a), Fraction(side.item())) for a, side in zip(data.A, data.b, strict=True)]
    for j in range(n):
        unit = [Fraction(int(j == k)) for k in range(n)]
        rows.append((unit, Fraction(data.upper[j].item())))
        rows.append(([-u for u in unit], -Fraction(data.lower[j].item())))
    equalities = [(rational(a), Fraction(side.item())) for a, side in zip(data.E, data.d, strict=True)]
    return exact_value(rational(data.c), rows, equalities)


@settings(max_examples=150)
@given(small_problems())
def test_outward_bounds_of_wrong_multipliers_hold_in_rational_arithmetic(case: tuple[Data, list[float]]) -> None:
    data, wrong = case
    assert data.A is not None
    m = data.A.shape[0]
    y, v = torch.tensor(wrong[:m], dtype=torch.float64), torch.tensor(wrong[m:], dtype=torch.float64)
    liar = Liar(torch.zeros_like(data.c), y, v)
    found = LinearProgram(liar, rounding="outward")(*data)
    assert not bool(found.lower.isnan())
    value = exact(data)
    if value is None or not bool(found.lower.isfinite()):
        return
    assert Fraction(found.lower.item()) <= value


@settings(max_examples=150)
@given(small_problems())
def test_outward_bounds_are_below_the_exact_dual_function(case: tuple[Data, list[float]]) -> None:
    """Stronger than the optimum: the bound is below what the same multipliers give in rationals."""
    data, wrong = case
    assert data.A is not None
    assert data.b is not None
    assert data.E is not None
    assert data.d is not None
    assert data.lower is not None
    assert data.upper is not None
    m = data.A.shape[0]
    y = torch.tensor(wrong[:m], dtype=torch.float64).nan_to_num(0, 0, 0).clamp(min=0)
    v = torch.tensor(wrong[m:], dtype=torch.float64).nan_to_num(0, 0, 0)
    found = certify_duals(flat(data), data.c[None] * 0, y[None], v[None], "outward", 1e-6)
    if not bool(found.lower.isfinite()):
        return
    y, v = found.inequality[0], found.equality[0]  # shrunk by a hair where the bound overflowed
    pairs = list(zip([*rational(y), *rational(v)], [*data.A, *data.E], [*data.b, *data.d], strict=True))
    total = -sum((s * Fraction(side.item()) for s, _, side in pairs), Fraction(0))
    for j, cost in enumerate(rational(data.c)):
        r = cost + sum((s * Fraction(row[j].item()) for s, row, _ in pairs), Fraction(0))
        total += min(r * Fraction(data.lower[j].item()), r * Fraction(data.upper[j].item()))
    assert Fraction(found.lower.item()) <= total


@settings(max_examples=100)
@given(small_problems())
def test_rays_never_condemn_a_feasible_problem(case: tuple[Data, list[float]]) -> None:
    data, wrong = case
    assert data.A is not None
    m = data.A.shape[0]
    y, v = torch.tensor(wrong[:m], dtype=torch.float64), torch.tensor(wrong[m:], dtype=torch.float64)
    if bool(proves_infeasible(flat(data), y[None], v[None])):
        assert exact(data) is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rounding", ["nearest", "outward"])
def test_random_multipliers_give_bounds_below_the_optimum(seed: int, rounding: str) -> None:
    data = boxed(20, 12, 9, 3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    y, v = torch.randn(1, 12, generator=generator).double(), torch.randn(1, 3, generator=generator).double()
    found = LinearProgram(Liar(torch.zeros(1, 9).double(), y, v), rounding=rounding)(*data)
    wanted = values(data)
    assert bool((found.lower < wanted).all())
    # The liar's claim of optimality is not believed.
    assert bool((found.status == Status.NUMERICAL).all())
    assert bool((found.inequality >= 0).all())


@dataclass(frozen=True)
class Claimant(ProgramSolver):
    """HiGHS whose answers are changed on their way."""

    change: Callable[[Answer], Answer]
    tol: float = 1e-6

    def solve(self, data: LPData, start: Answer | None) -> Answer:
        return self.change(Highs().solve(data, start))


@pytest.mark.parametrize("code", [Status.INFEASIBLE, Status.UNBOUNDED, 17, -3])
def test_claims_without_rays_are_not_believed(code: int) -> None:
    data = boxed(5, 3, 4, 2, seed=0)
    for size in (1.0, 1e3, torch.nan):
        liar = Claimant(
            lambda a, size=size: replace(
                a,
                status=torch.full_like(a.status, code),
                primal=a.primal * size,
                inequality=a.inequality * size,
                equality=a.equality * size,
            )
        )
        for parts in (data, data._replace(upper=None)):
            found = LinearProgram(liar)(*parts)
            assert set(found.status.tolist()) <= {Status.OPTIMAL, Status.NUMERICAL}, found
            assert bool((found.lower <= values(data) + 1e-9).all())
    assert LinearProgram(Claimant(lambda a: replace(a, status=a.status + code)))(*data).status.tolist() == [0] * 5


def test_claims_with_rays_are_proved_by_the_layer() -> None:
    one = torch.ones(2, 2, dtype=torch.float64)
    status = torch.tensor([Status.INFEASIBLE, Status.UNBOUNDED], dtype=torch.int8)
    told = Answer(one, one, one[:, :0], status, torch.zeros(2, dtype=torch.int64))
    A = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)  # x and y apart, both ways
    b, upper = torch.tensor([[-0.5], [0.5]]).double() * one, torch.tensor([[1.0], [torch.inf]]).double() * one
    found = LinearProgram(Claimant(lambda _: told))(-one, A, b, lower=0 * one, upper=upper)
    assert torch.equal(found.status, status)


@pytest.mark.parametrize("part", ["primal", "inequality", "equality"])
def test_answers_of_another_width_are_refused(part: str) -> None:
    liar = Claimant(lambda a: replace(a, **{part: getattr(a, part)[:, 1:]}))
    with pytest.raises(ValueError, match=rf"Claimant: {part} of 5 problem\(s\): wanted shape \(5, \d\), got \(5, \d\)"):
        LinearProgram(liar)(*boxed(5, 3, 4, 2, seed=0))


def test_outward_covers_the_rounding_of_long_sums() -> None:
    """Against rationals; "nearest" is above the exact dual function in some of these, so an allowance is needed."""
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(40, 300, generator=generator, dtype=torch.float64)
    ends = torch.randn(2, 40, 300, generator=generator, dtype=torch.float64).sort(0).values
    none = torch.zeros(40, 0, dtype=torch.float64)
    problems = flat(Data(c, lower=ends[0], upper=ends[1]))
    near, out = (certify_duals(problems, c, none, none, mode, 1e-6).lower for mode in ("nearest", "outward"))
    sums = []
    for costs, low, high in zip(c, ends[0], ends[1], strict=True):
        triples = zip(rational(costs), rational(low), rational(high), strict=True)
        sums.append(sum((min(r * l, r * u) for r, l, u in triples), Fraction(0)))
    assert all(Fraction(bound) <= total for bound, total in zip(out.tolist(), sums, strict=True))
    assert any(Fraction(bound) > total for bound, total in zip(near.tolist(), sums, strict=True))


def test_outward_covers_the_rounding_of_the_right_hand_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    b, y = torch.randn(40, 300, generator=generator).double(), torch.rand(40, 300, generator=generator).double()
    zero = torch.zeros(1, dtype=torch.float64)
    problems = flat(Data(zero, torch.zeros(300, 1, dtype=torch.float64), b / 3, None, None, zero, zero))
    none = torch.zeros(40, 0, dtype=torch.float64)
    near, out = (
        certify_duals(problems, zero.expand(40, 1), y / 7, none, m, 1e-6).lower for m in ("nearest", "outward")
    )
    pairs = zip(y / 7, b / 3, strict=True)
    sums = [-sum((p * q for p, q in zip(rational(s), rational(side), strict=True)), Fraction(0)) for s, side in pairs]
    assert all(Fraction(bound) <= total for bound, total in zip(out.tolist(), sums, strict=True))
    assert any(Fraction(bound) > total for bound, total in zip(near.tolist(), sums, strict=True))


def test_outward_covers_the_rounding_of_reduced_costs() -> None:
    """Costs that the rows cancel to rounding, times wide bounds."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(60, 20, generator=generator, dtype=torch.float64)
    y = torch.rand(10, 60, generator=generator, dtype=torch.float64)
    wide = torch.full((20,), 1e6, dtype=torch.float64)
    problems = flat(Data(-(y @ A), A, torch.zeros(60, dtype=torch.float64), lower=-wide, upper=wide))
    none = torch.zeros(10, 0, dtype=torch.float64)
    out = certify_duals(problems, y[:, :20], y, none, "outward", 1e-6).lower
    near, _ = dual_bound(problems, y, none, (problems.lower, problems.upper), "nearest")
    columns = [rational(column) for column in A.mT]
    for i in range(10):
        r = [
            Fraction(cost) + sum((p * q for p, q in zip(rational(y[i]), column, strict=True)), Fraction(0))
            for cost, column in zip(problems.c[i].tolist(), columns, strict=True)
        ]
        total = -sum((abs(part) * 10**6 for part in r), Fraction(0))
        assert Fraction(out[i].item()) <= total < Fraction(near[i].item())


def test_outward_costs_little() -> None:
    data = boxed(5, 12, 9, 3)
    near, out = (LinearProgram(Highs(), rounding=mode)(*data) for mode in ("nearest", "outward"))
    assert bool((out.lower < near.lower).all())
    assert bool((near.lower - out.lower < 1e-12).all())
    assert bool((out.status == Status.OPTIMAL).all())


def test_float32_outward_rounds_down() -> None:
    data = boxed(50, 3, 4, 0).to(torch.float32)
    found = LinearProgram(Highs(), rounding="outward")(*data)
    precise = LinearProgram(Highs(), rounding="outward")(*data.to(torch.float64))
    assert found.lower.dtype == torch.float32
    assert bool((found.lower.double() <= precise.lower).all())
    assert bool((precise.lower - found.lower.double() < 1e-6).all())


@pytest.mark.parametrize("make", [covering, packing])
def test_infinite_bounds_are_repaired_or_implied_under_outward(make: object) -> None:
    assert callable(make)
    data = make(6, 5, 7)
    wanted = values(data)
    for solver in (Highs(), PDHG(tol=1e-7)):
        found = LinearProgram(solver, rounding="outward")(*data)
        assert bool((found.lower <= wanted).all())
        assert bool((found.status == Status.OPTIMAL).all())


def test_implied_bounds_keep_every_feasible_point() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(8, 5, 4, generator=generator, dtype=torch.float64)
    points = torch.rand(8, 200, 4, generator=generator, dtype=torch.float64) * 3
    b = torch.full((8, 5), 2.0, dtype=torch.float64)
    lower = torch.zeros(4, dtype=torch.float64)
    E = torch.ones(1, 4, dtype=torch.float64)
    data = flat(Data(torch.zeros(8, 4, dtype=torch.float64), A, b, E, b[:, :1], lower))
    low, high = implied_box(data)
    assert bool(high.isfinite().all())
    points = points / points.sum(-1, keepdim=True) * 2
    inside = (points @ A.mT <= b.unsqueeze(-2)).all(-1)
    assert int(inside.sum()) > 100
    held = ((points >= low.unsqueeze(-2)) & (points <= high.unsqueeze(-2))).all(-1)
    assert bool(held[inside].all())


def test_implied_bounds_of_a_sparse_shared_matrix_are_those_of_its_copies() -> None:
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    A = A * (torch.rand(12, 9, generator=generator) < 0.2)
    E = torch.ones(1, 9, dtype=torch.float64) * (torch.arange(9) < 4)
    b = torch.rand(3, 12, generator=generator, dtype=torch.float64)
    lower = torch.zeros(9, dtype=torch.float64)
    c = torch.zeros(3, 9, dtype=torch.float64)
    shared = implied_box(flat(Data(c, A, b, E, b[:, :1], lower)))
    copies = implied_box(flat(Data(c, A.expand(3, -1, -1).clone(), b, E.expand(3, -1, -1).clone(), b[:, :1], lower)))
    assert bool(shared[1].isfinite().any())
    assert bool(shared[1].isinf().any())
    for one, other in zip(shared, copies, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_implied_bounds_are_outward_and_tight() -> None:
    """x_0 <= (side - least activity of the rest) / a_0, in rationals."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(50, 6, generator=generator, dtype=torch.float64) + 0.1
    side = torch.rand(50, generator=generator, dtype=torch.float64)
    rest = torch.rand(50, 6, generator=generator, dtype=torch.float64)
    upper = rest.clone()
    upper[:, 0] = torch.inf
    _, high = implied_box(flat(Data(a, a.unsqueeze(-2), side.unsqueeze(-1), lower=-rest, upper=upper)))
    for i in range(50):
        row, low = rational(a[i]), [-value for value in rational(rest[i])]
        least = sum((p * q for p, q in zip(row[1:], low[1:], strict=True)), Fraction(0))
        quotient = (Fraction(side[i].item()) - least) / row[0]
        assert quotient <= Fraction(high[i, 0].item()) <= quotient * (1 + Fraction(1, 10**12))
    assert torch.equal(high[:, 1:], upper[:, 1:])


def test_a_variable_that_nothing_bounds_has_no_bound() -> None:
    found = LinearProgram(Liar(torch.zeros(1, 2).double(), torch.zeros(1, 1).double(), torch.zeros(1, 0).double()))(
        torch.tensor([1.0, -1.0]).double(), torch.ones(1, 2).double(), torch.ones(1).double()
    )
    assert found.lower == -torch.inf
    assert found.gap == torch.inf
    assert found.status == Status.NUMERICAL


def test_gap_wants_a_feasible_point() -> None:
    data = boxed(1, 3, 4, 0)
    y, v = torch.zeros(1, 3).double(), torch.zeros(1, 0).double()
    feasible = LinearProgram(Highs())(*data)
    assert data.A is not None
    assert data.b is not None
    outside = feasible.primal + 100 * data.A[0, 0]
    for point, finite in ((feasible.primal, True), (outside, False)):
        found = LinearProgram(Liar(point, y, v))(*data)
        assert bool(found.gap.isfinite().all()) == finite
    value = (data.c * feasible.primal).sum(-1)
    bound = data.c.clamp(max=0).sum(-1)
    torch.testing.assert_close(LinearProgram(Liar(feasible.primal, y, v))(*data).gap, value - bound)
    nearly = Data(data.c * 0 + 1, -torch.ones(1, 4).double(), -torch.ones(1).double(), None, None, *data[5:])
    point = torch.full((1, 4), 0.25 - 1e-5).double()
    strict = LinearProgram(Liar(point, y[:, :1], v))(*nearly)
    loose = LinearProgram(Liar(point, y[:, :1], v), feasibility=1e-3)(*nearly)
    assert strict.gap == torch.inf
    assert bool(loose.gap.isfinite())


# Statuses


def test_contradictory_bounds_are_infeasible_and_alone() -> None:
    data = boxed(3, 4, 5, 1)
    lower = torch.zeros(3, 5, dtype=torch.float64)
    lower[1, 2] = 2.0
    for solver in (Highs(), PDHG()):
        found = LinearProgram(solver)(*data._replace(lower=lower))
        assert found.status.tolist() == [0, Status.INFEASIBLE, 0]
        assert found.lower[1] == -torch.inf
        torch.testing.assert_close(found.lower[[0, 2]], values(data)[[0, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [Highs(), PDHG()])
def test_problems_without_a_value_have_zero_gradient(solver: Highs | PDHG) -> None:
    """Even where the loss sends them inf or NaN, and even into data that they share with others."""
    parts = leaves(MIXED)
    found = LinearProgram(solver)(*parts)
    found.lower.exp().reciprocal().sum().backward()
    others = leaves(
        Data(*(part if i in (1, 5) else part if part is None else part[[0, 3]] for i, part in enumerate(MIXED)))
    )
    LinearProgram(solver)(*others).lower.exp().reciprocal().sum().backward()
    for index in (0, 2, 6):
        leaf = parts[index]
        assert leaf is not None
        assert leaf.grad is not None
        assert bool((leaf.grad[1:3] == 0).all())
    for index in (1, 5):
        leaf, other = parts[index], others[index]
        assert leaf is not None
        assert other is not None
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert all(leaf is None or leaf.grad is None or bool(leaf.grad.isfinite().all()) for leaf in parts)


def test_throw_counts_what_went_wrong() -> None:
    with pytest.raises(UnsolvedError, match=r"1 INFEASIBLE, 1 UNBOUNDED of 4 problem\(s\) \(first at \[1\]\)"):
        LinearProgram(Highs(), throw=True)(*MIXED)
    LinearProgram(Highs(), throw=True)(*boxed(2, 3, 4, 0))


# Gradients


def finite_differences(data: Data, step: float = 1e-6) -> list[Tensor | None]:
    """Central differences of SciPy's optimal values, summed over the batch."""
    grads: list[Tensor | None] = []
    for name, part in zip(NAMES, data, strict=True):
        if part is None:
            grads.append(None)
            continue
        grad = torch.zeros_like(part)
        for i in range(part.numel()):
            pair = []
            for sign in (1, -1):
                moved = part.clone()
                moved.view(-1)[i] += sign * step
                pair.append(values(data._replace(**{name: moved})).sum())
            grad.view(-1)[i] = (pair[0] - pair[1]) / (2 * step)
        grads.append(grad)
    return grads


@pytest.mark.parametrize(
    "data",
    [
        boxed(2, 4, 5, 1),
        boxed(2, 5, 4, 0, seed=1),
        boxed(2, 0, 5, 2, seed=2),
        boxed(2, 0, 4, 0, seed=3),
        covering(2, 3, 4),
    ],
    ids=["both", "inequalities", "equalities", "bounds", "infinite"],
)
@pytest.mark.parametrize("solver", [Highs(), PDHG(tol=1e-10)], ids=["highs", "pdhg"])
def test_gradient_equals_finite_differences_of_highs(data: Data, solver: Highs | PDHG) -> None:
    parts = leaves(data)
    LinearProgram(solver)(*parts).lower.sum().backward()
    for name, leaf, wanted in zip(NAMES, parts, finite_differences(data), strict=True):
        if leaf is None:
            continue
        assert leaf.grad is not None
        # Differences of values good to 1e-12 or so, over 2e-6.
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-6, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_gradcheck() -> None:
    parts = leaves(boxed(2, 3, 4, 1, seed=4))
    assert torch.autograd.gradcheck(lambda *args: LinearProgram(Highs())(*args).lower, parts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_shared_data_is_the_sum(name: str) -> None:
    data = boxed(6, 4, 5, 1)
    # A wide box: data taken from one problem must leave the others feasible.
    data = data._replace(lower=torch.full((5,), -9.0).double(), upper=torch.full((5,), 9.0).double())
    shared = data._replace(**{name: data.one(0)._asdict()[name]})
    tensor = shared._asdict()[name]
    # A shape of leading ones is shared as well.
    for shape in (tensor.shape, (1, *tensor.shape)):
        once = tensor.reshape(shape).clone().requires_grad_()
        each = tensor.expand(6, *tensor.shape).clone().requires_grad_()
        for leaf in (once, each):
            found = LinearProgram(Highs(), throw=True)(*shared._replace(**{name: leaf}))
            (found.lower * torch.arange(1.0, 7.0)).sum().backward()
        assert once.grad is not None
        assert each.grad is not None
        torch.testing.assert_close(once.grad.reshape(tensor.shape), each.grad.sum(0))


@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (2, 1, 4), (1, 3, 1), (2, 3, 1), (2, 3, 4), (1, 1, 1)])
def test_outer_products_are_summed_over_what_is_shared(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(2, 3, 4, 5, generator=generator)
    right = torch.randn(2, 3, 4, 6, generator=generator)
    wanted = (left.unsqueeze(-1) * right.unsqueeze(-2)).sum_to_size(*shape, 5, 6)
    torch.testing.assert_close(outer_sum(left, right, torch.Size([*shape, 5, 6])), wanted)


@pytest.mark.parametrize("solver", [Highs(), PDHG(tol=1e-8)], ids=["highs", "pdhg"])
def test_leading_shapes_broadcast(solver: Highs | PDHG) -> None:
    data = boxed(3, 4, 5, 1)
    assert data.A is not None
    c = torch.stack([data.c, -data.c])  # [2, 3, n]
    A = data.A[:1].clone().requires_grad_()  # [1, m, n]
    b = torch.full((2, 1, 4), 2.0, dtype=torch.float64, requires_grad=True)
    upper = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    found = LinearProgram(solver)(c, A, b, lower=data.lower, upper=upper)
    assert found.lower.shape == (2, 3)
    assert found.primal.shape == (2, 3, 5)
    assert found.inequality.shape == (2, 3, 4)
    assert found.equality.shape == (2, 3, 0)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64).reshape(2, 3)
    (found.lower * weights).sum().backward()
    total = [torch.zeros_like(part) for part in (A, b, upper)]
    for i in range(2):
        for j in range(3):
            single = [part.detach().clone().requires_grad_() for part in (A[0], b[i, 0], upper[j])]
            one = LinearProgram(solver)(c[i, j], *single[:2], lower=data.lower, upper=single[2])
            torch.testing.assert_close(one.lower, found.lower[i, j])
            (one.lower * weights[i, j]).backward()
            grads = [part.grad for part in single]
            total[0][0] += grads[0]
            total[1][i, 0] += grads[1]
            total[2][j] += grads[2]
    for part, wanted in zip((A, b, upper), total, strict=True):
        torch.testing.assert_close(part.grad, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [Highs(), PDHG()], ids=["highs", "pdhg"])
def test_an_empty_batch_is_answered(solver: Highs | PDHG) -> None:
    c = torch.zeros(0, 3, requires_grad=True)
    A = torch.ones(2, 3, requires_grad=True)
    found = LinearProgram(solver)(c, A, torch.ones(2), lower=torch.zeros(3), upper=torch.ones(3))
    assert found.lower.shape == (0,)
    assert found.primal.shape == (0, 3)
    found.lower.sum().backward()
    assert A.grad is not None
    assert bool((A.grad == 0).all())


def test_fixed_dual_gradient_is_that_of_the_reported_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    data = boxed(2, 3, 4, 1)
    y, v = torch.rand(2, 3, generator=generator).double(), torch.randn(2, 1, generator=generator).double()
    layer = LinearProgram(Liar(torch.zeros(2, 4).double(), y, v), value_gradient=FixedDualGradient())
    assert torch.autograd.gradcheck(lambda *args: layer(*args).lower, leaves(data))
    envelope = LinearProgram(layer.solver, value_gradient=EnvelopeGradient())
    parts = leaves(data)
    envelope(*parts).lower.sum().backward()
    assert parts[0] is not None
    # The envelope's rule takes the solver's own point instead.
    assert bool((parts[0].grad == 0).all())


def test_unfinished_solves_have_the_lagrangian_gradient() -> None:
    data = boxed(3, 6, 8, 2)
    parts = leaves(data)
    found = LinearProgram(PDHG(tol=1e-12, max_iterations=8))(*parts)
    assert bool((found.status == Status.ITERATION_LIMIT).all())
    found.lower.sum().backward()
    for leaf, wanted in zip(
        parts[:5],
        (
            found.primal,
            found.inequality.unsqueeze(-1) * found.primal.unsqueeze(-2),
            -found.inequality,
            found.equality.unsqueeze(-1) * found.primal.unsqueeze(-2),
            -found.equality,
        ),
        strict=True,
    ):
        assert leaf is not None
        torch.testing.assert_close(leaf.grad, wanted)


def test_nothing_is_kept_without_a_gradient() -> None:
    parts = leaves(boxed(2, 4, 5, 1))
    with torch.no_grad():
        found = LinearProgram(Highs())(*parts)
    assert found.lower.grad_fn is None
    assert LinearProgram(Highs())(*boxed(2, 4, 5, 1)).lower.grad_fn is None
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        LinearProgram(PDHG())(*leaves(boxed(2, 40, 50, 1)))
    # Vectors only: no [batch, m, n] block, whatever the iterations.
    assert kept
    assert max(kept) <= 2 * 50


def test_only_lower_is_differentiable_by_default() -> None:
    found = LinearProgram(Highs())(*leaves(boxed(2, 4, 5, 1)))
    assert found.lower.requires_grad
    assert not any(part.requires_grad for part in (found.inequality, found.equality, found.gap, found.status))
    with pytest.raises(RuntimeError, match=r"no gradient rule; give primal_gradient=Regularised\(strength\)"):
        found.primal.sum().backward()


def test_double_backward_is_an_error() -> None:
    c = boxed(1, 3, 4, 0).c.requires_grad_()
    found = LinearProgram(Highs())(c, *boxed(1, 3, 4, 0)[1:])
    for total in (found.lower.sum() ** 2, found.lower.sum()):
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(total, c, create_graph=True)


# The regularised argmin


@pytest.mark.parametrize("strength", [0.05, 0.5, 5.0])
def test_regularised_argmin_gradcheck(strength: float) -> None:
    layer = LinearProgram(Highs(), primal_gradient=Regularised(strength))
    parts = leaves(boxed(1, 3, 4, 1, seed=5))
    assert torch.autograd.gradcheck(lambda *args: layer(*args).primal, parts, rtol=1e-4, atol=1e-5)


def test_regularised_argmin_has_its_closed_form_on_a_box() -> None:
    c = torch.tensor([[0.3, -0.4, 2.0, -2.0]], dtype=torch.float64, requires_grad=True)
    layer = LinearProgram(Highs(), primal_gradient=Regularised(0.5))
    found = layer(c, lower=torch.full((4,), -1.0).double(), upper=torch.ones(4).double())
    torch.testing.assert_close(found.primal, (-c / 0.5).clamp(-1, 1))
    found.primal.sum().backward()
    torch.testing.assert_close(c.grad, torch.tensor([[-2.0, -2.0, 0.0, 0.0]]).double())
    assert found.lower.item() == pytest.approx(-4.7)


def test_regularised_gradient_of_shared_data_is_the_sum_and_failures_are_alone() -> None:
    layer = LinearProgram(Highs(), primal_gradient=Regularised(0.5))
    parts = leaves(MIXED)
    found = layer(*parts)
    assert bool(found.primal.isfinite().all())
    found.primal.sum().backward()
    A = parts[1]
    assert A is not None
    assert A.grad is not None
    total = torch.zeros_like(A)
    for i in (0, 2, 3):
        one = leaves(MIXED.one(i))
        layer(*one).primal.sum().backward()
        assert one[1] is not None
        assert one[1].grad is not None
        total += one[1].grad
    torch.testing.assert_close(A.grad, total)


def test_regularised_small_strength_is_the_vertex() -> None:
    data = boxed(3, 4, 5, 1)
    found = LinearProgram(Highs(), primal_gradient=Regularised(1e-3))(*data)
    torch.testing.assert_close(found.primal, LinearProgram(Highs())(*data).primal, rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match="strength must be > 0, got 0"):
        Regularised(0)


# The layer as a module, and its border


def test_it_trains_inside_a_module() -> None:
    torch.manual_seed(0)
    data = boxed(8, 4, 5, 0)

    class Planner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.costs = torch.nn.Linear(3, 5).double()
            self.program = LinearProgram(Highs())

        def forward(self, x: Tensor) -> Tensor:
            lower: Tensor = self.program(self.costs(x), *data[1:]).lower
            return lower

    planner = copy.deepcopy(Planner()).train()
    assert [name for name, _ in planner.named_parameters()] == ["costs.weight", "costs.bias"]
    x = torch.randn(8, 3, dtype=torch.float64)
    optimiser = torch.optim.SGD(planner.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = -planner(x).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    # The value is concave in the costs, so small steps up its gradient raise it.
    assert losses == sorted(losses, reverse=True)
    assert "Highs" in repr(planner)


good = boxed(2, 3, 4, 1)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"b": None}, ValueError, "give both A and b or neither"),
        ({"E": None}, ValueError, "give both E and d or neither"),
        ({"c": good.c[:, :3]}, ValueError, r"A has shape \(2, 3, 4\), wanted \[\*batch, 3, 3\]"),
        ({"b": torch.ones(2, 5).double()}, ValueError, r"b has shape \(2, 5\), wanted \[\*batch, 3\]"),
        ({"A": torch.ones(4).double()}, ValueError, "A needs at least 2 dimension"),
        ({"c": torch.ones(3, 4).double()}, ValueError, "leading shapes do not broadcast: c \\[3\\], A \\[2\\]"),
        ({"c": good.c * torch.nan}, ValueError, r"c holds NaN \(first at \[0, 0\]\)"),
        ({"b": torch.full((3,), -torch.inf).double()}, ValueError, r"b must be finite, or inf for no limit, got -inf"),
        ({"lower": torch.full((4,), torch.inf).double()}, ValueError, "lower must be finite or -inf"),
        ({"upper": torch.full((4,), -torch.inf).double()}, ValueError, "upper must be finite or inf"),
        ({"c": good.c.float()}, ValueError, "A is torch.float64, c is torch.float32"),
        ({"c": good.c.half()}, TypeError, "c must be float32 or float64, got torch.float16"),
        ({"c": good.c.long()}, TypeError, "c must be float32 or float64, got torch.int64"),
        ({"c": torch.ones(2, 0).double(), "A": None, "b": None, "E": None, "d": None}, ValueError, "no variables"),
    ],
)
def test_bad_data_is_an_error_that_says_what_and_where(
    change: dict[str, Tensor | None], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        batch_shape(gather(*good._replace(**change)))


def test_bad_options_raise_at_once() -> None:
    with pytest.raises(ValueError, match="feasibility must be > 0"):
        LinearProgram(Highs(), feasibility=-1.0)
    with pytest.raises(TypeError, match=r"solver must be a solver object such as Highs\(\)"):
        LinearProgram(Highs)
    with pytest.raises(TypeError):
        LinearProgram(Highs(), tole=1)


def test_autocast_is_an_error() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="autocast"):
        LinearProgram(Highs())(*good)


def test_the_package_loads_its_names_lazily() -> None:
    code = (
        "import sys, optrelax.layers as L; heavy = {'highspy', 'cvxpy', 'scipy.sparse', 'clarabel', 'matplotlib'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "L.LinearProgram; L.Status; L.PDHG; assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "assert 'Highs' in dir(L) and set(L.__all__) <= set(dir(L))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    import optrelax.layers

    with pytest.raises(AttributeError, match="no attribute 'Simplex'"):
        _ = optrelax.layers.Simplex  # type: ignore[attr-defined]
