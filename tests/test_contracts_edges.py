"""The edges of floating point and of shapes, for every relaxation: overflow, denormal numbers, nothing at all."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import pytest
import torch
from cases import BY_NAME, PLAIN, RELAXATIONS, NetworkCase, inputs, random_points
from oracles import Affinity, exact, fractions
from torch import nn

import optrelax as ox
from optrelax.relaxations import names, resolve

SOUND = [case.name for case in PLAIN if case.sound]
LAYERS = [name for name in names() if name in ("alpha-crown", "triangle", "layerwise")]
MAKE = {case.name: case.make for case in RELAXATIONS} | {name: (lambda n=name: resolve(n)) for name in LAYERS}
each_relaxation = pytest.mark.parametrize("name", [*SOUND, *LAYERS])
each_rounding = pytest.mark.parametrize("rounding", ["nearest", "outward"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def filled(*layers: nn.Module, weights: list[list[float]], biases: list[list[float]]) -> nn.Sequential:
    """A network of these numbers, in float64 at first."""
    net = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        given = [layer for layer in net if isinstance(layer, (nn.Linear, nn.Conv2d))]
        for layer, weight, bias in zip(given, weights, biases, strict=True):
            layer.weight.copy_(torch.tensor(weight, dtype=torch.float64).reshape(layer.weight.shape))
            layer.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return net


def rows_that_overflow(most: float) -> tuple[nn.Sequential, torch.Tensor]:
    """Every value is an ordinary number, but the product of two layers' weights is not."""
    big = math.sqrt(most) * 10
    layers = (nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    net = filled(*layers, weights=[[big], [big], [-1.0]], biases=[[0.0], [0.0], [1.0]])
    return net, torch.tensor([[100 / most]], dtype=torch.float64)


def sums_that_overflow(most: float) -> tuple[nn.Sequential, torch.Tensor]:
    """Parts of the sum lie beyond all numbers, the sum itself does not: no neuron that is dead.

    At numbers of ordinary size, as `capture` tries, nothing overflows.
    """
    m = most * 0.6 / 1000
    net = filled(
        nn.Linear(6, 1),
        nn.ReLU(),
        nn.Linear(1, 1),
        nn.ReLU(),
        nn.Linear(1, 1),
        weights=[[-m, -m, -m, m, m, 1.3 * m], [1 / most], [-1.0]],
        biases=[[0.0], [0.1], [0.0]],
    )
    return net, torch.full((1, 6), 1000.0, dtype=torch.float64)


def maps_that_overflow(most: float) -> tuple[nn.Sequential, torch.Tensor]:
    """Convolutions: values and rows."""
    layers = (nn.Conv2d(1, 1, 2, bias=True), nn.ReLU(), nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1))
    m, big = most * 0.6 / 1000, math.sqrt(most) * 10
    net = filled(*layers, weights=[[-m, -m, m, m], [big / most], [-big] * 4], biases=[[1.0], [0.0], [0.0]])
    return net, torch.full((1, 1, 3, 3), 1000.0, dtype=torch.float64)


OVERFLOWS: dict[str, Callable[[float], tuple[nn.Sequential, torch.Tensor]]] = {
    "rows": rows_that_overflow,
    "sums": sums_that_overflow,
    "maps": maps_that_overflow,
}


@cache
def overflowing(name: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor, list[Fraction]]:
    """A network, an input, and the exact outputs at points of the box between it and its double."""
    net, x = OVERFLOWS[name](torch.finfo(dtype).max)
    net, x = net.to(dtype), x.to(dtype)
    return net, x, [exact(net, fractions(at[0]))[0] for at in (x, 2 * x, 1.5 * x)]


