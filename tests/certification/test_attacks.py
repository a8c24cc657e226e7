"""The attack finds what enumeration and MILP find, and never leaves the region."""

import itertools

import pytest
import torch
from cases import BY_NAME, every_region, inputs, specification
from torch import Tensor, nn

import optrelax as ox
from optrelax.certification.attacks import PGD, find_counterexamples


def affine(weight: list[list[float]], bias: list[float]) -> nn.Sequential:
    """A linear network: its worst corner is known in closed form."""
    layer = nn.Linear(len(weight[0]), len(weight)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return nn.Sequential(layer)


def small(seed: int = 10) -> nn.Sequential:
    return ox.models.fc(4, 10, 8, 3, seed=seed).double()


def lattice(region: ox.InputBox, steps: int) -> Tensor:
    """Every point of a lattice over each example's box: [points, batch, n]."""
    axes = torch.linspace(0, 1, steps, dtype=region.dtype)
    t = torch.tensor(list(itertools.product(axes.tolist(), repeat=region.shape[1])), dtype=region.dtype)
    return region.lower + t[:, None] * (region.upper - region.lower)


def test_linear_network_gets_its_worst_corner():
    net = affine([[1.0, -2.0, 0.5], [0.0, 1.0, -1.0]], [9.0, 0.0])
    region = ox.InputBox(
        torch.tensor([[0.1, 0.0, -1.0]], dtype=torch.float64), torch.tensor([[0.2, 0.7, 4.0]], dtype=torch.float64)
    )
    found = find_counterexamples(net, region, ox.margins(torch.tensor([0]), 2))
    # margin = x0 - 3 x1 + 1.5 x2 + 9: least at (0.1, 0.7, -1)
    assert found.points[0].tolist() == pytest.approx([0.1, 0.7, -1.0], abs=1e-15)
    assert found.worst.item() == pytest.approx(0.1 - 2.1 - 1.5 + 9)
    assert found.found.tolist() == [False]


@pytest.mark.parametrize("name", list(BY_NAME))
def test_points_stay_inside_and_are_replayed(name):
    case = BY_NAME[name]
    network, region = case.network(), every_region(case.input_shape)
    outputs = network.outputs
    spec = specification(outputs, k=3, batch=len(region.lower))
    found = find_counterexamples(network, region, spec, PGD(restarts=2, steps=5))
    assert bool(region.contains(found.points).all())  # no tolerance
    values = (spec @ network.module(found.points).reshape(len(spec), -1)[..., None])[..., 0]
    torch.testing.assert_close(found.margins, values.detach())
    middle = (spec @ network.module(region.center).reshape(len(spec), -1)[..., None])[..., 0].amin(1)
    assert bool((found.worst <= middle + 1e-9 * middle.abs()).all())


def test_attack_reaches_what_a_lattice_reaches():
    net = small()
    x = inputs((4,), 12)
    region = ox.LinfBall(x, 0.2)
    spec = ox.margins(net(x).argmax(1), 3)
    points = lattice(region, 7)
    with torch.no_grad():
        outputs = net(points.flatten(0, 1)).unflatten(0, points.shape[:2])
    best = (spec.double() @ outputs[..., None])[..., 0].amin(-1).amin(0)
    found = find_counterexamples(net, region, spec, PGD(restarts=4, steps=60))
    # An example is given up for found as soon as a margin is <= 0, so only the others compare in value.
    robust = found.worst > 0
    assert int(robust.sum()) >= 2
    assert int((~robust).sum()) >= 2
    assert bool((found.worst <= best + 0.02)[robust].all())
    assert bool(found.found[best <= 0].all())


def test_more_targets_find_more_for_a_margin_that_starts_large():
    """The margin that is smallest at the centre cannot be closed; another one, larger there, can."""
    net = affine([[0.0, 0.0], [0.0, 0.1], [10.0, 0.0]], [1.0, 0.5, 0.0])
    region = ox.InputBox(torch.zeros(1, 2).double(), torch.tensor([[0.101, 0.2]]).double())
    spec = ox.margins(torch.tensor([0]), 3)
    # Margins 0.5 - 0.1 x1, which is never <= 0, and 1 - 10 x0: at the centre 0.49 and 0.495.
    one = find_counterexamples(net, region, spec, PGD(restarts=1, targets=1, steps=5))
    two = find_counterexamples(net, region, spec, PGD(restarts=1, targets=2, steps=5))
    assert one.worst.item() == pytest.approx(0.48)
    assert two.found.item()


def test_batch_equals_singles_and_seed_decides():
    net = small()
    x = inputs((4,), 6)
    region, spec = ox.LinfBall(x, 0.05), ox.margins(net(x).argmax(1), 3)
    network, flat, batch = ox.analysis.prepare(net, region)
    rows = ox.analysis.prepare_rows(network, spec, flat, batch)
    attack = PGD(restarts=3, steps=3, seed=7)
    whole = attack.search(network, flat, rows, keys=range(10, 16))
    for i in range(6):
        one = attack.search(network, flat.select(slice(i, i + 1)), rows[i : i + 1], keys=[10 + i])
        torch.testing.assert_close(one.points[0], whole.points[i])
    again = attack.search(network, flat, rows, keys=range(10, 16))
    assert torch.equal(again.points, whole.points)
    other = PGD(restarts=3, steps=0, seed=8).search(network, flat, rows)
    same = PGD(restarts=3, steps=0, seed=7).search(network, flat, rows)
    assert not torch.equal(other.points, same.points)


def test_no_global_generator_moves():
    net, x = small(), inputs((4,), 2)
    before = torch.get_rng_state()
    find_counterexamples(net, ox.LinfBall(x, 0.1), ox.margins(torch.tensor([0, 1]), 3))
    assert torch.equal(before, torch.get_rng_state())


def test_runs_under_no_grad_and_leaves_no_gradient():
    net, x = small(), inputs((4,), 2)
    with torch.no_grad():
        found = find_counterexamples(net, ox.LinfBall(x, 0.1), ox.margins(torch.tensor([0, 1]), 3))
    assert not found.margins.requires_grad
    assert not found.points.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_width_zero_and_nan_are_no_counterexamples():
    net, x = small(), inputs((4,), 2)
    label = net(x).argmax(1)
    found = find_counterexamples(net, ox.LinfBall(x, 0.0), ox.margins(label, 3))
    assert torch.equal(found.points, x)
    with torch.no_grad():
        net[-1].weight.fill_(torch.nan)
    found = find_counterexamples(net, ox.LinfBall(x, 0.1), ox.margins(label, 3))
    assert bool(found.worst.isnan().all())
    assert not bool(found.found.any())
    assert bool(ox.LinfBall(x, 0.1).contains(found.points).all())


def test_empty_batch():
    net = small()
    region = ox.LinfBall(torch.zeros(0, 4, dtype=torch.float64), 0.1)
    found = find_counterexamples(net, region, ox.margins(torch.zeros(0, dtype=torch.int64), 3))
    assert found.points.shape == (0, 4)
    assert found.margins.shape == (0, 2)


def test_extra_batch_dimensions():
    net = small()
    network = ox.capture(net, (4,))
    x = inputs((4,), 6).reshape(2, 3, 4)
    found = find_counterexamples(network, ox.LinfBall(x, 0.1), ox.margins(torch.zeros(2, 3, dtype=torch.int64), 3))
    assert found.points.shape == (2, 3, 4)
    assert found.worst.shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restarts": 0}, "PGD: restarts must be at least 1, got 0"),
        ({"steps": -1}, "PGD: steps must be at least 0, got -1"),
        ({"step": 0.0}, "PGD: step must be positive"),
        ({"step": float("nan")}, "PGD: step must be positive"),
        ({"targets": -1}, "PGD: targets must be at least 0, got -1"),
        ({"seed": -1}, "PGD: seed must be at least 0, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PGD(**options)


def test_keys_must_fit_the_batch():
    network = ox.capture(small(), (4,))
    region = ox.LinfBall(inputs((4,), 2), 0.1)
    with pytest.raises(ValueError, match="keys has 3 entries for a batch of 2"):
        PGD().search(network, region, torch.ones(1, 1, 3, dtype=torch.float64), keys=[1, 2, 3])
