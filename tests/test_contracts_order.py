"""What holds between relaxations, along eps, along the weights, between directions, and between chunks."""

import itertools
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from cases import (
    BEST,
    BY_NAME,
    NETWORKS,
    PLAIN,
    RELAXATIONS,
    SOUND,
    every_region,
    inputs,
    specification,
)
from oracles import minimum
from torch import Tensor, nn

import optrelax as ox
from optrelax.domains import backsubstitution, zonotope
from optrelax.domains.lines import Lines
from optrelax.domains.zonotope import Walk
from optrelax.domains.zonotope_rows import frontier, project
from optrelax.relaxations import Relaxation, resolve

SMALL = ["fc", "deep fc", "functional residual", "strided conv", "residual conv", "batch norm", "average pool"]
each_small = pytest.mark.parametrize("name", SMALL)


def case_of(name: str) -> tuple[ox.Network, ox.InputBox, Tensor]:
    case = BY_NAME[name]
    network = case.network()
    return network, every_region(case.input_shape), specification(network.outputs)


# --- orders on equal pre-activation bounds ------------------------------------------------------------------------


def on_given_bounds(name: str, network: ox.Network, region: ox.InputBox, rows: Tensor, given: str) -> Tensor:
    """Lower bounds of rows by a zonotope relaxation whose lines take another relaxation's pre-activation bounds."""
    relaxation = resolve(name)
    before = iter(resolve(given).preactivation_bounds(network, region).values())

    def lines(activation: ox.Activation, l: Tensor, u: Tensor) -> Lines:
        bounds = next(before)  # a walk meets the activations in the order of the bounds
        return relaxation.lines(activation, bounds.lower, bounds.upper)

    walk = Walk(lines, relaxation.errors)
    kept = zonotope.propagate(network, region, walk, frontier(network)).kept
    center, radius = project(network, kept, rows[None], False)
    return center - radius


def assert_at_most(a: Tensor, b: Tensor) -> None:
    assert (a <= b + 1e-9 * b.abs().clamp_min(1)).all()


@each_small
def test_box_is_at_most_hbox(name):
    network, region, rows = case_of(name)
    with torch.no_grad():
        assert_at_most(ox.lower_bounds(network, region, rows, "box"), ox.lower_bounds(network, region, rows, "hbox"))


@each_small
@pytest.mark.parametrize("given", ["box", "crown"])
@pytest.mark.parametrize("slope", ["", "-diag", "-diag-c", "-switch"])
def test_new_errors_of_their_own_are_never_worse_than_an_interval(name, given, slope):
    """hbox-X <= deepz-X and hzono <= deepz on equal pre-activation bounds."""
    network, region, rows = case_of(name)
    deep = "deepz-box" if not slope else f"deepz{slope}"
    with torch.no_grad():
        for hybrid, full in ((f"hbox{slope}", deep), ("hzono", "deepz")):
            low = on_given_bounds(hybrid, network, region, rows, given)
            assert_at_most(low, on_given_bounds(full, network, region, rows, given))


def test_an_order_that_does_not_hold_is_not_held():
    """On their own bounds crown and deepz differ either way: the data can tell orders from accidents."""
    signs = set()
    for name in SMALL:
        network, region, rows = case_of(name)
        with torch.no_grad():
            gap = ox.lower_bounds(network, region, rows, "crown") - ox.lower_bounds(network, region, rows, "deepz")
        signs |= {bool((gap > 1e-6).any()), -1 if bool((gap < -1e-6).any()) else True}
    assert {True, -1} <= signs


@pytest.mark.parametrize("name", ["fc", "functional residual", "strided conv"])
@pytest.mark.parametrize("given", ["box", "intersect"])
def test_every_line_is_at_most_the_triangle_on_equal_bounds(name, given):
    case = BY_NAME[name]
    network = case.network()
    region = ox.LinfBall(inputs(case.input_shape, 1, seed=4), 0.25, clip=(0.0, 1.0))
    rows = specification(network.outputs, k=2)
    source = BEST() if given == "intersect" else ox.Box()
    with torch.no_grad():
        before = source.preactivation_bounds(network, region)
        triangle = minimum(network, region, rows, before, integer=False)
        for lower, tria, continuous in itertools.product((0, 1), (False, True), (False, True)):
            relaxation = ox.Crown(lower=lower, tria=tria, continuous=continuous, preactivation=source)
            assert_at_most(ox.lower_bounds(network, region, rows, relaxation), triangle)
        for relaxation in (ox.Crown(preactivation=source), ox.FastLin(preactivation=source)):
            assert_at_most(ox.lower_bounds(network, region, rows, relaxation), triangle)


