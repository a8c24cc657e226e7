"""Softmax, attention, normalisations and quotients: captured as they are, and bounded at corners and inside."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import inputs, random_points
from torch import Tensor, nn

import optrelax as ox

GAIN = torch.linspace(0.5, 1.5, 4).double()

FUNCTIONS = {
    "softmax": (lambda x: F.softmax(x, 1), (5,)),
    "softmax of rows": (lambda x: torch.softmax(3 * x, -1), (2, 3)),
    "log softmax": (lambda x: F.log_softmax(x, 1), (6,)),
    "layer norm": (lambda x: F.layer_norm(x, (4,), GAIN, GAIN - 1), (4,)),
    "group norm": (lambda x: F.group_norm(x, 2, GAIN, GAIN - 1), (4, 2)),
    "instance norm": (lambda x: F.instance_norm(x, weight=GAIN, bias=GAIN), (4, 3)),
    "rms norm": (lambda x: F.rms_norm(x, (4,), GAIN, 1e-3), (4,)),
    "quotient": (lambda x: x[:, :2] / (x[:, 2:].square() + 1), (4,)),
    "quotient of a constant": (lambda x: 2 / (x + 3), (3,)),
    "logsumexp": (lambda x: torch.logsumexp(x, (1, 2)), (3, 2)),
    "logsumexp, kept": (lambda x: x - torch.logsumexp(x, 1, keepdim=True), (5,)),
    "norm": (lambda x: x.norm(dim=1) + x.norm(1, 1) + x.norm(torch.inf, 1), (4,)),
    "normalised": (lambda x: F.normalize(x + 2, dim=1), (4,)),
    "variance": (lambda x: x.var(1) + x.var((1, 2), correction=0, keepdim=True)[:, 0], (3, 2)),
    "deviation": (lambda x: (3 * x).std(1), (4,)),
    "gated": (lambda x: F.glu(x, 1), (4, 2)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, 2 * x, x, scale=0.7), (3, 2)),
}


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.like = nn.Parameter(torch.zeros(1).double())  # a module's type is its parameters'

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name][0](x)


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bounds_hold_and_are_tight_to_first_order(name):
    shape = FUNCTIONS[name][1]
    network = ox.capture(Function(name), shape)
    x = inputs(shape, 2)
    torch.testing.assert_close(network(x), FUNCTIONS[name][0](x))
    generator = torch.Generator().manual_seed(0)
    for eps, relaxation in itertools.product((0.0, 0.01, 0.5), ("box", "deepz", "hbox", "crown", "crown-ibp")):
        region = ox.LinfBall(x, eps)
        found = ox.bounds(network, region, relaxation, rounding="outward")
        signs = torch.randn(200, *x.shape, generator=generator, dtype=torch.float64).sign()
        inside = 2 * torch.rand(200, *x.shape, generator=generator, dtype=torch.float64) - 1
        points = (x + eps * torch.cat([signs, inside])).clamp(region.lower, region.upper)
        y = FUNCTIONS[name][0](points.flatten(0, 1)).reshape(len(points), 2, *network.output_shape)
        # The function itself is computed with rounding.
        slack = 1e-14 * y.abs().amax(0).clamp_min(1)
        assert bool((found.lower <= y.amin(0) + slack).all())
        assert bool((found.upper >= y.amax(0) - slack).all())
        if eps == 0.01 and relaxation in ("deepz", "crown"):
            assert float(found.width.mean()) < 1.25 * float((y.amax(0) - y.amin(0)).mean())


def test_softmax_by_intervals_is_exact():
    """The greatest share is taken at one corner: the entry's upper end, the others' lower ends."""
    x = inputs((4,), 3)
    region = ox.InputBox(x - 0.3, x + 0.8)
    found = ox.bounds(nn.Softmax(1), region, "box")
    for i in range(4):
        high, low = region.lower.clone(), region.upper.clone()
        high[:, i], low[:, i] = region.upper[:, i], region.lower[:, i]
        torch.testing.assert_close(found.upper[:, i], F.softmax(high, 1)[:, i])
        torch.testing.assert_close(found.lower[:, i], F.softmax(low, 1)[:, i])


def test_a_normalised_value_keeps_its_limit_where_its_deviation_may_vanish():
    """n numbers of mean 0 and variance 1: none is above sqrt(n - 1), whatever the bounds of the deviation say."""
    found = ox.bounds(nn.LayerNorm(4).double(), ox.LinfBall(torch.zeros(1, 4).double(), 1.0), "box", rounding="outward")
    assert float(found.upper.detach().max()) < 3**0.5 * 1.001


@pytest.mark.parametrize("name", ["softmax", "layer norm", "attention", "quotient", "logsumexp", "norm", "gated"])
@pytest.mark.parametrize("relaxation", ["box", "crown", "crown-ibp"])
def test_gradients_are_exact(name, relaxation):
    network, x = ox.capture(Function(name), FUNCTIONS[name][1]), inputs(FUNCTIONS[name][1], 1)

    def lower(x: Tensor, width: Tensor) -> Tensor:
        return ox.bounds(network, ox.InputBox(x - width, x + width), relaxation).lower

    width = torch.full_like(x, 0.05).requires_grad_()
    assert torch.autograd.gradcheck(lower, (x.requires_grad_(), width), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("relaxation", ["box", "deepz", "crown", "triangle", "alpha-crown"])
def test_where_a_norm_may_be_0_gradients_are_finite_and_a_point_is_exact(relaxation):
    layer = nn.Linear(4, 4).double()
    nn.init.zeros_(layer.bias)
    net, x = nn.Sequential(layer, Norm()), torch.zeros(1, 4).double()
    found = ox.bounds(net, ox.LinfBall(x, torch.tensor([0.5]).double()), relaxation)
    found.width.sum().backward()
    assert abs(float(found.lower.detach())) < 1e-9
    assert bool(layer.weight.grad.isfinite().all())
    point = ox.bounds(net, ox.LinfBall(x, 0.0), relaxation)
    torch.testing.assert_close(point.lower, net(x), atol=1e-7, rtol=0)
    torch.testing.assert_close(point.upper, net(x), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["softmax", "layer norm", "attention"])
def test_the_triangle_layer_holds_and_is_tighter_than_crown(name):
    function, shape = FUNCTIONS[name]
    network, region = ox.capture(Function(name), shape), ox.LinfBall(inputs(shape, 2), 0.3)
    with torch.no_grad():
        crown, found = (
            ox.bounds(network, region, relaxation, rounding="outward") for relaxation in ("crown", "triangle")
        )
        y = function(random_points(region, 200).flatten(0, 1)).reshape(200, 2, *network.output_shape)
    assert bool(((found.lower <= y) & (y <= found.upper)).all())
    assert float(found.width.mean()) < 0.97 * float(crown.width.mean())


BAND = torch.tensor([[True, True, False], [False, True, True], [True, False, True]])
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "bool": {"attn_mask": BAND},
    "minus infinity": {"attn_mask": torch.where(BAND, 0.3, -torch.inf).double()},
}


class Masked(nn.Module):
    """Attention of tokens to those that a mask shows; the mask is a buffer."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options, self.like = dict(options), nn.Parameter(torch.zeros(1).double())
        self.register_buffer("mask", self.options.pop("attn_mask", None))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, 2 * x, x, attn_mask=self.mask, **self.options)


