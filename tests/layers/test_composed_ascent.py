"""Dual ascent on the crossing neurons alone: the iterates of the sweeps, whatever stands beside a problem."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from lp_networks import QUESTIONS, question
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import optrelax as ox
from optrelax.kernels import native
from optrelax.layers import DualAscent, Highs, Layerwise, Status, Triangle, evaluation
from optrelax.layers.ascent import composed_ascent, dual_ascent, example_matrices
from optrelax.layers.ascent.schedule import rates
from optrelax.layers.composition import AffineBlocks, KeptNeurons
from optrelax.layers.hulls import hull_lines
from optrelax.layers.problems import DualPoint, Problems
from optrelax.layers.starts import chord_start, crown_start
from optrelax.margin_rows import margins

pytestmark = pytest.mark.compiler

RELU = [name for name in QUESTIONS if not any(odd in name for odd in ("bent", "relu6"))]
EXACT = [name for name in RELU if "trained" not in name]


@pytest.fixture(autouse=True)
def compiled() -> None:
    found = example_matrices.kernels()
    assert found.library is not None, found.reason


@pytest.fixture(params=["crossing", "alive"])
def keep(request: pytest.FixtureRequest) -> KeptNeurons:
    """Stable neurons composed away, or only the dead ones."""
    return request.param  # type: ignore[no-any-return]


def always(monkeypatch: pytest.MonkeyPatch, keep: KeptNeurons | None) -> None:
    monkeypatch.setattr(composed_ascent, "plan", lambda *given: keep)


def solved(monkeypatch: pytest.MonkeyPatch, keep: KeptNeurons | None, layer: Any, *given: Any, **more: Any) -> Any:
    always(monkeypatch, keep)
    with torch.no_grad():
        return layer.solve(*given, **more)


def by_sweeps(monkeypatch: pytest.MonkeyPatch, layer: Any, *given: Any, **more: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(dual_ascent, "layers_of", lambda problems: None)
        return solved(patch, None, layer, *given, **more)


def random_net(*widths: int, seed: int = 0, bias: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Linear maps and ReLUs; a greater bias makes fewer neurons cross."""
    g = torch.Generator().manual_seed(seed)
    parts: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        linear = nn.Linear(n, m, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(m, n, generator=g, dtype=dtype) / n**0.5)
            linear.bias.copy_(bias * torch.randn(m, generator=g, dtype=dtype))
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def box(inputs: int, batch: int, eps: float, seed: int = 1, dtype: torch.dtype = torch.float64) -> ox.InputBox:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, inputs, generator=g, dtype=dtype)
    return ox.InputBox(x - eps, x + eps)


# Few iterations from CROWN's start, tolerance out of reach: every iterate is compared, none is finished.
@pytest.mark.parametrize("iterations", [0, 1, 5])
@pytest.mark.parametrize("name", EXACT)
def test_iterates_are_those_of_the_sweeps(keep, name, iterations, monkeypatch):
    q = question(name)
    layer = Triangle(preactivation="crown", solver=DualAscent(max_iterations=iterations, tol=1e-300, check_every=2))
    given = (q.network, q.region, q.rows)
    found, wanted = solved(monkeypatch, keep, layer, *given), by_sweeps(monkeypatch, layer, *given)
    torch.testing.assert_close(found.lower, wanted.lower, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.gap, wanted.gap, rtol=1e-7, atol=1e-9)
    assert bool((found.iterations <= iterations).all())