# --- along eps ----------------------------------------------------------------------------------------------------


def along_eps(network: ox.Network, x: Tensor, eps: Tensor, rows: Tensor, relaxation: object) -> Tensor:
    """Lower bounds of rows around x [batch, ...] for every eps: [len(eps), batch, k]."""
    balls = x.expand(len(eps), *x.shape).flatten(0, 1)
    region = ox.LinfBall(balls, eps.to(x.dtype).repeat_interleave(len(x)))
    with torch.no_grad():
        return ox.lower_bounds(network, region, rows, relaxation).unflatten(0, (len(eps), len(x)))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [c for c in SOUND if c.monotone], ids=str)
@pytest.mark.parametrize("net", NETWORKS, ids=str)
def test_lower_bounds_fall_with_eps(case, net):
    network = net.network()
    rows = specification(network.outputs)
    found = along_eps(network, inputs(net.input_shape, 2, seed=6), torch.linspace(0, 0.6, 25), rows, case.make())
    assert (found[1:] <= found[:-1] + 1e-12 * float(found.abs().max())).all()


@pytest.mark.parametrize("name", ["crown", "crown-ibp", "hbox-switch", "crown-soft", "box-round"])
def test_others_do_rise_with_eps_somewhere(name):
    """The paper says which relaxations are not monotone: so they must not be flagged as such."""
    assert not next(c for c in RELAXATIONS if c.name == name).monotone
    for seed in range(6):
        network = BY_NAME["deep fc"].network(seed)
        x, rows = inputs((4,), 4, seed=seed), specification(3, k=6, seed=seed)
        steps = along_eps(network, x, torch.linspace(0, 0.8, 80), rows, name).diff(dim=0)
        if bool((steps > 1e-6).any()):
            return
    pytest.fail("it never rises")


# --- along the weights --------------------------------------------------------------------------------------------


