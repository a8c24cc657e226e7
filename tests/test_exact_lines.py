"""The command `python -m tests.exact_lines`, for a few pairs, and what it has found."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import exact_lines
import mpmath as mp
import pytest
import torch
from exact_functions import EXACT, FUNCTIONS, SLOPES, ClaimedLine, beaten
from flint import arb, ctx
from torch import Tensor

from optrelax.networks.activations import Smooth, elementary

PLAIN: dict[str, Callable[[Any], Any]] = {
    "sigmoid": lambda x: 1 / (1 + mp.exp(-x)),
    "tanh": mp.tanh,
    "silu": lambda x: x / (1 + mp.exp(-x)),
    "gelu": lambda x: x * mp.ncdf(x),
    "gelu_tanh": lambda x: x * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (x + mp.mpf(0.044715) * x**3))) / 2,
    "mish": lambda x: x * mp.tanh(mp.log1p(mp.exp(x))),
    "hardswish": lambda x: x * min(max(x + 3, 0), 6) / 6,
    "softsign": lambda x: x / (1 + abs(x)),
    "erf": mp.erf,
    "exp": mp.exp,
    "log": mp.log,
    "sqrt": mp.sqrt,
    "rsqrt": lambda x: 1 / mp.sqrt(x),
    "sin": mp.sin,
    "cos": mp.cos,
    "sinh": mp.sinh,
    "atan": mp.atan,
}
"""Definitions as a book has them, in another library's arithmetic."""
PLAIN |= {f"{name}'": partial(mp.diff, PLAIN[name]) for name in ("sigmoid", "tanh", "silu", "gelu", "gelu_tanh")}


def test_the_oracle_s_values_are_those_of_the_definitions():
    x = [*torch.linspace(-30, 30, 41).tolist(), 0.0, 3.0, -3.0, 1e-9, 0.7, 90.0, -90.0]
    with mp.workprec(400), ctx.workprec(200):
        for f in (*FUNCTIONS, *SLOPES):
            exact = EXACT[f.name](*f.parameters)
            plain = _with_parameters(f) if f.parameters else PLAIN[f.name]
            for at in x if f.domain[0] < 0 and not f.poles else (t for t in x if t > 0):
                whole, rest = exact(arb(at))
                mantissa, exponent = (whole + rest).mid().man_exp()
                value = mp.ldexp(mp.mpf(int(mantissa)), int(exponent))
                assert abs(value - plain(mp.mpf(at))) <= 1e-50 * max(1, abs(value)), (f.name, at)


def _with_parameters(f: Smooth) -> Callable[[Any], Any]:
    numbers = [mp.mpf(p) for p in f.parameters]
    if f.name == "power":
        return lambda x: x ** int(numbers[0])
    if f.name == "softplus":
        return lambda x: mp.log1p(mp.exp(numbers[0] * x)) / numbers[0]
    alpha, scale, rate = numbers
    return lambda x: scale * x if x > 0 else scale * alpha * mp.expm1(rate * x)


@pytest.mark.parametrize("name", ["gelu'", "softsign"])
def test_outward_lines_hold_on_pairs_of_every_size(name):
    told: list[str] = []
    count = exact_lines.check(40, told.append, [name])[name]
    assert (count.beaten, count.undecided) == (0, 0), told
    assert count.pairs >= 40
    assert told == [f"{name}: {count}"]


def test_a_line_that_is_off_by_less_than_a_unit_is_found():
    @dataclass(frozen=True)
    class Bold(Smooth):
        def outward_image(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return self.image(l, u)  # to nearest: e rounds down

    f = Bold("exp", torch.exp, torch.exp)
    one = torch.ones(1, dtype=torch.float64)
    assert exact_lines.violations(f, one, one, torch.Generator()).beaten


@pytest.mark.parametrize(("dtype", "x"), [(torch.float32, 1e38), (torch.float64, 1e308)])
def test_a_number_that_six_times_itself_overflows_bounds_hardswish(dtype, x):
    f = elementary.known("hardswish", ())
    ends = torch.tensor([x], dtype=dtype)
    assert not exact_lines.violations(f, ends, ends, torch.Generator()).beaten
    assert f(ends).isfinite().all()


@pytest.mark.parametrize(("dtype", "x"), [(torch.float32, -90.0), (torch.float64, -712.0)])
def test_what_is_left_of_silu_where_its_exponential_overflows_is_not_lost(dtype, x):
    f = elementary.known("silu", ())
    ends = torch.tensor([x], dtype=dtype)
    assert not exact_lines.violations(f, 1e9 * ends, ends, torch.Generator()).beaten
    assert -1e-35 < float(f(ends)) < 0


@pytest.mark.parametrize("x", [800.0, 1e300])
def test_what_a_function_never_reaches_bounds_it_and_what_it_passes_does_not(x):
    """tanh(x) < 1 by less than 10^-600, which no float and no 200 bits tell apart: 1 lies above it, and not below."""
    f = elementary.known("tanh", ())
    at = torch.tensor([x], dtype=torch.float64)
    flat, one = torch.zeros_like(at), torch.ones_like(at)
    for sign, wrong in ((1.0, False), (-1.0, True)):
        found = beaten(f, at, at, [ClaimedLine(sign, flat, one, at)], at[None])
        assert (len(found.beaten) > 0, found.undecided) == (wrong, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_far_out_a_wave_is_known_by_its_amplitude(name, dtype):
    """Where neighbouring numbers of the type lie apart by more than its crests are wide."""
    f = elementary.known(name, ())
    ends = torch.tensor([[-236289904.0, 5.796055452131571e-15], [-648198784.0, 506388.875], [0.0, 3e12]], dtype=dtype)
    low, high = f.outward_image(*ends.unbind(1))
    assert (low <= -1).all()
    assert (high >= 1).all()
