"""Smooth activations: every line holds, and none could lie much closer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from exact_functions import FUNCTIONS, ClaimedLine, beaten
from torch import Tensor, nn

import optrelax as ox
from optrelax.domains.lines import band_lines, crown_lines
from optrelax.networks.activations import Smooth
from optrelax.networks.activations.touching import sought, tolerance

each_function = pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f"{f.name}{f.parameters}")


def intervals(f: Smooth, count: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Intervals of widths from 3e-5 to 30 within the domain, of no width, and with an end or the middle on a break."""
    g = torch.Generator().manual_seed(seed)
    width = 10 ** (torch.rand(count, generator=g, dtype=torch.float64) * 6 - 4.5)
    middle = torch.randn(count, generator=g, dtype=torch.float64) * 3
    share = torch.rand(count, generator=g, dtype=torch.float64)
    l, u = middle - width * share, middle + width * (1 - share)
    for at in f.breaks:
        special = torch.tensor([[at, at + 1], [at - 2, at], [at, at], [at - 1.5, at + 1.5], [at - 2.9, at + 0.1]])
        l, u = torch.cat([l, special[:, 0].double()]), torch.cat([u, special[:, 1].double()])
    l, u = torch.cat([l, middle[:9]]), torch.cat([u, middle[:9]])
    if f.domain[0] == 0 or f.poles:
        l, u = l.abs() + 1e-3, u.abs() + 1e-3
        sign = torch.where(torch.rand(len(l), generator=g) < 0.5, -1.0, 1.0).double() if f.poles else 1.0
        l, u = torch.minimum(l * sign, u * sign), torch.maximum(l * sign, u * sign)
    return l.to(dtype), u.to(dtype)


def all_lines(f: Smooth, l: Tensor, u: Tensor) -> list[tuple[float, Tensor, Tensor]]:
    """Every line that a relaxation or a layer takes: 1 above and -1 below, slope, intercept."""
    found = []
    hull, closest, band = f.hull(l, u), crown_lines(f, l, u), band_lines(f, l, u)
    flat, (low, high) = torch.zeros_like(l), f.image(l, u)
    found += [(-1.0, *line) for line in hull.below] + [(1.0, *line) for line in hull.above]
    for lines in (closest, band):
        found += [(-1.0, lines.lower_slope, lines.lower_intercept), (1.0, lines.upper_slope, lines.upper_intercept)]
    return [*found, (-1.0, flat, low), (1.0, flat, high)]


