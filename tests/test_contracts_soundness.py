"""Soundness: no point of a region, no attack and no exact optimum lies outside of any sound relaxation's bounds."""

import itertools
from functools import cache

import pytest
import torch
from cases import (
    BY_NAME,
    CLOSED_FORMS,
    NETWORKS,
    REGIONS,
    RELAXATIONS,
    SOUND,
    corners,
    every_region,
    inputs,
    random_points,
    sampled,
    specification,
)
from oracles import minimum

import optrelax as ox
from optrelax.relaxations import names, resolve

each_sound = pytest.mark.parametrize("case", SOUND, ids=str)
POINT = [region.name for region in REGIONS].index("eps of 0")
each_network = pytest.mark.parametrize("net", NETWORKS, ids=str)


def where(wrong: torch.Tensor) -> str:
    """The regions in which an entry of [points, batch, ...] is true."""
    examples = wrong.reshape(*wrong.shape[:2], -1).any(2).any(0).nonzero()[:, 0].tolist()
    return f"regions {sorted({REGIONS[i // 2].name for i in examples})}"


def every_row(outputs: int) -> torch.Tensor:
    """Each output from below and from above, and random rows: [k, outputs]."""
    eye = torch.eye(outputs, dtype=torch.float64)
    return torch.cat([eye, -eye, specification(outputs)])


@each_network
@each_sound
def test_no_point_of_a_region_escapes(case, net):
    s = sampled(net.name)
    relaxation = case.make()
    rows = every_row(s.network.outputs)
    values = s.outputs.reshape(*s.outputs.shape[:2], -1) @ rows.mT
    with torch.no_grad():
        low = ox.lower_bounds(s.network, s.region, rows, relaxation)
        before = ox.preactivation_bounds(s.network, s.region, relaxation)
    size = max(float(v.abs().max()) for v in (s.outputs, *s.preactivation.values()))
    slack = 1e-11 * size * rows.abs().sum(1)
    assert (low - slack <= values).all(), where(low - slack > values)
    for node in s.network.activations:
        value, bounds = s.preactivation[node.name], before[node.path]
        slack = 1e-11 * value.abs().amax()
        outside = (value < bounds.lower - slack) | (value > bounds.upper + slack)
        assert not outside.any(), f"before {node.path}, {where(outside)}"
    if case.tight_at_points:  # eps = 0: the bound is the output to rounding
        points = slice(2 * POINT, 2 * POINT + 2)
        torch.testing.assert_close(low[points], values[0, points], rtol=1e-11, atol=1e-11 * size)


@cache
def in_float32(name: str) -> tuple[ox.Network, ox.InputBox, torch.Tensor, dict[str, torch.Tensor]]:
    """A float32 network, a float32 region, and what float64 makes of points of just that region: output, inside."""
    net = BY_NAME[name]
    network = ox.capture(net.module(), net.input_shape)
    region = every_region(net.input_shape)
    region = ox.InputBox(region.lower.float(), region.upper.float())
    exact = ox.InputBox(region.lower.double(), region.upper.double())
    points = torch.cat([random_points(exact, 25), corners(exact, 25)])
    network.module.float().double()  # the float32 numbers in float64
    with torch.no_grad():
        values = network.values(points.flatten(0, 1))
        kept = {node.name: values[node.inputs[0]].unflatten(0, points.shape[:2]) for node in network.activations}
        output = network.module(points.flatten(0, 1)).reshape(*points.shape[:2], -1)
    network.module.float()
    return network, region, output, kept


@pytest.mark.parametrize("net", [n for n in NETWORKS if n.in_float32], ids=str)
@each_sound
def test_rounded_outward_in_float32_nothing_escapes_and_there_is_no_tolerance(case, net):
    network, region, output, kept = in_float32(net.name)
    rows = every_row(network.outputs).float()
    with torch.no_grad():
        low = ox.lower_bounds(network, region, rows, case.make(), rounding="outward")
        before = ox.preactivation_bounds(network, region, case.make(), rounding="outward")
    assert low.dtype == torch.float32
    value = output @ rows.double().mT
    assert (low.double() <= value).all(), where(low.double() > value)
    for node in network.activations:
        value, bounds = kept[node.name], before[node.path]
        outside = (value < bounds.lower.double()) | (value > bounds.upper.double())
        assert not outside.any(), f"before {node.path}, {where(outside)}"


@each_network
def test_bounds_are_the_lower_bounds_of_either_sign(net):
    """`bounds` and `lower_bounds` are one thing: rows e_i and -e_i."""
    network = net.network()
    region = every_region(net.input_shape)
    eye = torch.eye(network.outputs, dtype=torch.float64)
    for name in ("box", "hbox", "deepz", "crown", "crown-1-c", "fast-lin"):
        with torch.no_grad():
            found = ox.bounds(network, region, name)
            low, high = (ox.lower_bounds(network, region, r, name).reshape(found.lower.shape) for r in (eye, -eye))
        slack = {"rtol": 1e-11, "atol": 1e-11 * float(found.upper.abs().max())}
        torch.testing.assert_close(found.lower, low, **slack)
        torch.testing.assert_close(found.upper, -high, **slack)