@pytest.mark.parametrize("name", RELU)
def test_a_whole_solve_is_as_tight_and_certified(keep, name, monkeypatch):
    q = question(name)
    layer = Triangle(solver=DualAscent(tol=1e-4))
    found = solved(monkeypatch, keep, layer, q.network, q.region, q.rows)
    wanted = by_sweeps(monkeypatch, layer, q.network, q.region, q.rows)
    room = 2e-4 * wanted.lower.abs().clamp_min(1)
    closed, theirs = (s.status == Status.OPTIMAL for s in (found, wanted))
    assert float(closed.double().mean()) > float(theirs.double().mean()) - 0.05
    both = closed & theirs
    assert bool(((found.lower - wanted.lower).abs() <= room)[both].all())
    assert bool((found.gap >= -1e-9).all())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "widths",
    [(1, 1, 1), (3, 2, 1), (7, 30, 5, 4), (16, 17, 16, 15, 3), (33, 20, 20, 20, 20, 6), (70, 90, 40, 13)],
    ids=str,
)
def test_every_size_and_thread_count(keep, widths, dtype, threads, monkeypatch):
    net = random_net(*widths, dtype=dtype, bias=0.5)
    region = box(widths[0], 5, 0.2, dtype=dtype)
    eye = torch.eye(widths[-1], dtype=dtype)
    layer = Triangle(preactivation="crown", solver=DualAscent(max_iterations=4, tol=1e-30, check_every=3))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = solved(monkeypatch, keep, layer, net, region, eye)
        again = solved(monkeypatch, keep, layer, net, region, eye)
    finally:
        torch.set_num_threads(before)
    wanted = by_sweeps(monkeypatch, layer, net, region, eye)
    close = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.lower, wanted.lower, rtol=close, atol=close)
    torch.testing.assert_close(found.gap, wanted.gap, rtol=100 * close, atol=100 * close)
    assert torch.equal(found.lower, again.lower)


def problems_of(
    net: nn.Module, region: ox.InputBox, rows: Tensor, example: Tensor | None
) -> tuple[Any, list[DualPoint]]:
    """One LP a row [R, outputs], over example[r]; None: over r."""
    network = ox.capture(net, region.lower.shape[1:])
    bounds = ox.Crown().preactivation_bounds(network, region)
    hulls = {n.name: hull_lines(n.op, bounds[n.name]) for n in network.activations}
    index = torch.arange(len(rows)) if example is None else example
    crown = crown_start(network, bounds, hulls)
    starts = [s.select(index) for s in (crown, chord_start(network, hulls, crown))]
    spelt = {name: h.select(index) for name, h in hulls.items()}
    return Problems(network, network.output, rows, region.select(index), spelt, example), starts


@torch.no_grad()
def test_what_stands_beside_a_problem_does_not_matter(keep, monkeypatch):
    """Shuffled, more of an example than stand side by side or than a thread takes, cut by memory, one by one."""
    net, region = random_net(20, 24, 16, 6, bias=0.4), box(20, 7, 0.25)
    g = torch.Generator().manual_seed(3)
    example = torch.cat([torch.full((130,), 2), torch.tensor([6, 0, 0, 5]), torch.full((13,), 4)])
    example = example[torch.randperm(len(example), generator=g)]
    rows = torch.randn(len(example), 6, generator=g, dtype=torch.float64)
    always(monkeypatch, keep)
    options = DualAscent(max_iterations=24, tol=1e-2, check_every=2)
    problems, starts = problems_of(net, region, rows, example)

    def run(options: DualAscent, problems: Problems, starts: list[DualPoint]) -> tuple[Any, ...]:
        found = composed_ascent.solve(options, problems, starts)
        assert found is not None
        return (*found.dual.alpha.values(), *found.primal.tau.values(), found.primal.x, found.iterations)

    whole = run(options, problems, starts)
    assert whole[-1].unique().numel() > 2, "problems are meant to leave at different iterations"
    parts = run(replace(options, max_bytes=1), problems, starts)
    alone = [
        run(options, problems.select(torch.tensor([r])), [s.select(torch.tensor([r])) for s in starts])
        for r in range(0, len(rows), 9)
    ]
    nobody_says = run(options, replace(problems, example=None), starts)
    for i, found in enumerate(whole):
        torch.testing.assert_close(parts[i], found, rtol=0, atol=1e-12)
        torch.testing.assert_close(nobody_says[i], found, rtol=0, atol=1e-9)
        torch.testing.assert_close(torch.cat([one[i] for one in alone]), found[::9], rtol=0, atol=1e-9)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 10.0])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e12])
