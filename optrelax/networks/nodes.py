"""The graph of a captured network: ops in topological order, immutable."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from optrelax.networks.activations import Activation, PiecewiseLinear
from optrelax.networks.batch_norms import BatchNormInTraining
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Affine, Linear, Reshape, Shape
from optrelax.networks.products import Multiply

if TYPE_CHECKING:
    from optrelax.networks.snapshots import Snapshot

Op = Affine | Activation | Greatest | Multiply
Kind = TypeVar("Kind")


Measured = Mapping[str, tuple[Tensor, Tensor]]  # mean and variance of a batch norm's values, by node


@dataclass(frozen=True)
class Node:
    """One op, the nodes it reads and the shape it gives (without the batch)."""

    name: str
    """Unique in the graph."""
    path: str
    """What a user knows it by: the module's path, or the graph node of a function."""
    op: Op
    inputs: tuple[str, ...]
    shape: Shape

    def of(self, kind: type[Kind]) -> Kind | None:
        """The op, where it is of a kind."""
        return self.op if isinstance(self.op, kind) else None

    @property
    def affine(self) -> Affine | None:
        """The op, where it is affine."""
        return self.op if isinstance(self.op, Affine) else None

    @property
    def activation(self) -> Activation | None:
        """The op, where it is an activation."""
        return self.op if isinstance(self.op, Activation) else None

    @property
    def piecewise(self) -> PiecewiseLinear | None:
        """The op, where it is a piecewise-linear activation."""
        return self.activation.piecewise if self.activation else None

    @property
    def maximum(self) -> Greatest | None:
        """The op, where it takes the greatest entry of windows."""
        return self.of(Greatest)

    @property
    def product(self) -> Multiply | None:
        """The op, where it multiplies two values."""
        return self.of(Multiply)


