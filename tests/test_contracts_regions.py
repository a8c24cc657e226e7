"""Regions: their contract, and every relaxation over every kind: sound, exact on affine networks, or a refusal."""

import pytest
import torch
from cases import BY_NAME, KINDS, PLAIN, RegionCase, inputs, specification
from oracles import fractions

import optrelax as ox
from optrelax.errors import UnsupportedRegionError
from optrelax.layers import InteriorPoint, Layerwise, Triangle
from optrelax.regions import Region
from optrelax.rounding import down, gamma, underflow

each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def region_of(kind: RegionCase, shape: tuple[int, ...] = (5,), batch: int = 2, seed: int = 0) -> Region:
    generator = torch.Generator().manual_seed(7)
    return kind.make(inputs(shape, batch, seed), generator)


def points_of(region: Region, count: int = 40) -> torch.Tensor:
    """Random points of a region, and those that random rows take, all inside: [points, batch, *input_shape]."""
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(1, 12, *region.shape[1:], generator=g, dtype=region.dtype)
    found = torch.cat([region.sample(count, g), region.lowest(rows).transpose(0, 1)])
    return torch.stack([region.project(x) for x in found])


@each_kind
def test_no_point_is_below_the_support_function_in_exact_arithmetic(kind):
    region = region_of(kind)
    rows = torch.randn(1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rows[0, 1, :3] = 0
    rows[0, 2, 1:] = rows[0, 2, 0]  # ties
    value, magnitude, terms = region.outward_support(rows)
    assert (magnitude >= 0).all()
    low = down(value - gamma(terms + 2, value.dtype) * magnitude - underflow(terms + 2, value.dtype))
    for x in points_of(region):
        assert region.contains(x).all()
        exact = fractions(x) @ fractions(rows[0]).T
        assert (exact >= fractions(low)).all()


@each_kind
def test_a_point_attains_the_support_function(kind):
    region = region_of(kind)
    rows = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    value = region.support(rows)
    taken = region.lowest(rows)
    torch.testing.assert_close((taken * rows).sum(2), value, rtol=1e-6, atol=1e-6)
    assert ((region.outward_support(rows).value - value).abs() <= 1e-6).all()
    low, high = region.extent(rows)
    torch.testing.assert_close(low, value)
    torch.testing.assert_close(high, -region.support(-rows))
    # The rows of a batch and rows for all are one thing.
    torch.testing.assert_close(region.support(rows[:1])[0], value[0])
    box = region.box(outward=True)
    assert ((taken >= box.lower[:, None] - 1e-9) & (taken <= box.upper[:, None] + 1e-9)).all()


@each_kind
def test_a_batch_is_a_stack_of_singles_and_an_empty_one_is_one(kind):
    region = region_of(kind, batch=3)
    rows = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    whole = region.support(rows)
    for i in range(3):
        one = region.select(slice(i, i + 1))
        torch.testing.assert_close(one.support(rows[i : i + 1]), whole[i : i + 1], rtol=1e-9, atol=1e-9)
    none = region.select(slice(0, 0))
    assert none.support(rows[:0]).shape == (0, 2)
    assert none.lowest(rows[:0]).shape == (0, 2, 5)
    assert none.contains(none.center).shape == (0,)


@each_kind
def test_in_float32_it_holds_the_region_of_float64(kind):
    region = region_of(kind)
    if isinstance(region, ox.ChoiceBox) and any((c.values != c.values.float()).any() for c in region.choices):
        with pytest.raises(ValueError, match="would round values"):
            region.outward().enclosing(torch.float32)
        return
    wide = region.outward().enclosing(torch.float32).to(torch.float64)
    for x in points_of(region):
        rows = torch.randn(1, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
        assert (wide.outward_support(rows).value - 1e-12 <= (x[:, None] * rows).sum(2)).all()


@each_kind
def test_gradients_are_those_of_finite_differences(kind):
    x = inputs((4,), 2).mul_(0.8).add_(0.1).requires_grad_()
    rows = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(8), requires_grad=True)

    def support(x, rows):
        return kind.make(x, torch.Generator().manual_seed(7)).support(rows)

    if kind.name.startswith("point"):  # the radius 0 leaves the box: x alone moves
        rows = rows.detach()
    assert torch.autograd.gradcheck(support, (x, rows), atol=1e-5, eps=1e-6)


REFUSED = {"cauchy": "cauchy", "deepz forward": "direction=forward", "deepz forward in chunks": "direction=forward"}


@each_kind
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_every_relaxation_bounds_every_kind_or_refuses_it_in_one_sentence(case, kind):
    net = BY_NAME["fc"].network()
    region = region_of(kind)
    rows = specification(3)
    relaxation = case.make()
    if case.name in REFUSED:
        with pytest.raises(UnsupportedRegionError, match=f"{REFUSED[case.name]}.*got {type(region).__name__}; .+"):
            ox.lower_bounds(net, region, rows, relaxation)
        return
    with torch.no_grad():
        points = points_of(region, 30)
        value = net.module(points.flatten(0, 1)).unflatten(0, points.shape[:2]) @ rows.mT
        low = ox.lower_bounds(net, region, rows, relaxation)
        assert (low - 1e-9 <= value).all()
        for name, bounds in ox.preactivation_bounds(net, region, relaxation).items():
            before = net.values(points.flatten(0, 1))[_source(net, name)].unflatten(0, points.shape[:2])
            assert ((before >= bounds.lower - 1e-9) & (before <= bounds.upper + 1e-9)).all()
        if case.tight_at_points and kind.name.startswith("point"):
            torch.testing.assert_close(low, value[0], rtol=1e-9, atol=1e-9)


def _source(net: ox.Network, path: str) -> str:
    return next(node.inputs[0] for node in net.activations if node.path == path)


@pytest.mark.parametrize("layer", [Triangle, Layerwise], ids=lambda c: c.__name__)
def test_layers_over_choices_in_float32(layer):
    net, x = ox.models.fc(4, 6, 3, seed=0), torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    region = ox.ChoiceBox(x - 0.1, x + 0.1, {0: torch.tensor([0.0, 1.0])})
    with torch.no_grad():
        low = layer(rounding="outward").lower_bounds(ox.capture(net, (4,)), region, torch.eye(3)[None])
        assert low.dtype == torch.float32
        for value in (0.0, 1.0):
            assert (low <= net(x.index_fill(1, torch.tensor([0]), value))).all()


@each_kind
def test_on_an_affine_network_bounds_are_exact(kind):
    net = BY_NAME["affine only"].network()
    region = region_of(kind, (4,))
    rows = specification(3)
    matrix = torch.func.jacrev(lambda v: net.module(v[None])[0])(torch.zeros(4, dtype=torch.float64)).detach()
    constant = net.module(torch.zeros(1, 4, dtype=torch.float64)).detach()[0]
    exact = region.support((rows @ matrix)[None]) + rows @ constant
    with torch.no_grad():
        for name in ("box", "hbox", "deepz", "fast-lin", "crown", "crown-ibp", "alpha-crown", "triangle", "layerwise"):
            torch.testing.assert_close(ox.lower_bounds(net, region, rows, name), exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["l2 ball", "clipped l2 ball", "clipped l1 ball"])
@pytest.mark.parametrize("layer", [Triangle, Layerwise], ids=lambda c: c.__name__)
def test_linear_programs_are_above_closed_forms_and_below_every_point(name, layer):
    kind = next(k for k in KINDS if k.name == name)
    net, region, rows = BY_NAME["fc"].network(), region_of(kind), specification(3)
    with torch.no_grad():
        points = points_of(region)
        value = net.module(points.flatten(0, 1)).unflatten(0, points.shape[:2]) @ rows.mT
        found = layer(preactivation=ox.Crown()).solve(net, region, rows)
        assert (found.lower <= value.amin(0) + 1e-9).all()
        assert (found.lower >= ox.lower_bounds(net, region, rows, "crown") - 1e-6).all()
        assert (found.gap >= -1e-9).all()
        outward = layer(preactivation=ox.Crown(), rounding="outward").solve(net, region, rows)
        torch.testing.assert_close(outward.lower, found.lower, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("net", ["strided conv", "grouped conv", "max pool", "functional residual"])
def test_other_networks_over_balls(net):
    case = BY_NAME[net]
    network = case.network()
    rows = specification(network.outputs)
    for kind in KINDS[1], KINDS[3]:
        region = region_of(kind, case.input_shape)
        with torch.no_grad():
            points = points_of(region, 30)
            value = network.module(points.flatten(0, 1)).unflatten(0, points.shape[:2]) @ rows.mT
            for name in ("box", "deepz", "fast-lin", "crown", "crown-ibp"):
                for rounding in ("nearest", "outward"):
                    low = ox.lower_bounds(network, region, rows, name, rounding=rounding)
                    assert (low - (1e-9 if rounding == "nearest" else 0) <= value).all(), (name, rounding)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_an_attack_stays_in_the_ball_and_meets_the_bound_of_an_affine_network(norm):
    net = BY_NAME["affine only"].network()
    x = inputs((4,), 3)
    region = {"l2": ox.L2Ball, "l1": ox.L1Ball}[norm](x, 0.7, clip=(0.0, 1.0))
    rows = specification(3, k=1)
    found = ox.PGD(steps=40).search(net, region, rows[None])
    assert region.contains(found.points).all()
    with torch.no_grad():
        low = ox.lower_bounds(net, region, rows, "crown")
    left = ~found.found
    torch.testing.assert_close(found.margins[left], low[left], rtol=1e-3, atol=1e-3)


def test_the_solver_that_wants_boxes_says_so():
    net, x = BY_NAME["fc"].network(), inputs((5,), 1)
    with pytest.raises(UnsupportedRegionError, match=r"takes boxes .* got L2Ball; .*DualAscent"):
        Triangle(solver=InteriorPoint()).solve(net, ox.L2Ball(x, 0.3), specification(3))