def test_extremes_stay_sound(keep, eps, scale, monkeypatch):
    """No width, everything crosses, tiny and huge weights: bounds stay below what is reached."""
    net = random_net(12, 15, 15, 4, bias=0.3)
    with torch.no_grad():
        net[2].weight *= scale
        net[2].bias.zero_()
    region = box(12, 4, eps)
    eye = torch.cat([torch.eye(4), -torch.eye(4)]).double()
    found = solved(monkeypatch, keep, Triangle(preactivation="crown"), net, region, eye)
    g = torch.Generator().manual_seed(4)
    for _ in range(50):
        share = torch.rand(region.lower.shape, generator=g, dtype=torch.float64).round()
        x = torch.lerp(region.lower, region.upper, share)
        with torch.no_grad():
            value = net(x) @ eye.mT
        assert bool((found.lower <= value + 1e-9 * value.abs().clamp_min(1)).all())
    assert bool(found.lower.isfinite().all())


def test_ties_and_neurons_that_are_dead_active_or_touch_zero(keep, monkeypatch):
    """l = 0, u = 0, |l| = |u|, coefficients of 0, an example without a crossing neuron beside one where all cross."""
    net = random_net(4, 6, 3)
    with torch.no_grad():
        net[0].weight.copy_(
            torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]])
        )
        net[0].bias.copy_(torch.tensor([0.0, 0.0, 5.0, -5.0, 0.0, 0.0]))
        net[2].weight[:, 4] = 0.0
    lower = torch.tensor([[-1.0, -1, -1, -1], [0, 0, -1, 2], [-1, -1, -1, -1], [1, 1, 1, 1]]).double()
    upper = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 3], [0, 0, 0, 0], [2, 2, 2, 2]]).double()
    region = ox.InputBox(lower, upper)
    rows = torch.cat([torch.eye(3), torch.zeros(1, 3)]).double()
    layer = Triangle(preactivation="crown", solver=DualAscent(tol=1e-9, exact=False, max_iterations=300))
    found, wanted = (solved(monkeypatch, way, layer, net, region, rows) for way in (keep, None))
    torch.testing.assert_close(found.lower, wanted.lower, rtol=1e-6, atol=1e-6)
    assert bool((found.lower[:, 3] == 0).all())
    assert bool((found.iterations[3] == 0).all()), "where nothing crosses the first evaluation is exact"


def test_a_threshold_stops_and_none_does_not(keep, monkeypatch):
    q = question("trained fc, eps 0.08")
    decided = Triangle(solver=DualAscent(threshold=0.0, tol=1e-6))
    exact = Triangle(solver=DualAscent(tol=1e-6, max_iterations=400))
    first, second = (solved(monkeypatch, keep, layer, q.network, q.region, q.rows) for layer in (decided, exact))
    assert float(first.iterations.double().mean()) < float(second.iterations.double().mean())
    certain = (first.lower > 0) | (first.lower + first.gap <= 0)
    assert bool(((second.lower > 0) == (first.lower > 0))[certain].all())


def test_an_earlier_solution_is_a_start(keep, monkeypatch):
    q = question("trained fc, eps 0.08")
    layer = Triangle(solver=DualAscent(tol=1e-5, max_iterations=400))
    first = solved(monkeypatch, keep, layer, q.network, q.region, q.rows)
    again = solved(monkeypatch, keep, layer, q.network, q.region, q.rows, start=first)
    assert bool((again.lower >= first.lower - 1e-9).all())
    stopped = replace(layer, solver=DualAscent(tol=1e-5, max_iterations=0))
    kept = solved(monkeypatch, keep, stopped, q.network, q.region, q.rows, start=first)
    torch.testing.assert_close(kept.lower, first.lower, rtol=1e-9, atol=1e-9)


