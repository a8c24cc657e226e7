"""No solver is trusted: whatever it returns, a bound may be loose and never wrong, and statuses say what is so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from lp_networks import answer, before, layerwise_answer, optimum, question
from test_exported import branched, contradictory
from torch import nn

import optrelax as ox
from optrelax.layers import PDHG, DualAscent, Highs, Layerwise, Solution, Status, Triangle
from optrelax.layers.network_solver import NetworkSolver, Points
from optrelax.layers.problems import DualPoint, PrimalPoint, Problems
from optrelax.layers.programs.highs import SparseAnswer
from optrelax.relaxations import name_of

NAMES = ("fc, eps 1", "relu6 and hardtanh, eps 0.5")
NAN, INF = torch.nan, torch.inf
Lie = Callable[[Points], Points]


def dual(change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    return lambda p: replace(p, dual=p.dual.combine(change))


def primal(change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    return lambda p: replace(p, primal=p.primal.combine(change))


def ends(size: float) -> Lie:
    return lambda p: replace(p, dual=replace(p.dual, ends={n: size * (a - 0.4) for n, a in p.dual.alpha.items()}))


def claim(status: int, ray: float) -> Lie:
    def lie(p: Points) -> Points:
        rays = {n: ray * (a - 0.3) for n, a in p.dual.alpha.items()}
        return replace(p, reason=torch.full_like(p.iterations, status), rays=rays)

    return lie


def some_entries(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        changed = t.clone()
        changed.view(-1)[::3] = value
        return changed

    return change


LIES: dict[str, Lie] = {
    "weights 10 too high": dual(lambda t: t + 10),
    "weights below 0": dual(lambda t: t - 3),
    "weights no numbers": dual(lambda t: t * NAN),
    "some weights no numbers": dual(some_entries(NAN)),
    "some weights infinite": dual(some_entries(INF)),
    "weights -infinite": dual(lambda t: t - INF),
    "multipliers of bounds": ends(1.0),
    "huge multipliers": ends(1e30),
    "multipliers no numbers": ends(NAN),
    "points outside the box and the hulls": primal(lambda t: t + 10),
    "points no numbers": primal(lambda t: t * NAN),
    "some points no numbers": primal(some_entries(NAN)),
    "points infinite": primal(lambda t: t + INF),
    "all of float32": lambda p: p.to(torch.float32),
    "negative counts": lambda p: replace(p, iterations=p.iterations - 100),
    **{f"says {status.name}, ray {ray:g}": claim(status, ray) for status in Status for ray in (0.0, 1e3, NAN)},
    "says a code that is none": claim(17, 1.0),
}


@dataclass(frozen=True)
class Liar(NetworkSolver):
    """An ascent whose points are changed on their way."""

    lie: Lie
    tol: float = 1e-4

    def solve(self, problems: Problems, starts: Sequence[DualPoint]) -> Points:
        return self.lie(DualAscent(max_iterations=20).solve(problems, starts))


def require_honest(found: Solution, truth: torch.Tensor, tol: float) -> None:
    """Bounds below the truth, objectives above it, OPTIMAL where they meet and only there."""
    size = truth.abs().clamp_min(1)
    assert (found.lower <= truth + 1e-11 * size).all()
    assert (found.lower + found.gap >= truth - 1e-9 * size.maximum(found.lower.abs())).all()
    closed = found.gap <= tol * found.lower.abs().clamp_min(1)
    assert torch.equal(found.status == Status.OPTIMAL, closed & found.lower.isfinite())
    assert (found.status != Status.INFEASIBLE).all()
    assert (found.status != Status.UNBOUNDED).all()


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_no_network_solver_is_trusted(lie, rounding):
    for name in NAMES:
        q = question(name)
        x = ox.InputBox(q.region.lower.clone().requires_grad_(), q.region.upper)
        found = Triangle(solver=Liar(lie), rounding=rounding).solve(q.network, x, q.rows)
        require_honest(found, answer(name), 1e-4)
        assert found.lower.isfinite().all(), "CROWN's point was at hand"
        (gradient,) = torch.autograd.grad(found.lower.sum(), x.lower)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("lie", [*LIES.values()][::3], ids=[*LIES.keys()][::3])
def test_no_network_solver_is_trusted_layer_by_layer_or_with_given_bounds(lie, rounding):
    name = NAMES[0]
    q = question(name)
    with torch.no_grad():
        found = Layerwise(solver=Liar(lie), rounding=rounding).solve(q.network, q.region, q.rows)
        truth = layerwise_answer(name)
        assert (found.lower <= truth + 1e-11 * truth.abs().clamp_min(1)).all()
        given = Triangle(solver=Liar(lie), preactivation=branched(name), rounding=rounding)
        truth = optimum(q.network, q.region, q.rows, branched(name))
        require_honest(given.solve(q.network, q.region, q.rows), truth, 1e-4)


WRONG: dict[str, tuple[Lie, str]] = {
    "a weight's shape": (
        lambda p: replace(p, dual=p.dual.combine(lambda t: t[:-1])),
        r"Liar: lower weights \(dual.alpha\) of activation '1': wanted \(6, 8\), got \(5, 8\)",
    ),
    "a missing layer": (
        lambda p: replace(p, dual=DualPoint(dict([*p.dual.alpha.items()][:1]), {})),
        r"Liar: lower weights \(dual.alpha\) of activation '\d' are missing, wanted \(6, \d\)",
    ),
    "an unknown layer": (
        lambda p: replace(p, primal=PrimalPoint(p.primal.x, p.primal.tau | {"more": p.iterations})),
        r"Liar: fractions \(primal.tau\) are not asked for, got 'more'",
    ),
    "an input's shape": (
        lambda p: replace(p, primal=PrimalPoint(p.primal.x[:, :-1], p.primal.tau)),
        r"Liar: input \(primal.x\): wanted \(6, 5\), got \(6, 4\)",
    ),
    "counts": (lambda p: replace(p, iterations=p.iterations[:1]), r"Liar: iterations: wanted \(6,\), got \(1,\)"),
}


@pytest.mark.parametrize(("lie", "message"), WRONG.values(), ids=WRONG.keys())
def test_points_of_another_shape_are_refused(lie, message):
    q = question(NAMES[0])
    with pytest.raises(ValueError, match=message):
        Triangle(solver=Liar(lie)).solve(q.network, q.region, q.rows)


# --- solvers of explicit programs ---------------------------------------------------------------------------------

PROGRAM_LIES: dict[str, Callable[[SparseAnswer], SparseAnswer]] = {
    "objectives 10 too high": lambda a: replace(a, objective=a.objective + 10),
    "points 10 too high": lambda a: replace(a, primal=a.primal + 10),
    "points no numbers": lambda a: replace(a, primal=a.primal * NAN),
    "points infinite": lambda a: replace(a, primal=a.primal + INF),
    "multipliers 10 too high": lambda a: replace(a, duals=a.duals + 10),
    "multipliers of 1e200": lambda a: replace(a, duals=a.duals * 1e200),
    "multipliers no numbers": lambda a: replace(a, duals=a.duals * NAN),
    "a code that is none": lambda a: replace(a, status=a.status + 17),
}


@dataclass(frozen=True)
class LyingHighs(Highs):
    """HiGHS whose answers are changed on their way."""

    lie: Callable[[SparseAnswer], SparseAnswer] = lambda a: a

    def solve_sparse(self, *given: object) -> SparseAnswer:
        return self.lie(super().solve_sparse(*given))


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("lie", PROGRAM_LIES.values(), ids=PROGRAM_LIES.keys())
def test_no_program_solver_is_trusted(lie, rounding):
    for name in NAMES:
        q = question(name)
        for options, truth in (({}, answer(name)), ({"preactivation": before(name, "default")}, answer(name))):
            with torch.no_grad():
                layer = Triangle(solver=LyingHighs(lie=lie), rounding=rounding, **options)
                found = layer.solve(q.network, q.region, q.rows)
            assert (found.lower <= truth + 1e-11 * truth.abs().clamp_min(1)).all()
            assert found.lower.isfinite().all()
            closed = found.gap <= 1e-6 * found.lower.abs().clamp_min(1)
            assert torch.equal(found.status == Status.OPTIMAL, closed)


@pytest.mark.parametrize("part", ["primal", "duals", "status", "iterations"])
def test_answers_of_another_shape_are_refused(part):
    q = question(NAMES[0])
    solver = LyingHighs(lie=lambda a: replace(a, **{part: getattr(a, part)[1:]}))
    with pytest.raises(ValueError, match=f"LyingHighs: {part} of 3 objectives: wanted shape"):
        Triangle(solver=solver).solve(q.network, q.region, q.rows)


# --- honest statuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [DualAscent(), PDHG(max_iterations=1), Highs()], ids=["ascent", "pdhg", "highs"])
@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("max_bytes", [None, 1])
def test_a_contradiction_concerns_every_row_of_its_example(solver, rounding, max_bytes):
    net, region, rows, given = contradictory("3", 0.5)
    rows = torch.cat([rows, 0 * rows[:1], 1e-3 * rows])
    layer = Triangle(solver=solver, preactivation=given, rounding=rounding, max_bytes=max_bytes)
    with torch.no_grad():
        found = layer.solve(net, region, rows)
    assert (found.status[1] == Status.INFEASIBLE).all()
    assert (found.lower[1] == -torch.inf).all()
    assert (found.gap[1] == torch.inf).all()
    assert (found.status[[0, 2]] == Status.OPTIMAL).all()


def test_outward_optimal_is_judged_by_the_outward_bound():
    """float32, wide layers: an allowance in float32 would exceed the tolerance."""
    net = ox.models.fc(784, 100, 100, 10, seed=0)
    x = torch.rand(2, 784, generator=torch.Generator().manual_seed(0))
    rows, region = ox.margins(torch.tensor([1, 2]), 10), ox.LinfBall(x, 0.01, clip=(0.0, 1.0))
    with torch.no_grad():
        for tol in (1e-4, 1e-6):
            found = Triangle(rounding="outward", solver=DualAscent(tol=tol)).solve(net, region, rows)
            closed = found.gap <= tol * found.lower.abs().clamp_min(1)
            assert torch.equal(found.status == Status.OPTIMAL, closed)
        sums = Triangle(rounding="outward", throw=True).solve(net, region, rows)
    assert (sums.status == Status.OPTIMAL).all()


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("solver", [DualAscent(), DualAscent(exact=True), Highs()], ids=["ascent", "ip", "highs"])
def test_what_overflows_is_no_bound(solver, rounding, dtype):
    """-2 relu(x) - 2 relu(-x) over the widest box: finite at each point, the LP's value is not."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1)).to(dtype)
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[2].weight.fill_(-2.0)
        for layer in (net[0], net[2]):
            layer.bias.zero_()
        region = ox.LinfBall(torch.zeros(1, 1, dtype=dtype), torch.finfo(dtype).max * 0.45)
        found = Triangle(solver=solver, rounding=rounding).solve(net, region, torch.eye(1, dtype=dtype))
    assert (found.lower <= -torch.finfo(dtype).max * 0.89).all()
    closed = found.gap <= solver.tol * found.lower.abs()
    # Twice such a value is none: nothing is called optimal there, however small the gap.
    ordinary = found.lower.abs() <= torch.finfo(dtype).max / 2
    assert not ordinary.any()
    assert torch.equal(found.status == Status.OPTIMAL, closed & ordinary)
    assert (found.lower < INF).all()


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("solver", [DualAscent(), DualAscent(exact=True)], ids=["ascent", "ip"])
def test_bounds_that_are_no_numbers_say_nothing(solver, rounding):
    """Of an example whose pre-activation bounds overflowed; its neighbour is none the worse."""
    q = question("fc, eps 1")
    network = q.network
    layer = Triangle(solver=solver, rounding=rounding)
    with torch.no_grad():
        good = layer.solve(network, q.region, q.rows)
        found = layer.closed_form(network, q.region)
        broken = {n: ox.Bounds.known(b.lower.clone(), b.upper.clone()) for n, b in found.items()}
        last = broken[network.activations[-1].name]
        last.lower[0, 1], last.upper[0, 1] = NAN, NAN
        from optrelax.layers.lots import solve_rows

        spoilt = solve_rows(layer, network, q.region, q.rows[None], broken)
    assert (spoilt.lower[0] == -torch.inf).all()
    assert (spoilt.status[0] == Status.NUMERICAL).all()
    assert (spoilt.gap[0] == torch.inf).all()
    torch.testing.assert_close(spoilt.lower[1], good.lower[1], rtol=0, atol=1e-9)


