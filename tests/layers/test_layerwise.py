"""The layerwise layer (LP-ALL): against HiGHS layer by layer, the exact optimum, and the orders that must hold."""

from __future__ import annotations

from dataclasses import replace

import oracles
import pytest
import torch
from cases import BY_NAME, inputs, random_points, specification
from lp_networks import QUESTIONS, answer, assert_close, before, layerwise_answer, layerwise_bounds, question
from torch import nn

import optrelax as ox
from optrelax.layers import DualAscent, Highs, InteriorPoint, Layerwise, Status, Triangle
from optrelax.relaxations import name_of, resolve

FOR_ALL = pytest.mark.parametrize("name", QUESTIONS)
ROUNDING = 1e-12


def solve(name: str, **options: object) -> ox.layers.Solution:
    q = question(name)
    with torch.no_grad():
        return Layerwise(**options).solve(q.network, q.region, q.rows)


@FOR_ALL
@pytest.mark.parametrize("solver", [InteriorPoint(), Highs()], ids=["ip", "highs"])
def test_values_and_bounds_are_those_of_highs_layer_by_layer(name, solver):
    found = solve(name, solver=solver)
    assert (found.status == Status.OPTIMAL).all()
    assert_close(found.lower, layerwise_answer(name), 2e-6)
    network = question(name).network
    assert set(found.preactivation) == {node.path for node in network.activations}
    for node in network.activations:
        b, wanted = found.preactivation[node.path], layerwise_bounds(name)[node.name]
        assert_close(b.lower, wanted.lower, 2e-6)
        assert_close(b.upper, wanted.upper, 2e-6)


@FOR_ALL
def test_by_default_it_is_sound_and_nearly_as_tight(name):
    found, wanted = solve(name), layerwise_answer(name)
    assert (found.lower <= wanted + ROUNDING * wanted.abs().clamp_min(1)).all()
    # Bounds a little looser layer by layer: a few tolerances in all.
    assert_close(found.lower, wanted, 2e-3)
    for path, b in found.preactivation.items():
        start = before(name, "default")[path]
        assert (b.lower >= start.lower).all()
        assert (b.upper <= start.upper).all()


@FOR_ALL
def test_never_below_the_triangle_on_equal_starting_bounds(name):
    assert (layerwise_answer(name) >= answer(name) - 1e-9).all()
    layerwise, triangle = solve(name, solver=Highs()), answer(name)
    assert (layerwise.lower >= triangle - 1e-9 * triangle.abs().clamp_min(1)).all()


def test_the_questions_put_it_to_the_test():
    gains = [float((layerwise_answer(name) - answer(name)).max()) for name in QUESTIONS]
    assert sum(gain > 1e-3 for gain in gains) >= 8


@pytest.mark.parametrize("name", ["fc, eps 1", "functional residual, eps 0.3", "deep residual, eps 0.4"])
def test_never_above_the_exact_optimum(name):
    q = question(name)
    exact = oracles.minimum(q.network, q.region, q.rows, layerwise_bounds(name), integer=True)
    found = solve(name, solver=Highs())
    assert (found.lower <= exact + 1e-6 * exact.abs().clamp_min(1)).all()
    assert (exact - found.lower > 1e-3).any()


def test_stable_neurons_keep_the_bounds_they_came_with():
    for name in ("fc, eps 1", "relu6 and hardtanh, eps 0.5"):
        network = question(name).network
        for solver in (DualAscent(), Highs()):
            found = solve(name, solver=solver).preactivation
            for node in network.activations[1:]:
                start = before(name, "default")[node.path]
                stable = ~node.op.crossing(start.lower, start.upper)
                assert stable.any() or name.startswith("fc")
                assert torch.equal(found[node.path].lower[stable], start.lower[stable])
                assert torch.equal(found[node.path].upper[stable], start.upper[stable])


@FOR_ALL
def test_hidden_values_lie_inside(name):
    q = question(name)
    x = random_points(q.region, 40)
    with torch.no_grad():
        values = q.network.values(x.flatten(0, 1))
        rows = q.network(x.flatten(0, 1)).reshape(*x.shape[:2], -1) @ q.rows.mT
    found = solve(name)
    assert (found.lower <= rows + 1e-11).all()
    for node in q.network.activations:
        z, b = values[node.inputs[0]].reshape(*x.shape[:2], *node.shape), found.preactivation[node.path]
        assert (z >= b.lower - 1e-11).all()
        assert (z <= b.upper + 1e-11).all()


def test_other_starting_bounds_only_say_which_neurons_cross():
    """Wider boxes at the start, the same optimum wherever every neuron that matters is solved anyway."""
    q = question("deep residual, eps 0.4")
    with torch.no_grad():
        found = {
            start: Layerwise(preactivation=start, solver=Highs()).solve(q.network, q.region, q.rows).lower
            for start in ("box", "crown", "fast-lin")
        }
    assert_close(found["box"], found["crown"], 1e-7)
    assert_close(found["fast-lin"], found["crown"], 1e-7)


def test_lower_bounds_fall_with_eps():
    case = BY_NAME["fc"]
    net, x, rows = case.module(), inputs(case.input_shape, 3), specification(3)
    last = None
    for eps in (0.0, 0.1, 0.3, 0.6, 1.0):
        with torch.no_grad():
            found = Layerwise(solver=Highs()).solve(net, ox.LinfBall(x, eps), rows).lower
        assert last is None or (found <= last + 1e-9).all()
        last = found


