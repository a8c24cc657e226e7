"""Rows as windows: bounds and gradients of whole rows, sound at every edge, through any op that has windows."""

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

import optrelax as ox
from optrelax.domains import frames
from optrelax.domains.passes import planning
from optrelax.domains.row_walks import Rows
from optrelax.kernels import window_step
from optrelax.kernels.convolutions import ConvGeometry
from optrelax.relaxations import resolve

RELAXATIONS = ["crown", "crown-0-tria", "deepz:direction=backward", "fast-lin", "hbox", "crown:rounding=outward"]


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Compiled steps through a single convolution, too."""
    monkeypatch.setattr(planning, "DEPTH", 1)


def drawn(seed):
    """A network of random geometry whose maps keep at least two pixels: module, input shape."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    channels = 2
    image = (channels, draw.randint(6, 9), draw.randint(6, 9))
    x, layers = torch.zeros(1, *image), []
    while len(layers) < 8:
        kind = draw.choice(["conv", "conv", "conv", "pool", "residual", "grouped", "dilated", "scale"])
        k, stride, padding = ((draw.randint(1, 3), draw.randint(1, 3)), (draw.randint(1, 2), draw.randint(1, 3)), 1)
        out = draw.choice([2, 4])
        if kind == "pool":
            block = nn.AvgPool2d(2, draw.randint(1, 2), draw.randint(0, 1), count_include_pad=draw.random() < 0.5)
        elif kind == "residual":
            body = nn.Sequential(
                nn.Conv2d(channels, out, 3, 2, 1), nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 3, 1, 1)
            )
            block = ox.models.Residual(body, nn.Conv2d(channels, out, 1, 2))
        elif kind == "grouped":
            block = nn.Conv2d(channels, out, 3, padding=2, groups=2)
        elif kind == "dilated":
            block = nn.Conv2d(channels, out, (2, 3), 1, (2, 1), dilation=(2, 1) if draw.random() < 0.5 else (1, 2))
        elif kind == "scale":
            block = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 2, padding=1))
        else:
            block = nn.Conv2d(channels, out, k, stride, padding)
        try:
            y = block.eval()(x)
        except RuntimeError:  # the map is too small for it
            y = x[..., :1, :1]
        if y.shape[2] * y.shape[3] < 2:
            break
        x, channels = y, y.shape[1]
        layers += [block] if draw.random() < 0.2 else [block, draw.choice([nn.ReLU(), nn.ReLU(), nn.LeakyReLU(0.2)])]
    layers += [nn.ReLU(), nn.Flatten(), nn.Linear(x.numel(), 4)]
    net = nn.Sequential(*layers)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.5, 0.5)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.bias, -0.5, 0.5)
    return net.double().eval(), image


