"""Floors: the products with a network's weights that a method cannot do without, counted by shapes and run bare.

Counted are the vectors that each affine op has to push forward or pull back. Left out is what a better implementation
could leave out as well: everything elementwise, products among coefficients, and rows that are still the weights
themselves (unit vectors pulled through their first affine op, shared by the batch).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from optrelax.domains import frames
from optrelax.networks.graph import Network, Node
from optrelax.networks.images import Conv2d
from optrelax.networks.ops import Affine, Linear
from optrelax.relaxations import Box, Cauchy, Crown, DeepZ, FastLin, HBox, Relaxation

Way = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Product:
    """Vectors pushed through an affine op, or pulled back through it."""

    node: str
    way: Way
    vectors: int
    constant: bool = False
    """Whether the vectors depend on no weights, so that a gradient stops here."""


Products = tuple[Product, ...]


def needed(network: Network, relaxation: Relaxation, batch: int, rows: int) -> Products:
    """The products of a relaxation for `rows` rows of the output of each of `batch` examples."""
    if isinstance(relaxation, (DeepZ, HBox)):
        # The same bounds either way, so the floor is the cheaper way.
        ways = (_substitution(network, batch, rows, sides=1), _zonotope(network, batch, rows, relaxation))
        return merged(min(ways, key=lambda products: multiply_adds(network, products)))
    if isinstance(relaxation, Box):
        found = [*_intervals(network, batch), *_folded(network, batch * rows)]
    elif isinstance(relaxation, Cauchy):
        found = _zonotope(network, batch, rows, relaxation)
    elif isinstance(relaxation, (Crown, FastLin)):
        if isinstance(relaxation.preactivation, Box):
            found = [*_intervals(network, batch), *_pulled(network, network.output, batch * rows)]
        elif relaxation.preactivation is None:
            # With parallel lines the upper bound's rows are those of the lower bound.
            found = _substitution(network, batch, rows, sides=1 if isinstance(relaxation, FastLin) else 2)
        else:
            raise TypeError(f"needed: counts no pre-activation bounds from {relaxation.preactivation!r}")
    else:
        raise TypeError(f"needed: counts no {type(relaxation).__name__}")
    return merged(found)


def two_sweeps(network: Network, problems: int) -> Products:
    """One iteration of a dual ascent: every row pulled back to the input, one point pushed forward."""
    return merged([*_pulled(network, network.output, problems), *_pushed(network, problems)])


def merged(products: Iterable[Product]) -> Products:
    """The same with vectors of equal kind together."""
    total: Counter[tuple[str, Way, bool]] = Counter()
    for p in products:
        total[p.node, p.way, p.constant] += p.vectors
    return tuple(Product(node, way, vectors, constant) for (node, way, constant), vectors in total.items() if vectors)


def multiply_adds(network: Network, products: Iterable[Product]) -> int:
    """Multiply-adds of one pass."""
    return sum(_affine(network[p.node]).cost() * p.vectors for p in products)


def _affine(node: Node) -> Affine:
    assert isinstance(node.op, Affine)
    return node.op


def _costly(network: Network, names: Iterable[str]) -> list[Node]:
    """Affine ops among `names` that are matrix products or convolutions; scales and sums are elementwise."""
    wanted = set(names)
    return [node for node in network if node.name in wanted and isinstance(node.op, (Linear, Conv2d))]


def _hidden(network: Network) -> set[str]:
    """Nodes that some activation depends on."""
    return set().union(*(network.ancestors(node.name) for node in network.activations))


def _stretch(network: Network, target: str) -> set[str]:
    """Nodes between `target` and the activations (or the input) before it, itself included."""
    found: set[str] = set()
    stack = [target]
    stops = {node.name for node in network.activations} | {network.input}
    while stack:
        top = stack.pop()
        if top not in found and top not in stops:
            found.add(top)
            stack.extend(network[top].inputs)
    return found


def _before_activations(network: Network) -> set[str]:
    """Nodes with no activation behind them."""
    relaxed = {node.name for node in network.activations}
    return {node.name for node in network if not network.ancestors(node.name) & relaxed}


def _pulled(network: Network, target: str, vectors: int, leave: Iterable[str] = ()) -> list[Product]:
    left = set(leave)
    return [Product(n.name, "backward", vectors) for n in _costly(network, network.ancestors(target) - left)]


def _folded(network: Network, vectors: int) -> list[Product]:
    """Rows of the output folded into the last affine ops."""
    return [Product(n.name, "backward", vectors) for n in _costly(network, _stretch(network, network.output))]


def _pushed(network: Network, vectors: int) -> list[Product]:
    constant = _before_activations(network)
    return [Product(n.name, "forward", vectors, n.name in constant) for n in _costly(network, _hidden(network))]


def _intervals(network: Network, batch: int) -> list[Product]:
    """Centres by W, radii by |W|."""
    return _pushed(network, 2 * batch)


def _substitution(network: Network, batch: int, rows: int, sides: int) -> list[Product]:
    """Rows of every neuron whose interval is not exact, layer by layer, then those of the output."""
    found = [p for p in _intervals(network, batch) if p.node in network.exact_intervals]
    for node in network.activations:
        source = node.inputs[0]
        if source not in network.exact_intervals:
            vectors = batch * sides * math.prod(node.shape)
            found += _seen(network, source, _pulled(network, source, vectors, leave=_stretch(network, source)))
    return found + _pulled(network, network.output, batch * rows)


def _seen(network: Network, source: str, products: list[Product]) -> list[Product]:
    """Rows of a map's neurons are windows: as many whole ones as hold the same numbers, rounded down."""
    plan = frames.plan(network, source)
    if plan is None:
        return products
    shares = {p.node: frames.entries(network[p.node].shape, plan.frames[p.node]) for p in products}
    sizes = {p.node: math.prod(network[p.node].shape) for p in products}
    return [replace(p, vectors=p.vectors * shares[p.node] // sizes[p.node]) for p in products]


def _zonotope(network: Network, batch: int, rows: int, relaxation: HBox | DeepZ | Cauchy) -> list[Product]:
    """Centre, terms in flight and |W| times what was just born, at every affine op; then the rows of the output."""
    found: list[Product] = []
    constant = _before_activations(network)
    for node in _costly(network, _hidden(network)):
        behind = network.ancestors(node.name)
        # What was born at an activation is a diagonal until the next one: weights, not a product.
        nearest = {name for n in _stretch(network, node.name) for name in network[n].inputs}
        terms = 0 if node.name in constant else math.prod(network.input_shape)
        born = [a for a in network.activations if a.name in behind and a.name not in nearest]
        if isinstance(relaxation, DeepZ):
            terms += sum(math.prod(a.shape) for a in born)
        vectors = batch * (1 + relaxation.k if isinstance(relaxation, Cauchy) else 2 + terms)
        found.append(Product(node.name, "forward", vectors, node.name in constant))
    return found + _folded(network, batch * rows)


# --- run bare -----------------------------------------------------------------------------------------------------


def bare(network: Network, products: Products, like: Tensor, *, gradient: bool) -> Callable[[], None]:
    """The products alone, on random numbers in the type and on the device of `like`.

    gradient: with the two products that each one's backward pass takes, by the vectors and by the weights.
    """
    sizes = [p.vectors * max(_numel(_affine(network[p.node]).shape), _numel(_given(network, p))) for p in products]
    generator = torch.Generator(like.device).manual_seed(0)
    # One store for all: each product reads as much of it as it needs.
    store = torch.randn(2, max(sizes, default=0), generator=generator, dtype=like.dtype, device=like.device)
    steps = [_step(network, p, store, gradient) for p in products]

    def run() -> None:
        with torch.no_grad():
            for step in steps:
                step()

    return run


def _numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _given(network: Network, product: Product) -> tuple[int, ...]:
    return _affine(network[product.node]).input_shapes[0]


def _step(network: Network, product: Product, store: Tensor, gradient: bool) -> Callable[[], Any]:
    op = _affine(network[product.node])

    def take(i: int, shape: tuple[int, ...]) -> Tensor:
        return store[i, : product.vectors * _numel(shape)].view(product.vectors, *shape)

    x, y = take(0, op.input_shapes[0]), take(1, op.shape)  # y: rows to pull back, or the gradient of the image
    by_vectors = gradient and not product.constant
    if isinstance(op, Conv2d):
        return _convolution(op, product.way, x, y, by_vectors, gradient)
    if isinstance(op, Linear):
        return _matrix(op, product.way, x, y, by_vectors, gradient)
    raise TypeError(f"bare: no bare product for {type(op).__name__}")


def _matrix(op: Linear, way: Way, x: Tensor, y: Tensor, by_vectors: bool, by_weights: bool) -> Callable[[], Any]:
    w = op.weight(x).detach()
    x, y = x.flatten(0, -2), y.flatten(0, -2)

    def run() -> None:
        if way == "forward" or by_vectors:
            x @ w.mT
        if way == "backward" or by_vectors:
            y @ w
        if by_weights:
            y.mT @ x

    return run


def _convolution(op: Conv2d, way: Way, x: Tensor, y: Tensor, by_vectors: bool, by_weights: bool) -> Callable[[], Any]:
    w, g = op.weight(x).detach(), op.geometry
    pairs = zip(x.shape[2:], y.shape[2:], w.shape[2:], g.stride, g.padding, g.dilation, strict=True)
    over = [n - ((o - 1) * s - 2 * p + d * (k - 1) + 1) for n, o, k, s, p, d in pairs]

    def run() -> None:
        if way == "forward" or by_vectors:
            F.conv2d(x, w, None, g.stride, g.padding, g.dilation, g.groups)
        if way == "backward" or by_vectors:
            F.conv_transpose2d(y, w, None, g.stride, g.padding, over, g.groups, g.dilation)
        if by_weights:
            conv2d_weight(x, w.shape, y, g.stride, g.padding, g.dilation, g.groups)

    return run
