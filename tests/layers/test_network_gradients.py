"""Gradients of the LP layers' optimal values against differences of HiGHS's, and what else autograd wants."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
import torch
from cases import BY_NAME, inputs, specification
from lp_networks import DeepResidual, assert_close, layerwise, optimum
from torch import Tensor, nn

import optrelax as ox
from optrelax.layers import Cvxpy, DualAscent, FixedSlopes, Highs, InteriorPoint, Layerwise, LinearProgram, Triangle
from optrelax.layers.network_lp import export

STEP = 1e-5  # the optimal value is exact to some 1e-14: the differences err by 1e-9, and by the step's square
EXACT = pytest.mark.parametrize("solver", [InteriorPoint(tol=1e-9), Highs()], ids=["ip", "highs"])
SOURCE = ox.Intersect(ox.Box(), ox.FastLin())


class Setting:
    """A network, the ends of a box and a row, all of them leaves; problems whose optima are unique."""

    def __init__(self, name: str, eps: float, seed: int) -> None:
        if name == "deep residual":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.net, shape = DeepResidual().double(), (5,)
        else:
            case = BY_NAME[name]
            self.net, shape = case.module(seed), case.input_shape
        self.network = ox.capture(self.net, shape)
        x = inputs(shape, 1, seed=seed)
        self.lower = (x - eps).requires_grad_()
        self.upper = (x + eps * torch.linspace(0.7, 1.3, x.numel(), dtype=x.dtype).reshape(x.shape)).requires_grad_()
        self.rows = specification(self.network.outputs, k=2, seed=seed).requires_grad_()
        self.leaves = {"lower": self.lower, "upper": self.upper, "rows": self.rows, **dict(self.net.named_parameters())}

    @property
    def region(self) -> ox.InputBox:
        return ox.InputBox(self.lower, self.upper)

    def bounds(self) -> dict[str, ox.Bounds]:
        return ox.preactivation_bounds(self.network, self.region, SOURCE)

    def triangle(self) -> float:
        """The sum of the optimal values by HiGHS, all data as they stand."""
        return float(optimum(self.network, self.region, self.rows, self.bounds()).sum())

    def layerwise(self) -> float:
        """The same with LP-ALL's bounds."""
        bounds = layerwise(self.network, self.region, self.bounds())
        return float(optimum(self.network, self.region, self.rows, bounds).sum())


@cache
def setting(name: str, eps: float, seed: int) -> Setting:
    return Setting(name, eps, seed)


def direction(leaf: Tensor) -> Tensor:
    """A random unit vector, the same at every call."""
    made = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(5), dtype=leaf.dtype)
    return made / made.norm()


def difference(leaf: Tensor, value: Callable[[], float]) -> float:
    """Derivative of the value along the leaf's direction, by central differences."""
    ends, start = [], leaf.detach().clone()
    with torch.no_grad():
        for step in (STEP, -STEP):
            leaf.copy_(start + step * direction(leaf))
            ends.append(value())
        leaf.copy_(start)
    return (ends[0] - ends[1]) / (2 * STEP)


def compare(gradients: dict[str, Tensor], wanted: dict[str, float]) -> None:
    """Every leaf's gradient against the differences along its direction, to 1e-6."""
    size = max(float(t.norm()) for t in gradients.values())
    for name, w in wanted.items():
        found = float((gradients[name] * direction(gradients[name])).sum())
        assert abs(found - w) <= 1e-6 * max(abs(w), 0.1 * size), f"{name}: {found} against {w}"


@cache
def differences(name: str, eps: float, seed: int, kind: str) -> dict[str, float]:
    """Differences of HiGHS's optimal values in the leaves of a setting; LP-ALL's in a selection of them."""
    s = setting(name, eps, seed)
    chosen = list(s.leaves)
    if kind == "layerwise":
        chosen = [*chosen[:3], *chosen[3::3], *chosen[-2:]]
    return {n: difference(s.leaves[n], getattr(s, kind)) for n in chosen}


