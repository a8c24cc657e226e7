"""A captured network: an immutable graph of affine ops and activations."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from optrelax.errors import Problem, UnsupportedOpError
from optrelax.networks.activations import Activation
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Affine, BatchNorm, BatchNormInTraining, Linear, Shape
from optrelax.networks.products import Multiply
from optrelax.uncompiled import uncompiled

if TYPE_CHECKING:
    from optrelax.networks.snapshots import Snapshot

Op = Affine | Activation | Greatest | Multiply
HALF = (torch.float16, torch.bfloat16)
# Modules that are another function (of the batch, or random) in training mode.
MODES = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
Statistics = Literal["batch", "population"]
Measured = Mapping[str, tuple[Tensor, Tensor]]  # mean and variance of a batch norm's values, by node
IN_TRAINING = "is in training mode; call .eval(), or bound optrelax.on_batch(net, x) with the statistics of a batch"


def normalises_by_batch(module: nn.Module) -> bool:
    """Whether a module is a batch norm of torch's own in training mode: affine once a batch is known."""
    norms = nn.modules.batchnorm
    known = isinstance(module, norms._BatchNorm) and not isinstance(module, norms._LazyNormBase)
    own = "forward" not in vars(module) and type(module).forward is norms._BatchNorm.forward
    return known and own and module.training


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

    @cached_property
    def products(self) -> tuple[Node, ...]:
        """The nodes that multiply two values."""
        return tuple(node for node in self.nodes if isinstance(node.op, Multiply))

    @cached_property
    def relaxed(self) -> tuple[Node, ...]:
        """The nodes that linear programs relax, in topological order: activations and products."""
        return tuple(node for node in self.nodes if isinstance(node.op, (Activation, Multiply)))

    @property
    def lowered(self) -> Graph:
        """The same function, and the same node names, as linear programs take it; this graph where it is so already.

        Maxima are composed of ReLUs, squares are activations, and other products read their factors through operands.
        """
        return self._lowered if any(isinstance(node.op, (Greatest, Multiply)) for node in self.nodes) else self

    @cached_property
    def in_training(self) -> Mapping[str, BatchNormInTraining]:
        """The batch norms that want the statistics of a batch, by node."""
        return {node.name: node.op for node in self.nodes if isinstance(node.op, BatchNormInTraining)}

    def with_ops(self, ops: Mapping[str, Op]) -> Graph:
        """The same nodes, some with other ops of the same shapes."""
        nodes = tuple(replace(node, op=ops[node.name]) if node.name in ops else node for node in self.nodes)
        found = Graph(nodes, self.output, self.input_shape)
        found.__dict__["_lowered"] = found if self.lowered is self else self.lowered.with_ops(ops)
        return found

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
            nodes += node.op.lowered(node) if isinstance(node.op, (Greatest, Multiply)) else [node]
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
            if len(node.inputs) > 1 or before[0] is None or not isinstance(node.op, Affine):
                continue
            if node.op.diagonal:
                mixed[node.name] = before[0]
            elif not before[0]:
                mixed[node.name] = True
        return frozenset(mixed)

    @cached_property
    def affine_ends(self) -> frozenset[str]:
        """Affine functions of the input that an op of another kind reads, and the input itself where one does."""
        affine = {self.input}
        for node in self.nodes:
            if isinstance(node.op, Affine) and affine.issuperset(node.inputs):
                affine.add(node.name)
        read = {name for node in self.nodes if not isinstance(node.op, Affine) for name in node.inputs}
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
            values[node.name] = _value(node.op, [values[name] for name in node.inputs])
        return values

    def clean_pass(self, x: Tensor) -> tuple[Measured, Tensor]:
        """Mean and variance at every batch norm in training mode, by node, and the output, of one batch."""
        values, measured = {self.input: x}, {}
        for node in self.nodes:
            op, inputs = node.op, [values[name] for name in node.inputs]
            if isinstance(op, BatchNormInTraining):
                mean, variance = measured[node.name] = op.measured(inputs[0])
                op = op.at(partial(_same, mean), partial(_same, variance))
            values[node.name] = _value(op, inputs)
        return measured, values[self.output]


def _value(op: Op, inputs: list[Tensor]) -> Tensor:
    return op.apply(*inputs) if isinstance(op, Affine) else op(*inputs)


