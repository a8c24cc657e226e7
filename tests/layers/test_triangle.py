"""The triangle layer: sound at any iteration count, optimal where it says so, and well-behaved as a module."""

from __future__ import annotations

import pickle
import warnings
from copy import deepcopy
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from cases import BY_NAME, CLOSED_FORMS, corners, inputs, random_points, specification
from lp_networks import QUESTIONS, answer, assert_close, before, optimum, question
from oracles import exact, fractions
from torch import Tensor, nn

import optrelax as ox
from optrelax.layers import DualAscent, FixedSlopes, Highs, InteriorPoint, Layerwise, Status, Triangle
from optrelax.layers.solutions import UnsolvedError
from optrelax.relaxations import name_of, resolve

FOR_ALL = pytest.mark.parametrize("name", QUESTIONS)
LINEAR = [n for n in CLOSED_FORMS if n.startswith(("box", "hbox", "hzono", "deepz", "fast-lin", "crown"))]
ROUNDING = 1e-12  # of bounds near 1 in float64


def solve(name: str, **options: object) -> ox.layers.Solution:
    q = question(name)
    with torch.no_grad():
        return Triangle(**options).solve(q.network, q.region, q.rows)


def mixed(count: int = 3) -> tuple[nn.Module, Tensor, ox.InputBox, Tensor]:
    """A network with crossing neurons, inputs, a region and rows."""
    net = BY_NAME["fc"].module()
    x = inputs((5,), count, seed=1)
    return net, x, ox.LinfBall(x, 0.8), specification(3)


# --- values -------------------------------------------------------------------------------------------------------


@FOR_ALL
@pytest.mark.parametrize("relaxation", ["default", "box", "crown"])
def test_by_default_the_value_is_highs_as_closely_as_claimed(name, relaxation):
    options = {} if relaxation == "default" else {"preactivation": relaxation}
    found, wanted = solve(name, **options), answer(name, relaxation)
    size = found.lower.abs().clamp_min(1)
    assert (found.lower <= wanted + ROUNDING * size).all()
    assert (wanted <= found.lower + found.gap + ROUNDING * size).all(), "the gap is no certificate"
    assert (found.gap >= -ROUNDING * size).all()
    closed = found.gap <= 1e-4 * size
    assert torch.equal(closed, found.status == Status.OPTIMAL)
    assert torch.equal(~closed, found.status == Status.ITERATION_LIMIT)
    assert_close(found.lower[closed], wanted[closed], 1e-4)


@FOR_ALL
@pytest.mark.parametrize("solver", [DualAscent(exact=True), InteriorPoint(), Highs()], ids=["finish", "ip", "highs"])
def test_exact_solvers_close_every_gap(name, solver):
    found, wanted = solve(name, solver=solver), answer(name)
    assert (found.status == Status.OPTIMAL).all()
    assert_close(found.lower, wanted, 1e-6)
    assert (found.gap <= 1e-6 * found.lower.abs().clamp_min(1)).all()
    assert (found.lower <= wanted + ROUNDING * wanted.abs().clamp_min(1)).all()


def test_the_questions_put_the_solvers_to_the_test():
    """CROWN's and Fast-Lin's bounds are well below the optimum on most of them."""
    loose = 0
    for name in QUESTIONS:
        q = question(name)
        with torch.no_grad():
            closed = [ox.lower_bounds(q.network, q.region, q.rows, form) for form in ("crown", "fast-lin")]
        loose += int((answer(name) - torch.maximum(*closed) > 1e-3).any())
    assert loose >= 8


@FOR_ALL
def test_sound_at_any_iteration_count_and_never_looser_with_more(name):
    wanted = answer(name)
    last = None
    for count in (0, 1, 2, 5, 12, 30):
        found = solve(name, solver=DualAscent(max_iterations=count, tol=1e-9, check_every=3))
        size = found.lower.abs().clamp_min(1)
        assert (found.lower <= wanted + ROUNDING * size).all(), count
        assert (found.iterations <= count).all()
        assert (found.lower + found.gap >= wanted - ROUNDING * size).all(), count
        if last is not None:
            assert (found.lower >= last - ROUNDING * size).all(), f"looser after {count} iterations"
        last = found.lower