def grid(f: Smooth, l: Tensor, u: Tensor, count: int = 401) -> Tensor:
    x = torch.lerp(l, u, torch.linspace(0, 1, count, dtype=l.dtype)[:, None])
    return torch.cat([x, *(torch.full_like(l, c).clamp(l, u)[None] for c in f.breaks)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@each_function
def test_the_function_lies_between_its_lines_to_rounding(f, dtype):
    l, u = intervals(f, 150, dtype)
    x = grid(f, l, u)
    y = f(x)
    for sign, slope, intercept in all_lines(f, l, u):
        size = y.abs() + (slope * x).abs() + intercept.abs() + f.error(x) / torch.finfo(dtype).eps
        assert (sign * (slope * x + intercept - y) >= -16 * torch.finfo(dtype).eps * size).all()


@each_function
def test_both_lines_of_a_side_hold_the_image_and_one_is_the_closest(f):
    """So an LP implies interval bounds and CROWN's."""
    l, u = intervals(f, 150)
    hull, closest = f.hull(l, u), f.closest(l, u)
    low, high = f.image(l, u)
    x = grid(f, l, u)
    floor = torch.maximum(*(s * x + i for s, i in hull.below))
    roof = torch.minimum(*(s * x + i for s, i in hull.above))
    size = 1e-12 * (1 + x.abs() + f(l).abs() + f(u).abs())
    assert (floor >= low - size).all()
    assert (roof <= high + size).all()
    for pair, (slope, intercept) in ((hull.below, closest[0]), (hull.above, closest[1])):
        assert torch.stack([(s == slope) & (i == intercept) for s, i in pair]).any(0).all()


def best_area(f: Smooth, l: Tensor, u: Tensor) -> Tensor:
    """The least area between two lines around samples: by the height in the middle, over a fine grid of slopes."""
    x = torch.lerp(l, u, torch.linspace(0, 1, 801, dtype=l.dtype)[:, None])
    y, m = f(x), (l + u) / 2
    heights = []
    steps = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
    low, high = steps.amin(0), steps.amax(0)
    for sign in (1.0, -1.0):
        least = torch.full_like(l, torch.inf)
        for t in torch.linspace(0, 1, 801, dtype=l.dtype):
            slope = torch.lerp(low, high, t)
            least = torch.minimum(least, (sign * (y - slope * x)).amax(0) + sign * slope * m)
        heights.append(least)
    return (heights[0] + heights[1]) * (u - l)


@each_function
def test_no_two_lines_enclose_much_less(f):
    l, u = intervals(f, 60)
    wide = u - l > 0.05
    l, u = l[wide], u[wide]
    (s0, i0), (s1, i1) = f.closest(l, u)
    m = (l + u) / 2
    area = ((s1 - s0) * m + i1 - i0) * (u - l)
    best = best_area(f, l, u)
    bent = best > 1e-6
    ratio = area[bent] / best[bent]
    # The search itself is a grid's, so that a ratio may fall short of 1 a little.
    assert float(ratio.median()) < 1.005
    assert float(ratio.max()) < 1.05


@each_function
def test_the_band_is_the_narrowest(f):
    """Of parallel lines; the width is convex in the slope, so slopes beside it show it."""
    l, u = intervals(f, 60)
    wide = u - l > 0.05
    l, u = l[wide], u[wide]
    slope = f.parallel_slope(l, u)
    low, high = f.band(slope, l, u)
    x = torch.lerp(l, u, torch.linspace(0, 1, 801, dtype=l.dtype)[:, None])
    steps = f(x).diff(dim=0) / x.diff(dim=0)
    least = high - low
    for t in torch.linspace(0, 1, 101, dtype=l.dtype):
        other = torch.lerp(steps.amin(0), steps.amax(0), t)
        value = f(x) - other * x
        least = torch.minimum(least, value.amax(0) - value.amin(0))
    bent = least > 1e-6
    ratio = (high - low)[bent] / least[bent]
    assert float(ratio.median()) < 1.001
    assert float(ratio.max()) < 1.05


def numbers_of_lines(f: Smooth, l: Tensor, u: Tensor) -> list[Tensor]:
    found = [number for _, *line in all_lines(f, l, u) for number in line]
    return [*found, *f.supporting(l, u, f.closest_share(l, u, 1.0), 1.0)[0]] if f.slides else found


@each_function
def test_one_interval_without_a_batch_has_the_lines_of_a_batch_of_one(f):
    for l, u in zip(*(ends[::5] for ends in intervals(f, 1)), strict=True):
        alone, batched = (numbers_of_lines(f, *ends) for ends in ((l, u), (l[None], u[None])))
        for number, batch in zip(alone, batched, strict=True):
            assert number.shape == ()
            assert number == batch[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@each_function
def test_tabulated_points_of_tangency_are_those_that_a_search_finds(f, dtype):
    """On either side of every cut, for points from next to it to beyond the table, the next cut being an end."""
    if f.period is not None or not f.cuts or 0 in f.curvature:
        return
    sizes = torch.logspace(-1.5, 5, 20, dtype=dtype)
    within = tolerance(dtype)
    for which, cut in enumerate(f.cuts):
        for side, way in ((0, 1.0), (1, -1.0)):
            places = torch.tensor([c for c in f.cuts if way * (c - cut) > 0], dtype=dtype)
            reach = (places - cut).abs().amin() if len(places) else torch.tensor(torch.inf, dtype=dtype)
            d, far = (t.flatten() for t in torch.meshgrid(sizes, sizes.clamp_max(reach), indexing="ij"))
            anchor, c, end = cut - way * d, torch.full_like(d, cut), cut + way * far
            found = f.tangencies(anchor, c, torch.full_like(d, which, dtype=torch.int64), end)
            start = torch.full_like(d, float(f.curvature[which + side]))
            searched = sought(f, anchor, c, end, start, within)
            known = ~found.isnan()
            steep = f.derivative(searched).abs() > 1e-3  # elsewhere a search in float32 meets rounding
            numbers = f(anchor).isfinite() & f(end).isfinite() & known & (steep | (dtype == torch.float64))
            near = 30 * within * searched.abs().clamp_min(1) * torch.where(d < 0.1, 100.0, 1.0)
            assert ((found - searched).abs() <= near)[numbers].all()
            assert f.name not in ("tanh", "sigmoid") or known[d < 9e3].all()


@each_function
def test_lines_slide_along_the_envelope(f):
    """At every share a line that holds; at the closest one that of CROWN; no line lies above one of them everywhere."""
    if not f.slides:
        return
    l, u = intervals(f, 60)
    x = grid(f, l, u, 101)
    y, m = f(x), (l + u) / 2
    for sign, closest in zip((-1.0, 1.0), f.closest(l, u), strict=True):
        shares = [torch.full_like(l, share) for share in (0.0, 0.3, 1.0)]
        best = f.closest_share(l, u, sign)
        for share in (*shares, best):
            (slope, intercept), there = f.supporting(l, u, share, sign)
            size = y.abs() + (slope * x).abs() + intercept.abs() + f.error(x) / torch.finfo(x.dtype).eps
            above = sign * (slope * x + intercept - y)
            assert (above >= -16 * torch.finfo(x.dtype).eps * size)[:, there].all()
            lowest = (above - 1e-7 * size).amin(0)  # it touches: nothing could be gained by moving it
            assert (lowest <= (1e-3 * (u - l) ** 2 * (1 + slope.abs())))[there].all()
        height = slope * m + intercept
        torch.testing.assert_close(height[there], (closest[0] * m + closest[1])[there], rtol=1e-7, atol=1e-9)


def worst(f: Smooth, l: Tensor, u: Tensor, slope: Tensor, intercept: Tensor, sign: float) -> list[str]:
    """Points at which a line is beaten in interval arithmetic, with no tolerance."""
    line = ClaimedLine(sign, slope, intercept, f.extreme(slope.to(l), l, u, sign)[0])
    found = beaten(f, l, u, [line], grid(f, l, u, 3))
    assert not found.undecided
    return found.beaten


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@each_function
def test_outward_lines_hold_in_real_arithmetic(f, dtype):
    l, u = intervals(f, 4, dtype, seed=1)
    for sign, slope, _ in all_lines(f, l, u)[4:-2]:
        assert not worst(f, l, u, slope, f.beyond(slope, l, u, sign), sign)
    low, high = f.outward_image(l, u)
    assert not worst(f, l, u, torch.zeros_like(l), low, -1.0)
    assert not worst(f, l, u, torch.zeros_like(l), high, 1.0)


@each_function
def test_outward_lines_hold_at_every_size(f):
    """From 1e-300 to 1e300, next to each other, and with ends that are infinite."""
    sizes = torch.tensor([1e-300, 1e-30, 1e-9, 0.3, 40.0, 800.0, 1e9, 1e30, 1e150, 1e300], dtype=torch.float64)
    ends = torch.cat([-sizes.flip(0), torch.zeros(1, dtype=torch.float64), sizes])
    l, u = torch.cartesian_prod(ends, ends).unbind(1)
    l, u = l[l <= u], u[l <= u]
    near = torch.cat([ends, torch.tensor([*f.breaks], dtype=torch.float64)])
    l, u = torch.cat([l, near]), torch.cat([u, torch.nextafter(near, near + 1)])
    keep = (l > 0) | (f.domain[0] != 0) & ((u < 0) if f.poles else torch.ones_like(l, dtype=torch.bool))
    l, u = l[keep][::3], u[keep][::3]
    below, above = f.closest(l, u)
    for sign, (slope, _) in ((-1.0, below), (1.0, above)):
        slope = slope.nan_to_num(0.0, 0.0, 0.0)
        assert not worst(f, l, u, slope, f.beyond(slope, l, u, sign), sign)
    infinite = torch.tensor([torch.inf], dtype=torch.float64)
    low, high = f.outward_image(-infinite, infinite)
    assert not (low > -1e-9).any() or f.name in ("exp", "sigmoid", "softplus")
    assert not (high < 0).any()


@each_function
def test_gradients(f):
    l, u = intervals(f, 6, seed=2)
    wide = (u - l > 1e-2) & (u - l < 8)
    for at in f.breaks:
        for x in (l, u, (l + u) / 2):
            wide &= (x - at).abs() > 1e-3
    l, u = l[wide].requires_grad_(), u[wide].requires_grad_()

    def values(l: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        below, above = f.closest(l, u)
        return (*below, *above, *f.image(l, u))

    def banded(l: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        slope = f.parallel_slope(l, u).detach()
        return f.band(slope, l, u)

    assert torch.autograd.gradcheck(values, (l, u), eps=1e-5, atol=1e-5, rtol=1e-4)
    assert all(t.isfinite().all() for t in torch.autograd.grad(sum(t.sum() for t in banded(l, u)), (l, u)))


@each_function
def test_gradients_at_ties_and_in_the_tails_are_finite(f):
    ends = [*f.breaks, 1.0, 40.0] if not f.poles and f.domain[0] != 0 else [0.5, 1.0, 40.0]
    tails = [] if f.name in ("exp", "sinh", "power", "gelu_tanh") or f.unit == 0 else [-1e4, 1e4]
    a = torch.tensor([*ends, *tails], dtype=torch.float64)
    l, u = torch.cartesian_prod(a, a).unbind(1)
    l, u = l[l <= u].requires_grad_(), u[l <= u].requires_grad_()
    hull, band = f.hull(l, u), band_lines(f, l, u)
    parts = [t for side in (hull.below, hull.above) for line in side for t in line]
    parts += [band.lower_slope, band.lower_intercept, band.upper_intercept, *f.image(l, u)]
    assert all(t.isfinite().all() for t in parts)
    for t in torch.autograd.grad(sum(t.sum() for t in parts), (l, u)):
        assert t.isfinite().all()


@each_function
def test_at_a_point_all_lines_are_the_value(f):
    l, _ = intervals(f, 30)
    y = f(l)
    for _, slope, intercept in all_lines(f, l, l):
        torch.testing.assert_close(slope * l + intercept, y, rtol=1e-12, atol=1e-12)


# --- what a user says of a function --------------------------------------------------------------------------------


def bump(x: Tensor) -> Tensor:
    return torch.exp(-x * x)


def bump_slope(x: Tensor) -> Tensor:
    return -2 * x * torch.exp(-x * x)


RIGHT: dict[str, Any] = {"inflections": (-math.sqrt(0.5), math.sqrt(0.5)), "extrema": (0.0,)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"derivative": lambda x: -2 * x * torch.exp(-x * x) + 1e-3}, "another derivative"),
        ({"inflections": ()}, "bends the other way"),
        ({"inflections": (0.0, 0.9)}, "bends the other way"),
        ({"extrema": ()}, "turns where no extremum"),
        ({"extrema": (0.1,)}, "turns where no extremum|derivative is .*, not 0"),
        ({"inflections": (1.0, -1.0)}, "must ascend"),
        ({"domain": (2.0, 1.0)}, "low < high"),
        ({"function": lambda x: torch.exp(-x * x).sum()}, "not elementwise"),
        (
            {"function": lambda x: torch.log(x), "derivative": lambda x: 1 / x, "inflections": (), "extrema": ()},
            "not finite",
        ),
        ({"function": torch.abs, "derivative": torch.sign, "inflections": (0.0,), "extrema": (0.0,)}, "is straight"),
    ],
)
def test_what_is_said_wrongly_is_refused(change, message):
    said = {"function": bump, "derivative": bump_slope, **RIGHT, **change}
    with pytest.raises(ValueError, match=f"^mine: .*({message})"):
        Smooth("mine", **said)


class Bump(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return bump(x)


def test_a_function_of_ones_own_is_bounded_everywhere(monkeypatch):
    from optrelax.networks import registry

    registry.load_rules()
    monkeypatch.setattr(registry, "_MODULES", dict(registry._MODULES))
    ox.register_activation(Bump, activation=Smooth("bump", bump, bump_slope, **RIGHT))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), Bump(), nn.Linear(5, 2)).double()
    region = ox.LinfBall(torch.rand(2, 3, dtype=torch.float64), 0.4)
    x = torch.lerp(region.lower, region.upper, torch.rand(300, 2, 3, dtype=torch.float64))
    for name in ("box", "hzono", "deepz", "crown", "alpha-crown:iterations=3", "triangle"):
        found = ox.bounds(net, region, name, rounding="outward")
        with torch.no_grad():
            assert ((found.lower <= net(x)) & (net(x) <= found.upper)).all()
