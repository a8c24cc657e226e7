"""Attention: torch's own layers, and masks of minus infinity before a softmax."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import inputs, random_points
from torch import Tensor, nn

import optrelax as ox

FUTURE = torch.ones(3, 3).triu(1) > 0
PAST = FUTURE.mT
INFINITE = torch.zeros(3, 3).masked_fill(FUTURE, -math.inf)


class Scores(nn.Module):
    """A function of the tokens' products with each other and of a mask."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], mask: Tensor) -> None:
        super().__init__()
        self.function, self.size = function, nn.Parameter(torch.ones(()).double())
        self.register_buffer("mask", mask.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.size * x @ x.mT, self.mask)


MASKS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "masked_fill": (lambda s, m: s.masked_fill(m, -math.inf).softmax(-1), FUTURE),
    "in place": (lambda s, m: s.masked_fill_(m, float("-inf")).softmax(1), FUTURE),
    "added": (lambda s, m: (s + m).softmax(-1), INFINITE.double()),
    "taken off": (lambda s, m: (s - m).softmax(-1), -INFINITE.double()),
    "before": (lambda s, m: (m - s).softmax(-1), INFINITE.double()),
    "where": (lambda s, m: torch.where(m, -math.inf, s).softmax(-1), FUTURE),
    "where not": (lambda s, m: torch.where(m, s, torch.tensor(-math.inf).double()).softmax(-1), ~FUTURE),
    "twice": (lambda s, m: (s.masked_fill(m, -math.inf) + INFINITE.roll(1, 1).double()).softmax(-1), FUTURE.roll(1, 1)),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", MASKS)
def test_minus_infinity_hides_entries_from_a_softmax(kind):
    net = Scores(*MASKS[kind])
    held = ox.capture(net, (3, 2))
    region = ox.LinfBall(inputs((3, 2), 2), 0.2)
    for after in (False, True):
        if after:
            net.mask.copy_(net.mask.flip(0, 1))
        for size in (1.0, 300.0):  # exponentials of hidden scores overflow
            x = size * region.x
            torch.testing.assert_close(ox.capture(net, (3, 2))(x), net(x))
            torch.testing.assert_close(held(x), net(x))
        y = net(random_points(region, 100).flatten(0, 1)).unflatten(0, (100, 2))
        for name in ("box", "crown"):
            found = ox.bounds(net, region, name, rounding="outward")
            assert bool(((found.lower <= y) & (y <= found.upper)).all())
            assert bool((found.upper - found.lower).isfinite().all())
            hidden = (y == 0).all(0)
            assert float((found.upper - found.lower)[hidden].max()) < 1e-12


@pytest.mark.parametrize(
    "function",
    [
        lambda s, m: s + m,
        lambda s, m: (s + m).relu(),
        lambda s, m: (s + m).log_softmax(-1),
        lambda s, m: (s + m) + s,
        lambda s, m: torch.where(FUTURE, s + m, s).softmax(-1),
    ],
)
def test_what_else_reads_hidden_entries_is_refused(function):
    with pytest.raises(ox.UnsupportedOpError, match="minus infinity hides; only a softmax may"):
        ox.capture(Scores(function, INFINITE.double()), (3, 2))


def test_a_mask_that_comes_to_hide_all_is_refused():
    net = Scores(*MASKS["masked_fill"])
    held = ox.capture(net, (3, 2))
    net.mask.fill_(True)
    for network in (net, held):
        with pytest.raises(ox.UnsupportedOpError, match="leaves a query without any score"):
            ox.bounds(network, ox.LinfBall(inputs((3, 2), 2), 0.1))


class Attention(nn.Module):
    """Torch's own layer, and what is asked of it."""

    def __init__(self, layer: dict[str, Any], **call: Any) -> None:
        super().__init__()
        self.layer, self.call = nn.MultiheadAttention(4, 2, batch_first=True, **layer), call

    def forward(self, x: Tensor) -> Tensor:
        key, value = x[..., : self.layer.kdim], x[..., : self.layer.vdim]
        output, weights = self.layer(x, key, value, **self.call)
        return output.flatten(1) if weights is None else torch.cat([output.flatten(1), weights.flatten(1)], 1)


def encoder() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), nn.Flatten())


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Attention({}),
    "weights of each head": lambda: Attention({}, average_attn_weights=False),
    "without weights": lambda: Attention({"bias": False}, need_weights=False),
    "other widths": lambda: Attention({"kdim": 3, "vdim": 2}, need_weights=False),
    "mask": lambda: Attention({}, need_weights=False, attn_mask=FUTURE, is_causal=True),
    "mask of numbers": lambda: Attention({}, attn_mask=INFINITE.double()),
    "encoder": encoder,
    "encoder without gradients": lambda: encoder().requires_grad_(False),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_torchs_layers(kind):
    torch.manual_seed(0)
    net, region = LAYERS[kind]().double().eval(), ox.LinfBall(inputs((3, 4), 2), 0.05)
    network = ox.capture(net, (3, 4))
    for size in (1, 2, 5, 6):
        x = inputs((3, 4), size)
        torch.testing.assert_close(network(x), net(x))
    y = net(random_points(region, 50).flatten(0, 1)).unflatten(0, (50, 2))
    found = ox.bounds(network, region, "box", rounding="outward")
    assert bool(((found.lower <= y) & (y <= found.upper)).all())


def test_layers_whose_batch_comes_second_are_refused_in_a_sentence_each():
    report = ox.check(nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5), nn.Flatten()).eval(), (3, 4))
    assert not report.ok
    assert len(report.problems) == 1
    assert "self_attn: MultiheadAttention: mixes the batch" in str(report)
