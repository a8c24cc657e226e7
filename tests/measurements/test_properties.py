"""Random graphs and random convolution shapes: capture is exact, and relaxations sound, on all of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import SOUND, corners, inputs, random_points, specification
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optrelax as ox
from optrelax.kernels import convolutions
from optrelax.kernels.convolutions import ConvGeometry
from optrelax.networks.images import Conv2d
from optrelax.networks.maxima import MaxPool

seeds = st.integers(0, 2**31 - 1)


def assert_sound(net: nn.Module, shape: tuple[int, ...], seed: int) -> None:
    """Sound relaxations, a third of them a seed, hold on random points and corners; outward rounding in float32 without
    tolerance.
    """
    x = inputs(shape, 3, seed=seed % 1000) * 2 - 1
    region = ox.LinfBall(x, torch.tensor([0.0, 0.1, 0.7]).double())
    points = torch.cat([random_points(region, 25, seed), corners(region, 25, seed)])
    with torch.no_grad():
        outputs = net(points.flatten(0, 1)).flatten(1)
        network = ox.capture(net, shape)
        torch.testing.assert_close(network(points.flatten(0, 1)).flatten(1), outputs, rtol=1e-10, atol=1e-10)
        rows = torch.cat([specification(network.outputs, seed=seed), -specification(network.outputs, seed=seed)])
        values = (outputs @ rows.mT).unflatten(0, points.shape[:2])
        slack = 1e-10 * max(1.0, float(values.abs().max()))
        for case in SOUND[seed % 3 :: 3]:
            low = ox.lower_bounds(network, region, rows, case.make())
            assert (low <= values.amin(0) + slack).all(), case.name
        assert_outward(net, network, region, rows)


def assert_outward(net: nn.Module, network: ox.Network, region: ox.InputBox, rows: Tensor) -> None:
    net.float()
    small = ox.InputBox(region.lower.float(), region.upper.float())
    found = {n: ox.lower_bounds(network, small, rows, n, rounding="outward") for n in ("box", "hbox", "deepz", "crown")}
    net.double()
    exact = ox.InputBox(small.lower.double(), small.upper.double())
    points = torch.cat([random_points(exact, 20), corners(exact, 20)])
    values = (net(points.flatten(0, 1)).flatten(1) @ rows.float().double().mT).unflatten(0, points.shape[:2])
    for name, low in found.items():
        assert (low.double() <= values.amin(0)).all(), name


# --- fully connected graphs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One node of a random graph: what it does to earlier values, counted back from the last."""

    kind: str
    first: int
    second: int


KINDS = ["linear", "relu", "leaky", "hardtanh", "add", "sub", "double", "scale", "reshape", "relu_", "norm"]
STEPS = st.lists(st.builds(Step, st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=9)
"""Not `steps`: forward reads an attribute of that name, and a capture looks into the globals of such names."""


class RandomGraph(nn.Module):
    """Values of one width, joined by residual branches; every value may be read any number of times."""

    def __init__(self, width: int, steps: list[Step]) -> None:
        super().__init__()
        self.steps, self.width = steps, width
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in steps)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in steps)
        for norm in self.norms:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.2, 2.0)
        self.scales = nn.ParameterList(torch.randn(width) for _ in steps)
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for i, step in enumerate(self.steps):
            a, b = (values[-1 - min(k, len(values) - 1)] for k in (step.first, step.second))
            values.append(self.apply_step(i, step.kind, a, b))
        return self.last(values[-1])

    def apply_step(self, i: int, kind: str, a: Tensor, b: Tensor) -> Tensor:
        match kind:
            case "linear":
                return self.layers[i](a)
            case "relu":
                return torch.relu(a)
            case "relu_":
                return F.relu(a - 0.1, inplace=True)
            case "leaky":
                return F.leaky_relu(a, 0.3)
            case "hardtanh":
                return F.hardtanh(a, -0.2, 0.5)
            case "add":
                return a + b
            case "sub":
                return a - b
            case "double":
                return a + a
            case "scale":
                return a * self.scales[i] + 0.25
            case "norm":
                return self.norms[i](a)
        return a.view(a.shape[0], 1, self.width).flatten(1)