@FOR_ALL
def test_without_iterations_it_is_the_better_of_crown_and_fast_lin(name):
    q = question(name)
    found = solve(name, preactivation="box", solver=DualAscent(max_iterations=0)).lower
    with torch.no_grad():
        forms = (ox.Crown(preactivation=ox.Box()), ox.FastLin(preactivation=ox.Box()))
        crown, fast = (ox.lower_bounds(q.network, q.region, q.rows, form) for form in forms)
    assert_close(torch.maximum(found, crown), found, 1e-12)
    if name.startswith(("fc", "trained", "deep", "strided", "functional")):  # one kink: Fast-Lin's lines are chords
        assert_close(found, torch.maximum(crown, fast), 1e-12)


@pytest.mark.parametrize("form", LINEAR)
@pytest.mark.parametrize(
    "name", ["fc, eps 1", "functional residual, eps 0.3", "leaky relu, eps 0.6", "trained fc, eps 0.08"]
)
def test_at_least_every_closed_form_on_its_own_bounds(form, name):
    q = question(name)
    with torch.no_grad():
        closed = ox.lower_bounds(q.network, q.region, q.rows, form)
    found = solve(name, preactivation=form, solver=Highs()).lower
    assert (found >= closed - 1e-9 * closed.abs().clamp_min(1)).all()


@FOR_ALL
def test_bounds_hold_at_points_of_the_region(name):
    q = question(name)
    x = random_points(q.region, 50)
    with torch.no_grad():
        values = q.network(x.flatten(0, 1)).reshape(*x.shape[:2], -1) @ q.rows.mT
    assert (solve(name).lower <= values + 1e-11).all()


def test_output_bounds_are_the_lower_bounds_of_either_sign():
    for name in ("fc, eps 1", "residual conv, eps 0.3"):
        q = question(name)
        with torch.no_grad():
            found = ox.bounds(q.network, q.region, "triangle")
        eye = torch.eye(q.network.outputs, dtype=torch.float64)
        low, high = (optimum(q.network, q.region, r, before(name, "default")) for r in (eye, -eye))
        assert_close(found.lower, low, 2e-4)
        assert_close(found.upper, -high, 2e-4)


def test_paper_networks():
    """Every architecture of the paper, on images of 8 x 8 (or what its convolutions need)."""
    for name, side in (("fc", 8), ("fc-small", 8), ("conv", 8), ("convplus", 10)):
        net = ox.models.build(name, (1, side, side), 3, seed=1).double().requires_grad_(False)
        region = ox.LinfBall(inputs((1, side, side), 1), 0.02)
        rows = ox.margins(torch.tensor([0]), 3).double()
        found = Triangle(solver=InteriorPoint()).solve(net, region, rows)
        network = ox.capture(net, (1, side, side))
        with torch.no_grad():
            bounds = ox.preactivation_bounds(network, region, ox.Intersect(ox.Box(), ox.FastLin()))
        assert_close(found.lower, optimum(network, region, rows[0], bounds), 1e-6)
        assert (found.status == Status.OPTIMAL).all()


# --- statuses and stopping ----------------------------------------------------------------------------------------


def test_a_looser_tolerance_stops_earlier_and_is_only_looser():
    tight, loose = (solve("trained fc, eps 0.08", solver=DualAscent(tol=tol)) for tol in (1e-5, 1e-2))
    assert (loose.iterations <= tight.iterations).all()
    assert (loose.iterations < tight.iterations).any()
    assert (loose.lower <= tight.lower + ROUNDING).all()
    for found, tol in ((tight, 1e-5), (loose, 1e-2)):
        done = found.status == Status.OPTIMAL
        assert (found.gap[done] <= tol * found.lower[done].abs().clamp_min(1)).all()
    assert (loose.status == Status.OPTIMAL).all()


