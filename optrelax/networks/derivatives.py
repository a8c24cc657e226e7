"""The derivative of a network as a network: forward differentiation, an op of tangents beside every op.

Tangents of a value stand in front of it, one for each number of the input: [directions, *shape]. An affine op maps
them as it maps values, an activation multiplies them by its derivative, a product follows the product rule. So every
relaxation that takes products bounds a Jacobian (Shi et al. 2022, "Efficiently computing local Lipschitz constants").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optrelax.errors import Problem, UnsupportedOpError
from optrelax.networks.activations import Activation, Smooth, slopes_of
from optrelax.networks.activations.slopes import slope_chain
from optrelax.networks.graph import Graph, Network, Node, Op
from optrelax.networks.ops import Add, Affine, EntryMap, Reshape, Scale, Shape
from optrelax.networks.products import Multiply
from optrelax.networks.views import Expand, Permute

__all__ = ["derivative"]


class Directions(Affine):
    """The linear part of an affine op on tangents: of every direction on its own."""

    def __init__(self, op: Affine, count: int) -> None:
        self.op, self.count = op, count
        self.input_shapes = tuple((count, *shape) for shape in op.input_shapes)
        self.shape = (count, *op.shape)
        self.diagonal, self.fan_in, self.fan_out = op.diagonal, op.fan_in, op.fan_out
        self.roundings = op.roundings

    def linear(self, *xs: Tensor) -> Tensor:
        return self.op.linear(*xs)

    def apply_abs(self, *rs: Tensor) -> Tensor:
        return self.op.apply_abs(*rs)

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return self.op.transpose(a)

    def cost(self) -> int:
        return self.count * self.op.cost()


class Seed(EntryMap):
    """The tangents of the input: the identity, whatever the input is."""

    roundings = 0

    def __init__(self, input_shape: Shape) -> None:
        self.count = math.prod(input_shape)
        self.input_shapes, self.shape = (tuple(input_shape),), (self.count, *input_shape)

    def linear(self, *xs: Tensor) -> Tensor:
        x = xs[0]
        lead = x.shape[: x.dim() - len(self.input_shapes[0])]
        return x.new_zeros(*lead, *self.shape)

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        lead = a.shape[: a.dim() - len(self.shape)]
        return (a.new_zeros(*lead, *self.input_shapes[0]),)

    def bias(self, like: Tensor) -> Tensor:
        return torch.eye(self.count, dtype=like.dtype, device=like.device).reshape(self.shape)


def derivative(network: Network) -> Network:
    """The Jacobian as a network of the same input: [batch, *input_shape] -> [batch, *output_shape, *input_shape].

    At a kink it gives the right derivative; bounds of it hold all of the generalised one.
    Raises UnsupportedOpError for activations without a derivative that can be bounded, and for maxima.
    """
    network.require_eval()
    graph = network.graph
    build = _TangentNodes(graph)
    problems: list[Problem] = []
    for node in graph.nodes:
        try:
            build.take(node)
        except ValueError as error:
            problems.append(Problem(node.path, type(node.op).__name__, str(error)))
            build.tangents[node.name] = graph.input
    if problems:
        raise UnsupportedOpError(problems, "affine ops, products, piecewise-linear and most smooth activations")
    rank, count = len(graph.output_shape), math.prod(graph.input_shape)
    last = build.tangents[graph.output]
    shape: Shape = (count, *graph.output_shape)
    last = build.add("jacobian:order", Permute(shape, [*range(1, rank + 1), 0]), last)
    last = build.add("jacobian", Reshape((*graph.output_shape, count), (*graph.output_shape, *graph.input_shape)), last)
    return Network(network.module, Graph(tuple(build.nodes), last, graph.input_shape))


class _TangentNodes:
    """Nodes of values and of tangents, in order."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.count = graph, math.prod(graph.input_shape)
        self.nodes: list[Node] = []
        self.tangents: dict[str, str] = {}
        self.tangents[graph.input] = self.add("input'", Seed(graph.input_shape), graph.input)

    def add(self, name: str, op: Op, *inputs: str, shape: Shape | None = None) -> str:
        self.nodes.append(Node(name, name, op, inputs, op.shape if shape is None else shape))  # type: ignore[union-attr]
        return name

    def take(self, node: Node) -> None:
        """The node itself, and the node of its tangents."""
        self.nodes.append(node)
        name, before = f"{node.name}'", [self.tangents[source] for source in node.inputs]
        if node.affine:
            self.tangents[node.name] = self.add(name, Directions(node.affine, self.count), *before)
        elif node.activation:
            slope = node.inputs[0]
            for i, op in enumerate(_slope(node.activation, node.shape)):
                slope = self.add(f"{name}:slope{i}", op, slope, shape=node.shape)
            self.tangents[node.name] = self._times(name, slope, before[0], node.shape)
        elif node.product:
            (x, y), (p, q) = node.inputs, before
            parts = [self._times(f"{name}:0", x, q, node.shape), self._times(f"{name}:1", y, p, node.shape)]
            self.tangents[node.name] = self.add(name, Add((self.count, *node.shape), (1.0, 1.0)), *parts)
        else:
            raise ValueError("has no derivative that can be bounded")

    def _times(self, name: str, factor: str, tangents: str, shape: Shape) -> str:
        """A value times the tangents of another."""
        wide = (self.count, *shape)
        one = self.add(f"{name}:row", Reshape(shape, (1, *shape)), factor)
        every = self.add(f"{name}:wide", Expand((1, *shape), wide), one)
        return self.add(name, Multiply(wide), every, tangents)


def _slope(activation: Activation, shape: Shape) -> list[Op]:
    """Ops that make an activation's derivative of what it reads."""
    if activation.piecewise is not None:
        return [slopes_of(activation.piecewise)]
    chain = slope_chain(activation) if isinstance(activation, Smooth) else None
    if chain is None:
        raise ValueError(f"{activation.name} says nothing of its derivative's bounds")
    return [_scaled(shape, *link) if isinstance(link, tuple) else link for link in chain]


def _scaled(shape: Shape, factor: float, shift: float) -> Scale:
    read = [torch.tensor(t, dtype=torch.float64, device="cpu") for t in (factor, shift)]
    return Scale(shape, lambda: read[0], (lambda: read[1]) if shift else None)
