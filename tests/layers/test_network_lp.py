"""The exported LP and MILP of a network: against enumeration, another encoding, and points of the network."""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from cases import BY_NAME, NETWORKS, RELU_NETWORKS, every_region, inputs, random_points, specification
from lp_networks import optimum
from scipy.optimize import Bounds as Limits
from scipy.optimize import LinearConstraint, linprog, milp
from torch import Tensor, nn

import optrelax as ox
from optrelax.layers.network_lp import NetworkLP, export
from optrelax.networks.ops import Affine

EXPORTED = [case for case in NETWORKS if not case.max_pool]
# The other encoding takes flat outputs, and its solver weights of ordinary size.
FLAT = [case for case in RELU_NETWORKS if case.name not in ("scalar output", "weights of 1e-12", "weights of 1e6")]


def bounds_of(network: ox.Network, region: ox.InputBox, relaxation: str = "crown") -> dict[str, ox.Bounds]:
    """Pre-activation bounds by node name."""
    with torch.no_grad():
        found = ox.preactivation_bounds(network, region, relaxation)
    return {node.name: found[node.path] for node in network.activations}


def one(bounds: dict[str, ox.Bounds], i: int) -> dict[str, ox.Bounds]:
    return {name: ox.Bounds(b.lower[i : i + 1], b.upper[i : i + 1]) for name, b in bounds.items()}


def least(program: NetworkLP, c: np.ndarray) -> float:
    """SciPy's answer to an exported MILP."""
    found = milp(
        c,
        constraints=[LinearConstraint(program.matrix, program.row_lower, program.row_upper)],
        bounds=Limits(program.col_lower, program.col_upper),
        integrality=program.integer.astype(int),
        options={"mip_rel_gap": 0.0},
    )
    assert found.status == 0, found.message
    return float(found.fun)


# --- against another encoding and enumeration ---------------------------------------------------------------------


@pytest.mark.parametrize("case", FLAT, ids=str)
def test_lp_and_milp_equal_another_encoding(case):
    network = case.network()
    eps = 0.05 if len(case.input_shape) == 3 else 0.4  # what a MILP solver settles in no time
    region = ox.LinfBall(inputs(case.input_shape, 2, seed=3), eps)
    rows = specification(network.outputs, k=2)
    before = bounds_of(network, region)
    triangle = oracles.minimum(network, region, rows, before, integer=False)
    torch.testing.assert_close(optimum(network, region, rows, before), triangle, rtol=1e-8, atol=1e-8)
    exact = oracles.minimum(network, region, rows, before, integer=True)
    for i in range(2):
        program = export(network, region.select(slice(i, i + 1)), one(before, i), integer=True)
        c, offset = program.objective(rows)
        for k in range(2):
            assert least(program, c[k]) + offset[k] == pytest.approx(float(exact[i, k]), rel=1e-5, abs=1e-5)


def enumerated(network: ox.Network, region: ox.InputBox, rows: Tensor, before: dict[str, ox.Bounds]) -> list[float]:
    """Least value of each row by one LP over the input for every choice of pieces."""
    choices = []
    for node in network.activations:
        b = before[node.name]
        for l, u in zip(b.lower.flatten().tolist(), b.upper.flatten().tolist(), strict=True):
            first = sum(l >= kink for kink in node.op.kinks)
            last = sum(u > kink for kink in node.op.kinks)
            choices.append(range(first, max(first, last) + 1))
    assert math.prod(len(c) for c in choices) <= 1000
    best = [math.inf] * len(rows)
    limits = list(zip(region.lower.flatten().tolist(), region.upper.flatten().tolist(), strict=True))
    for pieces in itertools.product(*choices):
        matrix, constant, sides, right = piecewise(network, region, list(pieces))
        for k, row in enumerate(rows.numpy()):
            found = linprog(row @ matrix, A_ub=sides, b_ub=right, bounds=limits, method="highs")
            if found.status == 0:
                best[k] = min(best[k], float(found.fun) + float(row @ constant))
    return best


