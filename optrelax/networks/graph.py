"""A captured network: an immutable graph of affine ops and activations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from optrelax.errors import Problem, UnsupportedOpError
from optrelax.networks.activations import Activation
from optrelax.networks.ops import Affine, Linear, MaxPool2d, Shape

Op = Affine | Activation | MaxPool2d
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


@dataclass(frozen=True)
class Network:
    """Nodes in topological order; reads the parameters of `module` at every use.

    Calling it evaluates the network: [batch, *input_shape] -> [batch, *output_shape].
    """

    module: nn.Module
    nodes: tuple[Node, ...]
    output: str
    input_shape: Shape
    input: str = "input"
    _by_name: Mapping[str, Node] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {node.name: node for node in self.nodes})

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

    def __call__(self, x: Tensor) -> Tensor:
        return self.values(x)[self.output]

    def require_eval(self) -> None:
        """UnsupportedOpError if a captured batch norm or dropout has been put in training mode since."""
        problems = [
            Problem(path or "(root)", type(m).__name__, "is in training mode; call .eval()")
            for path, m in self._modules
            if m.training and isinstance(m, MODES)
        ]
        if problems:
            raise UnsupportedOpError(problems)

    def require_weights(self, device: torch.device, dtype: torch.dtype) -> None:
        """ValueError unless every parameter and buffer lives on `device` and is exact in `dtype`, the region's."""
        for name, tensor in self._tensors():
            if tensor.device != device:
                raise ValueError(f"region is on {device}, {name} is on {tensor.device}; move one")
            if not tensor.is_floating_point() or tensor.dtype == dtype:
                continue
            if tensor.dtype in HALF:
                raise ValueError(f"{name} is {tensor.dtype}: bounds want float32 or float64; call net.float()")
            if tensor.dtype == torch.float64:
                raise ValueError(
                    f"region is {dtype}, {name} is {tensor.dtype}: bounds would be those of a rounded network; "
                    "use a float64 region or net.float()"
                )

    @cached_property
    def _modules(self) -> tuple[tuple[str, nn.Module], ...]:
        """The modules that were captured; walking them anew at each call would cost as much as a small layer."""
        return tuple(self.module.named_modules())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for path, module in self._modules:
            prefix = path + "." if path else ""
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                yield prefix + name, tensor
