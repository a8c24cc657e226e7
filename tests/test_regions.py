"""Regions: the ends they have, the points they hold, and the inputs they refuse."""

from fractions import Fraction

import pytest
import torch
from cases import inputs

import optrelax as ox


def test_a_ball_is_a_box_clipped_to_the_legal_range():
    x = torch.tensor([[0.05, 0.5, 0.98]])
    ball = ox.LinfBall(x, 0.1, clip=(0.0, 1.0))
    torch.testing.assert_close(ball.lower, torch.tensor([[0.0, 0.4, 0.88]]))
    torch.testing.assert_close(ball.upper, torch.tensor([[0.15, 0.6, 1.0]]))
    torch.testing.assert_close(ball.center, (ball.lower + ball.upper) / 2)
    torch.testing.assert_close(ball.radius, (ball.upper - ball.lower) / 2)
    assert isinstance(ball, ox.InputBox)
    assert ball.shape == (1, 3)
    assert ball.eps == 0.1
    assert ball.clip == (0.0, 1.0)
    assert ball.x is x


def test_eps_is_a_number_a_number_an_example_or_one_a_pixel():
    x = inputs((1, 2, 2), 3)
    eps = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    torch.testing.assert_close(ox.LinfBall(x, eps).upper - x, eps.reshape(3, 1, 1, 1).expand_as(x))
    torch.testing.assert_close(ox.LinfBall(x, torch.tensor(0.2)).upper, x + torch.tensor(0.2).double())
    torch.testing.assert_close(ox.LinfBall(x, x).lower, torch.zeros_like(x))
    line = inputs((), 3)
    torch.testing.assert_close(ox.LinfBall(line, eps).upper, line + eps)


def test_gradients_reach_the_middle_the_radius_and_the_ends():
    x = inputs((3,), 2).requires_grad_()
    eps = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
    ball = ox.LinfBall(x, eps)
    dx, de = torch.autograd.grad(ball.upper.sum() - 2 * ball.lower.sum(), (x, eps))
    torch.testing.assert_close(dx, torch.full_like(x, -1.0))
    torch.testing.assert_close(de, torch.full_like(eps, 9.0))


def test_contains_has_no_tolerance():
    ball = ox.LinfBall(torch.zeros(2, 2), 0.5)
    x = torch.tensor([[0.5, -0.5], [0.0, 0.0]])
    assert ball.contains(x).tolist() == [True, True]
    assert ball.contains(torch.nextafter(x, torch.full_like(x, torch.inf))).tolist() == [False, True]
    assert ox.LinfBall(torch.zeros(2), 0.5).contains(torch.tensor([0.1, 0.6])).tolist() == [True, False]


def test_select_takes_examples():
    ball = ox.LinfBall(inputs((3,), 4), 0.1)
    assert torch.equal(ball.select(slice(1, 3)).lower, ball.lower[1:3])
    assert torch.equal(ball.select(torch.tensor([3, 0])).upper, ball.upper[[3, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [0.1, 1 / 3, 0.5, 8 / 255])
def test_outward_holds_the_real_ball(dtype, eps):
    """x - eps and x + eps in real arithmetic, eps as the Python number it is: also where the difference cancels."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(40, 3, generator=g, dtype=torch.float64).to(dtype)
    near = torch.tensor([[eps, -eps, 0.0]], dtype=torch.float64).to(dtype)
    x = torch.cat([x, near, torch.nextafter(near, near + 1)])
    region = ox.LinfBall(x, eps).outward()
    assert region.dtype == dtype
    wanted = [(Fraction(float(v)) - Fraction(eps), Fraction(float(v)) + Fraction(eps)) for v in x.flatten()]
    found = zip(region.lower.flatten(), region.upper.flatten(), strict=True)
    for (low, high), (l, u) in zip(wanted, found, strict=True):
        assert Fraction(float(l)) <= low
        assert high <= Fraction(float(u))
    # ... and not much more than it.
    unit = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(region.lower, x - eps, rtol=unit, atol=unit * eps)


def test_outward_keeps_a_point_a_point_and_what_is_clipped_clipped():
    x = torch.tensor([[0.1, 0.0, 1.0, 0.25]])
    point = ox.LinfBall(x, 0.0).outward()
    assert torch.equal(point.lower, x)
    assert torch.equal(point.upper, x)
    clipped = ox.LinfBall(x, 0.3, clip=(0.0, 1.0)).outward()
    assert float(clipped.lower.min()) == 0
    assert float(clipped.upper.max()) == 1
    odd = ox.LinfBall(torch.tensor([[0.2, 0.25]]), 0.5, clip=(0.1, 0.3)).outward()  # no floats: the next one out
    assert Fraction(float(odd.lower.max())) <= Fraction(0.1)
    assert Fraction(float(odd.upper.min())) >= Fraction(0.3)
    box = ox.InputBox(torch.tensor([[0.0, 0.5]]), torch.tensor([[1.0, 0.5]])).outward()
    assert float(box.lower[0, 0]) < 0
    assert float(box.upper[0, 0]) > 1
    assert float(box.lower[0, 1]) == float(box.upper[0, 1]) == 0.5


def test_a_region_is_immutable():
    ball = ox.LinfBall(torch.zeros(1, 2), 0.1)
    with pytest.raises(AttributeError):
        ball.eps = 0.2  # type: ignore[misc]


def test_bounds_know_their_width_and_their_overlap():
    a = ox.Bounds(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0]))
    b = ox.Bounds(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 2.0]))
    assert a.width.tolist() == [2, 2]
    both = a.intersect(b)
    assert both.lower.tolist() == [1, 1]
    assert both.upper.tolist() == [2, 2]


def test_bounds_that_rounding_has_parted_keep_the_order_of_their_ends():
    a = ox.Bounds(torch.tensor([1.0]), torch.tensor([1.0]))
    b = ox.Bounds(torch.tensor([1.0 + 1e-7]), torch.tensor([1.0 + 1e-7]))
    both = a.intersect(b)
    assert both.lower.item() < both.upper.item()
    assert both.lower.item() == a.upper.item()


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        (torch.zeros(2), torch.zeros(3), r"Bounds: lower has shape \(2,\), upper has \(3,\)"),
        (torch.zeros(2), torch.zeros(2).double(), "Bounds: lower is torch.float32, upper is torch.float64"),
        (torch.tensor([0.0, 2.0]), torch.ones(2), r"Bounds: lower exceeds upper in 1 of 2 entries \(first at \[1\]\)"),
    ],
)
def test_bounds_that_are_none_are_refused(lower, upper, message):
    with pytest.raises(ValueError, match=message):
        ox.Bounds(lower, upper)


def test_a_pixel_at_the_float32_of_an_end_lies_inside():
    """0.7 in float32 is less than 0.7: the clip is meant in the type of x."""
    x = torch.tensor([[0.7, 0.9]])
    region = ox.LinfBall(x, 0.05, clip=(0.7, 0.9))
    assert torch.equal(region.lower[0, 0], x[0, 0])
    assert torch.equal(region.upper[0, 1], x[0, 1])
