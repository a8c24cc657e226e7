"""max_bytes: the planner's counts against the allocator's, pieces against the whole, and the limit nobody set."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import optrelax as ox
from optrelax import memory, memory_counts
from optrelax.domains.lines import crown_lines
from optrelax.layers import AlphaCrown, DualAscent, InteriorPoint, Layerwise, Triangle
from optrelax.relaxations import resolve

TOLERANCE = 1.2


def peak(call):
    """Most bytes that the CPU allocator had handed out at once, beyond what there was."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def test_the_peak_is_that_of_what_is_alive_at_once():
    def call():
        a = torch.ones(2**18)
        del a
        b = torch.ones(2**18)
        (b + 1).sum()

    assert peak(call) == pytest.approx(2 * 2**20, rel=0.01)


def fc():
    return ox.models.fc(144, 96, 64, 48, 10, seed=0), (144,), 12


def conv():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2, padding=1)
        net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, 10))
    return net, (1, 10, 10), 8


class Step:
    """One pass forward and backward, its bounds and the weights' gradients."""

    def __init__(self, make):
        net, shape, batch = make()
        self.net = net.eval()
        self.network = ox.capture(net, shape)
        x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(1))
        self.region = ox.LinfBall(x, 0.05, (0.0, 1.0))
        self.rows = ox.margins(torch.arange(batch) % 10, 10)

    def __call__(self, relaxation):
        self.net.zero_grad()
        low = ox.lower_bounds(self.network, self.region, self.rows, relaxation)
        low.sum().backward()
        return [low.detach(), *(p.grad for p in self.net.parameters())]

    def peak(self, relaxation):
        """Without the gradients, which are what the step is for."""
        return peak(lambda: self(relaxation)) - sum(p.numel() * 4 for p in self.net.parameters())


STEPS = {"fc": fc, "conv": conv}
NAMES = ("box", "hbox", "deepz:direction=forward", "deepz:direction=backward", "cauchy:k=20", "crown", "crown-ibp")
OTHERS = {
    "intersect": ox.Intersect(ox.Box(), ox.FastLin()),
    "crown on fast-lin": ox.Crown(preactivation=ox.FastLin()),
    "triangle": Triangle(solver=DualAscent(max_iterations=8)),
    "triangle by interior points": Triangle(solver=InteriorPoint(max_iterations=2)),
    "layerwise": Layerwise(solver=DualAscent(max_iterations=4)),
    "alpha-crown": AlphaCrown(iterations=1),
}
EVERY = {name: resolve(name) for name in NAMES} | OTHERS


def within(relaxation, most):
    if isinstance(relaxation, ox.Intersect):
        return ox.Intersect(*relaxation.parts, max_bytes=most)
    return replace(relaxation, max_bytes=most)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("of", STEPS)
