"""Capture: what is taken computes what the module does; what is not is refused by name, before any bound."""

import inspect
import operator
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, NETWORKS, inputs, specification
from torch import Tensor, nn
from torch.func import functional_call

import optrelax as ox
from optrelax.layers import Highs, Triangle
from optrelax.networks import leaves
from optrelax.networks.graph import Network
from optrelax.networks.ops import Affine


class Lambda(nn.Module):
    """A forward made of functions; tensors given by name become buffers, modules children, parameters parameters."""

    def __init__(self, function: Callable[..., Tensor], **attributes: object) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


def problems(net: nn.Module, shape: tuple[int, ...] = (4,)) -> str:
    """What capture has against a module; bounds raise the same."""
    report = ox.check(net.eval() if not net.training else net, shape)
    assert not report.ok
    region = ox.LinfBall(inputs(shape, 2).float(), 0.1)
    with pytest.raises(ox.UnsupportedOpError) as raised:
        ox.bounds(net, region)
    assert raised.value.problems == report.problems
    return str(report)


# --- what is taken ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETWORKS, ids=str)
def test_a_captured_network_computes_what_the_module_does(net):
    module = net.module()
    network = ox.capture(module, net.input_shape)
    x = inputs(net.input_shape, 5) - 0.3
    torch.testing.assert_close(network(x), module(x), rtol=1e-12, atol=1e-12)
    assert network.input_shape == net.input_shape
    assert network.output_shape == tuple(module(x).shape[1:])
    for node, value in zip(network, list(network.values(x).values())[1:], strict=True):
        assert value.shape == (5, *node.shape)


@pytest.mark.parametrize("net", NETWORKS, ids=str)
def test_every_affine_op_agrees_with_its_matrix(net):
    """linear, apply_abs and transpose are M, |M| and M^T of one matrix, with any leading dimensions."""
    network = net.network()
    for node in network:
        if not isinstance(node.op, Affine):
            continue
        op, n = node.op, torch.zeros(node.shape).numel()
        rows = torch.eye(n, dtype=torch.float64).reshape(1, n, *node.shape)
        pulled = op.transpose(rows)
        for i, shape in enumerate(op.input_shapes):
            size = torch.zeros(shape).numel()
            eye = torch.eye(size, dtype=torch.float64).reshape(1, size, *shape)
            given = [torch.zeros(1, size, *s, dtype=torch.float64) for s in op.input_shapes]
            given[i] = eye
            matrix = op.linear(*given).reshape(size, n).mT
            torch.testing.assert_close(op.apply_abs(*given).reshape(size, n).mT, matrix.abs())
            torch.testing.assert_close(pulled[i].reshape(n, size), matrix)
            assert int((matrix != 0).sum(1).max()) <= op.fan_in
            assert int((matrix != 0).sum(0).max()) <= op.fan_out
            if op.diagonal:
                assert op.fan_in == 1


