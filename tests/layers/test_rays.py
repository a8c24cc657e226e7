"""Proofs at infinite bounds: multipliers and rays that a solver's rounding has blurred."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from optrelax.layers import Highs, LinearProgram, Status
from optrelax.layers.programs import arguments, lp_data
from optrelax.layers.programs.quadratic_bounds import certify_quadratic
from optrelax.layers.programs.rays import proves_infeasible, proves_unbounded
from optrelax.layers.programs.safe_bounds import box_bound, certify_duals


def rows(*entries: list[float]) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.float64)


def problem(**given: torch.Tensor) -> lp_data.LPData:
    data = arguments.gather(*(given.get(name) for name in ("c", "A", "b", "E", "d", "lower", "upper")))  # type: ignore[arg-type]
    return arguments.flatten(data, torch.Size([1]))


INF = torch.inf


def test_a_free_column_that_meets_noise_alone_keeps_its_bound() -> None:
    """The second variable has no cost and no lower bound; its one multiplier is what rounding left of 0."""
    data = problem(
        c=rows([-1.0, 0.0]),
        A=rows([1.0, 0.0], [0.0, -1.0]),
        b=rows([2.0, 0.0]),
        lower=rows([-INF, 0.0]),
        upper=rows([INF, INF]),
    )
    noisy, x = rows([1.0, 3e-15]), rows([2.0, 0.0])
    found = certify_duals(data, x, noisy, noisy[:, :0], "outward", 1e-6)
    assert found.lower.item() == pytest.approx(-2.0, abs=1e-9)
    assert found.lower.item() <= -2.0
    # A multiplier that counts is not dropped.
    wrong = certify_duals(data, x, rows([1.0, 0.1]), noisy[:, :0], "outward", 1e-6)
    assert wrong.lower.item() <= -2.0


@pytest.mark.parametrize("y", [0.0, 3.6e-10])
def test_no_multipliers_bound_a_problem_without_costs(y: float) -> None:
    data = problem(c=rows([0.0]), A=rows([-0.3]), b=rows([1.0]), lower=rows([-1.0]), upper=rows([INF]))
    found = certify_duals(data, rows([0.0]), rows([y]), rows([0.0])[:, :0], "outward", 1e-6)
    assert found.lower.item() == pytest.approx(0.0, abs=1e-300)
    assert found.gap.item() == pytest.approx(0.0, abs=1e-300)


def test_a_reduced_cost_of_0_stays_0_beside_one_with_an_error() -> None:
    """One step below 0 times an infinite bound is infinite."""
    reduced, error = rows([0.0], [1.0]), rows([0.0], [1e-12])
    box = rows([-1.0], [2.0]), rows([INF], [3.0])
    found = box_bound(reduced, error, box, reduced[:, :0], "outward")
    assert found.tolist() == pytest.approx([0.0, 2.0], abs=1e-11)
    assert found[1].item() < 2 - 2e-12


def test_bounds_that_rows_imply_and_that_cross_show_infeasibility() -> None:
    """-2 x_0 <= -9 asks for more than x_0 <= 4, and no ray is given; at 4.5 both can be met."""
    one = rows([1.0, 1.0])
    sides = {"c": one, "A": rows([-2.0, 0.0]), "b": rows([-9.0]), "lower": rows([-INF, -INF])}
    none = rows([0.0])
    for least, infeasible in ((4.0, True), (4.5, False)):
        data = problem(**sides, upper=rows([least, INF]))
        assert bool(proves_infeasible(data, none, none[:, :0])) == infeasible


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_a_ray_of_descent_beside_rows_of_zeros_and_equal_rows(noise: float) -> None:
    """x_0 = x_1 + x_2, said twice, and a row of zeros: (1, 1, 0) leads down, and x_2 lies between bounds."""
    E = rows([1.0, -1.0, -1.0], [2.0, -2.0, -2.0], [0.0, 0.0, 0.0])
    given = {"c": rows([-1.0, 0.0, 0.0]), "E": E, "d": rows([0.0, 0.0, 0.0])}
    given |= {"lower": rows([0.0, -INF, -1.0]), "upper": rows([INF, INF, 1.0])}
    ray = rows([1.0, 1.0 + noise / 2, noise])
    assert bool(proves_unbounded(problem(**given), ray))
    assert not bool(proves_unbounded(problem(**given), -ray))
    # A row that the ray breaks, whatever is left out beside it.
    held = given | {"A": rows([1.0, 0.0, 1.0]), "b": rows([5.0])}
    assert not bool(proves_unbounded(problem(**held), ray))


@pytest.mark.parametrize("solver", ["auto", Highs(workers=1)])
def test_crossed_implied_bounds_are_a_status(solver: object) -> None:
    c, A = rows([2.0, 0.0, 2.0]), rows([2.0, -2.0, 0.0], [2.0, 1.0, 0.0])
    lower, upper = rows([-2e4, 0.0, 0.0]), rows([INF, 0.0, INF])
    found = LinearProgram(solver)(c, A, rows([-32478.3, -52478.3]), lower=lower, upper=upper)
    assert found.status.tolist() == [Status.INFEASIBLE]


@pytest.mark.parametrize("more", [1e-6, 1e-9, 1e-13])
def test_equal_columns_of_other_costs_have_no_bound(more: float) -> None:
    """x1 costs a little less than x0, and both are free: however little, the problem has no least value."""
    data = problem(c=rows([-1.0, -1.0 - more]), A=rows([1.0, 1.0])[None], b=rows([1.0]))
    point = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    found = certify_duals(data, *point, torch.zeros(1, 0, dtype=torch.float64), "outward", 1e-6)
    assert found.lower.tolist() == [-INF]


def test_a_singular_quadratic_program_that_falls_for_ever_has_no_bound() -> None:
    """Along x1 = -x2 nothing bends; points far out make every residual small beside its terms."""
    half = torch.tensor([[1.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    given = {"c": rows([0.0, -1.0, 0.0, 0.0]), "A": rows([0.0, 0.0, 0.0, 1.0])[None], "b": rows([1.0])}
    ends = {"lower": rows([-1e6, 0.0, -INF, 0.0]), "upper": rows([1e6, INF, INF, 1.0])}
    data = replace(problem(**given, **ends), P=half.mT @ half)
    far = rows([-1e6, 6.6e10, -6.65e10 + 5e8, 0.9])
    for x in (far, rows([-1e6, 6.65027737767527924e10, -6.65022745570423279e10, 0.88])):
        for y in (0.0, 24.5):
            prices = torch.full((1, 1), y, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.float64)
            for rounding in ("nearest", "outward"):
                assert certify_quadratic(data, x, *prices, rounding, 1e-6).lower.tolist() == [-INF]
