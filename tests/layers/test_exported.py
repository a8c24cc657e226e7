"""The exported path: given pre-activation bounds as constraints, contradictions, and generic LP solvers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import oracles
import pytest
import torch
from cases import BY_NAME, inputs, random_points, specification
from lp_networks import QUESTIONS, answer, assert_close, before, optimum, question
from torch import Tensor, nn

import optrelax as ox
from optrelax.layers import (
    PDHG,
    Cvxpy,
    DualAscent,
    Envelope,
    Highs,
    InteriorPoint,
    Layerwise,
    Status,
    Triangle,
    exported,
)
from optrelax.layers.milp import Milp
from optrelax.layers.programs.highs import SparseAnswer
from optrelax.layers.solutions import UnsolvedError

SOLVERS = pytest.mark.parametrize(
    "solver", [DualAscent(tol=1e-6), InteriorPoint(), Highs()], ids=["ascent", "ip", "highs"]
)
ROUNDING = 1e-12
FOR_ALL = pytest.mark.parametrize("name", QUESTIONS)


@cache
def branched(name: str) -> dict[str, ox.Bounds]:
    """Bounds that the LP does not imply: half the neurons are confined to an interval around a point's value.

    As branching makes them: feasible, since the network's values at one input of each region lie inside.
    """
    q = question(name)
    g = torch.Generator().manual_seed(3)
    point = random_points(q.region, 1, seed=4)[0]
    with torch.no_grad():
        values = q.network.values(point)
    given = {}
    for node in q.network.activations:
        b, z = before(name, "default")[node.path], values[node.inputs[0]]
        confined = torch.rand(z.shape, generator=g) < 0.5
        given[node.path] = ox.Bounds(
            torch.where(confined, z - 0.2 * (z - b.lower), b.lower),
            torch.where(confined, z + 0.2 * (b.upper - z), b.upper),
        )
    return given


@cache
def wanted(name: str) -> Tensor:
    q = question(name)
    return optimum(q.network, q.region, q.rows, branched(name))


def solve(name: str, given: dict[str, ox.Bounds], **options: object) -> ox.layers.Solution:
    q = question(name)
    with torch.no_grad():
        return Triangle(preactivation=given, **options).solve(q.network, q.region, q.rows)


# --- given bounds -------------------------------------------------------------------------------------------------


@FOR_ALL
@SOLVERS
def test_tighter_bounds_are_solved_to_the_true_optimum(name, solver):
    found = solve(name, branched(name), solver=solver)
    assert (found.status == Status.OPTIMAL).all()
    assert_close(found.lower, wanted(name), 2e-6)
    assert (found.lower <= wanted(name) + ROUNDING * wanted(name).abs().clamp_min(1)).all()
    assert (found.lower + found.gap >= wanted(name) - 1e-9 * wanted(name).abs().clamp_min(1)).all()


def test_the_sweeps_alone_fall_short_there(monkeypatch):
    """Without multipliers of the bounds the dual is loose: what the exported LP adds is put to the test."""
    monkeypatch.setattr(exported, "_settled", lambda found, threshold: torch.ones_like(found.status, dtype=torch.bool))
    short = 0
    for name in QUESTIONS:
        q = question(name)
        layer = Triangle(preactivation=branched(name), solver=DualAscent(tol=1e-6, max_iterations=500))
        with torch.no_grad():
            found = layer.solve(q.network, q.region, q.rows)
        assert (found.lower <= wanted(name) + 1e-9).all()
        short += int((wanted(name) - found.lower > 1e-3).any())
    assert short >= 8


def test_bounds_from_a_milp():
    """Exact pre-activation bounds: tighter than LP-ALL's, below the exact optimum."""
    name = "fc, eps 1"
    q = question(name)
    given = {}
    for node in q.network.activations:
        cut = ox.Network(q.network.module, q.network.nodes, node.inputs[0], q.network.input_shape)
        eye = torch.eye(cut.outputs, dtype=torch.float64)[None]
        parts = [q.region.select(slice(i, i + 1)) for i in range(q.region.shape[0])]
        found = torch.stack([Milp().minima(cut, part, torch.cat([eye, -eye], 1)).lower for part in parts])
        low, high = found.chunk(2, 1)
        given[node.path] = ox.Bounds(low, -high)
    by_node = {node.name: given[node.path] for node in q.network.activations}
    exact = oracles.minimum(q.network, q.region, q.rows, by_node, integer=True)
    for solver in (DualAscent(), Highs()):
        found = solve(name, given, solver=solver)
        assert (found.status == Status.OPTIMAL).all()
        assert (found.lower <= exact + 1e-6).all()
        assert (found.lower >= answer(name) - 1e-6).all()
        assert (found.lower > answer(name) + 1e-3).any()
        assert_close(found.lower, optimum(q.network, q.region, q.rows, given), 1e-4)