ONE = nn.Linear(4, 4)
FORMS = {
    "F.linear": ((4,), lambda m, x: F.linear(x, m.w, m.b), {"w": parameter(3, 4), "b": parameter(3)}),
    "F.linear without bias": ((4,), lambda m, x: F.linear(x, m.w), {"w": parameter(3, 4)}),
    "F.linear by keyword": (
        (4,),
        lambda m, x: F.linear(x, bias=m.b, weight=m.w),
        {"w": parameter(3, 4), "b": parameter(3)},
    ),
    "F.conv2d": (
        (2, 5, 5),
        lambda m, x: F.conv2d(x, m.w, m.b, 2, 1).flatten(1),
        {"w": parameter(3, 2, 3, 2), "b": parameter(3)},
    ),
    "F.conv2d by keyword": (
        (2, 5, 5),
        lambda m, x: F.conv2d(x, m.w, stride=(1, 2), padding="valid", dilation=2, groups=2).flatten(1),
        {"w": parameter(4, 1, 2, 2)},
    ),
    "F.conv2d same": (
        (1, 4, 4),
        lambda m, x: F.conv2d(x, m.w, padding="same").flatten(1),
        {"w": parameter(2, 1, 3, 3)},
    ),
    "F.avg_pool2d": ((1, 4, 4), lambda m, x: F.avg_pool2d(x, 2).flatten(1), {}),
    "F.avg_pool2d with settings": (
        (2, 5, 5),
        lambda m, x: F.avg_pool2d(x, (3, 2), stride=2, padding=(1, 0), divisor_override=5).flatten(1),
        {},
    ),
    "F.adaptive_avg_pool2d": ((2, 4, 6), lambda m, x: F.adaptive_avg_pool2d(x, (2, 3)).flatten(1), {}),
    "nn.AdaptiveAvgPool2d of None": (
        (2, 4, 6),
        lambda m, x: m.pool(x).flatten(1),
        {"pool": nn.AdaptiveAvgPool2d((1, None))},
    ),
    "F.max_pool2d": ((1, 4, 4), lambda m, x: F.max_pool2d(x, 2, padding=1).flatten(1), {}),
    "torch.max_pool2d": ((1, 4, 4), lambda m, x: torch.max_pool2d(x, (2, 1), 1).flatten(1), {}),
    "torch.relu": ((4,), lambda m, x: torch.relu(x - 0.5), {}),
    "relu method": ((4,), lambda m, x: (x - 0.5).relu(), {}),
    "relu in place": ((4,), lambda m, x: (x - 0.5).relu_(), {}),
    "F.relu in place": ((4,), lambda m, x: F.relu(x - 0.5, True), {}),
    "F.leaky_relu": ((4,), lambda m, x: F.leaky_relu(x - 0.5, 0.3), {}),
    "F.relu6": ((4,), lambda m, x: F.relu6(9 * x - 2), {}),
    "F.hardtanh": ((4,), lambda m, x: F.hardtanh(x, 0.2, 0.6), {}),
    "clamp": ((4,), lambda m, x: x.clamp(0.2, 0.6), {}),
    "clamp at zero": ((4,), lambda m, x: torch.clamp(x - 0.5, min=0), {}),
    "F.dropout off": ((4,), lambda m, x: F.dropout(x, 0.5, m.training), {}),
    "in place with another reader": ((4,), lambda m, x: in_place_alias(m, x), {"one": ONE}),
    "in place through a view": ((4,), lambda m, x: view_alias(m, x), {"one": ONE}),
    "alpha": ((4,), lambda m, x: torch.add(m.one(x), x, alpha=2) - torch.sub(x, m.one(x), alpha=-0.5), {"one": ONE}),
    "an old order of arguments": ((4,), lambda m, x: torch.add(x, m.c, alpha=2), {"c": parameter(4)}),
    "a keyword": ((4,), lambda m, x: torch.add(input=x, other=x), {}),
    "constants": (
        (4,),
        lambda m, x: 2 - ((x + 0.1) * m.s - m.b) / 3,
        {"s": parameter(4), "b": torch.tensor([0.1, 0, 2, 3])},
    ),
    "a constant that is not an attribute": ((3,), lambda m, x: x * torch.tensor([1.0, -2.0, 0.5]) + torch.ones(3), {}),
    "constants with a batch of one": ((2, 3), lambda m, x: (x - m.b).flatten(1), {"b": parameter(1, 2, 1)}),
    "computed constants": (
        (4,),
        lambda m, x: F.linear(x, (m.w * 2).abs().t(), m.b.reshape(-1)),
        {"w": parameter(4, 3), "b": parameter(3, 1)},
    ),
    "computed from a buffer": ((4,), lambda m, x: x * (m.b + 1).sqrt(), {"b": torch.rand(4)}),
    "negation": ((4,), lambda m, x: -x + torch.neg(x).neg(), {}),
    "a difference of branches": ((4,), lambda m, x: m.one(x) - x.relu(), {"one": ONE}),
    "in-place sums": ((4,), lambda m, x: operator.iadd(m.one(x), x), {"one": ONE}),
    "torch.add and sub": ((4,), lambda m, x: torch.sub(torch.add(m.one(x), x), 1.5), {"one": ONE}),
    "x + x": ((4,), lambda m, x: x.relu() + x.relu() + (x + x), {}),
    "one value read thrice": ((4,), lambda m, x: (lambda h: (h + h) - m.one(h))(torch.relu(x - 0.5)), {"one": ONE}),
    "view": ((2, 3), lambda m, x: x.view(x.size(0), -1), {}),
    "view by shape": ((2, 3), lambda m, x: x.view(x.shape[0], x.shape[1] * x.shape[2]), {}),
    "reshape": ((2, 3), lambda m, x: torch.reshape(x, (-1, 6)), {}),
    "flatten and back": ((2, 3), lambda m, x: torch.flatten(x, 1).unflatten(1, (3, 2)).flatten(start_dim=1), {}),
    "squeeze": ((1, 3), lambda m, x: x.squeeze(1).unsqueeze(2).squeeze(-1).contiguous(), {}),
    "a number that the shape gives": ((4,), lambda m, x: x / x.shape[1], {}),
    "an identity": ((4,), lambda m, x: x, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_functions_and_methods(form):
    shape, function, attributes = FORMS[form]
    module = Lambda(function, **attributes).double().eval()
    network = ox.capture(module, shape)
    x = inputs(shape, 4)
    torch.testing.assert_close(network(x), module(x), rtol=1e-13, atol=1e-13)
    region = ox.LinfBall(x, 0.2)
    rows = specification(network.outputs)
    g = torch.Generator().manual_seed(0)
    points = region.lower + torch.rand(50, *x.shape, generator=g, dtype=x.dtype) * (region.upper - region.lower)
    values = module(points.flatten(0, 1)).reshape(50, 4, -1) @ rows.mT
    for name in ("box", "hbox", "deepz", "crown"):
        low = ox.lower_bounds(module, region, rows, name)
        assert (low <= values + 1e-12).all(), name


def test_one_supported_layer_is_a_network_too():
    layer = nn.Linear(3, 2)
    assert torch.equal(ox.capture(layer)(torch.ones(1, 3)), layer(torch.ones(1, 3)))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_inputs_without_numbers_are_refused():
    for call in (lambda: ox.capture(nn.Linear(0, 2)), lambda: ox.capture(nn.Flatten(), (3, 0))):
        with pytest.raises(ValueError, match="holds no numbers"):
            call()


def test_input_shape_is_what_the_first_linear_layer_says():
    assert ox.capture(nn.Sequential(nn.Flatten(), nn.Linear(7, 2))).input_shape == (7,)
    with pytest.raises(ValueError, match="give input_shape"):
        ox.capture(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, 2)))
    assert ox.capture(ox.capture(nn.Linear(3, 2)), (3,)).input_shape == (3,)
    with pytest.raises(ValueError, match=r"takes inputs of shape \(3,\), got \(4,\)"):
        ox.capture(ox.capture(nn.Linear(3, 2)), (4,))