class Network(nn.Module):
    """A module as a graph of ops: reads the parameters of `module` at every use, and is a module itself.

    Its parameters and buffers are those of `module`, by reference, under "module."; `to`, `train`, `eval` and
    `load_state_dict` act on them. `copy.deepcopy`, pickle and torch.save copy the module and capture the copy.
    Calling it evaluates the network: [batch, *input_shape] -> [batch, *output_shape]. Made by `capture`.

    Args:
        module: whose parameters the ops read.
        graph: the graph, or its nodes in topological order.
        output: name of the node that is the output, where nodes are given.
        input_shape: without the batch, where nodes are given.
        recapture: whether `module` may be captured again where it has changed.

    Raises:
        TypeError: for nodes without output or input shape.

    Example:
        >>> net = ox.models.fc(4, 8, 2, seed=0)
        >>> network = ox.capture(net)
        >>> all(mine is theirs for mine, theirs in zip(network.parameters(), net.parameters()))
        True
        >>> network(torch.zeros(5, 4)).shape
        torch.Size([5, 2])
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
        self.statistics: Statistics | None = None
        """Whose statistics the batch norms take that are in training mode; None where there are none."""

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
    products = property(lambda self: self.graph.products, doc="The nodes that multiply two values.")
    relaxed = property(lambda self: self.graph.relaxed, doc="The nodes that linear programs relax.")
    readers = property(lambda self: self.graph.readers, doc="The nodes that read each node's value.")
    exact_intervals = property(lambda self: self.graph.exact_intervals, doc="Nodes whose interval image is exact.")
    affine_ends = property(lambda self: self.graph.affine_ends, doc="See `Graph.affine_ends`.")
    entrance = property(lambda self: self.graph.entrance, doc="See `Graph.entrance`.")

    @property
    def lowered(self) -> Network:
        """The same network as an LP takes it: see `Graph.lowered`."""
        found = self.graph.lowered
        return self if found is self.graph else self._with(found, self.statistics)

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
        """The output: [batch, *input_shape] -> [batch, *output_shape].

        Batch norms in training mode normalise by the batch and move their running statistics, as in the module.
        """
        self.require_current()
        if self.graph.in_training:
            return self.on_batch(x)[1]
        return self.graph.values(x)[self.graph.output]

    def on_batch(self, x: Tensor, statistics: Statistics = "batch") -> tuple[Network, Tensor]:
        """See `optrelax.on_batch`."""
        if statistics not in ("batch", "population"):
            raise ValueError(f"on_batch: statistics must be 'batch' or 'population', got {statistics!r}")
        self.require_current()
        graph = self.graph
        if not graph.in_training:
            return self, graph.values(x)[graph.output]
        self.require_weights(x.device, x.dtype)
        if statistics == "population":
            self.measured(x)
            found = self.at_population()
            return found, found.graph.values(x)[graph.output]
        measured, output = self._measured(x)
        return self.at_statistics(measured), output

    def measured(self, x: Tensor) -> Measured:
        """Statistics of one batch at every batch norm in training mode, by node; the running ones move."""
        self.require_current()
        return self._measured(x)[0]

    def _measured(self, x: Tensor) -> tuple[Measured, Tensor]:
        measured, output = self.graph.clean_pass(x)
        for name, (mean, variance) in measured.items():
            op = self.graph.in_training[name]
            op.update(mean, variance, x.shape[0] * math.prod(op.shape[1:]))
        return measured, output

    def at_statistics(self, measured: Measured) -> Network:
        """This network with given mean and variance for each of its batch norms in training mode, by node."""
        return self._with(self.graph.at_statistics(measured), "batch")

    def at_population(self) -> Network:
        """This network with the running statistics for its batch norms in training mode."""
        return self._with(self.graph.at_population(), "population")

    def _with(self, graph: Graph, statistics: Statistics | None) -> Network:
        found = Network(self.module, graph)
        found.__dict__["statistics"] = statistics
        return found

    @uncompiled
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
        """UnsupportedOpError for batch norms that want a batch, and where one or a dropout trains since the capture."""
        self.require_current()
        self.require_statistics()
        if self.statistics is not None or (self._recapture and self.graph.snapshot is not None):
            return  # the mode is that of the capture
        problems = [
            Problem(path or "(root)", type(m).__name__, "is in training mode; call .eval()")
            for path, m in self.module.named_modules()
            if m.training and isinstance(m, MODES)
        ]
        if problems:
            raise UnsupportedOpError(problems)

    def require_statistics(self) -> None:
        """UnsupportedOpError where batch norms are in training mode and no batch is given."""
        if waiting := self.graph.in_training:
            raise UnsupportedOpError(
                [
                    Problem(self.graph[name].path, op.layer.__class__.__name__, IN_TRAINING)
                    for name, op in waiting.items()
                ]
            )

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
    """What others know of a node; a batch norm is one in either mode."""
    kind = BatchNorm if isinstance(node.op, BatchNorm) else type(node.op)
    return node.name, node.path, kind, node.inputs, node.shape


def _same(tensor: Tensor) -> Tensor:
    return tensor