@SOLVERS
def test_bounds_that_the_lp_implies_need_no_export(solver, monkeypatch):
    """Numbers from a relaxation, given as numbers: the sweeps settle them, and HiGHS is not called."""
    name = "trained fc, eps 0.08"
    if not isinstance(solver, Highs):
        monkeypatch.setattr(Highs, "solve_sparse", None)
    found = solve(name, before(name, "default"), solver=replace(solver, tol=1e-4))
    assert (found.status == Status.OPTIMAL).all()
    assert_close(found.lower, answer(name), 1e-4)


def test_looser_bounds_are_as_loose_as_they_are():
    q = question("fc, eps 1")
    with torch.no_grad():
        box = ox.preactivation_bounds(q.network, q.region, "box")
    wide = {path: ox.Bounds(b.lower - 0.1, b.upper + 0.1) for path, b in box.items()}
    for solver in (DualAscent(tol=1e-6), Highs()):
        assert_close(solve("fc, eps 1", wide, solver=solver).lower, optimum(q.network, q.region, q.rows, wide), 1e-5)


def test_stable_neurons_confine_the_input():
    """A bound of a neuron that is dead and feeds nothing still says where the input lies."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        net[0].bias.zero_()
        net[2].weight.copy_(torch.tensor([[1.0, 0.0]]))
        net[2].bias.zero_()
    region = ox.InputBox(torch.tensor([[-1.0, -1.0]]).double(), torch.tensor([[1.0, 1.0]]).double())
    ends = torch.tensor([[0.0, -2.0]]).double(), torch.tensor([[1.0, -0.5]]).double()
    given = {"1": ox.Bounds(*ends)}
    row = torch.tensor([[-1.0]]).double()
    for solver in (DualAscent(), InteriorPoint(), Highs()):
        # max x1 subject to 0 <= x1, x1 + x2 <= -0.5, x2 >= -1: x1 = 0.5.
        found = Triangle(preactivation=given, solver=solver).solve(net, region, row)
        assert_close(found.lower, torch.tensor([[-0.5]]).double(), 1e-6)
        assert (found.status == Status.OPTIMAL).all()


def test_one_neuron_by_hand():
    """min -y over x in [-1, 1], z = x confined to [-0.5, 0.25], y in the triangle: -0.25 at z = 0.25."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.0 if p.dim() == 1 else 1.0)
    region = ox.InputBox(-torch.ones(1, 1).double(), torch.ones(1, 1).double())
    l, u = (torch.tensor([[v]], dtype=torch.float64, requires_grad=True) for v in (-0.5, 0.25))
    for solver in (DualAscent(tol=1e-9), InteriorPoint(), Highs()):
        layer = Triangle(preactivation={"1": ox.Bounds(l, u)}, solver=solver)
        found = layer.solve(net, region, torch.tensor([[-1.0], [1.0]]).double())
        assert_close(found.lower, torch.tensor([[-0.25, 0.0]]).double(), 1e-8)
        # V = -u: as a constraint, where the sweeps alone would say -s (1 - l) = -0.5.
        dl, du = torch.autograd.grad(found.lower[0, 0], (l, u))
        assert float(dl) == pytest.approx(0.0, abs=1e-6)
        assert float(du) == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize("name", ["fc, eps 1", "functional residual, eps 0.3", "bent leaky relu, eps 0.5"])