def test_a_pass_keeps_within_what_it_was_given(of, name):
    step, relaxation = Step(STEPS[of]), EVERY[name]
    whole = step.peak(within(relaxation, math.inf))
    need = relaxation.bytes_needed(step.network, step.region, 9)
    assert whole <= TOLERANCE * need
    least = relaxation.least_bytes(step.network, step.region, 9)
    most = max(need // 4, least)
    assert most < need
    assert step.peak(within(relaxation, most)) <= TOLERANCE * most


@pytest.mark.parametrize("name", ["box", "cauchy:k=20", "intersect", "crown on fast-lin", "triangle", "layerwise"])
@pytest.mark.parametrize("of", STEPS)
def test_pieces_have_the_bounds_and_gradients_of_the_whole(of, name):
    step, relaxation = Step(STEPS[of]), EVERY[name]
    if isinstance(relaxation, Triangle):  # iterations of Adam amplify rounding where a gradient is 0 to rounding
        relaxation = Triangle(solver=DualAscent(max_iterations=0))
    need = relaxation.bytes_needed(step.network, step.region, 9)
    whole, pieces = step(within(relaxation, math.inf)), step(within(relaxation, need // 4))
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


@pytest.mark.parametrize("name", ["crown", "deepz:direction=forward", "triangle", "alpha-crown"])
def test_preactivation_bounds_come_in_pieces_too(name):
    step, relaxation = Step(fc), EVERY[name]
    need = relaxation.bytes_needed(step.network, step.region, 0)
    small = within(relaxation, need // 4)
    assert peak(lambda: ox.preactivation_bounds(step.network, step.region, small)) <= TOLERANCE * need / 4
    whole, pieces = (ox.preactivation_bounds(step.network, step.region, r) for r in (relaxation, small))
    for path, bounds in whole.items():
        torch.testing.assert_close(bounds.lower, pieces[path].lower, rtol=1e-3, atol=1e-4)


def test_what_is_counted_is_near_what_is_taken():
    """A count that is too high cuts passes that would fit. The nearest miss: rows as windows on small maps, 1.64."""
    for make in (fc, conv):
        step = Step(make)
        for name in ("crown", "deepz:direction=backward"):
            whole = step.peak(within(EVERY[name], math.inf))
            assert EVERY[name].bytes_needed(step.network, step.region, 9) <= 1.7 * whole


# --- the limit ----------------------------------------------------------------------------------------------------


def test_half_of_what_is_free_is_the_limit_nobody_set(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**33)
    assert memory.limit(None, memory.SMALL, cpu) == math.inf
    assert memory.limit(None, memory.SMALL + 1, cpu) == 2**32
    assert memory.limit(2**20, 2**40, cpu) == 2**20
    assert memory.limit(math.inf, 2**60, cpu) == math.inf
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    assert memory.limit(None, 2**40, cpu) == memory.SMALL


def test_a_pass_that_does_not_fit_is_cut_by_itself(monkeypatch):
    step = Step(fc)
    monkeypatch.setattr(memory, "SMALL", 2**16)
    whole = step.peak(ox.Crown())
    monkeypatch.setattr(memory, "free_bytes", lambda device: whole)
    assert step.peak(ox.Crown()) <= TOLERANCE * whole / 2
    assert step.peak(ox.Crown(max_bytes=math.inf)) == pytest.approx(whole, rel=0.1)


def test_free_memory_is_between_nothing_and_the_machine():
    free = memory.free_bytes(torch.device("cpu"))
    assert free > 2**20
    assert free == math.inf or free < 2**50


def test_small_passes_stay_whole_and_the_rest_is_shared():
    assert memory.shares(100, [30, 500]) == [math.inf, 70]
    assert memory.shares(100, [500, 30, 600]) == [35, math.inf, 35]
    assert memory.shares(100, [60, 50]) == [50, math.inf]
    assert memory.shares(1, [60, 70]) == [1, 1]


@pytest.mark.parametrize("value", [0, -1, True, 1.5, math.nan, -math.inf])
def test_other_limits_are_refused(value):
    with pytest.raises(
        ValueError, match=r"Box: max_bytes must be a positive integer or None \(or math.inf: no limit\)"
    ):
        ox.Box(max_bytes=value)


def test_no_limit_has_a_name_in_a_string():
    assert resolve("crown:max_bytes=inf").max_bytes == math.inf
    assert resolve("crown:max_bytes=4096").max_bytes == 4096


@pytest.mark.parametrize("graph", [0, 1, 40_000])
@pytest.mark.parametrize("count", [1, 900, 10**6])
def test_lots_are_as_large_as_numbers_and_graphs_of_all_allow(count, graph):
    from optrelax.layers.layer_memory import LotSizes

    lots = LotSizes(count=count, each=100_000, kept=0, fixed=0, solver=0, graph=graph)

    def taken(size):
        return size * lots.each + count / size * graph

    for room in (lots.least, 1.5 * lots.least, 10 * lots.least):
        size = lots.size(room)
        assert taken(size) <= room + lots.each
        assert taken(size + 1) > room, "the next size would fit too"
    # Where not even the best size fits, it is taken all the same.
    best = lots.size(1)
    assert taken(best) <= min(taken(s) for s in (1, 2, 10, 100, 1000, 10**5)) + lots.each


@pytest.mark.parametrize("limit", [1, 2**18, 2**25])
@pytest.mark.parametrize("gradient", [False, True])
def test_many_classes_make_no_lots_of_single_problems(limit, gradient):
    """What is kept of all problems may exceed the limit by itself: lots then are as large as that, and no smaller."""
    net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 150)).double()
    network, region = ox.capture(net, (16,)), ox.LinfBall(torch.zeros(20, 16, dtype=torch.float64), 0.1)
    layer = Triangle(max_bytes=limit, rounding="outward")
    with torch.set_grad_enabled(gradient):
        lots, lot = layer._lots(network, region, 149), layer.budget(network, region, 149).lot
    assert lots.count == 20 * 149
    assert lots.count / lot <= max(100, 2 * lots.each / lots.kept), "single problems take a call each"
    if not gradient:
        rows = ox.margins(torch.arange(20), 150).double()
        with torch.no_grad():
            found, whole = (layer.changed(max_bytes=m).solve(net, region, rows).lower for m in (limit, None))
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_lines_take_what_is_counted(compiled):
    """A neuron's bounds are counted with its lines: 2, and 2 for their gradients."""
    relu, n = ox.activations.relu() if compiled else ox.activations.leaky_relu(0.1), 10_000
    l = torch.linspace(-2, 1, n, requires_grad=True)
    u = torch.linspace(1, 3, n, requires_grad=True)

    def call():
        lines = crown_lines(relu, l, u)
        (lines.lower_slope + lines.lower_intercept + lines.upper_slope + lines.upper_intercept).sum().backward()

    counted = memory_counts.bounds_and_lines(gradient=True).of(hidden=n)
    taken = peak(call) / 4 + 2 * n
    assert taken <= TOLERANCE * counted
    assert taken >= (0.4 if compiled else 0.8) * counted
