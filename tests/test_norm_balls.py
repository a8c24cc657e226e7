"""Balls of a norm cut by a box: optima in closed form and by cvxpy, sizes of every kind, bad input, and their doors."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from cases import BY_NAME, inputs
from oracles import fractions

import optrelax as ox
from optrelax.rounding import down, gamma, underflow

BALLS = {"l2": ox.L2Ball, "l1": ox.L1Ball}
each_norm = pytest.mark.parametrize("norm", BALLS)


def least(region, rows):
    """The proved lower bound of each row, [batch, k]."""
    value, magnitude, terms = region.outward_support(rows)
    return down(value - gamma(terms + 2, value.dtype) * magnitude - underflow(terms + 2, value.dtype))


@each_norm
def test_the_support_function_is_the_optimum_of_the_convex_program(norm):
    cp = pytest.importorskip("cvxpy")
    x = inputs((4,), 2)
    x[0, 0], x[1, 2] = 0.0, 1.0
    rows = torch.randn(1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    region = BALLS[norm](x, torch.tensor([0.3, 0.9]), clip=(0.0, 1.0))
    found = region.support(rows)
    for i, k in itertools.product(range(2), range(4)):
        z = cp.Variable(4)
        ball = cp.norm(z - x[i].numpy(), int(norm[1])) <= float(region.eps[i])
        value = cp.Problem(cp.Minimize(rows[0, k].numpy() @ z), [ball, z >= 0, z <= 1]).solve(solver="CLARABEL")
        assert abs(value - float(found[i, k])) < 1e-6


@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", ["1e-30", "1e-3", "1", "1e15", "1e30"])
def test_sizes_of_every_kind_stay_sound_in_exact_arithmetic(norm, dtype, size):
    """Points of the ball, by rationals: axes, and steps whose norm is exactly eps (3-4-5 for l2)."""
    eps = torch.tensor(float(size), dtype=dtype)
    x = torch.tensor([[0.25, 1.0, 0.0, 0.5]], dtype=dtype)
    rows = torch.tensor([[[1.0, -2.0, 3.0, 0.0], [1e-20, 1e20, -1.0, 2.0], [0.0] * 4, [2.0] * 4]], dtype=dtype)
    e = Fraction(float(eps))
    steps = [(s * e, 0, 0, 0) for s in (1, -1)] + [(0, s * e, 0, 0) for s in (1, -1)]
    pair = (Fraction(3, 5), Fraction(4, 5)) if norm == "l2" else (Fraction(1, 3), Fraction(2, 3))
    steps += [
        tuple(s * p * e for s, p in zip(signs, (*pair, 0, 0), strict=True))
        for signs in itertools.product((1, -1), (1, -1), (1,), (1,))
    ]
    exact_rows, center = fractions(rows[0]), fractions(x[0])
    for clip in (None, (0.0, 1.0)):
        region = BALLS[norm](x, eps, clip=clip)
        low, box = least(region, rows)[0], region.box(outward=True)
        for step in steps:
            point = [c + s for c, s in zip(center, step, strict=True)]
            if clip is not None:
                point = [min(max(p, Fraction(0)), Fraction(1)) for p in point]
            for k in range(4):
                value = sum(a * p for a, p in zip(exact_rows[k], point, strict=True))
                assert low[k] == -math.inf or Fraction(float(low[k])) <= value
            for p, l, u in zip(point, box.lower[0], box.upper[0], strict=True):
                assert Fraction(float(l)) <= p <= Fraction(float(u))
        if clip is not None and float(size) >= 1e15:  # all of the box
            some = rows[:, [0, 2, 3]]
            torch.testing.assert_close(region.support(some), ox.InputBox(x * 0, x * 0 + 1).support(some))


@each_norm
def test_eps_as_a_number_is_held_in_real_arithmetic(norm):
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    for eps in (0.1, 1 / 3, 8 / 255):
        ball = BALLS[norm](x, eps, clip=(-0.1, 1.1)).outward()
        assert all(Fraction(float(e)) >= Fraction(eps) for e in ball.eps)
        assert all(Fraction(float(v)) <= Fraction(-0.1) for v in ball.low[:, 0])


@each_norm
def test_a_radius_of_zero_is_the_point(norm):
    x = inputs((3,), 2).requires_grad_()
    eps = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for clip in (None, (0.0, 1.0)):
        region = BALLS[norm](x, eps, clip=clip)
        rows = torch.randn(2, 2, 3, dtype=torch.float64)
        value = region.support(rows)
        torch.testing.assert_close(value, (rows @ x[..., None])[..., 0])
        grads = torch.autograd.grad(value.sum(), (x, eps))
        assert all(g.isfinite().all() for g in grads)
        assert torch.equal(region.project(x + 1), x)
        assert region.contains(x).all()
        assert not region.contains(x + 1e-12).any()


@each_norm
def test_second_derivatives_are_exact_away_from_ties(norm):
    x = inputs((4,), 2).mul_(0.6).add_(0.2).requires_grad_()
    rows = torch.randn(1, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    eps = torch.tensor([0.2, 0.6], dtype=torch.float64, requires_grad=True)
    for clip in (None, (0.0, 1.0)):
        assert torch.autograd.gradgradcheck(lambda x, e, a, c=clip: BALLS[norm](x, e, c).support(a), (x, eps, rows))


@each_norm
def test_projections_lie_inside_and_inner_points_stay(norm):
    g = torch.Generator().manual_seed(2)
    for dtype, size in itertools.product((torch.float32, torch.float64), (1e-6, 0.3, 20.0)):
        x = torch.rand(50, 6, generator=g, dtype=torch.float64).to(dtype)
        region = BALLS[norm](x, size, clip=(0.0, 1.0))
        far = torch.randn(50, 6, generator=g, dtype=torch.float64).to(dtype) * 3
        assert region.contains(region.project(far)).all()
        near = region.project(x + size / 20 * (far.clamp(-1, 1)))
        torch.testing.assert_close(
            near, (x + size / 20 * far.clamp(-1, 1)).clamp(0, 1), rtol=0, atol=max(1e-6, size / 50)
        )


@each_norm
def test_crown_bounds_neurons_by_dual_norms_as_its_authors_do(norm):
    """Zhang et al. 2018: W x + b -+ eps |W|_q for a layer; for a row, the same of what it pulls back to."""
    net = ox.models.fc(4, 6, 2, seed=0).double()
    x, eps, q = inputs((4,), 2), 0.3, 2.0 if norm == "l2" else torch.inf
    region, (first, last) = BALLS[norm](x, eps), (m for m in net if isinstance(m, torch.nn.Linear))
    with torch.no_grad():
        (bounds,) = ox.preactivation_bounds(net, region, "crown").values()
        fall = eps * torch.linalg.vector_norm(first.weight, q, dim=1)
        torch.testing.assert_close(bounds.lower, first(x) - fall)
        torch.testing.assert_close(bounds.upper, first(x) + fall)
        l, u = bounds.lower, bounds.upper
        wide = torch.where(u > l, u - l, 1.0)
        slope = torch.where(l >= 0, 1.0, torch.where(u <= 0, 0.0, u / wide))
        top = torch.where((l < 0) & (u > 0), -slope * l, 0.0)
        floor = torch.where((l < 0) & (u > 0), (u > -l).double(), slope)
        a = last.weight[None]
        pulled = torch.where(a > 0, floor[:, None], slope[:, None]) * a
        constant = (a.clamp_max(0) * top[:, None]).sum(2) + last.bias + pulled @ first.bias
        back = pulled @ first.weight
        wanted = (back @ x[..., None])[..., 0] + constant - eps * torch.linalg.vector_norm(back, q, dim=2)
        torch.testing.assert_close(ox.bounds(net, region, "crown").lower, wanted)


@each_norm
def test_a_projection_is_the_nearest_point_of_ball_and_box(norm):
    cp = pytest.importorskip("cvxpy")
    g = torch.Generator().manual_seed(3)
    x = torch.rand(4, 5, generator=g, dtype=torch.float64)
    x[0, 0], x[1, 2] = 0.0, 1.0
    far = x + torch.randn(4, 5, generator=g, dtype=torch.float64) * torch.tensor([0.1, 0.5, 1.0, 4.0])[:, None]
    for clip in ((0.0, 1.0), None):
        found = BALLS[norm](x, 0.6, clip=clip).project(far)
        for i in range(4):
            z = cp.Variable(5)
            held = [cp.norm(z - x[i].numpy(), int(norm[1])) <= 0.6, *([z >= 0, z <= 1] if clip else [])]
            cp.Problem(cp.Minimize(cp.sum_squares(z - far[i].numpy())), held).solve(solver="CLARABEL")
            torch.testing.assert_close(found[i], torch.from_numpy(z.value), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: ox.L2Ball(x, -0.1), "L2Ball: eps must be >= 0, got -0.1"),
        (lambda x: ox.L1Ball(x, math.inf), "L1Ball: eps has 1 NaN or infinite"),
        (lambda x: ox.L2Ball(x, torch.ones(5)), r"L2Ball: eps must be a number or \[batch\] of 2, got \(5,\)"),
        (lambda x: ox.L2Ball(x, 0.1, clip=(0.6, 1.0)), r"L2Ball: x lies outside clip \[0.6, 1.0\]"),
        (lambda x: ox.ChoiceBox(x, x, {7: torch.zeros(2)}), r"ChoiceBox: coordinates must lie in \[0, 3\), got 7"),
        (lambda x: ox.ChoiceBox(x, x, {0: torch.zeros(2), (0, 1): torch.zeros(1, 2)}), "stands in two groups"),
        (lambda x: ox.Polytope(torch.ones(1, 2).double(), torch.ones(1).double(), x, x), r"A wants \[m, 3\]"),
        (
            lambda x: ox.Polytope(torch.eye(3).double(), torch.full((3,), -9.0).double(), x, x + 1),
            "example 0 has no point that keeps all rows strictly",
        ),
        (lambda x: ox.bounds(BY_NAME["fc"].network(), ox.L2Ball(x[None], 0.1)), "wants|takes inputs"),
    ],
)
def test_bad_input_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.full((2, 3), 0.5, dtype=torch.float64))


@each_norm
def test_certification_comparison_and_training_take_the_norm(norm):
    net = ox.models.fc(6, 8, 3, seed=0)
    x = torch.rand(12, 6, generator=torch.Generator().manual_seed(0))
    labels = net(x).argmax(1)
    report = ox.certify(net, (x, labels), 0.05, relaxation=["box", "crown"], norm=norm)
    wide = ox.certify(net, (x, labels), 0.05, relaxation=["box", "crown"])
    assert report.certified >= wide.certified  # the ball lies in the box
    assert report.summary()["norm"] == norm
    table = ox.compare(net, (x, labels), 0.05, ["crown", "triangle"], norm=norm, repeats=1).table
    assert table["mean bound"].is_finite().all()
    region = BALLS[norm](x, 0.05, clip=(0.0, 1.0))
    for loss in (ox.CertifiedLoss("crown"), ox.CertifiedLoss("box")):
        terms = loss(net, region, labels)
        terms.total.backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
    with pytest.raises(ValueError, match="norm: no ball of 'l3'"):
        ox.certify(net, (x, labels), 0.05, norm="l3")