def test_a_captured_network_takes_what_its_module_takes():
    """A module that flattens takes images, however its network was captured; one that does not refuses them."""
    net, x = ox.models.fc(4, 5, 3, seed=0), torch.rand(2, 1, 2, 2)
    network = ox.capture(net)
    assert network.input_shape == (4,)
    torch.testing.assert_close(network(x), net(x))
    found = ox.bounds(network, ox.LinfBall(x, 0.1))
    torch.testing.assert_close(found.lower, ox.bounds(net, ox.LinfBall(x, 0.1)).lower)
    flat = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"takes inputs of shape \(4,\), got \(1, 2, 2\)"):
        ox.capture(flat)(x)
    with pytest.raises(ValueError, match=r"takes inputs \[\*batch, 4\], got \(2, 1, 2, 2\)"):
        ox.bounds(ox.capture(flat), ox.LinfBall(x, 0.1))


def test_paths_are_those_of_the_modules_and_unique():
    network = BY_NAME["shared layers"].network()
    assert [n.path for n in network.activations] == ["relu", "relu#2", "relu#3"]
    assert len({n.path for n in network}) == len({n.name for n in network}) == len(network.nodes)
    found = ox.preactivation_bounds(network, ox.LinfBall(inputs((4,), 1), 0.1))
    assert list(found) == ["relu", "relu#2", "relu#3"]


def test_paths_name_modules_inside_modules_and_functions_by_their_node():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), Lambda(lambda m, x: torch.relu(x)))
    assert [n.path for n in ox.capture(net, (4,)).activations] == ["0.1", "relu"]