class Graph:
    """Nodes in topological order, and what follows from them; immutable, and shared by all who ask for one module.

    Its ops read the tensors of a module that it does not hold: it lives as long as its network, or that module.
    """

    input = "input"

    def __init__(self, nodes: tuple[Node, ...], output: str, input_shape: Shape) -> None:
        self.nodes, self.output, self.input_shape = nodes, output, input_shape
        self.snapshot: Snapshot | None = None
        """The module as it was at capture, where all of it can be seen."""
        self._by_name = {node.name: node for node in nodes}
        self._flattening: dict[Shape, Graph] = {}

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __getitem__(self, name: str) -> Node:
        return self._by_name[name]

    def shape_of(self, name: str) -> Shape:
        """Shape of a node's value without the batch; the input counts as a node."""
        return self.input_shape if name == self.input else self[name].shape

    @property
    def output_shape(self) -> Shape:
        """Shape of the output without the batch."""
        return self.shape_of(self.output)

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return math.prod(self.output_shape)

    @cached_property
    def activations(self) -> tuple[Node, ...]:
        """The activation nodes in topological order; their inputs are the pre-activations."""
        return tuple(node for node in self.nodes if node.activation)

    @cached_property
    def products(self) -> tuple[Node, ...]:
        """The nodes that multiply two values."""
        return tuple(node for node in self.nodes if node.product)

    @cached_property
    def relaxed(self) -> tuple[Node, ...]:
        """The nodes that linear programs relax, in topological order: activations and products."""
        return tuple(node for node in self.nodes if node.activation or node.product)

    @property
    def lowered(self) -> Graph:
        """The same function, and the same node names, as linear programs take it; this graph where it is so already.

        Maxima are composed of ReLUs, squares are activations, and other products read their factors through operands.
        """
        return self._lowered if any(node.maximum or node.product for node in self.nodes) else self

    @cached_property
    def in_training(self) -> Mapping[str, BatchNormInTraining]:
        """The batch norms that want the statistics of a batch, by node."""
        return {node.name: op for node in self.nodes if (op := node.of(BatchNormInTraining))}

    def with_ops(self, ops: Mapping[str, Op]) -> Graph:
        """The same nodes, some with other ops of the same shapes."""
        nodes = tuple(replace(node, op=ops[node.name]) if node.name in ops else node for node in self.nodes)
        found = Graph(nodes, self.output, self.input_shape)
        found.__dict__["_lowered"] = found if self.lowered is self else self.lowered.with_ops(ops)
        return found

    def flattening(self, shape: Shape) -> Graph:
        """The same nodes behind one that flattens inputs of another shape."""
        if shape not in self._flattening:
            name = next(
                f"flatten{'_' * i}" for i in range(len(self.nodes) + 1) if f"flatten{'_' * i}" not in self._by_name
            )
            first = Node(name, name, Reshape(shape, self.input_shape), (self.input,), self.input_shape)
            rest = (replace(n, inputs=tuple(name if i == self.input else i for i in n.inputs)) for n in self.nodes)
            output = name if self.output == self.input else self.output
            self._flattening[shape] = Graph((first, *rest), output, shape)
        return self._flattening[shape]

    def at_statistics(self, measured: Measured) -> Graph:
        """With given statistics for the batch norms in training mode."""
        return self.with_ops(
            {n: op.at(*(partial(_same, t) for t in measured[n])) for n, op in self.in_training.items()}
        )

    def at_population(self) -> Graph:
        """With the running statistics for the batch norms in training mode."""
        return self.with_ops({name: op.at_population() for name, op in self.in_training.items()})

    @cached_property
    def _lowered(self) -> Graph:
        nodes: list[Node] = []
        for node in self.nodes:
            composed = node.maximum or node.product
            nodes += composed.lowered(node) if composed else [node]
        found = Graph(tuple(nodes), self.output, self.input_shape)
        found.__dict__["_lowered"] = found
        return found

    @cached_property
    def readers(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that read each node's value."""
        found: dict[str, tuple[Node, ...]] = {}
        for node in self.nodes:
            for name in node.inputs:
                found[name] = (*found.get(name, ()), node)
        return found

    @cached_property
    def exact_intervals(self) -> frozenset[str]:
        """Nodes whose interval image is exact: at most one op that mixes inputs between them and the input."""
        mixed = {self.input: False}
        for node in self.nodes:
            before = [mixed.get(name) for name in node.inputs]
            if len(node.inputs) > 1 or before[0] is None or not node.affine:
                continue
            if node.affine.diagonal:
                mixed[node.name] = before[0]
            elif not before[0]:
                mixed[node.name] = True
        return frozenset(mixed)

    @cached_property
    def affine_ends(self) -> frozenset[str]:
        """Affine functions of the input that an op of another kind reads, and the input itself where one does."""
        affine = {self.input}
        for node in self.nodes:
            if node.affine and affine.issuperset(node.inputs):
                affine.add(node.name)
        read = {name for node in self.nodes if not node.affine for name in node.inputs}
        return frozenset(affine & read)

    @cached_property
    def entrance(self) -> tuple[Node, ...]:
        """The matrix product that all paths from the input lead through, behind diagonal ops alone; none: empty."""
        path: list[Node] = []
        while len(reading := self.readers.get(path[-1].name if path else self.input, ())) == 1:
            path.append(reading[0])
            op = path[-1].op
            if isinstance(op, Linear) and len(op.shape) == 1:
                return tuple(path)
            if not isinstance(op, Affine) or not op.diagonal or len(path[-1].inputs) > 1:
                break
        return ()

    def ancestors(self, name: str) -> frozenset[str]:
        """Every node that `name` depends on, itself included."""
        found: set[str] = set()
        stack = [name]
        while stack:
            top = stack.pop()
            if top in found or top == self.input:
                continue
            found.add(top)
            stack.extend(self[top].inputs)
        return frozenset(found)

    def values(self, x: Tensor) -> dict[str, Tensor]:
        """The value of every node, the input included."""
        values = {self.input: x}
        for node in self.nodes:
            values[node.name] = node.op(*(values[name] for name in node.inputs))
        return values

    def clean_pass(self, x: Tensor) -> tuple[Measured, Tensor]:
        """Mean and variance at every batch norm in training mode, by node, and the output, of one batch."""
        values, measured = {self.input: x}, {}
        for node in self.nodes:
            op, inputs = node.op, [values[name] for name in node.inputs]
            if (norm := node.of(BatchNormInTraining)) is not None:
                mean, variance = measured[node.name] = norm.measured(inputs[0])
                op = norm.at(partial(_same, mean), partial(_same, variance))
            values[node.name] = op(*inputs)
        return measured, values[self.output]


def _same(tensor: Tensor) -> Tensor:
    return tensor
