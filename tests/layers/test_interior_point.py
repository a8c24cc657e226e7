"""The exact finish: certified gaps of 1e-6, on every kind of network and on problems that are hard for it."""

from __future__ import annotations

import pytest
import torch
from cases import BY_NAME, inputs, specification
from lp_networks import QUESTIONS, answer, assert_close, before, question, trained

import optrelax as ox
from optrelax.layers import DualAscent, Highs, InteriorPoint, Status, Triangle, newton
from optrelax.layers.evaluation import evaluate, solved
from optrelax.layers.hulls import hull_lines
from optrelax.layers.problems import Problems
from optrelax.layers.reduction import reduce_problems, without_flat
from optrelax.layers.starts import crown_start
from optrelax.layers.sweeps import backward_sweep, nearest_point, primal_sweep


def problems(name: str) -> tuple[Problems, list]:
    """One problem an example and row, and CROWN's dual points."""
    q = question(name)
    bounds = {node.name: before(name, "default")[node.path] for node in q.network.activations}
    hulls = {n: hull_lines(q.network[n].op, b) for n, b in bounds.items()}
    k = len(q.rows)
    example = torch.arange(q.region.shape[0]).repeat_interleave(k)
    rows = q.rows.repeat(q.region.shape[0], 1).reshape(-1, *q.network.output_shape)
    made = Problems(
        q.network,
        q.network.output,
        rows,
        q.region.select(example),
        {n: h.select(example) for n, h in hulls.items()},
        example,
    )
    return made, [crown_start(q.network, bounds, hulls).select(example)]


@pytest.mark.parametrize("name", QUESTIONS)
def test_both_points_meet_at_the_optimum(name):
    made, starts = problems(name)
    found = solved(InteriorPoint(), made, starts)
    wanted = answer(name).flatten()
    assert_close(found.lower, wanted, 1e-6)
    assert_close(found.objective, wanted, 1e-6)
    # What is reported is what the points are worth.
    assert_close(backward_sweep(made, found.dual).value, found.lower, 1e-13)
    assert_close(primal_sweep(made, found.primal).objective, found.objective, 1e-13)
    for part in (found.dual.alpha, found.dual.beta, found.primal.tau):
        assert all(((w >= 0) & (w <= 1)).all() for w in part.values())
    assert ((found.primal.x >= made.box.lower) & (found.primal.x <= made.box.upper)).all()


@pytest.mark.parametrize("name", ["fc, eps 1", "functional residual, eps 0.3", "relu6 and hardtanh, eps 0.5"])
def test_the_reduced_problem_is_the_same_problem(name):
    """At any primal point: pre-activations p = M v + N y + m, the objective, and hulls that hold."""
    made, _ = problems(name)
    made = without_flat(made)
    reduced = reduce_problems(made)
    g = torch.Generator().manual_seed(1)
    x = made.region.sample(1, g)[0]
    tau = {n: torch.rand(h.free.shape, generator=g, dtype=torch.float64) for n, h in made.hulls.items()}
    values = {n: h.below0[0] for n, h in made.hulls.items()}
    point = nearest_point(made, x, values)
    point.tau.update({n: torch.where(made.hulls[n].free, tau[n], 0.0) for n in point.tau})
    sweep = primal_sweep(made, point)
    v = ((x - made.center) / made.radius).flatten(1)
    p, y = torch.zeros(2, *reduced.m.shape, dtype=torch.float64).unbind()
    for slot in reduced.slots:
        p[:, slot.span] = slot.gather(sweep.before[slot.name])
        y[:, slot.span] = slot.gather(sweep.after[slot.name])
    made_up = (reduced.M @ v[..., None] + reduced.N @ y[..., None])[..., 0] + reduced.m
    assert_close(made_up, p, 1e-11)
    value = (reduced.c_v * v).sum(1) + (reduced.c_y * y).sum(1) + reduced.offset
    assert_close(value, sweep.objective, 1e-11)
    g_p, g_y, h = reduced.constraints
    real = torch.cat([slot.real for slot in reduced.slots], 1)
    assert (torch.where(real, g_p * p + g_y * y - h, 0.0) >= -1e-11).all()
    inside = g_p * reduced.middle + g_y * reduced.inside - h
    assert (inside > 0).all(), "the start is not strictly inside"


def test_it_only_ever_improves_an_answer():
    made, starts = problems("trained fc, eps 0.08")
    for count in (0, 5, 60):
        ascent = DualAscent(max_iterations=count, tol=1e-12)
        first = solved(ascent, made, starts)
        found = evaluate(made, InteriorPoint().finish(made, ascent.solve(made, starts)), InteriorPoint().tol)
        assert (found.lower >= first.lower).all()
        assert (found.objective <= first.objective).all()
        assert (found.iterations >= first.iterations).all()
        assert (found.status == Status.OPTIMAL).all()