def test_a_threshold_stops_once_the_sign_is_certain():
    name = "trained fc, eps 0.08"
    wanted = answer(name)
    plain = solve(name, solver=DualAscent(tol=1e-6, max_iterations=400))
    found = solve(name, solver=DualAscent(tol=1e-6, max_iterations=400, threshold=0.0))
    assert found.iterations.sum() < plain.iterations.sum()
    assert torch.equal(found.lower > 0, wanted > 0)
    assert ((found.lower + found.gap <= 0) | (found.lower > 0) | (found.status == Status.OPTIMAL)).all()


def test_throw_raises_unless_every_problem_is_optimal():
    q = question("fc, eps 1")
    short = Triangle(solver=DualAscent(max_iterations=1, tol=1e-9), throw=True)
    with pytest.raises(UnsolvedError, match=r"Triangle: \d ITERATION_LIMIT of 6 problem\(s\)"):
        short.solve(q.network, q.region, q.rows)
    assert (Triangle(solver=Highs(), throw=True).solve(q.network, q.region, q.rows).status == 0).all()


def test_deterministic():
    for solver in (DualAscent(), InteriorPoint()):
        a, b = (solve("residual conv, eps 0.3", solver=solver) for _ in range(2))
        assert torch.equal(a.lower, b.lower)
        assert torch.equal(a.iterations, b.iterations)


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [DualAscent(), InteriorPoint(), Highs()], ids=["ascent", "ip", "highs"])
def test_a_batch_is_a_stack_of_singles(solver):
    for name in ("functional residual, eps 0.3", "relu6 and hardtanh, eps 0.5"):
        q = question(name)
        whole = solve(name, solver=solver)
        for i in range(q.region.shape[0]):
            one = q.region.select(slice(i, i + 1))
            for k in range(len(q.rows)):
                single = Triangle(solver=solver).solve(q.network, one, q.rows[k : k + 1])
                assert_close(single.lower[0, 0], whole.lower[i, k], 1e-9)


def test_memory_limits_change_nothing_beyond_rounding():
    for name in ("trained fc, eps 0.08", "strided conv, eps 0.4"):
        for make in (lambda limit: DualAscent(max_bytes=limit), lambda limit: InteriorPoint(max_bytes=limit)):
            whole, pieces = solve(name, solver=make(None)), solve(name, solver=make(20_000))
            # Adam divides by the size of the gradient, so where that is 0 to rounding its steps differ.
            tol = 1e-6
            assert_close(pieces.lower, whole.lower, tol)
            assert_close(pieces.gap, whole.gap, tol)
            assert torch.equal(pieces.status, whole.status)
        assert_close(solve(name, max_bytes=5_000).lower, solve(name).lower, tol)


def test_more_than_one_batch_dimension():
    net, _, region, rows = mixed(6)
    network = ox.capture(net, (5,))
    wide = ox.InputBox(region.lower.reshape(2, 3, 5), region.upper.reshape(2, 3, 5))
    flat, found = (Triangle().solve(network, r, rows) for r in (region, wide))
    for field in ("lower", "gap", "status", "iterations"):
        assert getattr(found, field).shape == (2, 3, 4)
        assert torch.equal(getattr(found, field), getattr(flat, field).reshape(2, 3, 4))
    per_example = specification(3, batch=6)
    one = Triangle().solve(network, region, per_example).lower
    assert torch.equal(Triangle().solve(network, wide, per_example.reshape(2, 3, 4, 3)).lower, one.reshape(2, 3, 4))
    again = Triangle().solve(network, wide, rows, start=found)
    assert again.lower.shape == (2, 3, 4)


@pytest.mark.parametrize("solver", [DualAscent(), DualAscent(exact=True), InteriorPoint(), Highs()], ids=repr)
def test_an_empty_batch_and_no_rows(solver):
    net, _, region, rows = mixed(2)
    layer = Triangle(solver=solver)
    nothing = layer.solve(net, region.select(slice(0, 0)), rows)
    assert nothing.lower.shape == nothing.gap.shape == nothing.status.shape == (0, 4)
    nothing.lower.sum().backward()
    assert layer.solve(net, region, rows[:0]).lower.shape == (2, 0)