@torch.no_grad()
@pytest.mark.parametrize("kind", MASKS)
def test_what_a_mask_hides_has_no_share(kind, tmp_path):
    net, x = Masked(MASKS[kind]), inputs((3, 2), 2)
    network = ox.capture(net, (3, 2))
    torch.testing.assert_close(network(x), net(x))
    ox.save(net, tmp_path / "net.safetensors", input_shape=(3, 2))
    torch.testing.assert_close(ox.load(tmp_path / "net.safetensors")(x), net(x))
    region, last = ox.LinfBall(x, 0.3), torch.tensor([[0.0], [0.0], [1.0]]).double()
    y = net(random_points(region, 200).flatten(0, 1)).unflatten(0, (200, 2))
    for name in ("box", "crown", "triangle"):
        found = ox.bounds(network, region, name, rounding="outward")
        assert bool(((found.lower <= y) & (y <= found.upper)).all())
        # The first token does not see the last one.
        assert float(ox.bounds(network, ox.InputBox(x - last, x + last), name).width[:, 0].max()) < 1e-12


def test_a_query_that_sees_nothing_is_refused():
    net = Masked({"attn_mask": torch.tensor([[True], [False], [True]]).expand(3, 3)})
    with pytest.raises(ox.UnsupportedOpError, match="leaves a query without any score"):
        ox.capture(net, (3, 2))


def test_divisors_that_may_be_zero_bound_nothing():
    found = ox.bounds(Function("quotient of a constant"), ox.LinfBall(torch.full((1, 3), -3.0).double(), 0.5), "crown")
    assert found.lower.isinf().all()
    assert found.upper.isinf().all()