# Dense enough in crossing neurons that the relaxations differ, small enough for an exact answer in no time.
EXACT = ["fc", "deep fc", "functional residual", "strided conv", "shared layers", "batch norm"]


@pytest.fixture(scope="module", params=EXACT)
def exact_optimum(request):
    """Network, region, rows and the least value of each row by MILP."""
    case = BY_NAME[request.param]
    network = case.network()
    region = ox.LinfBall(inputs(case.input_shape, 2, seed=3), 0.3, clip=(0.0, 1.0))
    rows = specification(network.outputs, k=2)
    with torch.no_grad():
        pre = resolve("box").preactivation_bounds(network, region)
        return network, region, rows, minimum(network, region, rows, pre, integer=True)


@each_sound
def test_the_exact_optimum_is_never_beaten(case, exact_optimum):
    network, region, rows, optimum = exact_optimum
    with torch.no_grad():
        low = ox.lower_bounds(network, region, rows, case.make())
    assert (low <= optimum + 1e-6 * optimum.abs().clamp_min(1)).all()


@each_sound
def test_every_closed_form_is_at_most_the_triangle_on_its_own_bounds(case, exact_optimum):
    network, region, rows, optimum = exact_optimum
    relaxation = case.make()
    with torch.no_grad():
        before = relaxation.preactivation_bounds(network, region)
        low = ox.lower_bounds(network, region, rows, relaxation)
    triangle = minimum(network, region, rows, before, integer=False)
    assert (low <= triangle + 1e-7 * triangle.abs().clamp_min(1)).all()
    assert (triangle <= optimum + 1e-6 * optimum.abs().clamp_min(1)).all()


@cache
def stable() -> torch.nn.Module:
    net = BY_NAME["always active layer"].module()
    torch.nn.init.constant_(net[2].bias, 50.0)
    return net


@each_sound
def test_without_a_crossing_neuron_only_the_input_loses(case):
    """With every neuron stable and kept exact the network is affine, and the bound its exact minimum."""
    if case.name.startswith(("box", "hbox-diag-c", "deepz-diag-c")) or case.name.endswith("-c"):
        return
    net = stable()
    region = ox.LinfBall(inputs((4,), 2), 0.2)
    matrix, x = torch.eye(4, dtype=torch.float64), region.center
    with torch.no_grad():
        for i in (0, 2, 4):
            matrix = net[i].weight @ matrix
        value = net(x)
        found = ox.bounds(net, region, case.make())
    radius = region.radius @ matrix.abs().mT
    torch.testing.assert_close(found.lower, value - radius, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.upper, value + radius, rtol=1e-10, atol=1e-10)


@each_sound
@pytest.mark.parametrize("net", ["fc", "strided conv", "batch norm"])
def test_bounds_before_the_first_activation_are_exact(case, net):
    """The first affine layers' intervals are attained, at corners: nothing is back-substituted there."""
    if case.name.startswith(("box-widen", "box-round")):
        return
    case_net = BY_NAME[net]
    network = case_net.network()
    first = network.activations[0]
    region = ox.LinfBall(inputs(case_net.input_shape, 2), 0.2)
    with torch.no_grad():
        before = ox.preactivation_bounds(network, region, case.make())[first.path]
        eye = torch.eye(region.lower[0].numel(), dtype=torch.float64).reshape(-1, *network.input_shape)
        zero = network.values(torch.zeros_like(eye[:1]))[first.inputs[0]]
        matrix = (network.values(eye)[first.inputs[0]] - zero).flatten(1).mT
        value = network.values(region.center)[first.inputs[0]]
    radius = (region.radius.flatten(1) @ matrix.abs().mT).reshape(value.shape)
    torch.testing.assert_close(before.lower, value - radius, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(before.upper, value + radius, rtol=1e-11, atol=1e-11)


def test_the_registry_holds_every_closed_form():
    """A name without a row here has no contract."""
    rows = {case.name.partition(":")[0] for case in RELAXATIONS}
    assert set(CLOSED_FORMS) <= rows
    assert set(CLOSED_FORMS) <= set(names())


@pytest.mark.parametrize("case", RELAXATIONS, ids=str)
def test_each_relaxation_says_whether_it_is_sound(case):
    assert case.make().sound is case.sound


def test_an_estimate_is_no_bound():
    """cauchy: declared unsound because it is: some point escapes from it."""
    escaped = 0
    for seed, name in itertools.product(range(4), ("fc", "deep fc")):
        s = sampled(name)
        with torch.no_grad():
            found = ox.bounds(s.network, s.region, ox.Cauchy(k=3, seed=seed))
        escaped += int((s.outputs < found.lower).any() or (s.outputs > found.upper).any())
    assert escaped > 0