def test_float32_keeps_its_type_and_is_as_close_as_it_can_be():
    for name in ("fc, eps 1", "trained conv, eps 0.05", "leaky relu, eps 0.6"):
        q = question(name)
        net = deepcopy(q.network.module).float()
        region = ox.InputBox(q.region.lower.float(), q.region.upper.float())
        shape = q.network.input_shape
        for solver in (DualAscent(), InteriorPoint(), Highs()):
            found = Triangle(solver=solver).solve(ox.capture(net, shape), region, q.rows)
            assert found.lower.dtype == found.gap.dtype == torch.float32
            assert found.status.dtype == torch.int8
            assert_close(found.lower.double(), answer(name), 2e-4)
        assert_close(found.lower.double(), answer(name), 2e-5)


# --- warm starts --------------------------------------------------------------------------------------------------


def test_a_warm_start_needs_fewer_iterations_and_is_never_looser():
    name = "trained fc, eps 0.08"
    q = question(name)
    layer = Triangle(solver=DualAscent(tol=1e-4))
    with torch.no_grad():
        first = layer.solve(q.network, q.region, q.rows)
        again = layer.solve(q.network, q.region, q.rows, start=first)
        assert (again.lower >= first.lower - ROUNDING * first.lower.abs().clamp_min(1)).all()
        assert (again.lower <= answer(name) + ROUNDING * answer(name).abs().clamp_min(1)).all()
        optimal = first.status == Status.OPTIMAL
        assert optimal.any()
        assert (again.iterations[optimal] == 0).all()  # nothing is left to do
        assert (again.gap <= first.gap + ROUNDING * first.lower.abs().clamp_min(1))[optimal].all()
        exact = Triangle(solver=DualAscent(exact=True)).solve(q.network, q.region, q.rows, start=first)
        assert_close(exact.lower, answer(name), 1e-6)  # an optimum to 1e-4 does not do for it
        # After a small step of the weights, as in training.
        net = deepcopy(q.network.module)
        g = torch.Generator().manual_seed(1)
        for p in net.parameters():
            p.mul_(1 + 1e-3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        network = ox.capture(net, q.network.input_shape)
        cold, warm = (layer.solve(network, q.region, q.rows, start=s) for s in (None, first))
    assert warm.iterations.sum() < cold.iterations.sum()
    none = replace(layer.solver, max_iterations=0)
    with torch.no_grad():
        cold, warm = (Triangle(solver=none).solve(network, q.region, q.rows, start=s) for s in (None, first))
    assert (warm.lower >= cold.lower - ROUNDING * cold.lower.abs().clamp_min(1)).all()
    assert (warm.lower > cold.lower + 1e-3).any()


def test_a_start_of_other_problems_is_refused():
    net, _, region, rows = mixed()
    layer = Triangle()
    good = layer.solve(net, region, rows)
    other = BY_NAME["deep fc"].module()
    foreign = layer.solve(other, ox.LinfBall(inputs((4,), 3), 0.5), rows)
    wrong = {
        "another network": foreign,
        "fewer examples": layer.solve(net, region.select(slice(0, 2)), rows),
        "fewer rows": layer.solve(net, region, rows[:2]),
        "as many problems in another shape": layer.solve(net, ox.LinfBall(inputs((5,), 4), 0.5), rows[:3]),
    }
    for start in wrong.values():
        with pytest.raises(ValueError, match=r"^start: "):
            layer.solve(net, region, rows, start=start)
    with pytest.raises(ValueError, match="start: wants the Solution of an earlier solve, got a Solution without state"):
        layer.solve(net, region, rows, start=replace(good, warm=None))
    for solver in (InteriorPoint(), Highs()):
        assert_close(Triangle(solver=solver).solve(net, region, rows, start=good).lower, good.lower.detach(), 2e-4)


# --- degenerate problems ------------------------------------------------------------------------------------------

SOLVERS = pytest.mark.parametrize("solver", [DualAscent(), InteriorPoint(), Highs()], ids=["ascent", "ip", "highs"])


@SOLVERS
@pytest.mark.parametrize("name", ["dead layer", "always active layer", "affine only", "weights of 1e-12"])
def test_without_a_crossing_neuron_the_bound_is_the_exact_minimum(solver, name):
    case = BY_NAME[name]
    net = case.module()
    region = ox.LinfBall(inputs((4,), 3), 0.02)
    rows = specification(3)
    found = Triangle(solver=solver).solve(net, region, rows)
    with torch.no_grad():
        bounds = ox.preactivation_bounds(net, region, "crown")
    assert not any((b.lower < 0).logical_and(b.upper > 0).any() for b in bounds.values()) or name == "weights of 1e-12"
    assert (found.status == Status.OPTIMAL).all()
    # An affine function of the input: its least value lies in the corner that its gradient points away from.
    x = region.center.requires_grad_()
    value = net(x) @ rows.mT
    for k in range(4):
        (slope,) = torch.autograd.grad(value[:, k].sum(), x, retain_graph=True)
        wanted = value[:, k].detach() - (slope.abs() * region.radius).sum(1)
        assert_close(found.lower[:, k], wanted, 1e-11)
    found.lower.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@SOLVERS
@pytest.mark.parametrize("name", ["fc", "functional residual", "relu6 and hardtanh", "strided conv"])
def test_a_box_without_width_is_its_point(solver, name):
    case = BY_NAME[name]
    net, x = case.module(), inputs(case.input_shape, 2)
    rows = specification(ox.capture(net, case.input_shape).outputs)
    found = Triangle(solver=solver).solve(net, ox.LinfBall(x, 0.0), rows)
    with torch.no_grad():
        assert_close(found.lower, net(x) @ rows.mT, 1e-11)
    assert (found.status == Status.OPTIMAL).all()
    found.lower.sum().backward()
    wanted = torch.autograd.grad((net(x) @ rows.mT).sum(), list(net.parameters()))
    for p, g in zip(net.parameters(), wanted, strict=True):
        assert_close(p.grad, g, 1e-9)


@SOLVERS
@pytest.mark.parametrize("size", [1e-15, 1e-200])
def test_neurons_that_cross_by_next_to_nothing(solver, size):
    net, _, region, rows = mixed(2)
    with torch.no_grad():
        z = net[0](region.center)
        net[0].weight.mul_(size)
        net[0].bias.copy_(size * (0.1 - z[0]) + 0.5 * size * z[0])
    found = Triangle(solver=solver).solve(net, region, rows)
    with torch.no_grad():
        bounds = ox.preactivation_bounds(net, region, "box")["1"]
    assert ((bounds.lower < 0) & (bounds.upper > 0)).any()
    assert (found.status == Status.OPTIMAL).all()
    network = ox.capture(net, (5,))
    with torch.no_grad():
        given = ox.preactivation_bounds(net, region, ox.Intersect(ox.Box(), ox.FastLin()))
    assert_close(found.lower, optimum(network, region, rows, given), 1e-9)
    found.lower.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@SOLVERS
def test_one_crossing_neuron_by_1e_15_among_others(solver):
    net, _, region, rows = mixed(1)
    with torch.no_grad():
        bounds = ox.preactivation_bounds(net, region, "box")["1"]
        net[0].bias[0] -= bounds.upper[0, 0] - 1e-15
        net[0].bias[1] -= bounds.lower[0, 1] + 1e-15
        given = ox.preactivation_bounds(net, region, ox.Intersect(ox.Box(), ox.FastLin()))
    found = Triangle(solver=solver).solve(net, region, rows)
    assert_close(found.lower, optimum(ox.capture(net, (5,)), region, rows, given), 1e-4)
    assert (found.status == Status.OPTIMAL).all()
    found.lower.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@SOLVERS
def test_duplicate_and_zero_rows(solver):
    net, _, region, rows = mixed(2)
    many = torch.cat([rows, rows, torch.zeros(1, 3, dtype=torch.float64), 2 * rows])
    found = Triangle(solver=solver).solve(net, region, many)
    assert_close(found.lower[:, :4], found.lower[:, 4:8], 1e-9)
    assert_close(found.lower[:, 4:8], found.lower[:, :4].detach(), 1e-12)
    assert (found.lower[:, 8] == 0).all()
    assert (found.gap[:, 8] == 0).all()
    assert_close(found.lower[:, 9:], 2 * found.lower[:, :4].detach(), 2e-4)


# --- rounding -----------------------------------------------------------------------------------------------------


@SOLVERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outward_is_below_nearest_and_below_the_exact_value_of_points(solver, dtype):
    """No tolerance: the network's value in rational arithmetic at points of the region, where the bound is tight."""
    g = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.LeakyReLU(0.3), nn.Linear(2, 2)).to(dtype)
    for p in net.parameters():
        nn.init.normal_(p, generator=g)
    network = ox.capture(net, (2,))
    rows = torch.tensor([[1.0, -1.0], [0.3, 0.7], [-1.1, 0.2]], dtype=dtype)
    centers = torch.rand(8, 2, generator=g, dtype=dtype)
    touched = 0
    for eps in (0.0, 1e-4, 0.05, 1.0):
        region = ox.LinfBall(centers, eps)
        with torch.no_grad():
            layers = [Triangle(solver=solver, rounding=r) for r in ("nearest", "outward")]
            nearest, outward = (layer.solve(network, region, rows).lower for layer in layers)
        # Solvers that stop at a tolerance may come a little closer to the optimum the second time.
        slack = 0.0 if isinstance(solver, Highs) else 1e-8
        if dtype == torch.float32 and not isinstance(solver, Highs):  # outward bounds are evaluated in float64
            slack = 1e-6
        assert (outward <= nearest + slack).all()
        assert_close(outward.double(), nearest.double(), 1e-4 if dtype == torch.float32 else slack + 1e-11)
        for i in range(8):
            ends = torch.stack([region.lower[i], region.upper[i]])
            for corner in torch.cartesian_prod(*ends.mT):
                values, bounds = fractions(rows) @ exact(net, fractions(corner)), fractions(outward[i])
                assert (bounds <= values).all()
                touched += sum(float(v - b) <= 1e-5 for v, b in zip(values, bounds, strict=True))
    assert touched > 50, "the bound is never close: rounding is not put to the test"


