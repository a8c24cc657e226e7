"""Planes of products: on corners in exact fractions, on fine grids, at ties, without width, and against each other."""

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from optrelax.domains.planes import Planes, outward_planes, product_planes, square_planes
from optrelax.enclosures import Bounds

ENDS = [0.0, 1.0, -1.0, 0.1, -0.3, 3.7, 1e-300, -1e-300, 1e150, -1e150, 5e-324]


def boxes(dtype: torch.dtype) -> tuple[Bounds, Bounds]:
    """Every pair of intervals with ends among these, ties and intervals without width included, and random ones."""
    ends = [float(torch.tensor(e, dtype=dtype)) for e in (ENDS if dtype == torch.float64 else ENDS[:6])]
    pairs = [(a, b) for a, b in itertools.product(ends, ends) if a <= b]
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(40, 2, generator=generator, dtype=torch.float64).to(dtype).sort(1).values.tolist()
    chosen = list(itertools.product(pairs[::3], pairs)) + list(itertools.product(map(tuple, some), some[:5]))
    x, y = (torch.tensor([pair[i] for pair in chosen], dtype=dtype) for i in (0, 1))
    return Bounds(x[:, 0], x[:, 1]), Bounds(y[:, 0], y[:, 1])


def value(plane: tuple[Tensor, Tensor, Tensor], i: int, p: Fraction, q: Fraction) -> Fraction:
    a, b, c = (Fraction(float(t[i])) for t in plane)
    return a * p + b * q + c


def finite(planes: Planes) -> Tensor:
    return torch.stack([t.isfinite() for t in (*planes.below, *planes.above)]).all(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.3)])
def test_outward_planes_hold_at_every_corner_in_real_arithmetic(dtype, shares):
    """A product less a plane has its extremes over a box at corners: four fractions decide."""
    x, y = boxes(dtype)
    found = outward_planes(product_planes(x, y, *shares), x, y, same=False)
    good = finite(found).nonzero()[:, 0].tolist()
    assert len(good) > 100
    for i in good:
        for p, q in itertools.product((x.lower[i], x.upper[i]), (y.lower[i], y.upper[i])):
            p, q = Fraction(float(p)), Fraction(float(q))
            assert value(found.below, i, p, q) <= p * q <= value(found.above, i, p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outward_planes_of_squares_hold_in_real_arithmetic(dtype):
    x, _ = boxes(dtype)
    found = outward_planes(square_planes(x), x, x, same=True)
    for i in finite(found).nonzero()[:, 0].tolist():
        l, u = Fraction(float(x.lower[i])), Fraction(float(x.upper[i]))
        slope = Fraction(float(found.below[0][i])) + Fraction(float(found.below[1][i]))
        assert -slope * slope / 4 >= Fraction(float(found.below[2][i]))  # the least of p^2 - slope p anywhere
        for p in (l, u):
            assert p * p <= value(found.above, i, p, p)


def test_planes_are_mccormicks_and_what_lies_between():
    x, y = Bounds(torch.tensor([-1.0]), torch.tensor([2.0])), Bounds(torch.tensor([0.5]), torch.tensor([3.0]))
    grid = torch.linspace(0, 1, 101)
    p, q = torch.meshgrid(-1 + 3 * grid, 0.5 + 2.5 * grid, indexing="ij")
    for share in (0.0, 0.25, 0.5, 1.0):
        planes = product_planes(x, y, share, share)
        below = planes.below[0] * p + planes.below[1] * q + planes.below[2]
        above = planes.above[0] * p + planes.above[1] * q + planes.above[2]
        assert bool((below <= p * q + 1e-5).all())
        assert bool((above >= p * q - 1e-5).all())
        # All have the same value at the middle; McCormick's touch two sides each.
        assert float(below[50, 50]) == pytest.approx(float(p[50, 50] * q[50, 50]) - 1.5 * 1.25, abs=1e-5)
        if share == 1.0:
            torch.testing.assert_close(below[0], (p * q)[0])
            torch.testing.assert_close(below[:, 0], (p * q)[:, 0])


def test_without_width_planes_are_the_product_and_gradients_are_finite():
    x = torch.tensor([0.0, 1.5, -2.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.0, -0.5, 3.0], dtype=torch.float64, requires_grad=True)
    planes = product_planes(Bounds(x, x.clone()), Bounds(y, y.clone()))
    for a, b, c in (planes.below, planes.above):
        torch.testing.assert_close(a * x + b * y + c, x * y)
    total = sum(t.sum() for t in (*planes.below, *planes.above))
    gradients = torch.autograd.grad(total, (x, y))
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_planes_pass_gradcheck():
    generator = torch.Generator().manual_seed(1)
    ends = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2)]
    widths = [torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(2)]

    def parts(*given: Tensor) -> tuple[Tensor, ...]:
        lx, wx, ly, wy = given
        planes = product_planes(Bounds(lx, lx + wx), Bounds(ly, ly + wy), 0.3, 0.8)
        square = square_planes(Bounds(lx, lx + wx))
        return (*planes.below, *planes.above, *square.below, *square.above)

    inputs = [t.requires_grad_() for t in (ends[0], widths[0], ends[1], widths[1])]
    assert torch.autograd.gradcheck(parts, inputs)
