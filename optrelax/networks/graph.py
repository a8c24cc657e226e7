"""A captured network: an immutable graph of affine ops and activations."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optrelax.errors import Problem, UnsupportedOpError
from optrelax.networks.activations import Activation
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Affine, Linear, Shape

if TYPE_CHECKING:
    from optrelax.networks.snapshots import Snapshot

Op = Affine | Activation | Greatest
HALF = (torch.float16, torch.bfloat16)
# Modules that are another function (of the batch, or random) in training mode.
MODES = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


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
        return tuple(node for node in self.nodes if isinstance(node.op, Activation))

    @property
    def lowered(self) -> Graph:
        """The same function, and the same node names, with maxima composed of ReLUs; this graph where it has none."""
        return self._lowered if any(isinstance(node.op, Greatest) for node in self.nodes) else self

    @cached_property
    def _lowered(self) -> Graph:
        nodes: list[Node] = []
        for node in self.nodes:
            nodes += node.op.lowered(node) if isinstance(node.op, Greatest) else [node]
        return Graph(tuple(nodes), self.output, self.input_shape)

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
            if len(node.inputs) > 1 or before[0] is None or not isinstance(node.op, Affine):
                continue
            if node.op.diagonal:
                mixed[node.name] = before[0]
            elif not before[0]:
                mixed[node.name] = True
        return frozenset(mixed)

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
            inputs = [values[name] for name in node.inputs]
            values[node.name] = node.op.apply(*inputs) if isinstance(node.op, Affine) else node.op(*inputs)
        return values


class Network(nn.Module):
    """A module as a graph of ops: reads the parameters of `module` at every use, and is a module itself.

    Its parameters and buffers are those of `module`, by reference, under "module."; `to`, `train`, `eval` and
    `load_state_dict` act on them. `copy.deepcopy`, pickle and torch.save copy the module and capture the copy.
    Calling it evaluates the network: [batch, *input_shape] -> [batch, *output_shape].
    """

    def __init__(
        self,
        module: nn.Module,
        graph: Graph | tuple[Node, ...],
        output: str | None = None,
        input_shape: Shape | None = None,
        *,
        recapture: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(graph, Graph):
            if output is None or input_shape is None:
                raise TypeError("Network: nodes need the name of their output and the shape of the input")
            graph = Graph(graph, output, input_shape)
        self.module = module
        self.training = module.training
        state = self.__dict__
        state["_graph"], state["_recapture"] = graph, recapture

    @property
    def graph(self) -> Graph:
        """The graph as captured; use `current()` where the module may have changed since."""
        found: Graph = self.__dict__["_graph"]
        return found

    nodes = property(lambda self: self.graph.nodes, doc="The nodes in topological order.")
    output = property(lambda self: self.graph.output, doc="Name of the node that is the output.")
    input = property(lambda self: self.graph.input, doc="Name of the input among the nodes.")
    input_shape = property(lambda self: self.graph.input_shape, doc="Shape of the input without the batch.")
    output_shape = property(lambda self: self.graph.output_shape, doc="Shape of the output without the batch.")
    outputs = property(lambda self: self.graph.outputs, doc="Number of outputs.")
    activations = property(lambda self: self.graph.activations, doc="The activation nodes in topological order.")
    readers = property(lambda self: self.graph.readers, doc="The nodes that read each node's value.")
    exact_intervals = property(lambda self: self.graph.exact_intervals, doc="Nodes whose interval image is exact.")
    entrance = property(lambda self: self.graph.entrance, doc="See `Graph.entrance`.")

    @property
    def lowered(self) -> Network:
        """The same network with maxima composed of ReLUs, which is what an LP takes: max(a, b) = b + relu(a - b)."""
        found = self.graph.lowered
        return self if found is self.graph else Network(self.module, found)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.graph.nodes)

    def __getitem__(self, name: str) -> Node:
        return self.graph[name]

    def shape_of(self, name: str) -> Shape:
        """Shape of a node's value without the batch; the input counts as a node."""
        return self.graph.shape_of(name)

    def ancestors(self, name: str) -> frozenset[str]:
        """Every node that `name` depends on, itself included."""
        return self.graph.ancestors(name)

    def values(self, x: Tensor) -> dict[str, Tensor]:
        """The value of every node, the input included."""
        return self.graph.values(x)

    def forward(self, x: Tensor) -> Tensor:
        """The output: [batch, *input_shape] -> [batch, *output_shape]."""
        self.require_current()
        return self.graph.values(x)[self.graph.output]

    def require_current(self) -> None:
        """Capture the module again where it has changed since; ValueError where that gives other nodes.

        Weights may change as they like. A layer put in another's place, a mode, a type or device, a number that
        forward reads: what is bounded is always what `module` computes now.
        """
        old = self.graph
        if not self._recapture or old.snapshot is None or old.snapshot.holds(self.module):
            return
        from optrelax.networks.capturing import graph_of

        new = graph_of(self.module, old.input_shape)
        if [_outline(n) for n in new.nodes] != [_outline(n) for n in old.nodes] or new.output != old.output:
            raise ValueError("the module is another network than when it was captured; capture it again")
        self.__dict__["_graph"] = new

    def disagreement(self, x: Tensor) -> str | None:
        """How the outputs of `module` itself on x [batch, *input_shape] differ from the graph's, None to rounding.

        Both run in the module's own type and device; a loaded network has no module to ask.
        """
        if not self._recapture:
            return None
        from optrelax.networks.probing import difference

        return difference(self.module, self.graph, x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        found = self._again(copy.deepcopy(self.module, memo))
        memo[id(self)] = found
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        self._again(self.module)
        return _unpickled, (self.module, self.input_shape)

    def _again(self, module: nn.Module) -> Network:
        if not self._recapture:
            raise TypeError(
                "a network that was not captured from a module cannot be copied or pickled; use optrelax.save"
            )
        return _unpickled(module, self.input_shape)

    def require_eval(self) -> None:
        """UnsupportedOpError if a captured batch norm or dropout has been put in training mode since."""
        self.require_current()
        if self._recapture and self.graph.snapshot is not None:
            return  # the mode is that of the capture
        problems = [
            Problem(path or "(root)", type(m).__name__, "is in training mode; call .eval()")
            for path, m in self.module.named_modules()
            if m.training and isinstance(m, MODES)
        ]
        if problems:
            raise UnsupportedOpError(problems)

    def require_weights(self, device: torch.device, dtype: torch.dtype) -> None:
        """ValueError unless every parameter and buffer lives on `device` and is exact in `dtype`, the region's."""
        snapshot = self.graph.snapshot
        kinds = snapshot.kinds if self._recapture and snapshot is not None else kinds_of(self.module)
        for (found, place), name in kinds.items():
            if place != device:
                raise ValueError(f"region is on {device}, {name} is on {place}; move one")
            if not found.is_floating_point or found == dtype:
                continue
            if found in HALF:
                raise ValueError(f"{name} is {found}: bounds want float32 or float64; call net.float()")
            if found == torch.float64:
                raise ValueError(
                    f"region is {dtype}, {name} is {found}: bounds would be those of a rounded network; "
                    "use a float64 region or net.float()"
                )


def kinds_of(module: nn.Module) -> dict[tuple[torch.dtype, torch.device], str]:
    """The types and devices of a module's tensors, and the first tensor of each."""
    found: dict[tuple[torch.dtype, torch.device], str] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        found.setdefault((tensor.dtype, tensor.device), name)
    return found


def _unpickled(module: nn.Module, input_shape: Shape) -> Network:
    from optrelax.networks.capturing import capture

    return capture(module, input_shape)


def _outline(node: Node) -> tuple[Any, ...]:
    """What others know of a node."""
    return node.name, node.path, type(node.op), node.inputs, node.shape