def test_weights_are_referenced_and_never_copied():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).eval()
    network, region = ox.capture(net), ox.LinfBall(inputs((4,), 3).float(), 0.1)
    before = ox.bounds(network, region).lower
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(ox.bounds(network, region).lower, before)
    torch.testing.assert_close(ox.bounds(network, region).lower, ox.bounds(net, region).lower)
    state = {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in net.state_dict().items()}
    net.load_state_dict(state)
    torch.testing.assert_close(network(region.lower), net(region.lower))
    net.double()
    assert ox.bounds(network, ox.LinfBall(inputs((4,), 3), 0.1)).lower.dtype == torch.float64
    net[0] = nn.Linear(4, 5).double()
    torch.testing.assert_close(network(inputs((4,), 1)), net(inputs((4,), 1)))
    net[0] = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5)).double()
    with pytest.raises(ValueError, match="is another network than when it was captured"):
        network(inputs((4,), 1))


def test_constants_follow_the_parameters_they_come_from():
    net = Lambda(lambda m, x: x * (m.w * 2), w=parameter(4)).double()
    network, x = ox.capture(net, (4,)), inputs((4,), 2)
    for _ in range(2):  # a graph of the capture's own would be gone after the first backward pass
        ox.bounds(network, ox.LinfBall(x, 0.1)).lower.sum().backward()
    with torch.no_grad():
        net.w.mul_(3)
    torch.testing.assert_close(network(x), net(x))


def test_capture_leaves_the_module_as_it_was():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), Lambda(lambda m, x: x + torch.ones(1)), nn.Flatten()
    ).eval()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    attributes = {name: list(vars(m)) for name, m in net.named_modules()}
    state = torch.get_rng_state()
    ox.capture(net, (1, 3, 3))
    ox.check(net.train(), (1, 3, 3))
    assert {name: list(vars(m)) for name, m in net.named_modules()} == attributes
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_functional_call_puts_weights_in():
    class Margin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()

        def forward(self, x: Tensor) -> Tensor:
            return ox.bounds(self.net, ox.LinfBall(x, 0.1)).lower

    module, x = Margin(), inputs((4,), 2)
    other = {name: torch.rand_like(p).requires_grad_() for name, p in module.named_parameters()}
    low = functional_call(module, other, (x,))
    gradients = torch.autograd.grad(low.sum(), list(other.values()))
    assert all(g.abs().sum() > 0 for g in gradients)
    module.load_state_dict({name: p.detach() for name, p in other.items()})
    torch.testing.assert_close(low, module(x))


def test_parametrized_weights_are_computed_at_each_use():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 2)).double()
    network, x = ox.capture(net, (4,)), inputs((4,), 2)
    torch.testing.assert_close(network(x), net(x))
    ox.bounds(network, ox.LinfBall(x, 0.1)).lower.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_an_optional_argument_keeps_its_default():
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            return x * scale

    x = inputs((4,), 2)
    torch.testing.assert_close(ox.capture(Scaled(), (4,))(x), 2 * x)


def test_nodes_that_nothing_reads_do_no_harm():
    net = Lambda(lambda m, x: (m.one(x).relu(), x * 2)[1], one=nn.Linear(4, 4)).double()
    region = ox.LinfBall(inputs((4,), 2), 0.1)
    for name in ("box", "hbox", "deepz", "crown"):
        torch.testing.assert_close(ox.bounds(net, region, name).lower, 2 * region.lower)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_every_problem_is_named_with_its_place_and_what_is_supported():
    halved = [nn.Linear(4, 8), nn.LPPool1d(2, 2)]
    net = nn.Sequential(*halved, nn.Sequential(*halved), Lambda(lambda m, x: x.cumprod(1) * x))
    report = ox.check(net, (4,))
    assert [(p.where, p.op) for p in report.problems[:2]] == [("1", "LPPool1d"), ("2.1", "LPPool1d")]
    assert any(p.op == "cumprod" for p in report.problems)
    with pytest.raises(ox.UnsupportedOpError, match=r"3 op\(s\) of the network cannot be bounded") as raised:
        ox.capture(net, (4,))
    message = str(raised.value)
    for piece in ("1: LPPool1d: has no rule", "2.1: LPPool1d: has no rule", "Supported: modules", "conv2d", "relu"):
        assert piece in message


def in_place_alias(m: Lambda, x: Tensor) -> Tensor:
    h = m.one(x)
    return F.relu(h, inplace=True) + h


def view_alias(m: Lambda, x: Tensor) -> Tensor:
    h = m.one(x)
    return h.view(-1, 2, 2).relu_().flatten(1) + h