@torch.no_grad()
def piecewise(network: ox.Network, region: ox.InputBox, pieces: list[int]) -> tuple[np.ndarray, ...]:
    """Output = matrix x + constant where sides x <= right, with every neuron on its given piece."""
    size = region.lower[0].numel()
    values = {network.input: torch.cat([torch.eye(size), torch.zeros(1, size)]).double()}
    values[network.input] = values[network.input].reshape(-1, *network.input_shape)
    sides, right = [], []
    for node in network:
        if isinstance(node.op, Affine):
            parts = [values[name] for name in node.inputs]
            image = node.op.apply(*parts)
            # The last row is the image of the constant; the others lose the constant of the op.
            bias = node.op.apply(*(torch.zeros_like(p[:1]) for p in parts))
            values[node.name] = torch.cat([image[:-1] - bias, image[-1:]])
            continue
        z = values[node.inputs[0]].flatten(1).numpy()
        y = np.empty_like(z)
        for i in range(z.shape[1]):
            p = pieces.pop(0)
            y[:, i] = node.op.slopes[p] * z[:, i]
            y[-1, i] += node.op.intercepts[p]
            if p > 0:
                sides.append(-z[:-1, i])
                right.append(z[-1, i] - node.op.kinks[p - 1])
            if p < len(node.op.kinks):
                sides.append(z[:-1, i])
                right.append(node.op.kinks[p] - z[-1, i])
        values[node.name] = torch.from_numpy(y).reshape(-1, *node.shape)
    output = values[network.output].flatten(1).numpy()
    return output[:-1].T, output[-1], np.array(sides), np.array(right)


class Branches(nn.Module):
    """A residual connection around a hardtanh, and a value used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = nn.functional.hardtanh(self.first(x), -0.4, 0.3)
        return self.last(torch.relu(self.second(a) + a) - 0.5 * a)


def layers(sizes: tuple[int, ...], *activations: nn.Module) -> nn.Module:
    """Linear layers of these sizes with the activations between them."""
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(linear[0], *(m for pair in zip(activations, linear[1:], strict=True) for m in pair))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 1, 2), nn.ReLU(), nn.Flatten(), *layers((4, 2, 2), nn.LeakyReLU(0.3)))


TINY = {
    "leaky": (lambda: layers((3, 4, 3, 2), nn.LeakyReLU(0.2), nn.LeakyReLU()), (3,)),
    "bent": (lambda: layers((3, 4, 3, 2), nn.LeakyReLU(1.7), nn.LeakyReLU(-0.6)), (3,)),
    "hardtanh": (lambda: layers((2, 3, 3, 2), nn.Hardtanh(-0.7, 0.8), nn.Hardtanh(-0.2, 0.1)), (2,)),
    "relu6": (lambda: layers((2, 3, 2, 2), nn.ReLU6(), nn.ReLU6()), (2,)),
    "conv": (conv, (1, 3, 3)),
    "residual": (Branches, (2,)),
}


@pytest.mark.parametrize("name", TINY)
def test_milp_equals_enumeration_of_the_pieces(name):
    build, shape = TINY[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        net = build().double()
    if name == "relu6":  # reach both kinks
        nn.init.normal_(net[0].weight, std=8.0, generator=torch.Generator().manual_seed(1))
    network = ox.capture(net, shape)
    region = ox.LinfBall(inputs(shape, 1), 1.5)
    rows = torch.cat([torch.eye(2), -torch.eye(2)]).double()
    before = bounds_of(network, region)
    wanted = enumerated(network, region, rows, before)
    program = export(network, region, before, integer=True)
    c, offset = program.objective(rows)
    found = [least(program, c[k]) + offset[k] for k in range(4)]
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    relaxed = optimum(network, region, rows, before)[0]
    assert (relaxed <= torch.tensor(wanted, dtype=torch.float64) + 1e-7).all()
    assert (relaxed < torch.tensor(wanted, dtype=torch.float64) - 1e-4).any(), "the relaxation is not put to the test"


class Graph(nn.Module):
    """a x + b f(x): every linear function over an activation's graph."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation, self.a, self.b = activation, nn.Linear(1, 8), nn.Linear(1, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(self.activation(x))