@each_relaxation
@each_rounding
@each_dtype
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_what_overflows_is_no_bound(name, rounding, dtype, overflow):
    """Never NaN, never on the wrong side, and no neuron is dead because its bounds are unknown."""
    net, x, values = overflowing(overflow, dtype)
    region, rows = ox.InputBox(x, 2 * x), torch.tensor([[1.0], [-1.0]], dtype=dtype)
    with torch.no_grad():
        low = ox.lower_bounds(net, region, rows, MAKE[name](), rounding=rounding)
        before = ox.preactivation_bounds(net, region, MAKE[name](), rounding=rounding)
    for row, bound in enumerate(low[0].tolist()):
        assert not math.isnan(bound)
        assert bound < math.inf
        least = min(v if row == 0 else -v for v in values)
        # To nearest: a relative error, of a number of ordinary size.
        room = 0 if rounding == "outward" else Fraction(1, 1000) * (1 + abs(least))
        assert bound == -math.inf or Fraction(bound) <= least + room
    for b in before.values():
        assert not bool(b.lower.isnan().any() | b.upper.isnan().any())
        assert bool((b.lower < math.inf).all() & (b.upper > -math.inf).all())


@cache
def overflowing_for_some() -> nn.Module:
    net, _ = rows_that_overflow(torch.finfo(torch.float32).max)
    with torch.no_grad():
        net[2].weight.mul_(1e-15)
        net[4].weight.mul_(1e15)
    return net.float()


@each_relaxation
def test_an_example_that_overflows_gives_no_gradient_and_leaves_the_others_theirs(name):
    """Never NaN, not even 0 times what is infinite on the way through the weights."""
    net = overflowing_for_some()
    x, rows = torch.tensor([[1e-25], [1e30]]), torch.eye(1)
    parameters = list(net.parameters())

    def gradient(at: torch.Tensor) -> list[torch.Tensor]:
        low = ox.lower_bounds(net, ox.InputBox(at, 2 * at), rows, MAKE[name]())
        both = ox.bounds(net, ox.InputBox(at, 2 * at), MAKE[name]())
        return list(torch.autograd.grad(low.sum() + both.lower.sum() + both.upper.sum(), parameters, allow_unused=True))

    assert ox.bounds(net, ox.InputBox(x, 2 * x), "box").lower.isfinite().flatten().tolist() == [True, False]
    for found, wanted in zip(gradient(x), gradient(x[:1]), strict=True):
        assert bool(found.isfinite().all())
        torch.testing.assert_close(found, wanted)