def test_a_primal_point_whose_value_has_lost_its_digits_shows_no_optimum():
    """The row's parts cancel: its value is 3 whatever the input, and 1e20 + 2 - 1e20 + 1 where it is added up."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        for layer, weight, bias in ((net[0], [[1e20]], [0.0]), (net[2], [[1.0], [-1.0]], [2.0, 1.0])):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
    region = ox.LinfBall(torch.ones(1, 1, dtype=torch.float64), 0.5)
    found = Triangle().solve(net, region, torch.ones(1, 2))
    assert float(found.lower.detach()) == 3
    assert float(found.gap) == torch.inf
    assert Status(int(found.status)) == Status.NUMERICAL


def test_a_warm_start_keeps_the_multipliers_of_given_bounds(monkeypatch):
    name = NAMES[0]
    q = question(name)
    with torch.no_grad():
        first = Triangle(solver=Highs(), preactivation=branched(name)).solve(q.network, q.region, q.rows)
        for lots in (None, 1):
            layer = Triangle(
                solver=DualAscent(max_iterations=0, tol=1e-9), preactivation=branched(name), max_bytes=lots
            )
            again = layer.solve(q.network, q.region, q.rows, start=first)
            monkeypatch.setattr("optrelax.layers.exported._settled", lambda f, t: torch.ones_like(f.lower) > 0)
            alone = layer.solve(q.network, q.region, q.rows, start=again)
            cold = layer.solve(q.network, q.region, q.rows)
            monkeypatch.undo()
            assert (alone.lower >= first.lower - 1e-9).all()
            assert (cold.lower < first.lower - 1e-3).any()


# --- names ---------------------------------------------------------------------------------------------------------


class Named(torch.nn.Module):
    """Two hidden layers under names of the user's."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names
        widths = ((3, 4), (4, 5), (5, 2))
        for i, (first, second) in enumerate(zip(names[::2], [*names[1::2], None], strict=True)):
            self.add_module(first, torch.nn.Linear(*widths[i]))
            if second is not None:
                self.add_module(second, torch.nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


@pytest.mark.parametrize(
    "names",
    [
        ("a", "input", "b", "output", "c"),
        ("input", "x", "output", "x_1", "y"),
        ("output", "relu", "input_1", "relu_1", "input"),
        ("rows", "pre", "pre:x", "post", "target"),
    ],
)
def test_submodules_may_have_any_name(names):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Named(names).double()
        plain = Named(("l0", "r0", "l1", "r1", "l2")).double()
    for theirs, mine in zip(plain.parameters(), net.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    region = ox.LinfBall(torch.zeros(2, 3, dtype=torch.float64), 1.3)
    rows = torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64)
    for relaxation in ("box", "deepz", "crown", "alpha-crown", "triangle", "layerwise"):
        found, wanted = (ox.lower_bounds(module, region, rows, relaxation) for module in (net, plain))
        assert torch.equal(found, wanted), relaxation
    with torch.no_grad():
        by_path = ox.preactivation_bounds(net, region, "crown")
        network = ox.capture(net, (3,))
        by_name = {node.name: by_path[node.path] for node in network.activations}
        layers = [Triangle(preactivation=b, solver=Highs()) for b in (by_path, by_name, "crown")]
        found, same = (layer.solve(net, region, rows).lower for layer in layers[:2])
        wanted = layers[2].solve(plain, region, rows).lower
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(same, wanted, rtol=0, atol=1e-9)


def test_layers_with_given_bounds_are_compared_and_named():
    given = branched(NAMES[0])
    copied = {path: ox.Bounds(b.lower.clone(), b.upper.clone()) for path, b in given.items()}
    other = {path: ox.Bounds(b.lower - 1, b.upper) for path, b in given.items()}
    layer = Triangle(preactivation=given)
    assert layer == Triangle(preactivation=copied)
    assert hash(layer) == hash(Triangle(preactivation=copied))
    assert layer != Triangle(preactivation=other)
    assert layer != Triangle()
    assert name_of(layer) == "triangle:preactivation=given"
    assert name_of(Layerwise(preactivation=given)) == "layerwise:preactivation=given"


def test_statuses_print_by_name():
    q = question(NAMES[0])
    found = Triangle(solver=DualAscent(max_iterations=1, tol=1e-9)).solve(q.network, q.region, q.rows[:1])
    assert f"status={[[Status(int(s)).name] for s in found.status[:, 0]]}" in repr(found)
    many = Triangle().solve(q.network, q.region, torch.zeros(60, q.network.outputs, dtype=torch.float64))
    assert "status=120 OPTIMAL," in repr(many)
