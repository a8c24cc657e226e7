"""Bounds rounded outward hold in real arithmetic: rational oracles, no tolerance anywhere."""

from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from cases import PLAIN, specification
from oracles import exact, fractions
from torch import Tensor, nn

import optrelax as ox
from optrelax.networks.models import Normalize, Residual, fc
from optrelax.rounding import down, gamma, underflow, unit_roundoff, up


def cancelling() -> nn.Module:
    """Normalisation, and a batch norm whose mean and bias all but cancel: constants that are sums themselves."""
    net = nn.Sequential(
        Normalize(0.1307, 0.3081), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LeakyReLU(0.1), nn.Linear(4, 2)
    )
    norm = net[2]
    norm.running_mean.uniform_(900, 1100)
    norm.running_var.uniform_(1e-3, 1e-2)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    with torch.no_grad():
        net[1].bias.copy_(norm.running_mean)
        norm.bias.copy_(norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt())
        net[1].bias.sub_(norm.running_mean)
    return net


def convolution() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 2, stride=1, padding=1),
        nn.BatchNorm2d(2),
        nn.Hardtanh(-0.1, 0.3),
        nn.AvgPool2d(3, stride=1),
        nn.Flatten(),
        nn.Linear(2, 2),
    )
    nn.init.uniform_(net[1].running_var, 0.01, 3)
    return net


NETWORKS = {
    "fc": ((3,), lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))),
    "cancelling constants": ((3,), cancelling),
    "convolution": ((1, 2, 2), convolution),
    "residual": (
        (3,),
        lambda: nn.Sequential(
            Residual(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))), nn.ReLU(), nn.Linear(3, 2)
        ),
    ),
    "max pool": (
        (1, 3, 3),
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.MaxPool2d(2, stride=1), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)),
    ),
    "small and large weights": ((3,), lambda: uneven()),
}


def uneven() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[:2] *= 1e-30
        net[0].bias[:2] *= 1e-38
        net[2].weight[:, 2:] *= 1e6
    return net


@cache
def exact_case(name: str, dtype: torch.dtype) -> tuple[nn.Module, ox.InputBox, Tensor, list[np.ndarray]]:
    """Network, region, rows, and the exact rows' values at corners and middle of each example: [points, k] each."""
    shape, build = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        net = build().to(dtype).eval()
    g = torch.Generator().manual_seed(3)
    x = torch.rand(4, *shape, generator=g, dtype=torch.float64).to(dtype)
    eps = torch.tensor([0.0, 1e-6, 1e-2, 0.4], dtype=dtype)
    region = ox.LinfBall(x, eps)
    rows = torch.cat([torch.eye(2), specification(2, k=2)]).to(dtype)
    corner = torch.rand(3, *x.shape, generator=g) < 0.5
    points = [region.lower, region.upper, x, *(torch.where(c, region.upper, region.lower) for c in corner)]
    values = []
    for i in range(len(x)):
        values.append(np.array([fractions(rows) @ exact(net, fractions(p[i])) for p in points]))
    return net, region, rows, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("case", [case for case in PLAIN if case.sound], ids=str)
def test_bounds_hold_in_rational_arithmetic(case, name, dtype):
    net, region, rows, values = exact_case(name, dtype)
    with torch.no_grad():
        low = ox.lower_bounds(net, region, rows, case.make(), rounding="outward")
        high = -ox.lower_bounds(net, region, -rows, case.make(), rounding="outward")
    for i, value in enumerate(values):
        assert (fractions(low[i]) <= value.min(0)).all(), f"example {i}"
        assert (fractions(high[i]) >= value.max(0)).all(), f"example {i}"
    if case.tight_at_points and name != "cancelling constants":  # the allowance is an allowance, not a loosening
        size = max(1.0, float(high.abs().max()))
        assert float((high[0] - low[0]).max()) <= 2000 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("name", ["box", "hbox", "deepz", "crown", "fast-lin"])
def test_to_nearest_they_do_not(name):
    """The contract above has teeth: bounds to nearest miss the exact value of a point."""
    missed = 0
    for network in NETWORKS:
        net, region, rows, values = exact_case(network, torch.float32)
        with torch.no_grad():
            low = ox.lower_bounds(net, region, rows, name)
        missed += sum(bool((fractions(low[i]) > v.min(0)).any()) for i, v in enumerate(values))
    assert missed > 0