def test_an_iteration_limit_is_sound_and_says_so():
    made, starts = problems("trained fc, eps 0.08")
    wanted = answer("trained fc, eps 0.08").flatten()
    for count in (1, 3, 6):
        found = solved(InteriorPoint(max_iterations=count), made, starts)
        assert (found.lower <= wanted + 1e-12 * wanted.abs().clamp_min(1)).all()
        assert (found.objective >= wanted - 1e-9).all()
        closed = found.objective - found.lower <= 1e-6 * found.lower.abs().clamp_min(1)
        assert torch.equal(closed, found.status == Status.OPTIMAL)
        assert torch.equal(~closed, found.status == Status.ITERATION_LIMIT)
    cold = InteriorPoint(max_iterations=1, warm=DualAscent(max_iterations=0))
    assert (solved(cold, made, starts).status == Status.ITERATION_LIMIT).any()


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e2, 1e4])
def test_rows_of_any_size(scale):
    q = question("trained fc, eps 0.08")
    with torch.no_grad():
        found = Triangle(solver=InteriorPoint()).solve(q.network, q.region, scale * q.rows)
    wanted = scale * answer("trained fc, eps 0.08")
    assert (found.status == Status.OPTIMAL).all()
    assert_close(found.lower, wanted, 1e-6)


@pytest.mark.parametrize("eps", [1e-9, 1e-6, 1e-3, 0.3, 1.0])
def test_boxes_of_any_size(eps):
    network = ox.capture(trained("fc"), (1, 8, 8))
    x = ox.load_dataset("digits", split="test").images[[3]].double()
    region, rows = ox.LinfBall(x, eps), specification(10, k=3)
    with torch.no_grad():
        found, exact = (Triangle(solver=s).solve(network, region, rows) for s in (InteriorPoint(), Highs()))
    assert (found.status == Status.OPTIMAL).all()
    assert_close(found.lower, exact.lower, 2e-6)


def test_some_inputs_without_width():
    case = BY_NAME["functional residual"]
    net, x = case.module(), inputs(case.input_shape, 3)
    width = torch.tensor([0.0, 0.5, 0.0, 0.8], dtype=torch.float64)
    region, rows = ox.InputBox(x - width, x + width), specification(3)
    with torch.no_grad():
        found, exact = (Triangle(solver=s).solve(net, region, rows) for s in (InteriorPoint(), Highs()))
    assert (found.status == Status.OPTIMAL).all()
    assert_close(found.lower, exact.lower, 2e-6)


def test_float32_problems_are_finished_in_float64():
    q = question("trained fc, eps 0.08")
    region = ox.InputBox(q.region.lower.float(), q.region.upper.float())
    net = trained("fc")
    single = ox.models.fc(64, 20, 20, 10)
    single.load_state_dict(net.state_dict())
    with torch.no_grad():
        found = Triangle(solver=InteriorPoint()).solve(ox.capture(single, (1, 8, 8)), region, q.rows)
    assert found.lower.dtype == torch.float32
    assert (found.status == Status.OPTIMAL).all()
    assert_close(found.lower.double(), answer("trained fc, eps 0.08"), 3e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, "tol must be > 0, got 0.0"),
        ({"max_iterations": 0}, "max_iterations must be >= 1, got 0"),
        ({"max_bytes": -1}, "max_bytes must be positive, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"InteriorPoint: {message}"):
        InteriorPoint(**options)


def test_a_factorisation_that_breaks_down_spoils_its_own_problem_only(monkeypatch):
    """Pivots of 0 are what a library returns where a factorisation overflows; solving with them would raise."""
    name = "trained fc, eps 0.08"
    made, starts = problems(name)
    good = solved(InteriorPoint(), made, starts)
    real = newton.factor

    def breaking(systems):
        factors, pivots, info = real(systems)
        pivots[0] = 0
        factors[0] = torch.nan
        return factors, pivots, info

    monkeypatch.setattr(newton, "factor", breaking)
    found = solved(InteriorPoint(), made, starts)
    assert (found.status != good.status).sum() <= 2
    assert_close(found.lower, good.lower, 1e-2)
    assert (found.status == Status.OPTIMAL).sum() >= made.count - 2


@pytest.mark.parametrize("n", [3, 64, 200, 260])
@pytest.mark.parametrize("threads", [1, 2])
def test_factors_are_right_with_several_threads(n, threads):
    g = torch.Generator().manual_seed(n)
    systems, right = (torch.randn(8, n, m, generator=g, dtype=torch.float64) for m in (n, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        factors, pivots, info = newton.factor(systems)
        found = torch.linalg.lu_solve(factors, pivots, right)
    finally:
        torch.set_num_threads(before)
    assert (info == 0).all()
    assert (systems @ found - right).abs().max() < 1e-8
