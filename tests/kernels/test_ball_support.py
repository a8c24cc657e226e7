"""Cut balls as compiled passes, against PyTorch's operations: values, minimisers, gradients, and what overflows."""

import itertools

import pytest
import torch

import optrelax as ox
from optrelax.kernels import ball_support
from optrelax.regions.ball_splits import CutBall, extent, least, minimisers

pytestmark = pytest.mark.compiler

each_ball = pytest.mark.parametrize("ball", [ox.L2Ball, ox.L1Ball], ids=lambda ball: ball.__name__)


def cut(n: int, eps: float, dtype: torch.dtype, generator: torch.Generator) -> CutBall:
    """Three examples in [0, 1], some entries at an end."""
    x = torch.rand(3, n, generator=generator, dtype=torch.float64).to(dtype)
    x[:, ::3], x[1, 1::7] = 0.0, 1.0
    return CutBall(x, torch.tensor([eps, 0.0, 2 * eps], dtype=dtype), torch.zeros_like(x), torch.ones_like(x))


def rows(batch: int, n: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random rows, among them ties, none at all, and sizes far apart."""
    a = torch.randn(batch, 5, n, generator=generator, dtype=torch.float64).to(dtype)
    a[:, 1], a[:, 2] = a[:, 1].sign(), 0.0
    a[:, 3] *= torch.rand(n, generator=generator, dtype=torch.float64).to(dtype) ** 8
    a[:, 4, ::2] = 0.0
    return a


@each_ball
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [1e-3, 0.4, 1.5, 1e4])
def test_compiled_passes_are_the_eager_ones(ball, dtype, eps, monkeypatch):
    assert ball_support.kernels().library is not None, ball_support.kernels().reason
    g = torch.Generator().manual_seed(0)
    for n, shared in itertools.product((1, 9, 100), (True, False)):
        region, a = cut(n, eps, dtype, g), rows(1 if shared else 3, n, dtype, g)
        grads = torch.randn(2, 3, 5, generator=g, dtype=torch.float64).to(dtype)
        found = []
        for compiled in (ball.compiled, 0):
            monkeypatch.setattr(ball, "compiled", compiled)
            leaves = [t.clone().requires_grad_() for t in (a, *region)]
            ends = extent(ball, leaves[0], CutBall(*leaves[1:]))
            with torch.no_grad():
                assert torch.equal(least(ball, a, region), ends[0])
                points = minimisers(ball, a, region)
            found.append([*ends, points, *torch.autograd.grad(ends, leaves, list(grads))])
        monkeypatch.undo()
        unit = 1e-4 if dtype == torch.float32 else 1e-10
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=unit, atol=unit * (1 + float(theirs.detach().abs().max())))


@each_ball
def test_coefficients_that_overflowed_or_vanish_give_no_bound_too_high(ball):
    g = torch.Generator().manual_seed(1)
    region = cut(6, 0.5, torch.float32, g)
    for bad in (torch.inf, -torch.inf, torch.nan):
        a = torch.randn(3, 2, 6, generator=g)
        a[:, 0, 2] = bad
        low, high = extent(ball, a, region)
        assert not (low[:, 0] > -torch.inf).any()
        assert not (high[:, 0] < torch.inf).any()
        assert low[:, 1].isfinite().all()
    small = torch.full((1, 1, 6), 1e-44)
    exact = least(ball, small.double(), CutBall(*(t.double() for t in region)))
    assert (least(ball, small, region).double() <= exact + 1e-44).all()