def bounds_and_gradients(net, captured, relaxation, windows=True, compiled=True):
    dtype = next(net.parameters()).dtype
    x = torch.rand(2, *captured.input_shape, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()
    net.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        if not windows:
            patch.setattr(frames, "plan", lambda *_: None)
            patch.setattr(frames, "plan_rows", lambda *_: None)
        if not (windows and compiled):
            patch.setattr(planning, "available", lambda _: False)
        region = ox.LinfBall(x, 0.05, (0.0, 1.0))
        low = ox.lower_bounds(captured, region, torch.eye(captured.outputs), relaxation)
        before = ox.preactivation_bounds(captured, region, relaxation)
        (low.sum() + sum(b.upper.pow(2).sum() - b.lower.sum() for b in before.values())).backward()
    ends = [t.detach() for b in before.values() for t in (b.lower, b.upper)]
    return [low.detach(), *ends, x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


def assert_equal(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("seed", range(12))
def test_bounds_and_gradients_are_those_of_whole_rows(seed):
    net, image = drawn(seed)
    captured = ox.capture(net, image)
    relaxation = RELAXATIONS[seed % len(RELAXATIONS)]
    theirs = bounds_and_gradients(net, captured, relaxation, windows=False)
    for compiled in (True, False):
        assert_equal(bounds_and_gradients(net, captured, relaxation, compiled=compiled), theirs, 1e-10)


class _Cat(nn.Module):
    """Channels of two branches behind one another."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1)


@pytest.mark.parametrize("relaxation", ["crown", "fast-lin"])
def test_concatenated_channels(relaxation):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), _Cat(), nn.ReLU(), nn.Conv2d(5, 2, 3), nn.ReLU(), nn.Flatten())
    net = net.append(nn.Linear(40, 3)).double()
    captured = ox.capture(net, (1, 8, 9))
    seen = frames.plan(captured, captured.activations[-1].inputs[0]).frames
    assert all(isinstance(frame, frames.Frame) and not frame.whole for frame in seen.values())
    assert_equal(*(bounds_and_gradients(net, captured, relaxation, windows) for windows in (True, False)), 1e-10)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("relaxation", ["crown", "fast-lin"])
def test_maps_joined_side_by_side(relaxation, dim):
    """Windows go through maps that are joined along their channels alone."""

    class Joined(nn.Module):
        def forward(self, x):
            first, second = (x.flip(dim) * 2.0).narrow(dim, 0, 1), x.narrow(dim, 1, 1)
            return torch.cat([first, second], dim)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), Joined(), nn.ReLU(), nn.Conv2d(2, 3, 2), nn.ReLU()).double()
    x = torch.rand(1, 1, 4, 4).double()
    found = ox.preactivation_bounds(net, ox.LinfBall(x, eps=1e-9), relaxation)["5"]
    torch.testing.assert_close(found.lower, net[:5](x), rtol=0, atol=1e-6)


def test_windows_are_taken_and_outgrow_their_map():
    seen = []
    for seed in range(12):
        net, image = drawn(seed)
        captured = ox.capture(net, image)
        plans = [frames.plan(captured, node.inputs[0]) for node in captured.activations]
        seen += [frame for plan in plans if plan is not None for frame in plan.frames.values()]
    assert sum(isinstance(frame, frames.Frame) and not frame.whole for frame in seen) > 100
    assert sum(isinstance(frame, frames.Frame) and frame.whole for frame in seen) > 50


@pytest.mark.parametrize("seed", [1, 4, 8])
def test_other_operations_without_a_compiler(seed, monkeypatch):
    net, image = drawn(seed)
    captured = ox.capture(net, image)
    compiled = bounds_and_gradients(net, captured, "crown")
    build = replace(window_step.kernels(), library=None)
    monkeypatch.setattr(window_step, "kernels", lambda: build)
    assert_equal(compiled, bounds_and_gradients(net, captured, "crown"), 1e-10)


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("seed", range(3))
def test_values_lie_inside_in_float32(seed, rounding):
    net, image = drawn(seed)
    captured = ox.capture(net.float(), image)
    x = torch.rand(2, *image, generator=torch.Generator().manual_seed(2))
    region = ox.LinfBall(x, 0.05)
    before = ox.preactivation_bounds(captured, region, f"crown:rounding={rounding}")
    slack = 0.0 if rounding == "outward" else 1e-5
    with torch.no_grad():
        for _ in range(20):
            y = region.lower + torch.randint(0, 2, (2, *image)) * (region.upper - region.lower)
            exact = {name: v.float() for name, v in captured.values(y).items()}
            for node in captured.activations:
                value, bounds = exact[node.inputs[0]], before[node.path]
                reach = 1e-5 * (1 + value.abs())  # the values round too
                assert (bounds.lower - slack - reach <= value).all()
                assert (value <= bounds.upper + slack + reach).all()


@pytest.mark.parametrize("relaxation", ["crown", "fast-lin", "deepz:direction=backward", "hzono"])
@pytest.mark.parametrize("before", [nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Linear(6, 5)])
def test_a_bias_behind_the_windows_counts_once(before, relaxation):
    """An op whose rows are no windows, in front of an activation that windows see."""
    torch.manual_seed(0)
    channels = 3 if isinstance(before, nn.ConvTranspose2d) else 2
    last = nn.Conv2d(channels, 2, 3, padding=1)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), before, nn.ReLU(), last, nn.ReLU()).double()
    before.bias.data.fill_(0.7)
    x = torch.rand(1, 1, 6, 6).double()
    found = ox.preactivation_bounds(net, ox.LinfBall(x, eps=1e-9), relaxation)["5"]
    torch.testing.assert_close(found.lower, net[:5](x), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.upper, net[:5](x), rtol=0, atol=1e-6)


def test_the_allowance_of_a_bias_counts_every_pixel_of_a_window(monkeypatch):
    counted, add_constant = [], Rows.add_constant

    def recorded(walk, amount, magnitude=None, terms=0, upper=None):
        counted.append(terms)
        add_constant(walk, amount, magnitude, terms, upper)

    monkeypatch.setattr(Rows, "add_constant", recorded)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.ReLU())
    ox.preactivation_bounds(net, ox.LinfBall(torch.zeros(1, 1, 9, 9), eps=0.1), "crown:rounding=outward")
    assert counted[1] >= 2 * 3 * 3, counted  # the window of the last convolution but one, two channels


def test_padding_is_no_value_of_the_op_before():
    """Two convolutions without an activation between: at the edge the second reads zeros, not the first one's bias."""
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(64, 1))
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.fill_(100.0)
        net[1].weight.fill_(1.0)
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = ox.preactivation_bounds(ox.capture(net.double(), (1, 8, 8)), ox.LinfBall(x.double(), 0.0), "crown")["2"]
    exact = net[1](net[0](x.double())).detach()
    torch.testing.assert_close(found.lower, exact)
    torch.testing.assert_close(found.upper, exact)
    assert float(exact.max() - exact.min()) > 400  # a corner sums 4 biases, a pixel inside 9


@pytest.mark.parametrize("geometry", [((2, 1), (1, 2), (1, 1)), ((1, 1), (2, 1), (2, 1)), ((3, 2), (0, 0), (1, 2))])
def test_products_are_transposes_with_gradients_to_any_order(geometry):
    stride, _, dilation = geometry
    torch.manual_seed(0)
    g = ConvGeometry(stride, (0, 0), dilation)
    a = torch.randn(3, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    whole = window_step.extent((2, 4), (2, 3), g)
    size = (whole[0] - 1, whole[1] - 2)

    def call(a, weight):
        return window_step.spread(a, weight, g, (1, 1), size)

    image = torch.randn(3, 2, *whole, dtype=torch.float64)
    inside = torch.zeros_like(image)
    inside[..., 1:, 1:-1] = image[..., 1:, 1:-1]
    there = (nn.functional.conv2d(inside, weight, None, stride, 0, dilation).permute(0, 2, 3, 1) * a).sum()
    torch.testing.assert_close((call(a, weight) * image[..., 1:, 1:-1].permute(0, 2, 3, 1)).sum(), there)
    assert torch.autograd.gradcheck(call, (a, weight))
    assert torch.autograd.gradgradcheck(call, (a, weight))


@pytest.mark.parametrize("maps", [1, 3])
def test_windows_of_maps_and_their_sums_with_gradients_to_any_order(maps):
    corners = torch.tensor([[[-1, -2], [0, 1], [2, 3], [5, -9]]])
    t = torch.randn(maps, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    windows = torch.randn(3, 4, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    seen = window_step.gather(t, corners, (2, 3)).expand(3, -1, -1, -1, -1)
    assert float(seen[:, 3].detach().abs().sum()) == 0  # it lies beyond the map
    assert float((seen[0, 1] - t[0, 0:2, 1:4]).detach().abs().sum()) == 0
    summed = window_step.scatter(windows, corners, (3, 4), maps)
    torch.testing.assert_close((seen * windows).sum(), (summed * t).sum())
    for call, given in (
        (lambda t: window_step.gather(t, corners, (2, 3)), t),
        (lambda w: window_step.scatter(w, corners, (3, 4), maps), windows),
    ):
        assert torch.autograd.gradcheck(call, given)
        assert torch.autograd.gradgradcheck(call, given)


@pytest.mark.parametrize("relaxation", ["crown", "fast-lin"])
def test_little_memory_takes_few_places_at_a_time(relaxation):
    net, image = drawn(4)
    captured = ox.capture(net, image)
    given = resolve(relaxation)
    region = ox.LinfBall(torch.zeros(2, *image, dtype=torch.float64), 0.1)
    few = replace(given, max_bytes=given.bytes_needed(captured, region, 4) // 8)
    assert_equal(bounds_and_gradients(net, captured, few), bounds_and_gradients(net, captured, given), 1e-10)


def test_peak_memory_is_that_of_the_count():
    from test_memory import TOLERANCE, peak

    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)]
    net = nn.Sequential(*(m for conv in (*convs, nn.Conv2d(16, 16, 3, 1, 1)) for m in (conv, nn.ReLU())), nn.Flatten())
    net.append(nn.Linear(1024, 5))
    captured = ox.capture(net, (3, 16, 16))
    region = ox.LinfBall(torch.rand(2, 3, 16, 16), 0.05)
    crown = replace(resolve("crown"), max_bytes=math.inf)

    def step():
        net.zero_grad()
        ox.lower_bounds(captured, region, torch.eye(5), crown).sum().backward()

    need = crown.bytes_needed(captured, region, 5)
    assert peak(step) <= TOLERANCE * need
    assert need <= 2 * peak(step)


@pytest.mark.parametrize("relaxation", ["crown", "fast-lin"])
def test_what_overflows_is_no_bound(relaxation):
    net = nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(), nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(144, 5))
    with torch.no_grad():
        net[0].bias.fill_(1e30)
        net[2].weight.fill_(1e10)
        net[2].weight[:2] *= -1
    found = list(ox.preactivation_bounds(net, ox.LinfBall(torch.rand(2, 2, 6, 6), 0.05), relaxation).values())[1]
    assert not (found.lower == math.inf).any()
    assert not (found.upper == -math.inf).any()


@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize("bias", [-50.0, 50.0, "ties"])
@pytest.mark.parametrize("relaxation", ["crown", "fast-lin"])
def test_edges_in_float32(relaxation, bias, eps):
    """Dead and active maps, neurons at l = 0, u = 0 and |l| = |u|, boxes of no width: as whole rows, values inside."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(100, 5))
    captured = ox.capture(net, (2, 5, 5))
    with torch.no_grad():
        if bias == "ties":  # the pixels are 0.5: with eps 0.3 the maps have l = 0, u = 0 and |l| = |u|
            net[0].weight.zero_()[:, 0] = 1.0
            net[0].bias.copy_(torch.tensor([-0.2, -0.8, -0.5]))
        else:
            net[0].bias.fill_(bias)
    x, found = torch.full((2, 2, 5, 5), 0.5), []
    region = ox.LinfBall(x, eps)
    for windows in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not windows:
                patch.setattr(frames, "plan", lambda *_: None)
                patch.setattr(planning, "available", lambda _: False)
            before = list(ox.preactivation_bounds(captured, region, relaxation).values())[1]
            found.append([before.lower.detach(), before.upper.detach()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    low, high = found[0]
    for _ in range(20):
        y = net[:3](x + eps * (2 * torch.rand_like(x) - 1)).detach()
        assert (low <= y + 1e-4).all()
        assert (y <= high + 1e-4).all()
