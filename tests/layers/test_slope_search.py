"""The search of alpha-CROWN: windows and sweeps are one computation, and what it finds is a bound."""

import pytest
import torch
from torch import nn

import optrelax as ox
from optrelax.domains.passes import planning, programs, running, workspace
from optrelax.domains.passes.line_maps import MixedMaps
from optrelax.domains.passes.neurons import rows_of_examples
from optrelax.layers import AlphaCrown, slope_climb


def residual(seed=0):
    """A residual block behind a strided convolution, a scale with both signs, and a hidden layer."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3, 1, 1))
    net = nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), ox.models.Residual(body, None), nn.ReLU())
    net = net.append(nn.Flatten()).append(nn.Linear(27, 6)).append(nn.LeakyReLU(0.1)).append(nn.Linear(6, 3))
    nn.init.uniform_(net[2].body[1].weight, -2.0, 2.0)
    return net.double().eval(), (2, 6, 6)


def dense(seed=0):
    torch.manual_seed(seed)
    hidden = (nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
    return nn.Sequential(nn.Flatten(), *hidden).double(), (2, 4, 4)


def region_of(shape, batch=2, eps=0.2):
    x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ox.LinfBall(x, eps)


ROWS = torch.tensor([[1.0, -1, 0], [0, 1, -1]], dtype=torch.float64)


def results(net, captured, region, iterations):
    net.zero_grad()
    x = region.center.clone().requires_grad_(True)
    of = ox.LinfBall(x, region.radius.flatten()[0].item())
    low = ox.lower_bounds(captured, of, ROWS, AlphaCrown(iterations=iterations))
    low.sum().backward()
    return [low.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("make", [residual, dense])
def test_windows_are_sweeps_done_faster(make, iterations, monkeypatch):
    net, shape = make()
    captured, region = ox.capture(net, shape), region_of(shape)
    fast = results(net, captured, region, iterations)
    monkeypatch.setattr(planning, "available", lambda region: False)
    for a, b in zip(fast, results(net, captured, region, iterations), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("make", [residual, dense])
def test_no_rows_and_no_examples_have_no_bounds(make):
    net, shape = make()
    captured = ox.capture(net, shape)
    for batch, rows in ((2, ROWS[:0]), (0, ROWS)):
        low = ox.lower_bounds(captured, region_of(shape, batch), rows, AlphaCrown(iterations=2))
        assert low.shape == (batch, len(rows))
        low.sum().backward()


def test_some_rows_at_a_time_are_the_same(monkeypatch):
    net, shape = residual()
    captured, region = ox.capture(net, shape), region_of(shape)
    whole = results(net, captured, region, 2)
    monkeypatch.setattr(workspace, "WORKSPACE", 1)
    for a, b in zip(results(net, captured, region, 2), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_rows_with_weights_of_their_own_can_be_differentiated_twice():
    net, shape = residual()
    captured, region = ox.capture(net, shape).lowered, region_of(shape, batch=1)
    given = ox.relaxations.resolve("crown").preactivation_bounds(captured, region)
    found = planning.program(captured, captured.output, depth=0)
    neurons = rows_of_examples(1, 2, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    weights = [
        torch.rand(2, *found.weighed[name].shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for name in found.activations
    ]

    def bound(*weights):
        lines = MixedMaps(constant=False)
        for node in captured.activations:
            b = given[node.name]
            hull = node.op.hull(b.lower.detach(), b.upper.detach())
            lines.add(node.name, hull.below[0], hull.below[1], hull.above[0])
        own = dict(zip(found.activations, weights, strict=True))
        return running.lower_bounds(found, captured, ROWS[None], neurons, region, lines, weights=own)

    grads = torch.autograd.grad(bound(*weights).pow(2).sum(), weights, create_graph=True)
    (second,) = torch.autograd.grad(grads[0].pow(2).sum(), weights[0])
    step = 1e-6 * torch.randn(weights[0].shape, generator=generator, dtype=torch.float64)

    def slope(first):
        moved = [first.detach().requires_grad_(True), *weights[1:]]
        return torch.autograd.grad(bound(*moved).pow(2).sum(), moved)[0].pow(2).sum()

    change = (slope(weights[0] + step) - slope(weights[0] - step)) / 2
    torch.testing.assert_close(change, (second * step).sum(), rtol=1e-5, atol=1e-12)


def test_what_is_found_is_a_bound_and_better_than_crown():
    net, shape = residual()
    captured, region = ox.capture(net, shape), region_of(shape, batch=3)
    with torch.no_grad():
        crown = ox.lower_bounds(captured, region, ROWS, "crown")
        found = ox.lower_bounds(captured, region, ROWS, AlphaCrown(iterations=8))
        outward = ox.lower_bounds(captured, region, ROWS, AlphaCrown(iterations=8, rounding="outward"))
        least = torch.full_like(found, torch.inf)
        generator = torch.Generator().manual_seed(3)
        for _ in range(200):
            signs = torch.randint(0, 2, region.shape, generator=generator).double() * 2 - 1
            least = torch.minimum(least, net(region.center + signs * region.radius) @ ROWS.mT)
    assert (found >= crown - 1e-12).all()
    assert float((found - crown).mean()) > 1e-2
    assert (found <= least).all()
    assert (outward <= found).all()
    torch.testing.assert_close(outward, found, rtol=1e-9, atol=1e-9)


def test_examples_leave_by_themselves(monkeypatch):
    """An example that is decided keeps the bound of its first iteration; the others go on as if they were alone."""
    net, shape = dense()
    captured, region = ox.capture(net, shape), region_of(shape, batch=3)
    calls = []
    step = slope_climb.Climb._step
    monkeypatch.setattr(slope_climb.Climb, "_step", lambda self, n: calls.append(len(self.top)) or step(self, n))
    with torch.no_grad():
        crown = ox.lower_bounds(captured, region, ROWS, "crown")
        least = crown.amin(1).sort().values
        halfway = float(least[1] + least[2]) / 2
        way = AlphaCrown(iterations=6, threshold=halfway, tol=0)
        mixed = ox.lower_bounds(captured, region, ROWS, way)
        assert calls[0] == 3
        assert calls[1] == 2
        decided = crown.amin(1) > halfway
        torch.testing.assert_close(mixed[decided], crown[decided])
        others = ox.lower_bounds(captured, region.select(~decided), ROWS, way)
        torch.testing.assert_close(mixed[~decided], others, rtol=1e-6, atol=1e-8)
        calls.clear()
        ox.lower_bounds(captured, region, ROWS, AlphaCrown(iterations=50, tol=0.5, patience=1))
    assert len(calls) < 20
    assert (mixed[~decided] > crown[~decided] + 1e-3).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tol": -1}, "tol must be >= 0"), ({"patience": 0}, "patience must"), ({"threshold": float("nan")}, "nan")],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AlphaCrown(**options)


@pytest.mark.parametrize("iterations", [0, 3])
def test_composed_pools_and_products_are_no_looser_than_crowns_own_rules(iterations):
    class Gated(nn.Module):
        """A pool, and a product behind an activation, where zero and the greatest entry bound a value best."""

        def __init__(self):
            super().__init__()
            self.pool = nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
            self.a, self.b = nn.Linear(12, 3), nn.Linear(12, 3)

        def forward(self, x):
            z = self.pool(x)
            return self.a(z).relu() * self.b(z) + self.a(z)

    torch.manual_seed(1)
    net, region = Gated().double(), region_of((2, 4, 4))
    rows = torch.cat([ROWS, -ROWS])
    crown, found = (ox.lower_bounds(net, region, rows, way) for way in (ox.Crown(), AlphaCrown(iterations=iterations)))
    assert bool((found >= crown - 1e-9).all())
    found.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())


class Tilted(nn.Module):
    """f(x) - slope * x, of one number."""

    def __init__(self, f, slope):
        super().__init__()
        self.f, self.slope = f, slope

    def forward(self, x):
        return self.f(x) - self.slope * x


@pytest.mark.parametrize("f", [torch.tanh, torch.sigmoid, nn.functional.softplus, torch.atan])
@pytest.mark.parametrize("slope", [0.15, 0.6])
def test_points_of_tangency_are_found(f, slope):
    """One neuron and a slope beside it: the exact extremes, which its envelope gives and no fixed line."""
    net = ox.capture(Tilted(f, slope), (1,))
    center = torch.tensor([[-0.7], [0.3], [1.4]], dtype=torch.float64)
    region = ox.LinfBall(center, 2.0)
    with torch.no_grad():
        values = net(
            torch.lerp(region.lower, region.upper, torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None, None])
        )
        exact = torch.stack([values.amin(0), -values.amax(0)])
        crown = ox.bounds(net, region, "crown")
        found = ox.bounds(net, region, AlphaCrown(iterations=80, decay=0.93, patience=80))
    found, crown = (torch.stack([b.lower, -b.upper]) for b in (found, crown))
    assert (found <= exact + 1e-6).all()
    assert (found >= crown - 1e-9).all()
    assert float((exact - crown).amax()) > 0.01
    assert (exact - found < 5e-3).all()


def test_chosen_points_of_tangency_hold_under_either_rounding_and_in_float32():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.rand(3, 3)
    region = ox.LinfBall(x, torch.tensor([0.0, 0.1, 0.8]))
    points = torch.lerp(region.lower, region.upper, torch.rand(400, *region.shape))
    with torch.no_grad():
        values = net(points)
        widths = {}
        for rounding, slack in (("nearest", 1e-5), ("outward", 0.0)):
            found = ox.bounds(net, region, AlphaCrown(iterations=10, rounding=rounding))
            widths[rounding] = found.width
            assert ((found.lower - slack <= values) & (values <= found.upper + slack)).all()
        crown = ox.bounds(net, region, "crown").width
        assert (widths["nearest"][2] < 0.97 * crown[2]).all()
        torch.testing.assert_close(widths["outward"], widths["nearest"], rtol=2e-2, atol=1e-4)


def test_a_search_makes_no_coefficients_again_that_it_has_room_for(monkeypatch):
    """All of its rows have a gradient, hidden neurons' too."""
    net, shape = residual()
    captured, region = ox.capture(net, shape), region_of(shape)
    calls = []
    for name in ("_forward", "_backward"):
        way = getattr(running, name)
        monkeypatch.setattr(running, name, lambda *given, name=name, way=way: calls.append(name) or way(*given))
    for kept in (2**24, 0):
        monkeypatch.setattr(programs, "KEPT_HIDDEN", kept)
        calls.append("search")
        ox.lower_bounds(captured, region, ROWS, AlphaCrown(iterations=2))
    half = len(calls) // 2
    assert "_backward" in calls
    assert calls[:half] == calls[half:]
