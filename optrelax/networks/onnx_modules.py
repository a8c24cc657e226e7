"""The plain `nn.Module` that an ONNX graph becomes: one child a node, each a torch function of the values before it.

Constants fold while the module is built; what is left is checked on `meta` tensors of two batch sizes, which hold no
numbers, so that a shape is refused before it is allocated.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optrelax.errors import Problem, UnsupportedOpError
from optrelax.networks.onnx_nodes import RULES, Function, OnnxNode, OnnxValue, require_small

for _subject in ("normalising", "ops", "reductions", "resizing", "shapes", "windows"):  # their rules
    importlib.import_module(f"optrelax.networks.onnx_{_subject}")

__all__ = ["GraphBuilder", "OnnxModule"]

_FAILURES = (ValueError, TypeError, RuntimeError, IndexError, KeyError, ArithmeticError)


class _NodeStep(nn.Module):
    """One node: a function of values that were computed before and of constants of its own."""

    def __init__(self, op: str, function: Function) -> None:
        super().__init__()
        self.op, self.function = op, function
        self.arguments: list[tuple[str, str] | None] = []  # ("value" or "constant", name), None for one left out
        self.outputs: tuple[str, ...] = ()

    def forward(self, values: Mapping[str, Tensor]) -> object:
        return self.function(
            *(None if a is None else values[a[1]] if a[0] == "value" else getattr(self, a[1]) for a in self.arguments)
        )

    def extra_repr(self) -> str:
        return self.op


class OnnxModule(nn.Module):
    """The function of an ONNX graph, example by example: [batch, *input_shape] -> [batch, *output_shape].

    An example's value is that of the file for a batch of one.
    """

    def __init__(self, input: str, output: str, input_shape: tuple[int, ...], own_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.input, self.output = input, output
        self.input_shape, self.own_shape = input_shape, own_shape
        self.order: list[str] = []

    def append(self, name: str, step: _NodeStep) -> None:
        """The next node."""
        self.add_module(name, step)
        self.order.append(name)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_shape != self.own_shape:
            x = x.flatten(1) if len(self.input_shape) > 1 else x
            x = x.unflatten(1, self.own_shape) if len(self.own_shape) > 1 else x
        values = {self.input: x}
        for name in self.order:
            step: _NodeStep = getattr(self, name)
            found = step(values)
            values.update(zip(step.outputs, _several(found), strict=False))
        return values[self.output]


def _several(found: object) -> tuple[Any, ...]:
    """What a function returned, one an output."""
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


class GraphBuilder:
    """Adds the nodes of a graph in order; `problems` are those that have no rule."""

    def __init__(self, input: str, own_shape: Sequence[int], dtype: torch.dtype, opset: int) -> None:
        self.values: dict[str, OnnxValue] = {input: OnnxValue(input, (1, *own_shape), dtype)}
        self.input, self.own_shape, self.opset = input, tuple(own_shape), opset
        self.problems: list[Problem] = []
        self.lost: set[str] = set()  # what comes out of a node with a problem
        self.steps: list[tuple[str, _NodeStep]] = []

    def add_constant(self, name: str, value: Tensor) -> None:
        """An initializer."""
        self.values[name] = OnnxValue(name, tuple(value.shape), value.dtype, value)

    def add(
        self, op: str, name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: dict[str, object]
    ) -> None:
        """One node."""
        outputs = tuple(outputs)
        while outputs and not outputs[-1]:
            outputs = outputs[:-1]
        if op == "Constant":
            self._constant(name, outputs, attributes)
            return
        if any(i in self.lost for i in inputs):
            if op not in RULES:
                self._refuse(op, name, outputs, "has no rule")
            self.lost.update(outputs)
            return
        missing = [i for i in inputs if i and i not in self.values]
        if missing:
            raise ValueError(f"node {name} reads {missing[0]!r}, which no node before it gives (a cycle, or a gap)")
        if op not in RULES:
            self._refuse(op, name, outputs, "has no rule")
            return
        node = OnnxNode(op, attributes, [self.values[i] if i else None for i in inputs], len(outputs), self.opset)
        try:
            self._step(node, name, outputs)
        except _FAILURES as error:
            self._refuse(op, name, outputs, str(error).partition("\n")[0] or type(error).__name__)

    def _refuse(self, op: str, name: str, outputs: Sequence[str], reason: str) -> None:
        self.problems.append(Problem(name, op, reason))
        self.lost.update(outputs)

    def _constant(self, name: str, outputs: Sequence[str], attributes: Mapping[str, object]) -> None:
        (found,) = attributes.values() if len(attributes) == 1 else (None,)
        if isinstance(found, (int, float)) or (isinstance(found, list) and found and not isinstance(found[0], bytes)):
            found = torch.tensor(
                found, dtype=torch.float32 if "float" in next(iter(attributes)) else torch.int64, device="cpu"
            )
        if not isinstance(found, Tensor):
            self._refuse("Constant", name, outputs, f"with {sorted(attributes)} has no rule")
            return
        self.add_constant(outputs[0], found)

    def _step(self, node: OnnxNode, name: str, outputs: tuple[str, ...]) -> None:
        function = RULES[node.op](node)
        kept = [None if i in node.consumed else v for i, v in enumerate(node.inputs)]
        constant = node.is_constant or all(v is None or v.constant is not None for v in kept)
        shapes = [self._outputs(function, kept, batch) for batch in ((1,) if constant else (2, 3))]
        for found in shapes[0]:
            require_small(found.shape if constant else found.shape[1:])
        if constant:
            results = function(*(None if v is None else v.constant for v in kept))
            for output, result in zip(outputs, _several(results), strict=False):
                self.add_constant(output, result.contiguous())
            return
        for output, two, three in zip(outputs, *shapes, strict=False):
            if two.dim() < 1 or two.shape[0] != 2 or three.shape != (3, *two.shape[1:]):
                raise ValueError(f"gives {list(two.shape)} for a batch of 2: the batch must stay the first dimension")
            self.values[output] = OnnxValue(output, (1, *two.shape[1:]), two.dtype)
        step = _NodeStep(node.op, function)
        step.outputs = outputs
        for place, value in enumerate(kept):
            step.arguments.append(None if value is None else self._argument(step, value, place not in node.statistics))
        self.steps.append((name, step))

    def _outputs(self, function: Function, kept: Sequence[OnnxValue | None], batch: int) -> tuple[Tensor, ...]:
        """What the function gives for a batch, as `meta` tensors: shapes without numbers."""
        given: list[Tensor | None] = []
        for v in kept:
            if v is None:
                given.append(None)
            elif v.constant is not None:
                given.append(v.constant.to("meta"))
            else:
                given.append(torch.empty((batch, *v.shape[1:]), dtype=v.dtype, device="meta"))
        found = function(*given)
        return _several(found)

    def _argument(self, step: _NodeStep, value: OnnxValue, trained: bool) -> tuple[str, str]:
        if value.constant is None:
            return "value", value.name
        name = _fresh(_identifier(value.name), lambda n: hasattr(step, n))
        if trained and value.constant.is_floating_point():
            step.register_parameter(name, nn.Parameter(value.constant))
        else:
            step.register_buffer(name, value.constant)
        return "constant", name

    def module(self, output: str, input_shape: Sequence[int] | None) -> OnnxModule:
        """The whole, in eval mode; UnsupportedOpError lists every node without a rule."""
        if self.problems:
            raise UnsupportedOpError(self.problems, ", ".join(sorted(RULES)))
        if output not in self.values:
            raise ValueError(f"output {output!r} is given by no node")
        if self.values[output].constant is not None:
            raise ValueError(f"output {output!r} does not depend on the input")
        shape = self.own_shape if input_shape is None else tuple(input_shape)
        module = OnnxModule(self.input, output, shape, self.own_shape)
        for name, step in self.steps:
            module.append(_fresh(_identifier(name), lambda n: hasattr(module, n)), step)
        return module.eval()


def _identifier(name: str) -> str:
    """A name that a module's attribute may have."""
    return re.sub(r"[^0-9A-Za-z_]+", "_", name).strip("_") or "node"


def _fresh(name: str, taken: Callable[[str], bool]) -> str:
    found, number = name, 1
    while taken(found):
        number += 1
        found = f"{name}_{number}"
    return found