def test_outward_gaps_are_certificates_too():
    name = "trained fc, eps 0.08"
    found = solve(name, rounding="outward")
    assert (found.lower <= answer(name)).all()
    assert (found.lower + found.gap >= answer(name) - 1e-9).all()


# --- as a module and as a relaxation ------------------------------------------------------------------------------


def test_usable_as_a_module():
    net, _, region, rows = mixed()
    layer = Triangle()
    model = nn.ModuleList([net, layer])
    assert list(layer.parameters()) == list(layer.buffers()) == []
    assert layer.state_dict() == {}
    assert model.to(torch.float64) is model
    assert model.eval()[1].training is False
    assert model.train()[1].training is True
    assert torch.equal(layer(net, region, rows), layer.solve(net, region, rows).lower)
    calls = []
    handle = layer.register_forward_hook(lambda *a: calls.append(a))
    layer(net, region, rows)
    handle.remove()
    assert len(calls) == 1
    shown = repr(model)
    assert "Triangle(" in shown
    assert "solver=DualAscent(" in shown
    assert "preactivation=Intersect(" in shown


def test_fields_do_not_change():
    layer = Triangle()
    with pytest.raises(FrozenInstanceError, match=r"cannot assign to field 'solver'; use dataclasses\.replace"):
        layer.solver = Highs()
    assert replace(layer, solver=Highs()).solver == Highs()
    assert layer.solver == DualAscent()