REFUSED = {
    "control flow": (lambda m, x: x if x.sum() > 0 else -x, {}, "control flow must not depend on values"),
    "weights from the input": (lambda m, x: F.linear(x, x), {}, "linear: mixes the batch: a batch of 3 gives (3, 3)"),
    "flatten of the batch": (lambda m, x: x.flatten(0), {}, r"flatten: mixes the batch: a batch of 3 gives (12,)"),
    "mean over the batch": (lambda m, x: x - x.mean(0), {}, "mean: mixes the batch"),
    "one row of all": (lambda m, x: x.view(1, -1), {}, "view: mixes the batch: a batch of 3 gives (1, 12)"),
    "half the batch": (lambda m, x: x.view(-1, 2), {}, "view: mixes the batch: a batch of 3 gives (6, 2)"),
    "transpose": (lambda m, x: x.t(), {}, "transpose: mixes the batch"),
    "the batch size as a number": (
        lambda m, x: x / x.shape[0],
        {},
        "div: mixes the batch: an argument depends on the batch size",
    ),
    "numbers from the batch size": (lambda m, x: x * (x.size(0) + 1) / 2, {}, "mul: mixes the batch"),
    "a constant times the batch size": (
        lambda m, x: x + m.w * x.size(0),
        {"w": parameter(4)},
        "a constant depends on the batch size",
    ),
    "a row of numbers an example": (lambda m, x: x + m.c, {"c": torch.zeros(3, 4)}, "mixes the batch"),
    "a parameter changed in place": (
        lambda m, x: x + m.w.add_(1),
        {"w": parameter(4)},
        "changes a parameter or constant in place",
    ),
    "a parameter that takes the input": (
        lambda m, x: m.w.mul_(x),
        {"w": parameter(4)},
        "changes a parameter or constant",
    ),
    "F.dropout that is always on": (
        lambda m, x: F.dropout(x, 0.5),
        {},
        "dropout: is random in training mode, its default",
    ),
    "random numbers": (lambda m, x: x + torch.rand(4), {}, "draws random numbers"),
    "random numbers of the input's size": (lambda m, x: x + torch.rand(x.shape[1]), {}, "draws random numbers"),
    "rounding": (lambda m, x: torch.div(x, 2, rounding_mode="floor"), {}, "rounding_mode has no rule"),
    "a constant output": (lambda m, x: m.w * 2, {"w": parameter(4)}, "output: does not depend on the input"),
    "two outputs": (lambda m, x: (x, x), {}, "the network must return one tensor, got tuple"),
    "another function of one size of the batch": (
        lambda m, x: x if len(x) != 333 else -x,
        {},
        "another function than the module on random inputs",
    ),
    "another function of what requires a gradient": (
        lambda m, x: 3 * x if x.requires_grad else x,
        {},
        "another function of inputs that require a gradient",
    ),
    "no more than so many": (lambda m, x: (x * 2)[:64], {}, "mixes the batch: 65 examples give an output of shape"),
    "sorting": (lambda m, x: x.sort(-1)[0], {}, "sort: has no rule"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason):
    function, attributes, message = REFUSED[reason]
    net = Lambda(function, **attributes).eval()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    assert message in problems(net)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


LAYERS = {
    "no statistics": (nn.BatchNorm2d(1, track_running_stats=False), (1, 4, 4), "mixes the batch"),
    "indices": (nn.MaxPool2d(2, return_indices=True), (1, 4, 4), "fails on an input of shape (1, 4, 4)"),
    "no batch": (nn.Conv2d(3, 1, 1), (4, 4), "mixes the batch"),
    "too small": (nn.Conv2d(1, 1, 5), (1, 4, 4), "fails on an input of shape (1, 4, 4)"),
    "no example": (nn.Linear(5, 2), (), "x is [batch, ...], one example x[None]"),
    "wrong width": (nn.Linear(5, 2), (4,), "fails on an input of shape (4,)"),
    "channels last": (nn.Conv2d(3, 1, 1), (8, 8, 3), "channels in front: x.transpose(0, 3, 1, 2)"),
    "unknown": (Lambda(lambda m, x: x.erfinv()), (4,), "erfinv: has no rule"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("reason", LAYERS)
def test_refused_layers(reason):
    layer, shape, message = LAYERS[reason]
    assert message in problems(nn.Sequential(layer, nn.Flatten()).eval(), shape)


@pytest.mark.parametrize("mode", [nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Dropout1d(0.5), nn.AlphaDropout(0.5)])
def test_training_mode_is_refused_and_changes_nothing(mode):
    net = nn.Sequential(nn.Linear(4, 4), mode, nn.ReLU()).train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    state = torch.get_rng_state()
    assert f"1: {type(mode).__name__}: is in training mode; call .eval()" in problems(net)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_training_mode_switched_on_after_the_capture_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.1)).eval()
    network, region = ox.capture(net), ox.LinfBall(torch.rand(2, 4), 0.1)
    ox.bounds(network, region)
    net.train()
    for call in (ox.bounds, ox.preactivation_bounds):
        with pytest.raises(ox.UnsupportedOpError, match=r"2 op\(s\) of the network cannot be bounded"):
            call(network, region)
    assert [p.where for p in ox.check(network).problems] == ["1", "3"]
    net.eval()
    ox.bounds(network, region)


def test_a_plain_network_may_stay_in_training_mode():
    assert ox.check(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).train(), (4,)).ok