def test_as_a_relaxation():
    q = question("fc, eps 1")
    with torch.no_grad():
        exact = Layerwise(solver=Highs())
        low = ox.lower_bounds(q.network, q.region, q.rows, exact)
        both = ox.bounds(q.network, q.region, exact)
        hidden = ox.preactivation_bounds(q.network, q.region, exact)
    assert_close(low, layerwise_answer("fc, eps 1"), 1e-8)
    found = solve("fc, eps 1", solver=Highs())
    for path, b in found.preactivation.items():
        assert torch.equal(hidden[path].lower, b.lower)
        assert torch.equal(hidden[path].upper, b.upper)
    for row, end in ((torch.eye(3), both.lower), (-torch.eye(3), -both.upper)):
        with torch.no_grad():
            assert_close(end, exact.solve(q.network, q.region, row.double()).lower, 1e-9)
    assert resolve("layerwise") == Layerwise()
    assert name_of(Layerwise()) == "layerwise"


def test_batches_and_memory_limits_change_nothing_beyond_rounding():
    name = "trained conv, eps 0.05"
    q = question(name)
    whole = solve(name, solver=InteriorPoint())
    small = solve(name, solver=InteriorPoint(), max_bytes=30_000)
    assert_close(small.lower, whole.lower, 1e-6)
    for i in range(2):
        with torch.no_grad():
            one = Layerwise(solver=InteriorPoint()).solve(q.network, q.region.select(slice(i, i + 1)), q.rows)
        assert_close(one.lower[0], whole.lower[i], 1e-6)
        for path, b in one.preactivation.items():
            assert_close(b.lower[0], whole.preactivation[path].lower[i], 1e-6)


def test_more_than_one_batch_dimension():
    q = question("fc, eps 1")
    wide = ox.InputBox(q.region.lower[:, None], q.region.upper[:, None])
    with torch.no_grad():
        found = Layerwise().solve(q.network, wide, q.rows)
    flat = solve("fc, eps 1")
    assert torch.equal(found.lower, flat.lower[:, None])
    for path, b in found.preactivation.items():
        assert torch.equal(b.lower, flat.preactivation[path].lower[:, None])


def test_an_empty_batch():
    q = question("fc, eps 1")
    for solver in (DualAscent(), InteriorPoint(), Highs()):
        found = Layerwise(solver=solver).solve(q.network, q.region.select(slice(0, 0)), q.rows)
        assert found.lower.shape == (0, 3)
        assert all(b.lower.shape[0] == 0 for b in found.preactivation.values())


def test_warm_start_of_the_rows():
    name = "deep residual, eps 0.4"
    q = question(name)
    layer = Layerwise(solver=DualAscent(tol=1e-5))
    with torch.no_grad():
        first = layer.solve(q.network, q.region, q.rows)
        again = layer.solve(q.network, q.region, q.rows, start=first)
    assert again.iterations.sum() < first.iterations.sum()
    assert (again.lower >= first.lower - ROUNDING).all()
    with pytest.raises(ValueError, match="start: has the bounds of"):
        layer.solve(q.network, q.region, q.rows[:1], start=first)


def test_outward_is_sound_and_close():
    for name in ("fc, eps 1", "functional residual, eps 0.3"):
        found, wanted = solve(name, rounding="outward", solver=Highs()), layerwise_answer(name)
        assert (found.lower <= wanted).all()
        assert_close(found.lower, wanted, 1e-8)


@pytest.mark.parametrize("solver", [DualAscent(), InteriorPoint(), Highs()], ids=["ascent", "ip", "highs"])
def test_degenerate_networks(solver):
    for name, eps in (("dead layer", 0.3), ("always active layer", 0.3), ("fc", 0.0), ("affine only", 0.3)):
        case = BY_NAME[name]
        net, x, rows = case.module(), inputs(case.input_shape, 2), specification(3)
        region = ox.LinfBall(x, eps)
        found = Layerwise(solver=solver).solve(net, region, rows)
        assert (found.status == Status.OPTIMAL).all()
        triangle = Triangle(solver=Highs()).solve(net, region, rows)
        assert_close(found.lower, triangle.lower.detach(), 1e-4)
        if found.lower.requires_grad:
            found.lower.sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_a_neuron_that_the_lp_finds_stable_stays_consistent():
    """Bounds that close in on a kink leave the next layers a neuron that no longer crosses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    region = ox.LinfBall(inputs((3,), 1), 1.0)
    with torch.no_grad():
        box = ox.preactivation_bounds(net, region, "box")["3"]
        tight = ox.preactivation_bounds(net, region, Layerwise(solver=Highs()))["3"]
        # The bias that puts the LP's lower bound at 0, where the box still crosses.
        net[2].bias[0] -= tight.lower[0, 0]
        found = Layerwise(solver=Highs(), preactivation="box").solve(net, region, torch.eye(2).double())
    assert box.lower[0, 0] - tight.lower[0, 0] < -1e-3
    assert abs(float(found.preactivation["3"].lower[0, 0])) < 1e-12
    assert (found.status == Status.OPTIMAL).all()


def test_replaced_options():
    layer = replace(Layerwise(), solver=Highs(), preactivation="box")
    assert layer == Layerwise(solver=Highs(), preactivation=ox.Box())
    assert layer.eval().training is False