def test_equal_where_the_fields_are():
    assert Triangle() == Triangle()
    assert Triangle() != Layerwise()
    assert Triangle() != Triangle(solver=DualAscent(tol=1e-3))
    assert Triangle(preactivation="crown") == Triangle(preactivation=ox.Crown())
    assert hash(Triangle(preactivation="crown")) == hash(Triangle(preactivation=ox.Crown()))
    assert len({Triangle(), Triangle(), Triangle(solver=Highs()), Layerwise()}) == 3


def test_copies_and_pickles():
    layer = Triangle(preactivation="crown", solver=DualAscent(tol=1e-3), gradient=FixedSlopes())
    assert deepcopy(layer) == layer
    assert pickle.loads(pickle.dumps(layer)) == layer  # noqa: S301


def test_has_a_name():
    assert resolve("triangle") == Triangle()
    assert name_of(Triangle()) == "triangle"
    assert name_of(resolve("triangle")) == "triangle"
    assert resolve("triangle:preactivation=crown") == Triangle(preactivation=ox.Crown())
    assert resolve(name_of(Triangle(preactivation=ox.Crown()))) == Triangle(preactivation=ox.Crown())
    assert resolve(name_of(Triangle(rounding="outward"))) == Triangle(rounding="outward")


def test_pre_activation_bounds_are_those_of_the_source():
    q = question("fc, eps 1")
    with torch.no_grad():
        for source in ("crown", "box"):
            found = ox.preactivation_bounds(q.network, q.region, Triangle(preactivation=source))
            wanted = ox.preactivation_bounds(q.network, q.region, source)
            for name, b in wanted.items():
                assert torch.equal(found[name].lower, b.lower)
                assert torch.equal(found[name].upper, b.upper)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_bad_options():
    with pytest.raises(ValueError, match="Triangle: preactivation=cauchy is an estimate, not a bound"):
        Triangle(preactivation="cauchy")
    with pytest.raises(ValueError, match="is an estimate, not a bound"):
        Layerwise(preactivation=ox.Cauchy(k=3))
    with pytest.raises(ValueError, match="unknown relaxation 'crwn'"):
        Triangle(preactivation="crwn")
    for wrong in (Highs, "highs", None, ox.Crown()):
        with pytest.raises(
            TypeError, match=r"Triangle: solver wants a solver object, such as DualAscent|parameter 'solver'"
        ):
            Triangle(solver=wrong)
    with pytest.raises(TypeError):
        Triangle(ox.Crown())
    with pytest.raises(TypeError, match="unexpected keyword argument 'solvr'"):
        Triangle(solvr=Highs())
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'outward', got 'up'"):
        Triangle(rounding="up")
    with pytest.raises(ValueError, match="max_bytes must be a positive integer or None"):
        Triangle(max_bytes=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": -1.0}, "tol must be > 0, got -1.0"),
        ({"step": 0.0}, "step must be > 0, got 0.0"),
        ({"decay": 1.5}, r"decay must lie in \(0, 1\], got 1.5"),
        ({"floor": -0.1}, r"floor must lie in \[0, 1\], got -0.1"),
        ({"max_iterations": -1}, "max_iterations must be >= 0, got -1"),
        ({"check_every": 0}, "check_every must be >= 1, got 0"),
        ({"max_bytes": 0}, "max_bytes must be positive, got 0"),
    ],
)
def test_bad_options_of_the_ascent(options, message):
    with pytest.raises(ValueError, match=f"DualAscent: {message}"):
        DualAscent(**options)


