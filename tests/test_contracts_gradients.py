"""Gradients: finite differences, ties, no NaN, types and devices kept, and nothing kept where none is wanted."""

from functools import cache

import pytest
import torch
from cases import BY_NAME, PLAIN, RelaxationCase, every_region, inputs, specification
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import optrelax as ox

each_case = pytest.mark.parametrize("case", PLAIN, ids=str)


class Bounded(nn.Module):
    """Lower bounds of rows as a module, so that `functional_call` can put weights in."""

    def __init__(self, net: nn.Module, relaxation: object) -> None:
        super().__init__()
        self.net, self.relaxation = net, relaxation

    def forward(self, lower: Tensor, upper: Tensor, rows: Tensor) -> Tensor:
        return ox.lower_bounds(self.net, ox.InputBox(lower, upper), rows, self.relaxation)  # type: ignore[arg-type]


class Tiny(nn.Module):
    """A residual network of a few weights, each pre-activation clear of every tie."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.first(x))
        return self.last(torch.relu(self.second(a) + a))


class TinyConv(nn.Module):
    """Convolution, batch norm, pooling and a constant, trained and not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2, stride=1, padding=1, bias=False)
        self.norm, self.pool, self.last = nn.BatchNorm2d(2), nn.AvgPool2d(2, stride=1), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.tensor([[[0.8]], [[1.3]]]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv((x - 0.2) / 0.5))) * self.scale
        return self.last(torch.flatten(torch.relu(self.pool(h) - 0.3), 1))