def windowed() -> nn.Module:
    """Convolutions with biases between activations, whose rows are windows."""
    norm, pool = nn.BatchNorm2d(2), nn.AvgPool2d(2, 1)
    layers = (nn.Conv2d(1, 2, 1), norm, nn.ReLU(), pool, nn.Conv2d(2, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    return nn.Sequential(*layers)


WINDOWED = NetworkCase("windows", windowed, (1, 4, 4))


@each_relaxation
@each_rounding
@pytest.mark.parametrize("max_bytes", [None, 1])
@pytest.mark.parametrize("net", ["strided conv", "max pool", "windows"])
def test_empty_batches_and_no_rows_have_bounds_of_their_shape(name, rounding, max_bytes, net):
    case, relaxation = BY_NAME.get(net, WINDOWED), MAKE[name]().changed(rounding=rounding)
    if name in LAYERS and case.max_pool:
        return
    network = case.network()
    whole = ox.LinfBall(inputs(case.input_shape, 2), 0.1)
    eye = torch.eye(network.outputs, dtype=torch.float64)
    if max_bytes is not None and hasattr(relaxation, "max_bytes"):
        relaxation = relaxation.changed(max_bytes=max_bytes)
    for region, rows in ((whole.select(slice(0, 0)), eye), (whole, eye[:0]), (whole.select(slice(0, 0)), eye[:0])):
        batch = region.shape[0]
        low = ox.lower_bounds(network, region, rows, relaxation)
        assert low.shape == (batch, len(rows))
        low.sum().backward()
    found = ox.bounds(network, whole.select(slice(0, 0)), relaxation)
    assert found.lower.shape == found.upper.shape == (0, *network.output_shape)
    before = ox.preactivation_bounds(network, whole.select(slice(0, 0)), relaxation)
    assert all(before[node.path].lower.shape == (0, *network.shape_of(node.inputs[0])) for node in network.activations)


# --- constants from the least denormal number to the greatest -----------------------------------------------------


def sizes(dtype: torch.dtype, count: int) -> torch.Tensor:
    """Numbers from the least denormal to the greatest, evenly spaced in size."""
    least, most = (-149, 127) if dtype == torch.float32 else (-1074, 1023)
    exponents = torch.linspace(least, most, count, dtype=torch.float64).round()
    return torch.ldexp(torch.linspace(1, 1.9, count, dtype=torch.float64), exponents).to(dtype)


def scales(dtype: torch.dtype, n: int) -> nn.Module:
    """Batch norms whose scale, mean * scale and shift are of every size; odd, so that sizes meet in other pairs."""
    net = nn.Sequential(nn.BatchNorm1d(n, eps=1e-5), nn.LeakyReLU(1e-46)).to(dtype).eval()
    some = sizes(dtype, n)
    with torch.no_grad():
        net[0].weight.copy_(some)
        net[0].running_var.copy_(some.flip(0)[torch.arange(n) * 5 % n])
        net[0].running_mean.copy_(some[torch.arange(n) * 3 % n])
        net[0].bias.copy_(-some[torch.arange(n) * 7 % n])
    return net


def matrices(dtype: torch.dtype, n: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n)).to(dtype).eval()
    some = sizes(dtype, n)
    with torch.no_grad():
        for i, layer in enumerate((net[0], net[2])):
            layer.weight.copy_(torch.diag(some[torch.arange(n) * (3 + 2 * i) % n] * (1 - 2 * i)))
            layer.bias.zero_()
    return net


def constants(dtype: torch.dtype, n: int) -> nn.Module:
    """Python numbers that the type does not hold, one after another."""
    net = nn.Sequential(
        Affinity(1e50, 1e30, 0.0),
        nn.LeakyReLU(1e-46),
        nn.Linear(n, n),
        nn.Hardtanh(-1e-46, 1e-46),
        Affinity(1e-30, 1, 0.1),
    )
    with torch.no_grad():
        net[2].weight.copy_(torch.eye(n) * 1e30)
        net[2].bias.zero_()
    return net.to(dtype).eval()


@cache
def of_every_size(
    build: Callable[[torch.dtype, int], nn.Module], dtype: torch.dtype
) -> tuple[nn.Module, torch.Tensor, list[list[Fraction]]]:
    """A network, inputs with one entry other than 0, and the exact outputs."""
    n = 11
    net, some = build(dtype, n), sizes(dtype, n)
    x = torch.cat([torch.diag(some), -torch.diag(some[torch.arange(n) * 4 % n])])
    return net, x, [exact(net, fractions(at)) for at in x]


@each_dtype
@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("build", [scales, matrices, constants])
def test_allowances_hold_for_numbers_of_every_size(name, build, dtype):
    """Rational values, one input other than 0 an example, so that no great one hides what a small one loses."""
    net, x, values = of_every_size(build, dtype)
    to_zero = ox.InputBox(x.clamp(max=0), x.clamp(min=0))
    with torch.no_grad():
        found = [ox.bounds(net, at, MAKE[name](), rounding="outward") for at in (ox.InputBox(x, x), to_zero)]
    for i, exactly in enumerate(values):
        for b in found:
            for low, high, v in zip(b.lower[i].tolist(), b.upper[i].tolist(), exactly, strict=True):
                assert low == -math.inf or Fraction(low) <= v
                assert high == math.inf or v <= Fraction(high)


class Summed(nn.Module):
    """A hidden activation of one number an example, without a dimension of its own."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.activation, self.last = nn.Linear(4, 5), activation, nn.Linear(1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.activation(torch.relu(self.first(x)).sum(1) - 0.7)[:, None])


@cache
def summed(activation: type[nn.Module]) -> tuple[nn.Module, ox.Network]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = Summed(activation()).double()
    return net, ox.capture(net, (4,))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("name", [*SOUND, *LAYERS])
def test_a_hidden_value_may_have_no_dimension(name, activation):
    net, network = summed(activation)
    region = ox.LinfBall(inputs((4,), 3), 0.2)
    y = net(random_points(region, 200).flatten(0, 1)).detach().unflatten(0, (200, 3))
    for rounding in ("nearest", "outward"):
        try:
            found = ox.bounds(network, region, MAKE[name](), rounding=rounding)
        except ox.UnsupportedOpError:
            assert activation is nn.Tanh
            return
        assert bool((found.lower <= y + 1e-9).all() & (y <= found.upper + 1e-9).all())