def test_float32_sweeps_of_float64_problems(keep, monkeypatch):
    q = question("trained fc, eps 0.08")
    found = [
        solved(monkeypatch, keep, Triangle(solver=DualAscent(precision=precision)), q.network, q.region, q.rows)
        for precision in ("same", "float32")
    ]
    assert found[1].lower.dtype == torch.float64
    torch.testing.assert_close(found[1].lower, found[0].lower, rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("name", ["fc, eps 1", "residual conv, eps 0.3", "trained conv, eps 0.05"])
def test_layerwise_through_it(keep, name, monkeypatch):
    q = question(name)
    layer = Layerwise(solver=DualAscent(tol=1e-4))
    found, wanted = (solved(monkeypatch, way, layer, q.network, q.region, q.rows) for way in (keep, None))
    torch.testing.assert_close(found.lower, wanted.lower, rtol=3e-3, atol=3e-3)


def test_gradients_are_those_of_the_other_way(keep, monkeypatch):
    net, region = random_net(10, 12, 12, 4, bias=0.4), box(10, 6, 0.2)
    layer = Triangle(solver=DualAscent(tol=1e-7, max_iterations=2000))
    spec = margins(torch.arange(6) % 4, 4).double()
    grads = []
    for way in (keep, None):
        always(monkeypatch, way)
        net.zero_grad()
        layer(net, region, spec).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-2 * float(grads[1].abs().max()))