@cache
def build(kind: type[nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind().double().eval()


def arguments(net: nn.Module, shape: tuple[int, ...]) -> tuple[list[str], tuple[Tensor, ...]]:
    """Names of the weights, and (lower, upper, rows, weights) as leaves."""
    x = inputs(shape, 2, seed=11)
    widths = 0.15 + 0.1 * inputs(shape, 2, seed=12)
    named = dict(net.named_parameters())
    leaves = (x - widths, x + widths, specification(2, k=3), *(p.detach() for p in named.values()))
    return list(named), tuple(t.clone().requires_grad_() for t in leaves)


def bounded(net: nn.Module, relaxation: object, names: list[str]):
    module = Bounded(net, relaxation)

    def function(lower: Tensor, upper: Tensor, rows: Tensor, *weights: Tensor) -> Tensor:
        given = {f"net.{name}": w for name, w in zip(names, weights, strict=True)}
        return functional_call(module, given, (lower, upper, rows))

    return function


def assert_gradients(case: RelaxationCase, kind: type[nn.Module], shape: tuple[int, ...], fast: bool = True) -> None:
    net = build(kind, 3)
    names, leaves = arguments(net, shape)
    function = bounded(net, case.make(), names)
    assert gradcheck(function, leaves, eps=1e-7, atol=1e-5, rtol=1e-4, fast_mode=fast)


# Chunks are computed again in the backward pass, outside of functional_call: their gradients are checked elsewhere.
WHOLE = [case for case in PLAIN if "chunks" not in case.name]


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_finite_differences(case):
    """float64 gradcheck in weights, biases, both ends of the region, and rows."""
    assert_gradients(case, Tiny, (2,))


@pytest.mark.parametrize("name", ["box", "hbox-switch", "deepz", "crown", "crown-1-tria-c", "crown-ibp-soft", "cauchy"])
def test_finite_differences_of_a_convolution(name):
    """With batch norm, pooling and a constant that is trained."""
    assert_gradients(next(c for c in PLAIN if c.name == name), TinyConv, (1, 2, 2))


@pytest.mark.parametrize("name", ["hbox", "crown-soft"])
def test_finite_differences_entry_by_entry(name):
    """The slow check, of every entry of the Jacobian."""
    assert_gradients(next(c for c in PLAIN if c.name == name), Tiny, (2,), fast=False)


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_second_derivatives(case):
    net = build(Tiny, 3)
    names, leaves = arguments(net, (2,))
    function = bounded(net, case.make(), names)
    assert gradgradcheck(function, leaves, eps=1e-6, atol=1e-4, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_second_derivative_of_a_sum(case):
    """Where the incoming gradient is a constant a rule that cannot be differentiated would quietly count as one."""
    net = build(Tiny, 3)
    names, leaves = arguments(net, (2,))
    function = bounded(net, case.make(), names)

    def penalty(*at):
        return sum(g.square().sum() for g in torch.autograd.grad(function(*at).sum(), at, create_graph=True))

    assert gradcheck(penalty, leaves, eps=1e-6, atol=1e-4, rtol=1e-3, fast_mode=True)


def test_chunks_inside_functional_call_need_their_backward_there():
    net = build(Tiny, 3)
    names, leaves = arguments(net, (2,))
    low = bounded(net, ox.Crown(max_bytes=1), names)(*leaves)
    with pytest.raises(RuntimeError, match=r"call backward\(\) first \(inside functional_call, too\)"):
        low.sum().backward()


@each_case
def test_unbatched_weights_get_the_sum_of_the_examples_gradients(case):
    net = BY_NAME["functional residual"].network()
    x, rows = inputs((4,), 3), specification(3)
    low = ox.lower_bounds(net, ox.LinfBall(x, 0.2), rows, case.make())
    together = torch.autograd.grad(low.sum(), list(net.parameters()))
    total = [torch.zeros_like(p) for p in net.parameters()]
    for one in x:
        low = ox.lower_bounds(net, ox.LinfBall(one[None], 0.2), rows, case.make())
        total = [t + g for t, g in zip(total, torch.autograd.grad(low.sum(), list(net.parameters())), strict=True)]
    torch.testing.assert_close(list(together), total, rtol=1e-9, atol=1e-10)


NO_NAN = ["fc", "dead layer", "weights of 1e-12", "weights of 1e6", "relu6 and hardtanh", "max pool"]


@each_case
@pytest.mark.parametrize("name", NO_NAN)
def test_no_gradient_is_nan_whatever_the_region_or_the_layer(case, name):
    net = BY_NAME[name]
    if net.max_pool and not case.max_pool:
        return
    module = net.network(dtype=torch.float32)
    region = every_region(net.input_shape, batch=1)
    lower, upper = region.lower.float().requires_grad_(), region.upper.float().requires_grad_()
    low = ox.lower_bounds(module, ox.InputBox(lower, upper), specification(3), case.make())
    assert low.isfinite().all()
    gradients = torch.autograd.grad(low.sum(), [lower, upper, *module.parameters()], allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)


@cache
def thin() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
        net[2].bias.zero_()
    return net


@each_case
def test_pre_activations_of_subnormal_width_have_gradients(case):
    """l = -1e-40, u = 2e-40 in float32: crossing, and the reciprocal of the width overflows."""
    net = thin()
    lower = torch.tensor([[-1e-40, -1e-45], [-1e-40, 0.0], [0.0, 0.0]], requires_grad=True)
    upper = torch.tensor([[2e-40, 1e-45], [1.0, 1e-45], [0.0, 0.0]], requires_grad=True)
    low = ox.lower_bounds(net, ox.InputBox(lower, upper), specification(2), case.make())
    gradients = torch.autograd.grad(low.sum(), [lower, upper, *net.parameters()])
    assert low.isfinite().all()
    assert not any(g.isnan().any() for g in gradients)


def slope_at_a_point(name: str, bias: float) -> float:
    """Gradient of the lower bound of relu(x + bias) at x = 0, eps = 0, in the bias."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.fill_(bias)
    low = ox.lower_bounds(net, ox.LinfBall(torch.zeros(1, 1), 0.0), torch.ones(1, 1), name)
    return float(torch.autograd.grad(low.sum(), net[0].bias)[0])


@pytest.mark.parametrize("name", ["hbox", "hzono", "deepz", "fast-lin", "crown", "crown-0", "crown-ibp", "crown-soft"])
def test_at_a_tie_the_gradient_is_that_of_the_active_side(name):
    """l = u = 0: the convention is slope 1 (l >= 0 wins); on either side the neuron's own slope."""
    assert slope_at_a_point(name, 0.0) == 1
    assert slope_at_a_point(name, 0.5) == 1
    assert slope_at_a_point(name, -0.5) == 0


def test_box_takes_relu_s_own_gradient_at_a_tie():
    """Its lines are images: relu'(0) = 0."""
    assert slope_at_a_point("box", 0.0) == 0


@pytest.mark.parametrize("name", ["crown", "crown-ibp", "deepz"])
def test_a_weight_of_0_after_a_pool_has_the_derivative_of_the_side_taken(name):
    """Its row is 0 at the pool: where one entry dominates its window, that entry and nothing else."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 2, 2)), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 1))
    net = net.double()
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([0.0, 10.0, 0.0, 0.0]))
        net[4].weight.zero_()
    region = ox.LinfBall(torch.rand(1, 2, dtype=torch.float64), 0.01)
    low = ox.lower_bounds(net, region, torch.eye(1), name)
    (found,) = torch.autograd.grad(low.sum(), net[4].weight)
    ends = ox.bounds(net[:4], region, name)
    assert float(ends.lower.detach()) - 1e-9 <= float(found) <= float(ends.upper.detach()) + 1e-9


def test_the_width_of_a_pixel_that_does_not_move_has_a_gradient():
    """At eps = 0 the bound falls with eps all the same, in every domain: -|coefficient| an input."""
    net = nn.Sequential(nn.Linear(3, 2)).double()
    for name in ("box", "hbox", "deepz", "crown"):
        eps = torch.zeros((), dtype=torch.float64, requires_grad=True)
        low = ox.bounds(net, ox.LinfBall(inputs((3,), 1), eps), name).lower
        (gradient,) = torch.autograd.grad(low.sum(), eps)
        torch.testing.assert_close(gradient, -net[0].weight.detach().abs().sum(), msg=name)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_type_is_that_of_the_region(case, dtype):
    """float32 weights serve a float64 region; rows are cast."""
    net = BY_NAME["batch norm"].network(dtype=torch.float32)
    region = ox.LinfBall(inputs((4,), 2).to(dtype), 0.1)
    spec = ox.margins(torch.tensor([0, 2]), 3)
    low = ox.lower_bounds(net, region, spec, case.make())
    assert low.dtype == dtype
    assert all(b.lower.dtype == dtype for b in ox.preactivation_bounds(net, region, case.make()).values())
    low.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_float32_weights_under_a_float64_region_are_their_own_numbers():
    """Constants computed from others (1 / std, batch norm) are not rounded to float32 on the way."""
    net = BY_NAME["residual conv"].module().float()
    x = inputs((2, 4, 4), 2)
    value = BY_NAME["residual conv"].module()
    value.load_state_dict(net.state_dict())
    found = ox.bounds(net, ox.LinfBall(x, 0.0), "box")
    torch.testing.assert_close(found.lower, value(x), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@each_case
def test_the_device_is_that_of_the_region(case):
    net = BY_NAME["residual conv"].module().cuda()
    region = ox.LinfBall(inputs((2, 4, 4), 2).cuda(), 0.1)
    low = ox.lower_bounds(net, region, specification(3), case.make())
    assert low.is_cuda
    low.sum().backward()
    expected = ox.lower_bounds(net.cpu(), ox.LinfBall(inputs((2, 4, 4), 2), 0.1), specification(3), case.make())
    torch.testing.assert_close(low.cpu(), expected, rtol=1e-9, atol=1e-9)


@each_case
def test_under_no_grad_nothing_is_kept(case):
    net = BY_NAME["fc"].network().module  # captured: the export runs the forward on tensors without numbers
    before = {name: dict(vars(m)) for name, m in net.named_modules()}
    saved = []
    x = inputs((5,), 2).requires_grad_()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
        region = ox.LinfBall(x, 0.2)
        low = ox.lower_bounds(net, region, specification(3), case.make())
        found = ox.bounds(net, region, case.make())
    assert not saved
    assert not low.requires_grad
    assert not found.lower.requires_grad
    assert {name: dict(vars(m)) for name, m in net.named_modules()} == before


@pytest.mark.parametrize("name", ["box", "hbox", "deepz", "crown"])
def test_bounds_rounded_outward_have_the_gradient_of_those_to_nearest(name):
    net = BY_NAME["fc"].network()
    region, rows = ox.LinfBall(inputs((5,), 2), 0.2), specification(3)
    found = [
        torch.autograd.grad(ox.lower_bounds(net, region, rows, name, rounding=r).sum(), list(net.parameters()))
        for r in ("nearest", "outward")
    ]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)
