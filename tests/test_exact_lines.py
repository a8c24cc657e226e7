"""The command `python -m tests.exact_lines`, for a few pairs, and what it has found."""

import math
from dataclasses import dataclass

import exact_lines
import pytest
import torch
from torch import Tensor

from optrelax.networks.activations import Smooth, elementary


@pytest.mark.parametrize("name", ["gelu'", "softsign"])
def test_outward_lines_hold_on_pairs_of_every_size(name, monkeypatch):
    monkeypatch.setattr(exact_lines, "ROUND", 4)
    told: list[str] = []
    asked, wrong = exact_lines.check(8, math.inf, told.append, name)
    assert (asked[name], wrong) == (8, 0), told
    assert told == ["8 pairs of 1 functions, 0 lines beaten"]


def test_a_line_that_is_off_by_less_than_a_unit_is_found():
    @dataclass(frozen=True)
    class Bold(Smooth):
        def outward_image(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return self.image(l, u)  # to nearest: e rounds down

    f = Bold("exp", torch.exp, torch.exp)
    one = torch.ones(1, dtype=torch.float64)
    assert exact_lines.violations(f, one, one, torch.Generator())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_far_out_a_wave_is_known_by_its_amplitude(name, dtype):
    """Where neighbouring numbers of the type lie apart by more than its crests are wide."""
    f = elementary.known(name, ())
    ends = torch.tensor([[-236289904.0, 5.796055452131571e-15], [-648198784.0, 506388.875], [0.0, 3e12]], dtype=dtype)
    low, high = f.outward_image(*ends.unbind(1))
    assert (low <= -1).all()
    assert (high >= 1).all()
