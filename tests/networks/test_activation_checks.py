"""An activation that is not what it says is refused, where it is made or registered."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import optrelax as ox
from optrelax.networks.activations import Hull, PiecewiseLinear, clamp, leaky_relu, relu

HONEST = {
    "relu": relu(),
    "leaky relu": leaky_relu(0.3),
    "steep": PiecewiseLinear("steep", lambda x: x.clamp_min(0) * 20 - 1, (0.0,), (0.0, 20.0), (-1.0, -1.0)),
    "abs": PiecewiseLinear("abs", torch.abs, (0.0,), (-1.0, 1.0), (0.0, 0.0)),
    "concave": PiecewiseLinear("concave", lambda x: x.clamp_max(2), (2.0,), (1.0, 0.0), (0.0, 2.0)),
    "hardtanh": clamp(-1.0, 1.0),
    "hardsigmoid": PiecewiseLinear(
        "hardsigmoid", torch.nn.functional.hardsigmoid, (-3.0, 3.0), (0.0, 1 / 6, 0.0), (0.0, 0.5, 1.0)
    ),
}


@pytest.mark.parametrize("activation", HONEST.values(), ids=HONEST.keys())
def test_what_is_so_passes(activation):
    ox.check_activation(activation)


@pytest.mark.parametrize(
    ("function", "kinks", "slopes", "intercepts"),
    [
        (torch.sigmoid, (0.0,), (0.25, 0.25), (0.5, 0.5)),
        (torch.tanh, (-1.0, 1.0), (0.0, 1.0, 0.0), (-1.0, 0.0, 1.0)),
        (torch.relu, (0.0,), (1.0, 0.0), (0.0, 0.0)),
        (torch.abs, (0.0,), (0.0, 1.0), (0.0, 0.0)),
        (lambda x: x.clamp_min(0) + 1e-6, (0.0,), (0.0, 1.0), (0.0, 0.0)),
        (lambda x: torch.where(x > 100, 2 * x, x.relu()), (0.0,), (0.0, 1.0), (0.0, 0.0)),
        (lambda x: x.relu() * torch.nan, (0.0,), (0.0, 1.0), (0.0, 0.0)),
    ],
)
def test_a_function_that_leaves_its_pieces_is_refused_where_it_is_made(function, kinks, slopes, intercepts):
    with pytest.raises(ValueError, match=r"^mine: the function is .* at .*, its pieces say"):
        PiecewiseLinear("mine", function, kinks, slopes, intercepts)


def test_a_function_of_the_whole_tensor_is_refused():
    with pytest.raises(ValueError, match=r"mine: makes \(\) of \(22,\), which is not elementwise"):
        PiecewiseLinear("mine", lambda x: x.relu().sum(), (0.0,), (0.0, 1.0), (0.0, 0.0))


@dataclass(frozen=True)
class Careless(PiecewiseLinear):
    """A ReLU whose hull and image are its own."""

    def hull(self, l: Tensor, u: Tensor) -> Hull:
        (b0, b1), (above, _) = (lambda h: (h.below, h.above))(super().hull(l, u))
        low = above[0], above[1] * 0.9
        return Hull((b0, b1), (low, low))


@dataclass(frozen=True)
class Narrow(PiecewiseLinear):
    def image(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        low, high = super().image(l, u)
        return low, high - 0.01


@pytest.mark.parametrize(
    ("kind", "message"), [(Careless, "beyond (CROWN's upper line|line 0 above its hull)"), (Narrow, "beyond its image")]
)
def test_lines_and_images_of_ones_own_are_sampled(kind, message):
    activation = kind("mine", torch.relu, (0.0,), (0.0, 1.0), (0.0, 0.0))
    with pytest.raises(ValueError, match=rf"mine: over \[.*\] the function is .* at .*, {message}"):
        ox.check_activation(activation)

    def mine(x: Tensor) -> Tensor:
        return x.relu()

    with pytest.raises(ValueError, match="mine: over"):
        ox.register_activation(mine, activation=activation)


def test_what_is_no_activation_is_named():
    with pytest.raises(TypeError, match="check_activation: wants an Activation, got builtin_function_or_method"):
        ox.check_activation(torch.relu)
