"""A captured network: an immutable graph of affine ops and activations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from optrelax.checks import require_choice
from optrelax.errors import Problem, UnsupportedOpError
from optrelax.networks.batch_norms import BatchNorm
from optrelax.networks.nodes import Graph as Graph
from optrelax.networks.nodes import Measured
from optrelax.networks.nodes import Node as Node
from optrelax.networks.nodes import Op as Op
from optrelax.networks.ops import Shape
from optrelax.uncompiled import uncompiled

HALF = (torch.float16, torch.bfloat16)
# Modules that are another function (of the batch, or random) in training mode.
MODES = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
Statistics = Literal["batch", "population"]
IN_TRAINING = "is in training mode; call .eval(), or bound optrelax.on_batch(net, x) with the statistics of a batch"


def normalises_by_batch(module: nn.Module) -> bool:
    """Whether a module is a batch norm of torch's own in training mode: affine once a batch is known."""
    norms = nn.modules.batchnorm
    known = isinstance(module, norms._BatchNorm) and not isinstance(module, norms._LazyNormBase)
    own = "forward" not in vars(module) and type(module).forward is norms._BatchNorm.forward
    return known and own and module.training


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
        if tuple(x.shape[max(x.dim() - len(self.input_shape), 0) :]) != self.input_shape:
            return self.taking(tuple(x.shape[1:]))(x)
        self.require_current()
        if self.graph.in_training:
            return self.on_batch(x)[1]
        return self.graph.values(x)[self.graph.output]

    def taking(self, shape: Shape) -> Network:
        """The same function of inputs in another shape: as its module takes them, or flattened for a flat input."""
        if shape == self.input_shape:
            return self
        if math.prod(shape) != math.prod(self.input_shape) or not (self._recapture or len(self.input_shape) == 1):
            raise ValueError(f"the network takes inputs of shape {self.input_shape}, got {shape}")
        if not self._recapture:
            return self._with(self.graph.flattening(shape), self.statistics)
        from optrelax.networks.capturing import capture

        try:
            return capture(self.module, shape)
        except UnsupportedOpError as error:
            raise ValueError(f"the network takes inputs of shape {self.input_shape}, got {shape}") from error

    def on_batch(self, x: Tensor, statistics: Statistics = "batch") -> tuple[Network, Tensor]:
        """See `optrelax.on_batch`."""
        require_choice("on_batch", "statistics", statistics, "batch", "population")
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

    def __deepcopy__(self, memo: dict[int, object]) -> Network:
        make, parts = self.__reduce__()
        found = memo[id(self)] = make(*copy.deepcopy(parts, memo))
        return found

    def __reduce__(self) -> tuple[Callable[..., Network], tuple[object, ...]]:
        if not self._recapture:
            from optrelax.networks.checkpoints import remade

            return remade(self)
        _unpickled(self.module, self.input_shape)  # what cannot be captured now is refused now
        return _unpickled, (self.module, self.input_shape)

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


def _outline(node: Node) -> tuple[object, ...]:
    """What others know of a node; a batch norm is one in either mode."""
    kind = BatchNorm if node.of(BatchNorm) else type(node.op)
    return node.name, node.path, kind, node.inputs, node.shape