class OneNeuron(nn.Module):
    """relu(x + b), and x itself kept beside it, so that rows see both; x in [-1, 1] makes l = b - 1 and u = b + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.spread, self.shift, self.join = (
            nn.Linear(1, 2).double(),
            nn.Parameter(torch.zeros(2).double()),
            nn.Linear(2, 1).double(),
        )
        with torch.no_grad():
            self.spread.weight.fill_(1.0)
            self.spread.bias.copy_(torch.tensor([0.0, 5.0]))  # the second neuron is always active

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.spread(x) + self.shift)


@cache
def one_neuron() -> ox.Network:
    return ox.capture(OneNeuron(), (1,))


def jump(relaxation: object, at: float) -> float:
    """Greatest change of any row's bound as the neuron's bias crosses `at` (by 1e-9 to either side)."""
    network = one_neuron()
    region = ox.InputBox(torch.tensor([[-1.0]]).double(), torch.tensor([[1.0]]).double())
    rows = torch.tensor([[1, 0], [-1, 0], [1, -1], [-1, 1], [1, -0.5], [-1, 0.5], [2, -1.5]]).double()
    found = []
    with torch.no_grad():
        for side in (-1e-9, 1e-9):
            network.module.shift[0] = at + side
            found.append(ox.lower_bounds(network, region, rows, relaxation))  # type: ignore[arg-type]
    return float((found[0] - found[1]).abs().max())


AT = {"l = 0": 1.0, "u = 0": -1.0, "|l| = |u|": 0.0}
# Where a bound may jump in the weights (paper.md); box-round does so at its grid.
JUMPS = {
    "hbox": {"l = 0"},
    "deepz-box": {"l = 0"},
    "crown-0": {"l = 0"},
    "deepz-slanted": {"l = 0"},
    "deepz-slanted:kappa=0.3": {"l = 0"},
    "hbox-diag": {"u = 0"},
    "deepz-diag": {"u = 0"},
    "crown-1": {"u = 0"},
    "crown-0-tria": {"l = 0", "u = 0"},
    "crown-1-tria": {"l = 0", "u = 0"},
    "crown": {"|l| = |u|"},
    "crown in chunks": {"|l| = |u|"},
    "crown-ibp": {"|l| = |u|"},
    "crown on the best of box and fast-lin": {"|l| = |u|"},
    "hbox-switch": {"|l| = |u|"},
    "deepz-switch": {"|l| = |u|"},
}


@pytest.mark.parametrize("case", SOUND, ids=str)
def test_a_bound_jumps_in_the_weights_where_the_paper_says_and_nowhere_else(case):
    if case.name.startswith("box-round"):
        # F = 10 (100), omega .5 (1): the ends move by omega at each multiple of 1 / F, here at l = -0.7.
        assert jump(case.make(), 0.3) > 0.1
        assert not case.continuous
        return
    found = {place for place, bias in AT.items() if jump(case.make(), bias) > 1e-6}
    assert found == JUMPS.get(case.name, set())
    assert case.continuous == (not found)
    assert jump(case.make(), 0.3) <= 1e-6


# --- one relaxation, several ways ---------------------------------------------------------------------------------

SLOPES = [
    {},
    {"slope": "box"},
    {"slope": "diag"},
    {"slope": "diag", "continuous": True},
    {"slope": "switch"},
    {"slope": "soft", "gamma": 3.0},
    {"slope": "slanted", "kappa": 0.7},
]


@pytest.mark.parametrize("options", SLOPES, ids=str)
@pytest.mark.parametrize("net", [n for n in NETWORKS if not n.max_pool], ids=str)
def test_zonotopes_are_the_same_forward_and_backward(net, options):
    network = net.network()
    region, rows = every_region(net.input_shape), specification(network.outputs)
    with torch.no_grad():
        found = [
            ox.lower_bounds(network, region, rows, ox.DeepZ(direction=d, **options)) for d in ("forward", "backward")
        ]
        before = [
            ox.preactivation_bounds(network, region, ox.DeepZ(direction=d, **options)) for d in ("forward", "backward")
        ]
    scale = max([float(found[0].abs().max()), 1e-300])
    assert float((found[0] - found[1]).abs().max()) <= 1e-10 * scale
    for path, bounds in before[0].items():
        scale = float(torch.maximum(bounds.lower.abs(), bounds.upper.abs()).max())
        for a, b in ((bounds.lower, before[1][path].lower), (bounds.upper, before[1][path].upper)):
            assert float((a - b).abs().max()) <= 1e-10 * scale


def direction_taken(network: ox.Network, rows: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which walk `auto` uses for so many rows."""
    taken = []
    substitute, propagate = backsubstitution.substitute, zonotope.propagate
    monkeypatch.setattr(
        backsubstitution, "substitute", lambda *a, **k: (taken.append("backward"), substitute(*a, **k))[1]
    )
    monkeypatch.setattr(zonotope, "propagate", lambda *a, **k: (taken.append("forward"), propagate(*a, **k))[1])
    region = ox.LinfBall(inputs(network.input_shape, 1), 0.1)
    with torch.no_grad():
        ox.lower_bounds(network, region, specification(network.outputs, k=rows), "deepz")
    return taken[0]


@pytest.mark.parametrize(
    ("widths", "rows", "expected"),
    [
        # Many inputs, few neurons: rows are fewer than noise terms.
        ((200, 8, 8, 3), 2, "backward"),
        # Few inputs, wide layers: noise terms are fewer than rows.
        ((3, 60, 60, 3), 20, "forward"),
        ((3, 4, 4, 2), 500, "forward"),
    ],
)
def test_deepz_takes_the_direction_with_fewer_multiply_adds(widths, rows, expected, monkeypatch):
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    network = ox.capture(nn.Sequential(*layers[:-1]).double(), (widths[0],))
    assert direction_taken(network, rows, monkeypatch) == expected