ACTIVATIONS = [nn.ReLU(), *map(nn.LeakyReLU, (0.2, 1.7, -0.6)), nn.Hardtanh(-0.3, 0.4), nn.ReLU6()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("ends", [(-1.0, 2.0), (-0.2, 0.1), (-0.5, 0.1), (0.2, 0.7), (-2.0, -0.5), (5.0, 7.0), (-1, 9)])
def test_over_one_neuron_the_lp_is_the_convex_hull(activation, ends):
    """A linear function is least over the hull where it is least over the graph: at an end or a kink."""
    network = ox.capture(Graph(activation).double(), (1,))
    region = ox.InputBox(*(torch.tensor([[float(end)]], dtype=torch.float64) for end in ends))
    inside = [kink for kink in network.activations[0].op.kinks if ends[0] < kink < ends[1]]
    points = torch.tensor([*ends, *inside], dtype=torch.float64)
    with torch.no_grad():
        wanted = network.module(points[:, None]).amin(0)
    found = optimum(network, region, torch.eye(8, dtype=torch.float64), bounds_of(network, region))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# --- points of the network are points of the LP -------------------------------------------------------------------


def columns_at(program: NetworkLP, network: ox.Network, x: Tensor) -> np.ndarray:
    """All columns at an input [1, *input_shape]: the network's values, and the switches where they stand."""
    with torch.no_grad():
        values = network.values(x)
    v = np.zeros(len(program.col_lower))
    v[program.columns["input"]] = x.flatten().numpy()
    for node in network.activations:
        z = values[node.inputs[0]].flatten().numpy()
        v[program.columns[f"pre:{node.name}"]] = z
        v[program.columns[f"post:{node.name}"]] = values[node.name].flatten().numpy()
        place = program.columns[f"pre:{node.name}"]
        l, u = (torch.from_numpy(end[place]) for end in (program.col_lower, program.col_upper))
        crossing = node.op.crossing(l, u).numpy()
        for i, kink in enumerate(node.op.kinks):
            if f"on{i + 1}:{node.name}" in program.columns:
                v[program.columns[f"on{i + 1}:{node.name}"]] = z[crossing] >= kink
    return v


@pytest.mark.parametrize("case", EXPORTED, ids=str)
@pytest.mark.parametrize("integer", [False, True], ids=["lp", "milp"])
def test_every_point_of_the_network_is_feasible(case, integer):
    network = case.network()
    region = every_region(case.input_shape, 1)
    before = bounds_of(network, region, "box")
    rows = specification(network.outputs)
    points = random_points(region, 5)
    for i in range(region.shape[0]):
        program = export(network, region.select(slice(i, i + 1)), one(before, i), integer=integer)
        c, offset = program.objective(rows.reshape(-1, *network.output_shape))
        assert program.integer.any() <= integer
        for x in points[:, i : i + 1]:
            v = columns_at(program, network, x)
            slack = 1e-11 * max(1.0, float(np.abs(v).max()))
            assert (v >= program.col_lower - slack).all()
            assert (v <= program.col_upper + slack).all()
            sides = program.matrix @ v
            scale = slack + 1e-11 * (abs(program.matrix) @ np.abs(v))
            assert (sides >= program.row_lower - scale).all()
            assert (sides <= program.row_upper + scale).all()
            with torch.no_grad():
                value = rows @ network(x).flatten()
            np.testing.assert_allclose(c @ v + offset, value.numpy(), rtol=1e-9, atol=1e-9 * np.abs(c).max())


def test_all_columns_have_finite_bounds_and_blocks_are_where_they_say():
    network = BY_NAME["functional residual"].network()
    region = ox.LinfBall(inputs((4,), 1), 0.5)
    before = bounds_of(network, region)
    program = export(network, region, before)
    assert np.isfinite(program.col_lower).all()
    assert np.isfinite(program.col_upper).all()
    for node in network.activations:
        b = before[node.name]
        place = program.columns[f"pre:{node.name}"]
        np.testing.assert_array_equal(program.col_lower[place], b.lower.flatten())
        np.testing.assert_array_equal(program.col_upper[place], b.upper.flatten())
        rows = program.rows[f"affine:{node.name}"]
        np.testing.assert_array_equal(program.row_lower[rows], program.row_upper[rows])
        block = program.matrix[rows, place].toarray()
        np.testing.assert_array_equal(block, np.eye(b.lower.numel()))


def test_a_chord_is_one_row():
    """A crossing ReLU has two rows below and one above; a stable neuron one equality."""
    network = ox.capture(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double(), (2,))
    region = ox.LinfBall(torch.zeros(1, 2, dtype=torch.float64), 1.0)
    name = network.activations[0].name
    ends = torch.tensor([[-1.0, -2.0, 0.5]]), torch.tensor([[1.0, -1.0, 3.0]])
    program = export(network, region, {name: ox.Bounds(*(end.double() for end in ends))})
    assert program.matrix.shape[0] == 3 + 2 + 3


# --- targets inside the network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_upto_takes_what_lies_before_a_node(depth):
    """The LP about a hidden value equals that of the network cut off there."""
    case = BY_NAME["relu6 and hardtanh"]
    module = case.module()
    network, cut = ox.capture(module, (4,)), ox.capture(module[: depth + 1], (4,))
    region = ox.LinfBall(inputs((4,), 2), 0.5)
    before = bounds_of(network, region)
    names = dict(zip((n.name for n in cut.activations), network.activations, strict=False))
    rows = specification(cut.outputs)
    short = {name: before[node.name] for name, node in names.items()}
    wanted = optimum(cut, region, rows, short)
    whole = ox.capture(module, (4,))
    target = next(node.name for node in whole if node.path == cut[cut.output].path)
    found = optimum(whole, region, rows, before, upto=target)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    program = export(whole, region.select(slice(0, 1)), one(before, 0), upto=target)
    assert {name for name in program.columns if name.startswith("pre:")} == {f"pre:{n.name}" for n in names.values()}
