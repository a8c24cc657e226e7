"""What a branch and bound says and does not say: points that are none, claims that contradict proofs, no time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from optrelax.layers import MixedIntegerProgram, Status
from optrelax.layers.programs.lp_data import LPData

f64 = torch.float64
Found = tuple[Tensor, Tensor, Tensor]
KNAPSACK = {
    "c": torch.tensor([-4.0, -5.0, -6.0], dtype=f64),
    "A": torch.tensor([[3.0, 4.0, 5.0]], dtype=f64),
    "lower": torch.zeros(3, dtype=f64),
    "upper": torch.ones(3, dtype=f64),
}


def first(value: float) -> Callable[[Found], Found]:
    """The first problem's point, all of one number."""
    return lambda found: (torch.cat([torch.full_like(found[0][:1], value), found[0][1:]]), *found[1:])


def claim(status: Status) -> Callable[[Found], Found]:
    return lambda found: (*found[:2], torch.full_like(found[2], int(status)))


@pytest.mark.parametrize(
    ("lie", "status"),
    [
        (first(torch.nan), Status.NUMERICAL),
        (first(torch.inf), Status.NUMERICAL),
        (first(0.5 + 7), Status.NUMERICAL),
        (claim(Status.UNBOUNDED), Status.NUMERICAL),
        (claim(Status.INFEASIBLE), Status.INFEASIBLE),
    ],
    ids=["no number", "infinite", "not in the box", "unbounded", "infeasible"],
)
def test_what_branch_and_bound_says_is_held_to_what_is_proved(
    lie: Callable[[Found], Found], status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = MixedIntegerProgram._branch

    def branch(self: MixedIntegerProgram, data: LPData) -> Found:
        return lie(honest(self, data))

    monkeypatch.setattr(MixedIntegerProgram, "_branch", branch)
    limits = torch.tensor([[7.0], [12.0], [-1.0]], dtype=f64)
    found = MixedIntegerProgram([True] * 3)(b=limits, **KNAPSACK)
    torch.testing.assert_close(found.lower, torch.tensor([-9.0, -15.0, -torch.inf], dtype=f64))
    assert found.status[0] == status
    assert found.value[0] == torch.inf
    assert found.gap[0] == torch.inf
    assert found.status[2] == Status.INFEASIBLE  # proved
    if status == Status.NUMERICAL and found.status[1] != status:  # a lie about the first alone
        assert found.status[1] == Status.OPTIMAL
        assert found.value[1].item() == pytest.approx(-15.0)


def test_a_search_without_time_says_so_and_has_no_value() -> None:
    """The point that a search without time leaves, of zeros, violates the row."""
    program = {**KNAPSACK, "c": -KNAPSACK["c"], "A": -KNAPSACK["A"]}
    found = MixedIntegerProgram([True] * 3, time_limit=1e-9)(b=torch.tensor([-4.0], dtype=f64), **program)
    assert found.status == Status.TIME_LIMIT
    assert found.value == torch.inf
    assert found.lower.isfinite()


def test_workers_are_checked_when_the_layer_is_made() -> None:
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        MixedIntegerProgram([True], workers=0)