def test_the_first_layers_are_not_back_substituted(monkeypatch):
    """Their intervals are exact: rows are pulled from the second activation's input on."""
    network = BY_NAME["fc"].network()
    targets = []
    real = backsubstitution.substitute
    monkeypatch.setattr(
        backsubstitution,
        "substitute",
        lambda net, target, *a, **k: (targets.append(target), real(net, target, *a, **k))[1],
    )
    with torch.no_grad():
        ox.lower_bounds(network, every_region((5,)), specification(3), "crown")
    second, output = network.activations[1].inputs[0], network.output
    assert targets == [second, output]


@each_small
def test_intersect_is_the_best_of_each(name):
    network, region, rows = case_of(name)
    parts = [ox.Box(), ox.DeepZ(direction="forward"), ox.HBox(slope="chord")]
    with torch.no_grad():
        both = ox.Intersect(*parts)
        low = torch.stack([ox.lower_bounds(network, region, rows, p) for p in parts]).amax(0)
        torch.testing.assert_close(ox.lower_bounds(network, region, rows, both), low, rtol=0, atol=0)
        before = [ox.preactivation_bounds(network, region, p) for p in parts]
        for path, bounds in ox.preactivation_bounds(network, region, both).items():
            lower = torch.stack([b[path].lower for b in before]).amax(0)
            upper = torch.stack([b[path].upper for b in before]).amin(0)
            # Ends that rounding has parted are put in order again, part by part: they stay between the two.
            parted = lower > upper
            for got, best in ((bounds.lower, lower), (bounds.upper, upper)):
                assert bool((got == best)[~parted].all())
                assert bool(((got >= upper) & (got <= lower))[parted].all())
            torch.testing.assert_close(lower[parted], upper[parted], rtol=1e-12, atol=1e-12)


@dataclass(frozen=True, kw_only=True)
class _Given(Relaxation):
    """Pre-activation bounds that somebody else computed."""

    bounds: dict

    def preactivation_bounds(self, network, region):
        return self.bounds


@pytest.mark.parametrize(
    "dear", [ox.Crown(), ox.FastLin(), ox.Crown(rounding="outward")], ids=["crown", "fast-lin", "outward"]
)
@each_small
def test_rows_bound_the_neurons_that_box_leaves_crossing(name, dear):
    """Neuron by neuron against a relaxation that bounds all of one layer, on the same bounds before it."""
    network, region, rows = case_of(name)
    dear = resolve(dear)
    box = ox.Box(rounding=dear.rounding)
    both = ox.Intersect(box, dear)
    with torch.no_grad():
        given = box.preactivation_bounds(network, region)
        best = both.preactivation_bounds(network, region)
        for node in network.activations:
            known, source = given[node.name], node.inputs[0]
            before = network.ancestors(source)
            nodes = tuple(n for n in network.nodes if n.name in before)
            below = ox.Network(network.module, nodes, source, network.input_shape)
            known_before = {n: b for n, b in best.items() if n in before}
            lines = replace(dear, preactivation=_Given(bounds=known_before, rounding=dear.rounding))
            own = lines.output_bounds(below, region)
            crossing = node.op.crossing(known.lower, known.upper)
            for got, of_box, of_rows, worse in (
                (best[node.name].lower, known.lower, own.lower, torch.maximum),
                (best[node.name].upper, known.upper, own.upper, torch.minimum),
            ):
                assert bool((got == of_box)[~crossing].all())
                torch.testing.assert_close(got[crossing], worse(of_box, of_rows)[crossing], rtol=1e-6, atol=1e-9)
        ours = ox.lower_bounds(network, region, rows, both)
        assert bool((ours >= ox.lower_bounds(network, region, rows, box)).all())
        given = replace(dear, preactivation=_Given(bounds=best, rounding=dear.rounding))
        exact = ox.lower_bounds(network, region, rows, given)
        assert bool((ours >= exact - 1e-9 * (1 + exact.abs())).all())