@torch.no_grad()
def test_the_cheapest_way_is_taken():
    """Few cross and few are dead: composed; all cross: kept; matrices beyond cache or memory: the sweeps."""

    def planned(net: nn.Module, copies: int, iterations: int, count: int | None = None) -> KeptNeurons | None:
        rows = torch.eye(10, dtype=torch.float64).repeat(3 * copies, 1)
        problems, _ = problems_of(net, box(60, 3, 0.3), rows, torch.arange(3).repeat_interleave(10 * copies))
        problems = problems.select(torch.arange(problems.count)[:count])
        given = composed_ascent.examples(problems)
        assert given is not None
        return composed_ascent.plan(given, iterations, AffineBlocks(problems.network, problems.rows))

    active = random_net(60, 80, 80, 10)
    with torch.no_grad():
        for slot in (0, 2):
            active[slot].bias[4:] += 9.0
    assert planned(active, 3, 200) == "crossing"
    assert planned(random_net(60, 80, 80, 10), 1, 200) == "alive"
    assert planned(random_net(60, 600, 600, 10), 1, 200) is None
    conv = nn.Sequential(nn.Unflatten(1, (1, 6, 10)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    assert planned(conv.double(), 1, 200) is not None
    assert planned(conv, 1, 200, count=1) is None, "one problem is not counted for a convolution written out"


def test_other_hulls_and_machines_without_a_compiler_take_the_other_ways(keep, monkeypatch):
    q = question("bent leaky relu, eps 0.5")
    always(monkeypatch, keep)
    with torch.no_grad():
        Triangle().solve(q.network, q.region, q.rows)
        q = question("fc, eps 1")
        wanted = Triangle().solve(q.network, q.region, q.rows)
        monkeypatch.setattr(composed_ascent, "kernels", lambda: native.Build(None, "tested without"))
        found = Triangle().solve(q.network, q.region, q.rows)
    torch.testing.assert_close(found.lower, wanted.lower, rtol=3e-4, atol=3e-4)
    assert math.isfinite(float(found.lower.sum()))


@pytest.mark.parametrize("end", [nn.ReLU(), nn.LeakyReLU(0.1)], ids=["relu", "leaky relu"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_network_that_ends_in_an_activation(keep, exact, end, monkeypatch):
    net, region = nn.Sequential(*random_net(9, 8, 6, 4, bias=0.3), end), box(9, 5, 0.3)
    rows = torch.cat([torch.eye(4), -torch.eye(4), torch.ones(1, 4)]).double()
    layer = Triangle(preactivation="crown", solver=DualAscent(tol=1e-6, max_iterations=400, exact=exact))
    found, wanted = (solved(monkeypatch, way, layer, net, region, rows) for way in (keep, None))
    exactly = Triangle(preactivation="crown", solver=Highs()).solve(net, region, rows).lower
    torch.testing.assert_close(found.lower, wanted.lower, rtol=1e-6, atol=1e-6)
    assert bool((found.lower <= exactly + 1e-7).all())
    torch.testing.assert_close(found.lower, exactly, rtol=0, atol=1e-6 if exact else 1e-2)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_neurons(keep, monkeypatch):
    net = nn.Sequential(nn.Linear(3, 0), nn.ReLU(), nn.Linear(0, 2)).double()
    found = solved(monkeypatch, keep, Triangle(), net, box(3, 2, 0.1), torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(found.lower, net[2].bias.detach().expand(2, 2))


def test_another_default_device_changes_nothing(keep, monkeypatch):
    net, region, rows = random_net(6, 7, 5, 3), box(6, 3, 0.2), torch.eye(3, dtype=torch.float64)
    always(monkeypatch, keep)
    with torch.no_grad():
        problems, starts = problems_of(net, region, rows, torch.arange(3))
        torch.set_default_device("meta")
        try:
            elsewhere = evaluation.solved(DualAscent(max_iterations=4, max_bytes=1), problems, starts).lower
        finally:
            torch.set_default_device(None)
        here = evaluation.solved(DualAscent(max_iterations=4, max_bytes=math.inf), problems, starts).lower
        torch.testing.assert_close(elsewhere, here)


@torch.no_grad()
def test_examples_of_unlike_counts_keep_to_the_memory():
    """Objectives are laid out by the example with the most of them."""
    net, region = random_net(40, 30, 30, 200, bias=0.5), box(40, 64, 0.1)
    example = torch.cat([torch.zeros(200, dtype=torch.int64), torch.arange(64)])
    rows = torch.eye(200, dtype=torch.float64)[torch.arange(len(example)) % 200]
    problems, starts = problems_of(net, region, rows, example)
    room = 4 * 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        composed_ascent.solve(DualAscent(max_iterations=2, max_bytes=room), problems, starts)
    total = most = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    assert most < 3 * room


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_iterations": 2.5}, "max_iterations must be an integer, got 2.5"),
        ({"tol": "small"}, "tol must be a number"),
    ],
)
def test_options_of_no_use_are_refused(option, message):
    plain = DualAscent.__new__(DualAscent)  # past the annotations that the tests check
    for name, value in {**vars(DualAscent()), **option}.items():
        object.__setattr__(plain, name, value)
    with pytest.raises(TypeError, match=message):
        plain.__post_init__()


def test_a_schedule_is_that_of_its_definition():
    """Weights n^4 over their sum, and Adam's corrections; a limit of a million iterations lays out nothing."""
    options, total = DualAscent(step=0.3, decay=0.9, floor=0.02), 0
    for step in range(60):
        n = step + 1
        total += n**4
        wanted = (n**4 / total, 1 / (1 - 0.9**n), 0.3 * max(0.9**step, 0.02) / (1 - 0.7**n))
        assert rates(options, step) == pytest.approx(wanted, rel=1e-12)


@torch.no_grad()
def test_the_limit_of_iterations_is_all_the_same_to_a_solve_that_ends(keep, monkeypatch):
    net, region = random_net(12, 15, 15, 4, bias=0.3), box(12, 4, 0.1)
    rows = torch.eye(4, dtype=torch.float64)
    short, long = (
        solved(monkeypatch, keep, Triangle(solver=DualAscent(max_iterations=most, tol=1e-3)), net, region, rows)
        for most in (2_000, 10**12)
    )
    assert (short.status == 0).all()
    assert torch.equal(short.lower, long.lower)
    assert torch.equal(short.iterations, long.iterations)