@pytest.mark.parametrize("where", ["root", "layer", "container"])
@pytest.mark.parametrize("pre", [False, True])
def test_forward_hooks_are_refused_and_not_run(where, pre):
    """What a hook does with the values it sees is its own affair, and capture would show it values that are none."""
    seen: list[object] = []
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)).double()
    target = {"root": net, "layer": net[0][0], "container": net[0]}[where]
    if pre:
        target.register_forward_pre_hook(lambda module, args: seen.append(args))
    else:
        target.register_forward_hook(lambda module, args, output: seen.append(output))
    assert "has forward hooks" in problems(net.float())
    assert not seen


@pytest.mark.parametrize("where", ["root", "layer", "container"])
def test_a_forward_put_on_one_object_is_the_one_captured(where):
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
    target = {"root": net, "layer": net[0][1], "container": net[0]}[where]
    target.forward = lambda x: x * 3  # type: ignore[method-assign]
    x = torch.rand(2, 4)
    torch.testing.assert_close(ox.capture(net, (4,))(x), net(x))


def test_a_subclass_with_a_forward_of_its_own_is_not_its_parent():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(Doubled(4, 3)).double()
    x = inputs((4,), 2)
    report = ox.check(net, (4,))
    if report.ok:
        torch.testing.assert_close(ox.capture(net, (4,))(x), net(x))
    else:
        assert "Doubled" in str(report)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_are_refused(dtype):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    network = ox.capture(net)
    net.to(dtype)
    assert "bounds want float32 or float64; call .float()" in problems(net)
    with pytest.raises(ValueError, match=r"0\.weight: torch\.\w*float16: bounds want float32 or float64"):
        ox.bounds(network, ox.LinfBall(torch.rand(2, 4), 0.1))


def test_two_inputs_are_refused():
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    assert "the network must take one tensor" in problems(Two())


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"capture: wants an nn\.Module or a Network, got function"):
        inspect.unwrap(ox.capture)(lambda x: x, (4,))  # without the tests' own check of types


def test_a_network_is_immutable():
    network = ox.capture(nn.Linear(2, 2))
    assert isinstance(network, Network)
    with pytest.raises(AttributeError):
        network.output = "input"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        network.nodes[0].name = "other"  # type: ignore[misc]


def test_values_that_overflow_are_compared_nowhere():
    """Infinite or no number by the order of its sums, which differs between an example alone and a batch."""
    net = nn.Sequential(nn.Conv2d(2, 2, 2, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1), nn.Flatten(), nn.Linear(9, 1))
    with torch.no_grad():
        for layer, size in ((net[0], 1e17), (net[2], 1e32), (net[4], 1e37)):
            for p in layer.parameters():
                p.copy_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    low = ox.bounds(net, ox.LinfBall(torch.zeros(1, 2, 4, 4), 1.0), "box").lower
    assert float(low.detach()) == -torch.inf


def counting(m: Lambda, x: Tensor) -> Tensor:
    m.inner.calls = getattr(m.inner, "calls", 0) + 1
    return x * m.inner.calls


def test_a_module_that_counts_its_calls_is_no_function():
    assert "gives another output each time it is called" in problems(Lambda(counting, inner=nn.ReLU()))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.rand(1, 4))])