@pytest.mark.parametrize(
    "relaxation",
    [ox.Crown(), ox.FastLin(), ox.DeepZ(direction="forward"), ox.DeepZ(direction="backward"), ox.HBox(), BEST()],
    ids=lambda r: type(r).__name__ + getattr(r, "direction", ""),
)
@pytest.mark.parametrize("name", ["residual conv", "max pool"])
def test_chunks_change_nothing(name, relaxation):
    """max_bytes: bounds and gradients, in weights, region and rows, are those of one piece."""
    case = BY_NAME[name]
    small = ox.Intersect(*relaxation.parts, max_bytes=60_000) if isinstance(relaxation, ox.Intersect) else None
    if small is None:
        small = type(relaxation)(**{**vars(relaxation), "max_bytes": 60_000})
    found = []
    for r in (relaxation, small):
        module = case.network()
        x = inputs(case.input_shape, 3).requires_grad_()
        eps = torch.tensor([0.05, 0.2, 0.4], dtype=torch.float64, requires_grad=True)
        rows = specification(3, batch=3).requires_grad_()
        low = ox.lower_bounds(module, ox.LinfBall(x, eps), rows, r)
        gradients = torch.autograd.grad(low.square().sum(), [x, eps, rows, *module.parameters()], allow_unused=True)
        found.append([low.detach(), *(g for g in gradients if g is not None)])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_chunks_refuse_weights_that_changed_before_the_backward_pass():
    """They are computed again in the backward pass: with other weights its gradient would be another network's."""
    net = BY_NAME["fc"].module()
    low = ox.lower_bounds(net, ox.LinfBall(inputs((5,), 2), 0.2), specification(3), ox.Crown(max_bytes=1))
    with torch.no_grad():
        net[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="max_bytes: the network's weights changed"):
        low.sum().backward()


@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("name", ["residual conv"])
def test_a_batch_is_a_stack_of_single_examples(case, name):
    net = BY_NAME[name]
    network, region = net.network(), every_region(net.input_shape)
    rows = specification(network.outputs, batch=len(region.lower))
    with torch.no_grad():
        low = ox.lower_bounds(network, region, rows, case.make())
        before = ox.preactivation_bounds(network, region, case.make())
        for i in (0, 9, 13):
            one = region.select(slice(i, i + 1))
            torch.testing.assert_close(
                ox.lower_bounds(network, one, rows[i : i + 1], case.make())[0], low[i], rtol=1e-10, atol=1e-11
            )
            for path, bounds in ox.preactivation_bounds(network, one, case.make()).items():
                torch.testing.assert_close(bounds.lower[0], before[path].lower[i], rtol=1e-10, atol=1e-11)
                torch.testing.assert_close(bounds.upper[0], before[path].upper[i], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_shapes_of_batches(case):
    """No examples, one example, and two batch dimensions; rows of the batch and rows for all."""
    network = BY_NAME["fc"].network()
    relaxation = case.make()
    rows = specification(3)
    for batch in ((0,), (1,), (2, 3)):
        x = torch.rand(*batch, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        region = ox.LinfBall(x, 0.2)
        with torch.no_grad():
            found = ox.bounds(network, region, relaxation)
            low = ox.lower_bounds(network, region, rows, relaxation)
            own = ox.lower_bounds(network, region, rows.expand(*batch, 4, 3), relaxation)
            before = ox.preactivation_bounds(network, region, relaxation)
        assert found.lower.shape == found.upper.shape == (*batch, 3)
        assert low.shape == own.shape == (*batch, 4)
        assert [b.lower.shape for b in before.values()] == [(*batch, 8), (*batch, 6)]
        torch.testing.assert_close(low, own)
        flat = ox.LinfBall(x.reshape(-1, 5), 0.2)
        with torch.no_grad():
            torch.testing.assert_close(ox.lower_bounds(network, flat, rows, relaxation).reshape(low.shape), low)


def test_no_rows_give_no_bounds():
    network = BY_NAME["fc"].network()
    for name in ("box", "hbox", "deepz", "crown"):
        assert ox.lower_bounds(network, every_region((5,)), torch.zeros(0, 3), name).shape == (14, 0)
