"""Ops that have no step of their own: scales and biases that go into a convolution's weights or into lines."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from optrelax.domains.lines import Lines
from optrelax.networks.graph import Network, Node
from optrelax.networks.images import Conv2d
from optrelax.networks.ops import Add, Affine, Linear, Reshape, Scale


def channelwise(op: Scale) -> bool:
    """Whether every pixel of a channel is scaled and shifted alike."""
    parts = (
        op.factor(torch.zeros((), device="cpu")),
        None if op.bias(torch.zeros((), device="cpu")) is None else op.bias(torch.zeros((), device="cpu")),
    )
    if len(op.shape) == 1:
        return True
    return all(t is None or t.dim() < 3 or _constant_over_pixels(t) for t in parts)


def _constant_over_pixels(t: Tensor) -> bool:
    # An expanded dimension has stride 0.
    return all(n == 1 or step == 0 for n, step in zip(t.shape[-2:], t.stride()[-2:], strict=True))


def weighted(node: Node) -> Conv2d | Linear | None:
    """The op, where it is a product with a weight that steps are written for."""
    return node.of(Conv2d) or node.of(Linear)


def diagonal_to_input(network: Network, node: Node) -> bool:
    """Whether diagonal ops alone lead from the input here."""
    while node.of(Scale):
        if node.inputs[0] == network.input:
            return True
        node = network[node.inputs[0]]
    return False


def folds(network: Network, node: Node) -> bool:
    """Whether a scale stands behind a convolution or a matrix that nobody else reads."""
    source = node.inputs[0]
    if source == network.input or len(network.readers[source]) > 1 or not node.of(Scale):
        return False
    return weighted(network[source]) is not None


def arrival_of(network: Network, source: str) -> str:
    """The node at which rows arrive from the activation behind `source`: scales before it go into its lines."""
    while source != network.input:
        node = network[source]
        if not node.of(Scale) or diagonal_to_input(network, node) or len(network.readers[source]) > 1:
            break
        source = node.inputs[0]
    return source


def _biased(network: Network, name: str) -> Iterator[tuple[Node, Node | None]]:
    """Ops whose bias goes into the lines behind `name`, each with the scale that goes into its weights."""
    if name == network.input or len(network.readers[name]) > 1:
        return
    node = network[name]
    if weighted(node):
        yield node, None
    elif node.of(Scale) and folds(network, node) and not diagonal_to_input(network, node):
        yield network[node.inputs[0]], node
    elif add := node.of(Add):
        if add.bias(torch.zeros((), device="cpu")) is not None:
            yield node, None
        for part in node.inputs:
            yield from _biased(network, part)


def settled(network: Network) -> frozenset[str]:
    """Nodes whose bias goes into lines."""
    found = set()
    for node in network.activations:
        for pair in _biased(network, arrival_of(network, node.inputs[0])):
            found |= {op.name for op in pair if op is not None}
    return frozenset(found)


def folded_weight(network: Network, name: str, like: Tensor) -> Tensor:
    """Weight of a convolution or matrix with the scale behind it; a matrix behind a map reads channels last."""
    node = network[name]
    op = weighted(node)
    assert op is not None
    w = op.weight(like)
    reading = network.readers.get(name, ())
    if len(reading) == 1 and folds(network, reading[0]) and _folded(network, reading[0]):
        scale = reading[0].of(Scale)
        assert scale is not None
        factor = scale.factor(like)
        if factor is not None:
            w = w * _channels(factor, w.shape[0]).reshape(-1, *[1] * (w.dim() - 1))
    if node.of(Conv2d):
        return w
    source = node.inputs[0]
    if source != network.input and network[source].of(Reshape):
        shape = network.shape_of(network[source].inputs[0])
        if len(shape) == 3:
            w = w.unflatten(1, shape).permute(0, 2, 3, 1).flatten(1)
    return w


def _folded(network: Network, scale: Node) -> bool:
    """Whether a scale goes into the weights before it: else it goes into the lines behind it."""
    name = scale.name
    while len(reading := network.readers.get(name, ())) == 1:
        if reading[0].activation:
            return False
        if not reading[0].of(Scale):
            return True
        name = reading[0].name
    return True


def _channels(t: Tensor, n: int) -> Tensor:
    """A number a channel, of a tensor that broadcasts to [n, ...] and is alike in all pixels: [n]."""
    if t.dim() <= 1:
        return t.expand(n)
    return t.flatten(t.dim() - 2)[..., 0].reshape(-1).expand(n)


def lines_at_arrival(network: Network, node: Node, lines: Lines) -> tuple[Tensor, ...]:
    """Lines in the value at which rows arrive, without biases that nobody else reads; channels last, [batch, h, w, c].

    s (f z + b) + t = (s f) z + (s b + t): a map's worth of work instead of one more pass over the rows.
    """
    ls, li, us, ui = lines.lower_slope, lines.lower_intercept, lines.upper_slope, lines.upper_intercept
    source, arrival = node.inputs[0], arrival_of(network, node.inputs[0])
    while source != arrival:
        scale = network[source].of(Scale)
        assert scale is not None
        ls, li, us, ui = _through(ls, li, us, ui, scale.factor(ls), scale.bias(ls))
        source = network[source].inputs[0]
    total: Tensor | None = None
    for op, scaled in _biased(network, arrival):
        assert op.affine
        b = op.affine.bias(ls)
        if scaled is not None and (scale := scaled.of(Scale)):
            factor, shift = scale.factor(ls), scale.bias(ls)
            b = b if b is None or factor is None else b * factor
            b = shift if b is None else (b if shift is None else b + shift)
        total = b if total is None else (total if b is None else total + b)
    ls, li, us, ui = _through(ls, li, us, ui, None, total)
    return tuple(channels_last(t) for t in (ls, li, us, ui))


def _through(
    ls: Tensor, li: Tensor, us: Tensor, ui: Tensor, factor: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if shift is not None:
        li, ui = li + ls * shift, ui + us * shift
    if factor is not None:
        ls, us = ls * factor, us * factor
    return ls, li, us, ui


def channels_last(t: Tensor) -> Tensor:
    """[batch, n] or [batch, c, h, w] -> [batch, h, w, c]."""
    return t[:, None, None] if t.dim() == 2 else t.permute(0, 2, 3, 1)


def diagonals(network: Network, name: str) -> list[Affine]:
    ops: list[Affine] = []
    while name != network.input:
        op = network[name].affine
        assert op is not None
        ops.insert(0, op)
        name = network[name].inputs[0]
    return ops