@pytest.mark.parametrize("name", ["max pool", "dilated max pool", "maxima"])
def test_maxima_are_composed_of_relus(name):
    """Layers and solvers agree, no point escapes, and exact layerwise bounds are the tighter ones."""
    case = BY_NAME[name]
    network, region, rows = case.network(), ox.LinfBall(inputs(case.input_shape, 2), 0.1), specification(3)
    points = torch.cat([corners(region, 40), random_points(region, 40)])
    values = (network(points.flatten(0, 1)) @ rows.mT).unflatten(0, points.shape[:2])
    found = {}
    for key, layer in {"ascent": Triangle(), "highs": Triangle(solver=Highs()), "layerwise": Layerwise()}.items():
        found[key] = layer.solve(network, region, rows)
        assert (found[key].lower <= values + 1e-9).all(), key
        assert set(layer.preactivation_bounds(network, region)) == {n.name for n in network.activations}
    torch.testing.assert_close(found["ascent"].lower, found["highs"].lower, rtol=1e-3, atol=1e-3)
    assert (found["layerwise"].lower >= found["highs"].lower - 1e-4).all()
    assert (ox.lower_bounds(network, region, rows, "alpha-crown") <= values + 1e-9).all()


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("name", ["max pool", "maxima"])
def test_no_pool_makes_an_lp_looser_than_crown(name, rounding):
    """At every radius, from where one entry of a window dominates to where all cross."""
    case = BY_NAME[name]
    network, rows = case.network(), specification(3)
    layer = Triangle(preactivation="crown", rounding=rounding, solver=DualAscent(max_iterations=3))
    for eps in (0.02, 1.0):
        region = ox.LinfBall(inputs(case.input_shape, 1), eps)
        found = layer.solve(network, region, rows)
        assert (found.lower >= ox.lower_bounds(network, region, rows, "crown", rounding=rounding)).all()
        assert (found.gap >= 0).all()