def test_gradient_reaches_the_given_bounds_and_all_else(name):
    q = question(name)
    region = ox.InputBox(q.region.lower[:1].clone().requires_grad_(), q.region.upper[:1].clone().requires_grad_())
    rows = q.rows.clone().requires_grad_()
    ends = {p: [e[:1].clone().requires_grad_() for e in (b.lower, b.upper)] for p, b in branched(name).items()}
    leaves = [region.lower, region.upper, rows, *(e for pair in ends.values() for e in pair)]

    def value() -> float:
        found = float(optimum(q.network, region, rows, {p: ox.Bounds(*e) for p, e in ends.items()}).sum())
        return math.inf if math.isnan(found) else found  # of an empty polyhedron

    layer = Triangle(preactivation={p: ox.Bounds(*e) for p, e in ends.items()}, solver=Highs())
    gradients = torch.autograd.grad(layer.solve(q.network, region, rows).lower.sum(), leaves)
    size = max(float(t.norm()) for t in gradients)
    checked = 0
    # A neuron confined to a single value has no derivative there.
    wide = [torch.ones(leaf.numel(), dtype=torch.bool) for leaf in leaves[:3]]
    wide += [(pair[1] - pair[0]).flatten() > 1e-3 for pair in ends.values() for _ in pair]
    for leaf, gradient, indices in zip(leaves, gradients, wide, strict=True):
        start = leaf.detach().clone()
        for i in indices.nonzero()[:, 0].tolist():
            sides, middle = [], value()
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    leaf.view(-1)[i] += step
                sides.append((value() - middle) / step)
                leaf.data.copy_(start)
            low, high = sorted(sides)
            found = float(gradient.view(-1)[i])
            # At a kink (a bound that is just attained) any slope between the two sides is one.
            assert low - 1e-6 * size <= found <= high + 1e-6 * size
            checked += high - low < 1e-6 * size
    assert checked > 0.8 * sum(int(indices.sum()) for indices in wide)


def test_gradient_does_not_depend_on_the_solver():
    net, rows = BY_NAME["fc"].module(), specification(3)
    region = ox.LinfBall(inputs((5,), 2), 1.0)
    with torch.no_grad():
        given = ox.preactivation_bounds(net, region, "crown")
        middle = {p: ox.Bounds(0.6 * b.lower, 0.6 * b.upper) for p, b in given.items()}
    found = []
    for solver in (Highs(), DualAscent(tol=1e-9), InteriorPoint(tol=1e-9)):
        net.zero_grad()
        layer = Triangle(preactivation=middle, solver=solver, gradient=Envelope())
        layer.solve(net, region, rows).lower.sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    for other in found[1:]:
        assert_close(other, found[0], 1e-6)


def test_given_bounds_with_layerwise_are_never_loosened():
    for name in ("fc, eps 1", "relu6 and hardtanh, eps 0.5", "functional residual, eps 0.3"):
        q = question(name)
        for solver in (DualAscent(), Highs()):
            with torch.no_grad():
                found = Layerwise(preactivation=branched(name), solver=solver).solve(q.network, q.region, q.rows)
            assert (found.status == Status.OPTIMAL).all()
            assert (found.lower >= wanted(name) - 2e-4).all()
            for path, b in branched(name).items():
                assert (found.preactivation[path].lower >= b.lower).all()
                assert (found.preactivation[path].upper <= b.upper).all()


def test_by_path_or_by_node_and_with_batch_dimensions():
    q = question("fc, eps 1")
    by_path = branched("fc, eps 1")
    by_node = {node.name: by_path[node.path] for node in q.network.activations}
    flat = solve("fc, eps 1", by_path).lower
    assert torch.equal(solve("fc, eps 1", by_node).lower, flat)
    wide = ox.InputBox(q.region.lower[:, None], q.region.upper[:, None])
    deep = {p: ox.Bounds(b.lower[:, None], b.upper[:, None]) for p, b in by_path.items()}
    with torch.no_grad():
        assert torch.equal(Triangle(preactivation=deep).solve(q.network, wide, q.rows).lower, flat[:, None])


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
def test_outward_is_just_below(rounding):
    for name in ("fc, eps 1", "bent leaky relu, eps 0.5", "residual conv, eps 0.3"):
        found = solve(name, branched(name), solver=Highs(), rounding=rounding).lower
        assert_close(found, wanted(name), 1e-9)
        if rounding == "outward":
            assert (found <= solve(name, branched(name), solver=Highs()).lower).all()