def test_a_scripted_module_inside_is_refused(make):
    assert "0: " in (found := problems(nn.Sequential(make(nn.Linear(4, 4)), nn.ReLU())))
    assert "is scripted, and cannot be followed" in found


def test_a_lazy_module_is_refused_until_its_first_call():
    net, x = nn.Sequential(nn.LazyLinear(3), nn.ReLU()), torch.rand(2, 4)
    assert "0: LazyLinear: has no weights before its first call" in problems(net)
    net(x)
    torch.testing.assert_close(ox.capture(net, (4,))(x), net(x))


OUTSIDE = {
    ".data": (lambda m, x: x.data * 2, "use .detach()"),
    "numpy": (lambda m, x: x + torch.from_numpy(x.detach().numpy()), "control flow must not depend on values"),
    "inference_mode": (lambda m, x: inferred(m, x), "use torch.no_grad() there"),
    "vmap": (lambda m, x: torch.vmap(lambda row: row * 2)(x), "torch.vmap and torch.func inside forward"),
    "grad": (lambda m, x: torch.func.grad(lambda z: z.square().sum())(x), "torch.vmap and torch.func inside forward"),
}


def inferred(m: Lambda, x: Tensor) -> Tensor:
    with torch.inference_mode():
        h = F.linear(x, m.weight)
    return F.linear(h, m.weight)


@pytest.mark.parametrize("how", OUTSIDE)
def test_what_leaves_autograds_sight_is_refused(how):
    function, message = OUTSIDE[how]
    assert message in problems(Lambda(function, weight=parameter(4, 4)))