def test_an_lp_with_a_pool_has_the_gradient_of_the_bound_taken():
    case = BY_NAME["max pool"]
    module, rows = case.module(), specification(3)
    x = inputs(case.input_shape, 1).requires_grad_(True)

    def lower(center):
        layer = Triangle(preactivation="box", solver=DualAscent(max_iterations=3))
        return layer.solve(module, ox.LinfBall(center, 1.0), rows).lower.sum()

    (found,) = torch.autograd.grad(lower(x), x)
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    with torch.no_grad():
        wanted = (lower(x + 1e-6 * step) - lower(x - 1e-6 * step)) / 2e-6
    torch.testing.assert_close((found * step).sum(), wanted, rtol=1e-3, atol=1e-3)


def test_half_precision_and_autocast_are_refused():
    net, _, region, rows = mixed()
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast"):
        Triangle().solve(net, region, rows)
    with pytest.raises(ValueError, match="float"):
        Triangle().solve(net.half(), ox.InputBox(region.lower.float(), region.upper.float()), rows)


def test_no_optimum_is_claimed_beside_the_overflow_threshold():
    """The optimum, -3e38, is a float32: another such value added would be none."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]])), net[0].bias.zero_()
        net[2].weight.fill_(-2.0), net[2].bias.zero_()
    region = ox.LinfBall(torch.zeros(1, 1), 1.5e38)
    for rounding in ("nearest", "outward"):
        found = Triangle(rounding=rounding).solve(net, region, torch.eye(1))
        assert found.status.item() == Status.NUMERICAL
        assert found.lower.item() <= -2 * torch.tensor(1.5e38).item()
        with pytest.raises(UnsolvedError, match="NUMERICAL"):
            Triangle(rounding=rounding, throw=True).solve(net, region, torch.eye(1))


@pytest.mark.parametrize("relaxation", ["triangle", "alpha-crown", Layerwise()], ids=str)
def test_a_compiled_step_breaks_its_graph_at_the_layer(relaxation):
    net, x = ox.models.fc(3, 4, 2, seed=0).double(), torch.rand(2, 3, dtype=torch.float64)

    def step(x: torch.Tensor) -> torch.Tensor:
        return ox.bounds(net, ox.LinfBall(2 * x, 0.2), relaxation).lower.sum()

    grads = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for function in (step, torch.compile(step, backend="eager")):
            leaf = x.clone().requires_grad_()
            function(leaf).backward()
            grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])