@settings(max_examples=25)
@given(st.integers(1, 4), STEPS, seeds)
def test_random_graphs(width, steps, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = RandomGraph(width, steps).double().eval()
    assert_sound(net, (width,), seed)


# --- convolutions -------------------------------------------------------------------------------------------------

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@dataclass(frozen=True)
class ConvShape:
    """A convolution and an input that it fits."""

    groups: int
    channels: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    size: tuple[int, int]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (self.groups * self.channels[0], *self.size)


@st.composite
def conv_shapes(draw: st.DrawFn) -> ConvShape:
    kernel, dilation = draw(pairs), draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = tuple(draw(st.integers(n, n + 3)) for n in least)
    channels = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    return ConvShape(draw(st.integers(1, 2)), channels, kernel, draw(pairs), padding, dilation, size)  # type: ignore[arg-type]


@settings(max_examples=120)
@given(conv_shapes(), seeds)
def test_convolutions_of_any_shape_agree_with_their_matrix(shape, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape.groups * shape.channels[1], shape.channels[0], *shape.kernel, generator=g).double()
    geometry = ConvGeometry(shape.stride, shape.padding, shape.dilation, shape.groups)
    op = Conv2d(shape.input_shape, lambda: weight, None, geometry)
    n = torch.zeros(shape.input_shape).numel()
    eye = torch.eye(n, dtype=torch.float64).reshape(n, *shape.input_shape)
    matrix = F.conv2d(eye, weight, None, shape.stride, shape.padding, shape.dilation, shape.groups)
    assert matrix.shape[1:] == op.shape
    rows = torch.randn(2, 3, *op.shape, generator=g).double()
    expected = rows.flatten(2) @ matrix.flatten(1).mT
    torch.testing.assert_close(op.transpose(rows)[0].flatten(2), expected)
    torch.testing.assert_close(op.apply_abs(eye), matrix.abs())
    assert int((matrix.flatten(1) != 0).sum(0).max()) <= op.fan_in
    assert int((matrix.flatten(1) != 0).sum(1).max()) <= op.fan_out


@pytest.mark.compiler
@settings(max_examples=100)
@given(conv_shapes(), seeds)
def test_compiled_pulling_of_rows_is_the_transposed_convolution(shape, seed):
    """Also where PyTorch's is the one in use: images of many channels."""
    assert convolutions.kernels().library is not None, convolutions.kernels().reason
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape.groups * shape.channels[1], shape.channels[0], *shape.kernel, generator=g).double()
    geometry = ConvGeometry(shape.stride, shape.padding, shape.dilation, shape.groups)
    x = torch.randn(3, *shape.input_shape, generator=g).double()
    how = (None, shape.stride, shape.padding, shape.dilation, shape.groups)
    a = torch.randn(F.conv2d(x, weight, *how).shape, generator=g).double()
    leaves = [t.requires_grad_() for t in (a, weight)]
    x.requires_grad_()
    (expected,) = torch.autograd.grad(F.conv2d(x, weight, *how), x, a, create_graph=True)
    found = convolutions._Pull.apply(a, weight, geometry, shape.input_shape[1:])
    torch.testing.assert_close(found, expected)
    grad = torch.randn(x.shape, generator=g).double()
    for one, other in zip(*(torch.autograd.grad(v, leaves, grad) for v in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=60)
@given(conv_shapes(), seeds)
def test_pooling_windows_are_those_of_torch(shape, seed):
    if any(2 * p > k for p, k in zip(shape.padding, shape.kernel, strict=True)):
        return  # torch refuses it
    op = MaxPool(shape.input_shape, shape.kernel, shape.stride, shape.padding, shape.dilation)
    x = torch.randn(4, *shape.input_shape, generator=torch.Generator().manual_seed(seed))
    windows = op.windows(x.device)
    padded = torch.cat([x.flatten(1), torch.full((4, 1), -torch.inf)], 1)  # index -1 is padding
    torch.testing.assert_close(padded[:, windows].amax(-1), op(x))


@settings(max_examples=20)
@given(conv_shapes(), st.sampled_from(["none", "average", "max"]), st.booleans(), seeds)
def test_random_convolutional_networks(shape, pool, residual, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ConvNet(shape, pool, residual).double().eval()
    assert_sound(net, shape.input_shape, seed)


class ConvNet(nn.Module):
    """Convolution, batch norm, an optional residual block and an optional pooling."""

    def __init__(self, shape: ConvShape, pool: str, residual: bool) -> None:
        super().__init__()
        inner, outer = shape.input_shape[0], shape.groups * shape.channels[1]
        settings = (shape.kernel, shape.stride, shape.padding, shape.dilation, shape.groups)
        self.conv = nn.Conv2d(inner, outer, *settings)
        self.norm, self.block = nn.BatchNorm2d(outer), nn.Conv2d(outer, outer, 3, padding=1)
        nn.init.uniform_(self.norm.running_var, 0.2, 2.0)
        self.residual = residual
        self.pool = {"none": nn.Identity(), "average": nn.AvgPool2d(2, 1, 1), "max": nn.MaxPool2d(2, 1, 1)}[pool]
        with torch.no_grad():
            features = self.features(torch.zeros(1, *shape.input_shape)).shape[1]
        self.last = nn.Linear(features, 2)

    def features(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)) if not self.training else self.conv(x))
        if self.residual:
            h = torch.relu(h + self.block(h))
        return self.pool(h).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))