@pytest.mark.parametrize("case", [case for case in PLAIN if case.sound], ids=str)
def test_an_example_that_overflows_spoils_only_itself(case):
    """The allowance of an example must not hold the magnitudes of the others."""
    net = fc(3, 6, 4, 2, seed=1).double()
    with torch.no_grad():
        net[1].weight.mul_(10)
    x = torch.full((3, 3), 0.5, dtype=torch.float64)
    x[1] = torch.finfo(torch.float64).max / 2
    assert not net(x)[1].isfinite().any()
    region, rows = ox.InputBox(x - 0.1, x + 0.1), torch.eye(2, dtype=torch.float64)
    with torch.no_grad():
        found = ox.lower_bounds(net, region, rows, case.make(), rounding="outward")
        alone = ox.lower_bounds(net, region.select(slice(0, 1)), rows, case.make(), rounding="outward")
    assert not (found[1] > 0).any()
    torch.testing.assert_close(found[::2], alone.expand(2, 2), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["box", "hbox", "deepz", "crown"])
def test_a_wide_float32_network_stays_within_its_float64_self(name):
    """784 inputs: allowances grow with the sums; the values by float64, whose own error is 1e-9 of theirs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = fc(784, 60, 60, 10)
    x = torch.rand(3, 784, generator=torch.Generator().manual_seed(1))
    region = ox.LinfBall(x, torch.tensor([0.0, 1e-4, 0.05]), clip=(0.0, 1.0))
    with torch.no_grad():
        found = ox.bounds(net, region, name, rounding="outward")
        nearest = ox.bounds(net, region, name)
        net.double()
        for point in (region.lower, region.upper, x):
            value = net(point.double())
            assert (found.lower.double() <= value).all()
            assert (value <= found.upper.double()).all()
    assert float((nearest.lower - found.lower).max()) <= 0.02


def test_intersections_and_given_bounds_round_as_asked():
    best = ox.Intersect(ox.Box(), ox.FastLin(), rounding="outward")
    assert all(part.rounding == "outward" for part in best.parts)
    net, region, rows, values = exact_case("fc", torch.float32)
    relaxation = ox.Crown(preactivation=ox.Intersect("box", "fast-lin"), rounding="outward")
    low = ox.lower_bounds(net, region, rows, relaxation)
    assert all((fractions(low[i]) <= v.min(0)).all() for i, v in enumerate(values))
    with pytest.raises(ValueError, match="Intersect: parts round differently"):
        ox.Intersect(ox.Box(rounding="outward"), ox.FastLin())


def test_the_entry_points_override_the_rounding_and_nothing_else():
    net, region, rows, _ = exact_case("fc", torch.float32)
    for relaxation in (ox.Crown(max_bytes=64), ox.Crown(max_bytes=64, rounding="outward")):
        low = ox.lower_bounds(net, region, rows, relaxation, rounding="outward")
        assert torch.equal(low, ox.lower_bounds(net, region, rows, ox.Crown(rounding="outward", max_bytes=64)))
        near = ox.lower_bounds(net, region, rows, relaxation, rounding="nearest")
        assert torch.equal(near, ox.lower_bounds(net, region, rows, ox.Crown(max_bytes=64)))
        assert (low < near).all()


def test_an_estimate_cannot_be_rounded_into_a_bound():
    with pytest.raises(ValueError, match="Cauchy: an estimate cannot be rounded outward"):
        ox.Cauchy(rounding="outward")
    with pytest.raises(ValueError, match="Cauchy: an estimate cannot be rounded outward"):
        ox.bounds(nn.Linear(2, 2), ox.LinfBall(torch.zeros(1, 2), 0.1), "cauchy", rounding="outward")


# --- the allowances themselves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gamma_bounds_the_error_of_a_sum_of_products(dtype):
    g = torch.Generator().manual_seed(0)
    for n in (1, 7, 300):
        a, b = (torch.randn(n, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
        true = sum((Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)), Fraction(0))
        size = sum(abs(Fraction(float(x)) * Fraction(float(y))) for x, y in zip(a, b, strict=True))
        assert abs(Fraction(float(a @ b)) - true) <= Fraction(gamma(n, dtype)) * size


def test_units():
    assert unit_roundoff(torch.float32) == 2.0**-24
    assert unit_roundoff(torch.float64) == 2.0**-53
    assert underflow(3, torch.float32) == 3 * 2.0**-126
    with pytest.raises(
        ValueError, match=r"a sum of 1000000 terms in torch\.float32 has no useful error bound; use float64"
    ):
        gamma(10**6, torch.float32)


def test_the_next_float_moves_with_its_number():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    for step in (up, down):
        assert torch.autograd.grad((step(x) * x.detach()).sum(), x)[0].tolist() == x.tolist()
        assert torch.func.vmap(step)(x).tolist() == step(x).tolist()


def test_up_and_down_are_the_next_floats():
    x = torch.tensor([0.0, 1.0, -1.0, 1e30], requires_grad=True)
    assert (up(x) > x).all()
    assert (down(x) < x).all()
    assert torch.equal(down(up(x)), x)
    (gradient,) = torch.autograd.grad(up(x).sum() + 2 * down(x).sum(), x)
    assert gradient.tolist() == [3, 3, 3, 3]