def backward(layer: Triangle | Layerwise, s: Setting) -> dict[str, Tensor]:
    found = layer.solve(s.network, s.region, s.rows).lower.sum()
    gradients = torch.autograd.grad(found, list(s.leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g
        for (name, leaf), g in zip(s.leaves.items(), gradients, strict=True)
    }


GENERIC = [
    ("fc", 1.0, 0),
    ("deep fc", 2.5, 0),
    ("functional residual", 0.3, 1),
    ("strided conv", 0.4, 0),
    ("residual conv", 0.1, 0),
    ("leaky relu", 0.6, 0),
    ("bent leaky relu", 0.5, 0),
    ("relu6 and hardtanh", 0.5, 1),
    ("deep residual", 0.4, 0),
    ("shared layers", 2.0, 0),
]
generic = pytest.mark.parametrize("case", GENERIC, ids=lambda c: c[0])


# --- exact gradients ----------------------------------------------------------------------------------------------


@generic
@EXACT
def test_triangle_gradient_is_that_of_the_optimal_value(case, solver):
    """Through every weight and bias, the row, the box's ends, and the pre-activation bounds that hang on them."""
    s = setting(*case)
    compare(backward(Triangle(solver=solver), s), differences(*case, "triangle"))


@pytest.mark.parametrize("case", [GENERIC[i] for i in (0, 2, 5, 7, 8)], ids=lambda c: c[0])
@EXACT
def test_layerwise_gradient_goes_through_the_lps_of_earlier_layers(case, solver):
    s = setting(*case)
    found = backward(Layerwise(solver=solver), s)
    compare(found, differences(*case, "layerwise"))
    # The bounds of hidden layers carry part of it: the triangle's gradient is another one.
    other = backward(Triangle(solver=solver), s)
    assert any((found[n] - other[n]).norm() > 1e-3 * found[n].norm() for n in found)


@EXACT
def test_through_hidden_bounds_of_the_layerwise_layer(solver):
    """`preactivation_bounds` are differentiable themselves."""
    s = setting("fc", 1.0, 0)
    weights = torch.linspace(-1, 1, 6, dtype=torch.float64)

    def value() -> float:
        b = layerwise(s.network, s.region, s.bounds())[s.network.activations[1].name]
        return float((weights * b.lower).sum() + (weights.flip(0) * b.upper).sum())

    b = ox.preactivation_bounds(s.network, s.region, Layerwise(solver=solver))["3"]
    total = (weights * b.lower).sum() + (weights.flip(0) * b.upper).sum()
    leaves = {n: t for n, t in s.leaves.items() if n in ("lower", "upper", "0.weight", "0.bias", "2.weight", "2.bias")}
    gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    compare(gradients, {n: difference(leaf, value) for n, leaf in leaves.items()})


@EXACT
def test_through_eps_and_centre(solver):
    net = BY_NAME["fc"].module()
    x = inputs((5,), 1).requires_grad_()
    eps = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    rows = specification(3, k=2)
    network = ox.capture(net, (5,))

    def value() -> float:
        region = ox.LinfBall(x, eps)
        return float(optimum(network, region, rows, ox.preactivation_bounds(network, region, SOURCE)).sum())

    found = Triangle(solver=solver).solve(network, ox.LinfBall(x, eps), rows).lower.sum()
    leaves = {"x": x, "eps": eps}
    gradients = dict(zip(leaves, torch.autograd.grad(found, [x, eps]), strict=True))
    compare(gradients, {n: difference(leaf, value) for n, leaf in leaves.items()})
    assert float(gradients["eps"]) < 0


@EXACT
def test_a_shared_layer_gets_the_sum(solver):
    """One module used three times, against three modules of equal weights."""

    class Unrolled(nn.Module):
        def __init__(self, shared: nn.Module) -> None:
            super().__init__()
            self.layers = nn.ModuleList(deepcopy(shared.layer) for _ in range(3))
            self.last = deepcopy(shared.last)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.relu(layer(x))
            return self.last(x)

    shared = BY_NAME["shared layers"].module()
    unrolled = Unrolled(shared)
    region, rows = ox.LinfBall(inputs((4,), 2), 2.0), specification(3)
    for net in (shared, unrolled):
        Triangle(solver=solver).solve(net, region, rows).lower.sum().backward()
    for name in ("weight", "bias"):
        total = sum(getattr(layer, name).grad for layer in unrolled.layers)
        assert_close(getattr(shared.layer, name).grad, total, 1e-9)
        assert_close(getattr(shared.last, name).grad, getattr(unrolled.last, name).grad, 1e-9)


@EXACT
def test_a_shared_specification_gets_the_sum(solver):
    net = BY_NAME["fc"].module().requires_grad_(False)
    region = ox.LinfBall(inputs((5,), 3), 0.8)
    shared = specification(3).requires_grad_()
    own = specification(3)[None].repeat(3, 1, 1).requires_grad_()
    for rows in (shared, own):
        Triangle(solver=solver).solve(net, region, rows).lower.sum().backward()
    assert_close(shared.grad, own.grad.sum(0), 1e-9)


def test_gradcheck():
    s = Setting("fc", 1.0, 0)
    layers = [s.net[0].weight, s.net[2].bias, s.rows, s.lower, s.upper]

    def value(*_: Tensor) -> Tensor:
        return Triangle(solver=Highs(workers=1)).solve(s.network, s.region, s.rows).lower

    assert torch.autograd.gradcheck(value, layers, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


# --- another formulation of the same gradient ---------------------------------------------------------------------


def dense(s: Setting, bounds: dict[str, ox.Bounds]) -> tuple[dict[str, Tensor], Tensor, object]:
    """The exported LP of a setting as data of `LinearProgram`: arguments, offsets, and the program itself."""
    given = {node.name: bounds[node.path] for node in s.network.activations}
    program = export(s.network, ox.InputBox(s.lower.detach(), s.upper.detach()), given)
    c, offset = program.objective(s.rows.detach())
    matrix = torch.from_numpy(program.matrix.toarray())
    low, high = torch.from_numpy(program.row_lower), torch.from_numpy(program.row_upper)
    equal = low == high
    above, below = high.isfinite() & ~equal, low.isfinite() & ~equal
    data = {
        "c": torch.from_numpy(c),
        "A": torch.cat([matrix[above], -matrix[below]]),
        "b": torch.cat([high[above], -low[below]]),
        "E": matrix[equal],
        "d": low[equal],
        "lower": torch.from_numpy(program.col_lower),
        "upper": torch.from_numpy(program.col_upper),
    }
    return {n: t.requires_grad_() for n, t in data.items()}, torch.from_numpy(offset), (program, equal)


@pytest.mark.parametrize(
    ("solver", "tol"),
    [(Highs(), 1e-8), (Cvxpy(eps=1e-9), 1e-5), (Cvxpy(solver="CLARABEL", eps=1e-10, layer=True), 1e-3)],
    ids=["highs", "cvxpy, envelope", "cvxpylayers"],
)
def test_the_general_layer_agrees_on_the_exported_formulation(solver, tol):
    """dV/dW = -dV/dE at the entries of W, dV/db = dV/dd, and the box's ends, on fixed pre-activation bounds.

    cvxpylayers differentiates the objective through the KKT system of the LP: exact in theory at a unique vertex.
    """
    s = Setting("fc", 1.0, 0)
    with torch.no_grad():
        bounds = s.bounds()
    value = Triangle(solver=Highs(), preactivation=bounds).solve(s.network, s.region, s.rows).lower
    leaves = [s.net[0].weight, s.net[0].bias, s.net[2].weight, s.net[2].bias, s.lower, s.upper]
    wanted = torch.autograd.grad(value.sum(), leaves)
    data, offset, (program, equal) = dense(s, bounds)
    found = LinearProgram(solver)(**data)
    assert_close(found.lower + offset, value.detach()[0], max(tol, 1e-6))
    if getattr(solver, "layer", False):
        E, d, low, high = torch.autograd.grad(found.lower.sum(), [data[n] for n in ("E", "d", "lower", "upper")])
    else:
        found.lower.sum().backward()
        E, d, low, high = (data[n].grad for n in ("E", "d", "lower", "upper"))
    position = equal.cumsum(0) - 1
    place = program.columns["input"]
    mine = []
    for node, source in zip(s.network.activations, ("input", f"post:{s.network.activations[0].name}"), strict=True):
        block = position[program.rows[f"affine:{node.name}"]]
        mine += [-E[block][:, program.columns[source]], d[block]]
    mine += [low[place][None], high[place][None]]
    scale = max(float(w.abs().max()) for w in wanted)
    for a, b in zip(mine, wanted, strict=True):
        assert float((a - b).abs().max()) <= tol * scale


# --- unfinished solves --------------------------------------------------------------------------------------------


def test_the_error_falls_with_the_gap():
    """By default the gradient is off by the size of the gap; what training needs is in the documentation."""
    s = setting("fc", 1.0, 0)
    exact = backward(Triangle(solver=Highs()), s)
    size = torch.cat([t.flatten() for t in exact.values()]).norm()
    errors = []
    for tol, count in ((1e-2, 100), (1e-4, 500), (1e-5, 1000)):
        found = backward(Triangle(solver=DualAscent(tol=tol, max_iterations=count)), s)
        errors.append(float(torch.cat([(found[n] - exact[n]).flatten() for n in exact]).norm() / size))
    assert errors[1] < 0.1
    assert errors[-1] < 0.3 * errors[0]
    finished = backward(Triangle(solver=DualAscent(exact=True)), s)
    assert max(float((finished[n] - exact[n]).abs().max()) for n in exact) < 1e-6 * float(size)


def test_fixed_slopes_are_another_gradient():
    """Back-substitution differentiated at the optimal slopes is off by percents: coefficients of 0 are its kinks."""
    errors = []
    for case in GENERIC:
        s = setting(*case)
        exact = backward(Triangle(solver=Highs()), s)
        other = backward(Triangle(solver=Highs(), gradient=FixedSlopes()), s)
        size = torch.cat([t.flatten() for t in exact.values()]).norm()
        errors.append(float(torch.cat([(other[n] - exact[n]).flatten() for n in exact]).norm() / size))
    # From a few tenths of a percent to more than the gradient itself.
    assert sum(e > 0.01 for e in errors) >= 5
    assert max(errors) < 5


def test_fixed_slopes_are_the_gradient_of_the_bound_at_fixed_slopes():
    """Without iterations and where CROWN's slopes are the better start, that of back-substitution."""
    s = Setting("fc", 1.0, 0)
    layer = Triangle(solver=DualAscent(max_iterations=0), gradient=FixedSlopes(), preactivation="box")
    crown, fast = (
        ox.lower_bounds(s.network, s.region, s.rows, form(preactivation=ox.Box())) for form in (ox.Crown, ox.FastLin)
    )
    found = layer.solve(s.network, s.region, s.rows).lower
    assert_close(found, torch.maximum(crown, fast).detach(), 1e-12)
    chosen = (crown > fast).double()
    assert chosen.any()
    mine, wanted = (torch.autograd.grad((v * chosen).sum(), list(s.leaves.values())) for v in (found, crown))
    for g, w in zip(mine, wanted, strict=True):
        assert_close(g, w, 1e-10)


# --- autograd -----------------------------------------------------------------------------------------------------


def kept(run: Callable[[], object]) -> tuple[int, object]:
    """Bytes that autograd keeps for the backward pass, parameters aside, and the result."""
    total: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        total[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    return sum(total.values()), result


@pytest.mark.parametrize("layer", [Triangle, Layerwise])
def test_memory_does_not_grow_with_the_iterations(layer):
    s = setting("deep residual", 0.4, 0)
    sizes = [
        kept(lambda n=n: layer(solver=DualAscent(max_iterations=n, tol=1e-14)).solve(s.network, s.region, s.rows))[0]
        for n in (1, 10, 100)
    ]
    assert sizes[0] > 0
    assert max(sizes) <= 1.2 * sizes[0]


@pytest.mark.parametrize("layer", [Triangle, Layerwise])
@pytest.mark.parametrize("solver", [DualAscent(), InteriorPoint(), Highs()], ids=["ascent", "ip", "highs"])
def test_no_grad_keeps_nothing(layer, solver):
    s = setting("fc", 1.0, 0)
    with torch.no_grad():
        size, found = kept(lambda: layer(solver=solver).solve(s.network, s.region, s.rows))
    assert size == 0
    assert not found.lower.requires_grad
    for field in ("gap", "status", "iterations"):
        assert not getattr(layer(solver=solver).solve(s.network, s.region, s.rows), field).requires_grad


def test_without_leaves_there_is_no_graph():
    s = Setting("fc", 1.0, 0)
    s.net.requires_grad_(False)
    found = Triangle().solve(s.network, ox.InputBox(s.lower.detach(), s.upper.detach()), s.rows.detach())
    assert not found.lower.requires_grad


@pytest.mark.parametrize("layer", [Triangle(), Triangle(gradient=FixedSlopes()), Layerwise(), Triangle(solver=Highs())])
def test_a_double_backward_is_a_clear_error(layer):
    s = setting("fc", 1.0, 0)
    found = layer.solve(s.network, s.region, s.rows).lower.sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(found, s.net[0].weight, create_graph=True)


def test_two_backward_passes_want_the_graph_retained():
    s = Setting("fc", 1.0, 0)
    found = Triangle().solve(s.network, s.region, s.rows).lower
    found[0, 0].backward(retain_graph=True)
    first = s.net[0].weight.grad.clone()
    found[0, 1].backward()
    both = s.net[0].weight.grad
    (alone,) = torch.autograd.grad(Triangle().solve(s.network, s.region, s.rows).lower[0, 1], s.net[0].weight)
    assert_close(both - first, alone, 1e-12)


def test_frozen_layers_get_nothing_and_change_nothing():
    s = Setting("fc", 1.0, 0)
    free = backward(Triangle(solver=Highs()), s)
    s.net[2].requires_grad_(False)
    Triangle(solver=Highs()).solve(s.network, s.region, s.rows).lower.sum().backward()
    assert s.net[2].weight.grad is None
    assert_close(s.net[0].weight.grad, free["0.weight"], 1e-12)
    assert_close(s.net[4].weight.grad, free["4.weight"], 1e-12)


def test_a_batch_has_the_gradients_of_its_examples():
    net = BY_NAME["functional residual"].module()
    x, rows = inputs((4,), 3), specification(3)
    for solver in (DualAscent(), Highs()):
        layer = Triangle(solver=solver)
        (whole,) = torch.autograd.grad(layer.solve(net, ox.LinfBall(x, 0.3), rows).lower.sum(), net.first.weight)
        parts = [
            torch.autograd.grad(layer.solve(net, ox.LinfBall(one, 0.3), rows).lower.sum(), net.first.weight)[0]
            for one in x.split(1)
        ]
        assert_close(whole, sum(parts), 1e-6)


def test_float32_gradients():
    s = Setting("fc", 1.0, 0)
    exact = backward(Triangle(solver=Highs()), s)
    net = deepcopy(s.net).float()
    region = ox.InputBox(s.lower.detach().float(), s.upper.detach().float())
    for solver, tol in ((Highs(), 1e-4), (InteriorPoint(), 1e-4), (DualAscent(), 0.1)):
        net.zero_grad()
        Triangle(solver=solver).solve(net, region, s.rows.detach()).lower.sum().backward()
        for name, p in net.named_parameters():
            assert p.grad.dtype == torch.float32
            assert float((p.grad.double() - exact[name]).norm()) <= tol * float(exact[name].norm()) + 1e-6


def test_the_optimal_value_is_continuous_where_its_bounds_are():
    """Along a line in weight space on which neurons change from stable to crossing: no jump, unlike CROWN's."""
    net = BY_NAME["fc"].module().requires_grad_(False)
    region, rows = ox.LinfBall(inputs((5,), 1), 0.3), specification(3, k=1)
    start, g = net[0].bias.clone(), torch.Generator().manual_seed(2)
    direction = torch.randn(8, generator=g, dtype=torch.float64)
    jumps = {}
    for name, layer in {
        "triangle": Triangle(solver=InteriorPoint()),
        "layerwise": Layerwise(solver=InteriorPoint()),
        "crown": ox.Crown(),
    }.items():
        values = []
        for t in torch.linspace(0, 1.0, 41, dtype=torch.float64):
            net[0].bias.copy_(start + t * direction)
            values.append(ox.lower_bounds(net, region, rows, layer)[0])
        steps = torch.stack(values).diff(dim=0).abs()
        # A jump stands out among its neighbours; a kink does not.
        around = torch.maximum(steps[:-2], steps[2:])
        jumps[name] = float((steps[1:-1] - 1.5 * around).max())
    assert jumps["triangle"] < 1e-4
    assert jumps["layerwise"] < 1e-4
    assert jumps["crown"] > 1e-3