def test_autocast_that_is_off_changes_nothing():
    def off(m: Lambda, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return m.inner(x)

    net, x = Lambda(off, inner=nn.Linear(4, 3)), torch.rand(2, 4)
    torch.testing.assert_close(ox.capture(net, (4,))(x), net(x))


CHOSEN = torch.tensor([True, False, True, True])
MASKS = {
    "buffer": (lambda m, x: x[:, m.mask], {"mask": CHOSEN.clone()}, (4,)),
    "of a module inside": (lambda m, x: m.inner(x)[:, m.inner.mask], {"inner": Lambda(lambda m, x: 2 * x)}, (4,)),
    "closed over": (lambda m, x: x[:, CHOSEN], {}, (4,)),
    "list": (lambda m, x: x[:, [True, False, True, True]] * x[:, :1], {}, (4,)),
    "of two dimensions": (lambda m, x: x[:, :, m.mask], {"mask": torch.eye(2) > 0}, (3, 2, 2)),
    "beside a number": (lambda m, x: x[:, 1, m.mask], {"mask": CHOSEN.clone()}, (2, 4)),
    "of none": (lambda m, x: torch.cat([x, x[:, m.mask]], 1), {"mask": torch.zeros(4) > 1}, (4,)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_constant_mask_moves_entries(kind):
    function, attributes, shape = MASKS[kind]
    net = Lambda(function, **attributes)
    if "inner" in attributes:
        net.inner.register_buffer("mask", CHOSEN.clone())
    x = torch.rand(3, *shape)
    for name in ("box", "crown"):
        torch.testing.assert_close(ox.bounds(net, ox.LinfBall(x, 0.0), name).lower, net(x))


def test_a_mask_that_changes_is_followed():
    net, x = Lambda(lambda m, x: x[:, m.mask], mask=CHOSEN.clone()), torch.rand(3, 4)
    held = ox.capture(net, (4,))
    net.mask.logical_not_()
    torch.testing.assert_close(ox.capture(net, (4,))(x), net(x))
    with pytest.raises(ValueError, match="another network than when it was captured"):
        held(x)


@pytest.mark.parametrize("function", [lambda m, x: x[:, m.mask > 0] * 2, lambda m, x: x[x > 0]])
def test_a_mask_that_is_computed_is_refused_with_the_cure(function):
    assert "a mask must be a buffer or a constant, or numbers such as mask.nonzero()" in problems(
        Lambda(function, mask=CHOSEN.float())
    )


@pytest.mark.parametrize("net", [nn.RReLU(), Lambda(lambda m, x: F.rrelu(x, 0.1, 0.5))], ids=["module", "function"])
def test_rrelu_in_evaluation_is_its_mean_slope(net):
    x = torch.randn(5, 4)
    torch.testing.assert_close(ox.capture(net.eval(), (4,))(x), net(x))


# --- threads -------------------------------------------------------------------------------------------------------


def test_threads_may_capture_and_compute_at_the_same_time():
    """A trace replaces methods of every module in the process; nobody else may notice."""
    nets = [nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(3)]
    x = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    wanted = [net(x) for net in nets]
    captured = ox.capture(nets[0])
    ready, done = threading.Barrier(4, timeout=60), threading.Semaphore(0)

    def tracing(net: nn.Module, value: Tensor) -> bool:
        ready.wait()
        try:
            return all(torch.equal(ox.capture(net)(x), value) for _ in range(40))
        finally:
            done.release()

    def computing() -> bool:
        """The module that another thread traces, and a network that reads its parameters."""
        ready.wait()
        finished, equal, end = 0, True, time.monotonic() + 30
        while finished < 3 and time.monotonic() < end:
            finished += done.acquire(blocking=False)
            equal = equal and torch.equal(nets[0](x), wanted[0]) and torch.equal(captured(x), wanted[0])
        return equal and finished == 3

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads change places within a trace
    try:
        with ThreadPoolExecutor(4) as pool:
            tasks = [pool.submit(tracing, net, value) for net, value in zip(nets, wanted, strict=True)]
            assert all(task.result() for task in [*tasks, pool.submit(computing)])
    finally:
        sys.setswitchinterval(interval)


def test_running_statistics_may_be_parts_of_a_parameter():
    """Then forward runs without gradients alone, and so does its export."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4, 3) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.weight[:, 0], self.weight[:, 1])

    net, x = Net().eval(), torch.rand(5, 4)
    network = ox.capture(net, (4,))
    with torch.no_grad():
        torch.testing.assert_close(network(x), net(x))
        net.weight.mul_(2)
        torch.testing.assert_close(network(x), net(x))


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.first(x)
        return self.second(h * torch.relu(h))


def test_a_check_speaks_for_the_relaxation_asked_about():
    plain, smooth = (nn.Sequential(nn.Linear(3, 4), f, nn.Linear(4, 2)) for f in (nn.ReLU(), nn.Tanh()))
    for name in ("box", "crown-0", "crown", "triangle", "layerwise"):
        assert ox.check(plain, relaxation=name).ok
    assert ox.check(smooth, relaxation="triangle").ok
    (refused,) = ox.check(smooth, relaxation="crown-0").problems
    assert (refused.where, refused.op) == ("1", "tanh")
    assert ox.check(Squares(), (3,), relaxation="crown").ok
    assert ox.check(Squares(), (3,), relaxation="triangle").ok
    (product,) = ox.check(Squares(), (3,), relaxation=Triangle(solver=Highs())).problems
    assert product.op == "Multiply"
    assert "solver=DualAscent()" in product.reason
    with pytest.raises(ValueError, match="unknown relaxation"):
        ox.check(plain, relaxation="crowm")


@pytest.mark.parametrize("captured", [True, False])
def test_a_compiled_step_may_be_the_first_that_captures(captured):
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)), torch.rand(2, 4)

    def step(x: Tensor) -> Tensor:
        return ox.capture(net, (4,)).graph.values(2 * x)["2"]

    wanted = step(x) if captured else None
    found = torch.compile(step, backend="eager")(x)
    torch.testing.assert_close(found, step(x) if wanted is None else wanted)


def test_reads_of_shapes_and_types_look_for_no_backward(monkeypatch):
    """An export asks a tensor hundreds of them an op; the search walks all functions that have a backward."""
    searches = []
    search = leaves._own_backward
    monkeypatch.setattr(leaves, "_own_backward", lambda: searches.append(1) or search())
    assert ox.check(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), (4,)).ok
    assert 3 <= len(searches) < 30


@pytest.mark.parametrize("relaxation", ["box", "crown", "triangle"])
def test_a_network_made_in_inference_mode_is_bounded_there(relaxation):
    with torch.inference_mode():
        net, x = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).eval(), torch.rand(2, 5)
        found = ox.bounds(net, ox.LinfBall(x, 0.1), relaxation)
        assert bool((found.lower <= net(x)).all() and (net(x) <= found.upper).all())
        net[0].bias.add_(1.0)
        torch.testing.assert_close(ox.bounds(net, ox.LinfBall(x, 0.0), relaxation).lower, net(x))