def test_bounds_that_do_not_fit_are_refused():
    net, region, rows = BY_NAME["fc"].module(), ox.LinfBall(inputs((5,), 2), 0.3), specification(3)
    with torch.no_grad():
        good = ox.preactivation_bounds(net, region, "box")
    b = good["1"]
    wrong = {
        r"no activation named 'first'; the network has \['1', '3'\]$": {"first": b, **good},
        "bounds of activation '3' are missing": {"1": b},
        r"'1' wants \(2, 8\), got \(1, 8\)": {**good, "1": ox.Bounds(b.lower[:1], b.upper[:1])},
        "bounds of '1' must be finite": {**good, "1": ox.Bounds(b.lower, b.upper + torch.inf)},
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            Triangle(preactivation=given).solve(net, region, rows)


# --- contradictions -----------------------------------------------------------------------------------------------


def contradictory(node: str, amount: float) -> tuple[nn.Module, ox.InputBox, Tensor, dict[str, ox.Bounds]]:
    """Example 1 of 3 has a neuron confined to values that it cannot take, by `amount`."""
    net = BY_NAME["fc"].module()
    region, rows = ox.LinfBall(inputs((5,), 3), 0.6), specification(3)
    with torch.no_grad():
        exact = ox.preactivation_bounds(net, region, Layerwise(solver=Highs()))
    given = {}
    for path, b in exact.items():
        lower, upper = b.lower.clone(), b.upper.clone()
        if path == node:
            lower[1, 0] = upper[1, 0] + amount
            upper[1, 0] = lower[1, 0] + 1
        given[path] = ox.Bounds(lower, upper)
    return net, region, rows, given


@pytest.mark.parametrize("node", ["1", "3"])
@pytest.mark.parametrize("amount", [0.1, 1e-6])
@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@SOLVERS
def test_contradictory_bounds_are_reported_and_spoil_nothing(node, amount, rounding, solver):
    net, region, rows, given = contradictory(node, amount)
    found = Triangle(preactivation=given, solver=solver, rounding=rounding).solve(net, region, rows)
    assert (found.status[1] == Status.INFEASIBLE).all()
    assert (found.lower[1] == -torch.inf).all()
    assert (found.gap[1] == torch.inf).all()
    others = torch.tensor([0, 2])
    assert (found.status[others] == Status.OPTIMAL).all()
    kept = {p: ox.Bounds(b.lower[others], b.upper[others]) for p, b in given.items()}
    alone = Triangle(preactivation=kept, solver=solver, rounding=rounding).solve(net, region.select(others), rows)
    assert_close(found.lower[others], alone.lower.detach(), 1e-9)
    # The gradient of a problem without a value is 0, whatever the loss makes of -inf.
    found.lower.exp().sum().backward()
    mine = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    alone.lower.exp().sum().backward()
    for g, p in zip(mine, net.parameters(), strict=True):
        assert_close(g, p.grad, 1e-7)


@pytest.mark.parametrize("solver", [Cvxpy(), PDHG(tol=1e-5)], ids=["cvxpy", "pdhg"])
def test_other_solvers_report_contradictions_too(solver):
    net, region, rows, given = contradictory("3", 0.1)
    found = Triangle(preactivation=given, solver=solver).solve(net, region, rows[:1])
    assert found.status.flatten().tolist() == [Status.OPTIMAL, Status.INFEASIBLE, Status.OPTIMAL]
    assert found.lower[1, 0] == -torch.inf


@pytest.mark.parametrize("solver", [DualAscent(), Highs()], ids=["ascent", "highs"])
@pytest.mark.parametrize("node", ["1", "3"])
def test_layerwise_does_not_lose_a_contradiction_on_the_way(solver, node):
    """The stage's own LPs see neurons alone; the last LP has all bounds together."""
    net, region, rows, given = contradictory(node, 0.1)
    found = Layerwise(preactivation=given, solver=solver).solve(net, region, rows)
    assert (found.status[1] == Status.INFEASIBLE).all()
    assert (found.lower[1] == -torch.inf).all()
    assert (found.status[[0, 2]] == Status.OPTIMAL).all()


def test_a_contradiction_is_not_certified_and_throw_says_so():
    net, region, rows, given = contradictory("3", 0.1)
    with pytest.raises(UnsolvedError, match=r"Triangle: 4 INFEASIBLE of 12 problem\(s\) \(first at \[1, 0\]\)"):
        Triangle(preactivation=given, throw=True).solve(net, region, rows)


def test_bounds_that_contradict_each_other_by_rounding_are_no_contradiction():
    """float32 bounds at a point: exact arithmetic finds no input that meets them all."""
    case = BY_NAME["functional residual"]
    net, x, rows = case.module().float(), inputs((4,), 4).float(), specification(3)
    region = ox.LinfBall(x, 0.0)
    with torch.no_grad():
        given = ox.preactivation_bounds(net, region, "crown")
        value = net(x) @ rows.float().mT
        for solver in (DualAscent(), InteriorPoint(), Highs()):
            found = Triangle(preactivation=given, solver=solver).solve(net, region, rows)
            assert (found.status != Status.INFEASIBLE).all()
            assert_close(found.lower, value, 1e-5)
            # The same bounds as a relaxation: implied, so that only rounding can have parted them.
            assert (Triangle(preactivation="crown", solver=solver).solve(net, region, rows).status == 0).all()


@dataclass(frozen=True)
class Liar(Highs):
    """A solver that says what it is told to."""

    claim: Status = Status.OPTIMAL
    ray: float = 0.0

    def solve_sparse(self, c: object, matrix: object, *sides: object) -> SparseAnswer:
        true = Highs().solve_sparse(c, matrix, *sides)
        count = len(true.status)
        return replace(
            true,
            status=torch.full((count,), int(self.claim), dtype=torch.int8).numpy(),
            primal=0 * true.primal,
            duals=self.ray * (true.duals + 1),
        )


@pytest.mark.parametrize("ray", [0.0, 1.0, -1.0, 1e3])
@pytest.mark.parametrize("given", [False, True], ids=["implied", "given"])
def test_no_solver_is_trusted(ray, given):
    name = "fc, eps 1"
    options = {"preactivation": branched(name)} if given else {}
    truth = wanted(name) if given else answer(name)
    q = question(name)
    for claim in Status:
        with torch.no_grad():
            found = Triangle(solver=Liar(claim=claim, ray=ray), **options).solve(q.network, q.region, q.rows)
        assert (found.lower <= truth + 1e-9).all()
        assert (found.lower > -torch.inf).all(), "an unproved claim of infeasibility took the bound away"
        assert (found.lower + found.gap >= truth - 1e-9).all()
        closed = found.gap <= 1e-6 * found.lower.abs().clamp_min(1)
        assert torch.equal(found.status == Status.OPTIMAL, closed)
        assert (found.status != Status.INFEASIBLE).all()
        assert (found.status != Status.UNBOUNDED).all()


# --- generic solvers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fc, eps 1", "functional residual, eps 0.3", "relu6 and hardtanh, eps 0.5"])
@pytest.mark.parametrize(
    "solver", [Cvxpy(eps=1e-6), Cvxpy(solver="CLARABEL", eps=1e-8), PDHG(tol=1e-6)], ids=["scs", "clarabel", "pdhg"]
)
def test_any_linear_program_solver_will_do(name, solver):
    q = question(name)
    found = Triangle(solver=solver).solve(q.network, q.region, q.rows)
    assert_close(found.lower, answer(name), 1e-3)
    assert (found.lower <= answer(name) + ROUNDING * answer(name).abs().clamp_min(1)).all()
    assert (found.lower + found.gap >= answer(name) - 1e-9).all()
    assert torch.equal(found.status == Status.OPTIMAL, found.gap <= solver.tol * found.lower.abs().clamp_min(1))
    assert (found.status == Status.OPTIMAL).all()


def test_an_inaccurate_solver_is_only_loose():
    name = "fc, eps 1"
    q = question(name)
    for solver in (Cvxpy(eps=1e-2, tol=1e-6), PDHG(tol=1e-6, max_iterations=20)):
        with torch.no_grad():
            found = Triangle(solver=solver).solve(q.network, q.region, q.rows)
            source = ox.Intersect(ox.Box(), ox.FastLin())
            crown = ox.lower_bounds(q.network, q.region, q.rows, ox.Crown(preactivation=source))
        assert (found.status != Status.OPTIMAL).any()
        assert (found.lower <= answer(name) + ROUNDING).all()
        assert (found.lower + found.gap >= answer(name) - ROUNDING).all()
        # Where the solver failed, the start stands in.
        failed = found.status != Status.OPTIMAL
        assert (found.lower >= crown - ROUNDING)[failed].all()


def test_a_time_limit_leaves_the_start():
    name = "trained fc, eps 0.08"
    q = question(name)
    with torch.no_grad():
        found = Triangle(solver=Highs(time_limit=0.0)).solve(q.network, q.region, q.rows)
        start = Triangle(solver=DualAscent(max_iterations=0)).solve(q.network, q.region, q.rows)
    assert (found.status == Status.TIME_LIMIT).all()
    assert (found.lower >= start.lower - ROUNDING * start.lower.abs().clamp_min(1)).all()
    assert found.gap.isfinite().all()
    assert (found.lower <= answer(name) + ROUNDING * answer(name).abs().clamp_min(1)).all()


def test_iterations_are_those_of_the_simplex_method():
    found = solve("trained fc, eps 0.08", before("trained fc, eps 0.08", "default"), solver=Highs(workers=1))
    assert found.iterations.dtype == torch.int64
    assert (found.iterations >= 0).all()
    assert found.iterations.sum() > 0
    # Rows of one example start from the last basis.
    assert (found.iterations[:, 0] >= found.iterations[:, 1:].float().mean(1)).all()


def test_workers_change_nothing():
    name = "residual conv, eps 0.3"
    one, three = (solve(name, branched(name), solver=Highs(workers=n)) for n in (1, 3))
    assert_close(one.lower, three.lower, 1e-9)
