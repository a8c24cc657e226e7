"""Compiled back-substitution: any rows of any target, few at a time, with gradients to any order."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import optrelax as ox
from optrelax.domains import frames
from optrelax.domains.passes import planning, programs, running
from optrelax.domains.passes.lanes import LaneSpace, lanes_of
from optrelax.domains.passes.line_maps import LineMaps
from optrelax.domains.passes.neurons import EveryNeuron, Neurons
from optrelax.domains.passes.programs import Program
from optrelax.kernels import lane_step


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Two convolutions do, so that the networks stay small."""
    monkeypatch.setattr(planning, "DEPTH", 2)


def small(seed=0):
    """A residual block behind a strided convolution, scales folded into weights and lines."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, 1, 1))
    net = nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), ox.models.Residual(body.append(nn.BatchNorm2d(3)), None))
    net = net.append(nn.ReLU()).append(nn.Flatten()).append(nn.Linear(75, 6)).append(nn.ReLU()).append(nn.Linear(6, 3))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.5, 0.5)
            nn.init.uniform_(m.weight, -1.0, 1.0)
    return net.double().eval(), (2, 9, 9)


def region_of(shape, batch=2):
    x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ox.LinfBall(x, 0.05)


def test_every_target_behind_an_activation_has_steps():
    net, shape = small()
    captured = ox.capture(net, shape)
    # Before the first activation all rows are shared.
    assert planning.program(captured, captured.activations[0].inputs[0]) is None
    targets = [*(node.inputs[0] for node in captured.activations[1:]), captured.output]
    for target in targets:
        found = planning.program(captured, target)
        assert found is not None
        assert found is planning.program(captured, target)
        assert found.windows == (frames.plan(captured, target) is not None)


def test_another_network_is_planned_anew():
    net, shape = small()
    captured = ox.capture(net, shape)
    region = region_of(shape)
    before = ox.bounds(captured, region)
    net[0] = nn.Conv2d(2, 3, 5, 2, 2).double()
    after = ox.bounds(captured, region)
    torch.testing.assert_close(after.lower, ox.bounds(ox.capture(net, shape), region).lower)
    assert float((before.lower - after.lower).detach().abs().max()) > 1e-3


def bounds_and_gradients(net, captured, region):
    net.zero_grad()
    found = ox.preactivation_bounds(captured, region)
    low = ox.lower_bounds(captured, region, torch.eye(3, dtype=torch.float64))
    (low.sum() + sum(b.upper.pow(2).sum() - b.lower.sum() for b in found.values())).backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    return [low.detach(), *(t.detach() for b in found.values() for t in (b.lower, b.upper)), *grads]


@pytest.mark.parametrize(("rows", "kept"), [(1, 0), (7, 0), (7, 2**26)])
def test_few_rows_at_a_time_are_the_same(rows, kept, monkeypatch):
    net, shape = small()
    captured, region = ox.capture(net, shape), region_of(shape)
    whole = bounds_and_gradients(net, captured, region)
    monkeypatch.setattr(Program, "at_once", lambda *_, **__: rows)
    monkeypatch.setattr(programs, "KEPT", kept)
    monkeypatch.setattr(programs, "KEPT_HIDDEN", kept)
    for a, b in zip(bounds_and_gradients(net, captured, region), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def stacked():
    """Windows up to the input, which leave the image."""
    torch.manual_seed(5)
    convs = [nn.Conv2d(2, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 3, 3, 1, 1)]
    layers = [m for conv in convs for m in (conv, nn.ReLU())]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 3))
    return net.double().eval(), (2, 15, 15)


@pytest.mark.parametrize(("build", "rows"), [(small, None), (small, 24), (stacked, None), (stacked, 8)])
def test_rows_side_by_side_are_rows_one_by_one(build, rows, monkeypatch):
    """Blocks of six and eight rows of a place, some padded; a channel never fires, another always does."""
    net, shape = build()
    with torch.no_grad():
        net[0].bias[0], net[0].bias[1] = -1e3, 1e3
        (net[2].body[0] if build is small else net[2]).bias[2] = -1e3
    captured, region = ox.capture(net, shape), region_of(shape)
    taken = []
    monkeypatch.setattr(running, "LaneSpace", lambda *given: taken.append(given[-1]) or LaneSpace(*given))
    if rows is not None:
        monkeypatch.setattr(Program, "at_once", lambda *_, **__: rows)
    torch.use_deterministic_algorithms(True)  # what is not written is no number
    try:
        side = bounds_and_gradients(net, captured, region)
    finally:
        torch.use_deterministic_algorithms(False)
    assert taken
    monkeypatch.setattr(running, "lanes_of", lambda *_: 0)
    for a, b in zip(side, bounds_and_gradients(net, captured, region), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_blocks_have_two_vectors_where_rows_fill_them():
    one = lane_step.vector(torch.float32)
    rows = EveryNeuron(1, torch.zeros(1, 2, dtype=torch.int64), 4 * one)
    assert lanes_of(rows, 4 * one, torch.float32) == 2 * one
    assert lanes_of(rows, 2 * one - 1, torch.float32) == one
    assert lanes_of(rows, one - 1, torch.float32) == 0
    assert lanes_of(replace(rows, k=one + 1), 4 * one, torch.float32) == one
    assert lanes_of(replace(rows, k=one // 2), 4 * one, torch.float32) == 0


def test_lists_leave_out_what_is_zero_alone():
    """A line that is 0 beside one that is not, and what is no number, are kept."""
    maps = [torch.zeros(1, 1, 5) for _ in range(4)]
    maps[0][..., 1], maps[1][..., 2], maps[2][..., 4] = 1.0, float("nan"), 1e-40
    found = torch.full((1, 1, 6), -1, dtype=torch.int32)
    lane_step.lines().call("keep", torch.float32, 1, 5, *maps, found)
    assert found.flatten()[:4].tolist() == [3, 1, 2, 4]


def test_a_second_backward_pass_is_the_first():
    net, shape = small()
    captured, region = ox.capture(net, shape), region_of(shape)
    low = ox.lower_bounds(captured, region, torch.eye(3, dtype=torch.float64)).sum()
    first, second = (torch.autograd.grad(low, list(net.parameters()), retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kept", [0, 2**26])
def test_the_gradient_goes_back_by_the_rows_that_it_reads_alone(kept, monkeypatch):
    """All rows of the one, a few, those of no number, none; a second backward pass, as the first."""
    net, shape = small()
    captured, region = ox.capture(net, shape), region_of(shape)
    target, taken = captured.activations[2], []
    monkeypatch.setattr(programs, "KEPT", kept)
    monkeypatch.setattr(programs, "KEPT_HIDDEN", kept)
    back = running._backward

    def counted(found, work, sums):
        if found.target == target.inputs[0]:
            taken.append(work.count)
        back(found, work, sums)

    monkeypatch.setattr(running, "_backward", counted)
    bounds = ox.preactivation_bounds(captured, region)[target.path]
    value = torch.cat([bounds.lower.flatten(), bounds.upper.flatten()])
    few = torch.zeros_like(value)
    few[::9] = torch.arange(1.0, len(few[::9]) + 1)
    spoilt = few.clone()
    spoilt[4] = torch.nan
    for weight in (torch.ones_like(value), few, spoilt, torch.zeros_like(value)):
        grads = []
        for share in (running.AGAIN, 0.0):
            with monkeypatch.context() as patch:
                patch.setattr(running, "AGAIN", share)
                patch.setattr(running, "APART", share)
                taken.clear()
                grads.append(torch.autograd.grad(value, list(net[0].parameters()), weight, retain_graph=True))
                if share and bool((weight == 0).any()):
                    assert sum(taken) == int((weight != 0).sum())
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_any_neurons_in_any_order():
    """Ragged: five rows of one example, one of the other, signs mixed."""
    net, shape = small()
    captured, region = ox.capture(net, shape), region_of(shape)
    target = captured.activations[2].inputs[0]
    found = planning.program(captured, target)
    bounds = ox.preactivation_bounds(captured, region)
    lines = LineMaps()
    for node in captured.activations[:2]:
        b = bounds[node.path]
        lines[node.name] = ox.Crown().lines(node.op, b.lower, b.upper)
    channels = captured.shape_of(target)[0]
    rows = found.unit_rows(captured.shape_of(target), region.lower)
    wanted = [(1, 0, 0, 2, 1), (0, 4, 4, 0, -1), (0, 4, 4, 0, 1), (0, 2, 3, 1, 1), (0, 0, 4, 2, -1), (0, 1, 1, 1, 1)]
    place = torch.tensor([w[:3] for w in wanted])
    which = torch.tensor([c if sign > 0 else channels + c for *_, c, sign in wanted])
    value = running.lower_bounds(found, captured, rows, Neurons(place, which), region, lines)
    b = bounds[captured.activations[2].path]
    for got, (e, y, x, c, sign) in zip(value, wanted, strict=True):
        torch.testing.assert_close(got, b.lower[e, c, y, x] if sign > 0 else -b.upper[e, c, y, x])


def test_rows_are_made_for_entries_that_some_example_wants():
    net, shape = small()
    captured = ox.capture(net, shape)
    for target in (captured.activations[2].inputs[0], captured.activations[-1].inputs[0]):
        found, inner = planning.program(captured, target, depth=1), captured.shape_of(target)
        wanted = torch.zeros(2, *inner, dtype=torch.bool)
        wanted[0, 2], wanted[1, 1] = True, True
        neurons, index = found.some_neurons(wanted)
        like = torch.zeros((), dtype=torch.float64)
        rows, every = found.unit_rows(inner, like, neurons.entries), found.unit_rows(inner, like)
        assert rows.shape == (1, 4, *every.shape[2:])
        assert index[1].unique().tolist() == neurons.entries.tolist() == [1, 2]
        entry = index[1].repeat_interleave(2) + torch.tensor([0, every.shape[1] // 2]).repeat(len(index[1]))
        assert torch.equal(rows[0, neurons.which], every[0, entry])


def test_gradients_to_second_order():
    net, shape = small(3)
    captured = ox.capture(net, shape)
    region = region_of(shape, 1)
    parameters = [net[0].bias, net[2].body[3].weight]

    def gradients():
        low = ox.lower_bounds(captured, region, torch.eye(3, dtype=torch.float64))
        return torch.autograd.grad(low.sum(), parameters, create_graph=True)

    first = gradients()
    generator = torch.Generator().manual_seed(0)
    way = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    ours = torch.autograd.grad(sum((g * w).sum() for g, w in zip(first, way, strict=True)), parameters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "available", lambda _: False)
        second = gradients()
        theirs = torch.autograd.grad(sum((g * w).sum() for g, w in zip(second, way, strict=True)), parameters)
    for a, b in zip((*first, *ours), (*second, *theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_what_has_no_step_is_left_to_the_rules():
    convs = [nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2)]
    grouped = nn.Sequential(*(m for conv in convs for m in (conv, nn.ReLU())), nn.Flatten(), nn.Linear(36, 2))
    captured = ox.capture(grouped, (2, 9, 9))
    assert planning.program(captured, captured.activations[2].inputs[0]) is not None
    assert planning.program(captured, captured.output) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e12])
@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_dead_layers_points_and_sizes_out_of_range_have_bounds_that_hold(dtype, scale, eps):
    """In float32 1e12 overflows: -inf and inf, never a number that is none."""
    net, shape = small()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                m.weight.mul_(scale)
        net[0].bias[0] = -1e3 * scale  # a channel that never fires
    net = net.to(dtype)
    x = region_of(shape).x.to(dtype)
    found = ox.bounds(net, ox.LinfBall(x, eps), ox.Intersect(ox.Box(), ox.Crown()))
    plain = ox.bounds(net, ox.LinfBall(x, eps), "crown")
    assert planning.program(ox.capture(net, shape), ox.capture(net, shape).output) is not None
    corners = [x + eps * s * torch.sign(torch.randn_like(x)) for s in (0.0, 0.5, 1.0, 1.0)]
    for low, high in ((found.lower, found.upper), (plain.lower, plain.upper)):
        for point in corners:
            y = net(point)
            near = 1e3 * torch.finfo(dtype).eps * (y.abs() + low.abs().nan_to_num(posinf=0) + 1e-30)
            assert bool((low - near <= y).logical_or(~y.isfinite()).all())
            assert bool((y <= high + near).logical_or(~y.isfinite()).all())
            assert not low.isnan().any()
            assert not high.isnan().any()
