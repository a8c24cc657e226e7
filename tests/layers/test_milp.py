"""The MILP solver's word, against another encoding and against enumeration; its points are replayed."""

import math

import oracles
import pytest
import torch
from cases import NETWORKS, inputs, random_points
from torch import nn

import optrelax as ox
from optrelax.layers.milp import Milp
from optrelax.relaxations import resolve

# A solver's absolute tolerances mean nothing where the weights are 1e-12 or 1e6.
ORDINARY = [case for case in NETWORKS if not case.max_pool and "weights of" not in case.name]
# The other encoding takes flat outputs.
EXACT = [case for case in ORDINARY if case.relu_only and case.name != "scalar output"]
OTHERS = [case for case in ORDINARY if case not in EXACT]


def question(case, eps: float = 0.1):
    """A network, one region, and rows [1, k, *output_shape]."""
    network = case.network()
    region = ox.LinfBall(inputs(case.input_shape, 1), eps, (0.0, 1.0))
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(3, network.outputs, generator=g, dtype=torch.float64)
    return network, region, rows


def shaped(network, rows):
    return rows.reshape(1, len(rows), *network.output_shape)


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_minima_equal_those_of_another_encoding(case):
    network, region, rows = question(case)
    with torch.no_grad():
        before = resolve("crown").preactivation_bounds(network, region)
    truth = oracles.minimum(network, region, rows, before, integer=True)[0]
    answer = Milp().minima(network, region, shaped(network, rows))
    torch.testing.assert_close(answer.lower, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answer.upper, truth, rtol=1e-5, atol=1e-5)
    assert answer.message == ""
    assert answer.point is not None
    assert bool(region.contains(answer.point[None]).all())
    with torch.no_grad():
        replayed = rows @ network(answer.point[None]).flatten()
    assert float(replayed.min()) == pytest.approx(float(answer.upper.min()), abs=1e-9)


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_other_activations_are_exact_too(case):
    """No point lies below the claimed minimum, and the minimum is attained."""
    network, region, rows = question(case)
    answer = Milp().minima(network, region, shaped(network, rows))
    torch.testing.assert_close(answer.lower, answer.upper, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        values = network(random_points(region, 2000)[:, 0]).reshape(2000, -1) @ rows.mT
    assert bool((values.amin(0) >= answer.lower - 1e-6).all())


def test_signs_stop_early_but_agree():
    case = EXACT[0]
    network, region, rows = question(case)
    answer = Milp().minima(network, region, shaped(network, rows))
    lifted = nn.Sequential(*network.module, nn.Linear(network.outputs, 3).double())
    with torch.no_grad():
        lifted[-1].weight.copy_(rows)
        lifted[-1].bias.copy_(0.01 - answer.lower)
    eye = torch.eye(3, dtype=torch.float64)[None]
    robust = Milp().decide(ox.capture(lifted, case.input_shape), region, eye)
    assert bool((robust.lower > 0).all())
    assert bool((robust.lower <= 0.01 + 1e-6).all())
    with torch.no_grad():
        lifted[-1].bias[1] -= 0.02
    broken = Milp().decide(ox.capture(lifted, case.input_shape), region, eye)
    assert float(broken.upper[1]) <= 0
    assert float(broken.lower[2]) == -math.inf  # never asked: the first counterexample ends it
    last = Milp().decide(ox.capture(lifted, case.input_shape), region, eye, order=[2, 0])
    assert float(last.upper.min()) > 0
    assert float(last.lower[1]) == -math.inf


def test_time_limit_is_kept_and_said():
    net = ox.models.fc(20, 40, 40, 40, 2, seed=0).double()
    region = ox.LinfBall(inputs((20,), 1), 0.5)
    rows = torch.eye(2, dtype=torch.float64)[None]
    answer = Milp(time_limit=0.05).minima(ox.capture(net, (20,)), region, rows)
    assert "open (time limit of 0.05 s)" in answer.message
    assert bool((answer.lower <= answer.upper).all())


def test_no_crossing_neuron_is_a_plain_lp():
    net = ox.models.fc(4, 6, 3, seed=0).double()
    with torch.no_grad():
        net[1].bias.fill_(50.0)
    region = ox.LinfBall(inputs((4,), 1), 0.1)
    answer = Milp().minima(ox.capture(net, (4,)), region, torch.eye(3, dtype=torch.float64)[None])
    expected = ox.bounds(net, region, relaxation="crown").lower[0].detach()  # exact without a crossing neuron
    torch.testing.assert_close(answer.lower, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(answer.upper, expected, rtol=1e-7, atol=1e-7)


def test_maxima_are_solved_exactly():
    """Never above the values on a grid, and attained."""
    network = ox.capture(nn.Sequential(nn.MaxPool1d(3, 2, 1), nn.Flatten()).double(), (1, 5))
    ends = torch.tensor([[-1.0, 0.5, -2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 1.5, 3.0]], dtype=torch.float64)
    region = ox.InputBox(ends[0].reshape(1, 1, 5), ends[1].reshape(1, 1, 5))
    rows = torch.tensor([[[1.0, 1.0, 1.0], [-1.0, 2.0, -1.0], [-1.0, -1.0, -1.0], [0.0, -1.0, 1.0]]]).double()
    grid = torch.cartesian_prod(*(torch.linspace(float(l), float(u), 7) for l, u in ends.mT))
    values = network(grid.double()[:, None]) @ rows[0].mT
    answer = Milp().minima(network, region, rows)
    assert (answer.lower <= values.amin(0) + 1e-6).all()
    torch.testing.assert_close(answer.lower, answer.upper, rtol=1e-6, atol=1e-6)


def test_unsupported_and_bad_options():
    with pytest.raises(ValueError, match="time_limit must be > 0 seconds, got 0"):
        Milp(time_limit=0)
    with pytest.raises(ValueError, match="threads must be >= 1, got 0"):
        Milp(threads=0)
    with pytest.raises(ValueError, match="an estimate, not a bound"):
        Milp(preactivation="cauchy")
