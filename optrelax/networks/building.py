"""From an exported graph to the nodes of a network: every call by its rule, every problem collected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from optrelax.errors import Problem
from optrelax.networks.activations import Activation
from optrelax.networks.calls import BATCH, HIDDEN, Call, Op, Refused, Value, holds_value, is_value, several
from optrelax.networks.exported_nodes import (
    SHAPES_ONLY,
    SIZES,
    arguments_by_name,
    is_batch,
    is_random,
    is_symbol,
    size_at,
    with_ancestors,
)
from optrelax.networks.exporting import Exported
from optrelax.networks.graph import Node
from optrelax.networks.leaves import Leaf, arguments_of
from optrelax.networks.live_tensors import LiveConstant, LiveTensor
from optrelax.networks.ops import Shape, Source
from optrelax.networks.places import NO_RULE, line_of, module_of, op_name, plainest
from optrelax.networks.registry import rule_of, takes_hidden

aten = torch.ops.aten
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_RANDOM = "draws random numbers, so that it is no fixed function; draw them outside of forward"
_OPEN = (
    "a size depends on the values of a tensor; a mask must be a buffer or a constant, or numbers such as "
    "mask.nonzero()[:, 0], made once"
)
_DROPOUT = "is random in training mode, its default; pass training=self.training and call .eval()"
_EMPTY = "holds what its memory happened to hold; start with zeros"
_FAILURES = (ValueError, NotImplementedError, RuntimeError, TypeError, IndexError, KeyError, AttributeError)


class Building:
    """Walks an exported graph once; `nodes`, `output` and `problems` are what it finds."""

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        self.given = exported.input
        example = self.given.meta["val"]
        self.batch, self.dtype = example.shape[0], example.dtype
        self.input_shape: Shape = tuple(int(n) for n in example.shape[1:])
        self.nodes: list[Node] = []
        self.output: str | None = None
        self.problems = list(exported.problems)
        self.fixed: list[tuple[Source, Tensor]] = list(exported.fixed)
        """Constants whose values the network depends on in more than its numbers, and these values."""
        self._values: dict[fx.Node, Any] = {}  # what stands for a node among the arguments of a call
        self._paths: dict[str, int] = {"input": 1}
        self._read: tuple[Value, ...] = ()  # by the call whose rule is asked
        self._device = example.device
        self._calls: dict[fx.Node, str] = {}  # names of the calls that belong to no module of torch's
        self._called: dict[str, int] = {}

    def run(self) -> Building:
        """Build every node that the output needs."""
        if self.problems:
            return self
        needed = self._needed()
        for node in self.exported.graph.nodes:
            if node in needed:
                self._visit(node)
        self._finish()
        for node in self.exported.graph.nodes:
            node.meta.clear()  # constants keep the graph, and need no example tensors
        return self

    def _needed(self) -> set[fx.Node]:
        return with_ancestors(n for n in self.exported.graph.nodes if n.name == self.exported.output or is_random(n))

    def _problem(self, node: fx.Node, reason: str) -> None:
        path, kind = module_of(node)
        own = kind.startswith("torch.nn.modules.")
        name = self._name(node)
        self.problems.append(
            Problem(self._where(node), kind.rpartition(".")[2] if own and path else name, reason, line_of(node))
        )

    def _name(self, node: fx.Node) -> str:
        key = self._key(node)
        return op_name(node.target) if key is None else self.exported.leaves[key].name

    def _where(self, node: fx.Node) -> str:
        """The path of a module that is one of torch's or registered, else the call's own name, numbered."""
        path, kind = module_of(node)
        key = self._key(node)
        if key is not None and self.exported.leaves[key].module is not None:
            return path or "(root)"
        if kind.startswith("torch.nn.") and path:
            return path
        if node not in self._calls:
            count = self._called.get(name := self._name(node), 0)
            self._called[name] = count + 1
            self._calls[node] = f"{name}_{count}" if count else name
        return self._calls[node]

    def _key(self, node: fx.Node) -> int | None:
        if str(node.target) == "optrelax.leaf.default":
            return int(node.args[1])  # type: ignore[arg-type]
        return None

    # --- what a node is -------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        if node is self.given:
            self._values[node] = Value("input", self.input_shape)
        elif node.op == "placeholder":
            value = node.meta.get("val")
            source = self.exported.sources[node]
            if isinstance(value, Tensor):
                self._values[node] = LiveTensor(source, tuple(value.shape), value.dtype)
            else:
                self._values[node] = value
        elif node.op == "call_function":
            self._call(node)

    def _call(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        name = str(getattr(node.target, "__name__", node.target))
        if name == "getitem" and isinstance(self._values.get(node.args[0]), tuple):  # type: ignore[arg-type]
            found = self._values[node.args[0]][node.args[1]]  # type: ignore[index]
            if found is None:
                self._problem(node, "this output has no rule")
                found = self._broken(value)
            self._values[node] = found
        elif is_random(node):
            self._problem(node, _DROPOUT if "dropout" in name else _RANDOM)
            self._values[node] = self._broken(value)
        elif "empty" in name:
            self._problem(node, _EMPTY)
            self._values[node] = self._broken(value)
        elif node.target in SIZES or (isinstance(value, _SYMBOLS) and not self._reads_value(node)):
            self._values[node] = BATCH
        elif not self._reads_value(node):
            self._constant(node, value)
        else:
            self._apply(node, value)

    def _broken(self, value: Any) -> Value:
        return Value("", (self._shape(value) if isinstance(value, Tensor) else None) or ())

    def _reads_value(self, node: fx.Node) -> bool:
        if node.target in SHAPES_ONLY or node.target in SIZES:
            return False
        return any(holds_value(self._values.get(n)) for n in node.all_input_nodes)

    def _shape(self, value: Tensor) -> Shape | None:
        """Shape without the batch; None where the batch is not in front, alone."""
        if value.dim() == 0 or not is_batch(value.shape[0], self.batch) or any(map(self._moves, value.shape[1:])):
            return None
        return tuple(int(n) for n in value.shape[1:])

    def _moves(self, size: object) -> bool:
        """Whether a size depends on the batch."""
        return is_symbol(size) or is_batch(size, self.batch)

    def _constant(self, node: fx.Node, value: object) -> None:
        if not isinstance(value, Tensor):
            self._values[node] = None if isinstance(value, (list, tuple)) else value
            return
        batched = any(map(self._moves, value.shape))
        shape = self._shape(value) if batched else tuple(value.shape)
        if shape is None:
            self._problem(node, f"mixes the batch: {self._sizes(value)}")
            self._values[node] = LiveTensor(lambda: torch.zeros((), device="cpu"), (), value.dtype)
            return
        found = LiveConstant(lambda size: self._evaluate(node, size, {}), shape, value.dtype, batched)
        self._values[node] = found
        if self._reads_batch(node) and found.depends_on_batch():
            self._problem(node, "mixes the batch: a constant depends on the batch size")

    def _reads_batch(self, node: fx.Node) -> bool:
        return any(self._values.get(n) is BATCH or n.target in SHAPES_ONLY for n in with_ancestors([node]))

    def _evaluate(self, node: fx.Node, size: int, memo: dict[fx.Node, object]) -> Any:
        """A node that does not depend on the input, for a batch of that size."""
        if node in memo:
            return memo[node]
        if node in self.exported.sources:
            return self.exported.sources[node]()
        if node is self.given or is_value(self._values.get(node)):
            value = self._values[node]
            found: object = torch.zeros(size, *value.shape, dtype=self.dtype, device=self._device)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._evaluate(n, size, memo))
            found = node.target(*args, **kwargs)  # type: ignore[operator]
        memo[node] = found
        return found

    def _counts_batch(self, size: torch.SymInt) -> bool:
        """Whether a size is decided by that of the batch, and not a symbol of its own."""
        return is_symbol(self.batch) and size.node.expr.free_symbols == {self.batch.node.expr}

    def _sizes(self, value: Tensor) -> str:
        if any(is_symbol(n) and not self._counts_batch(n) for n in value.shape):
            return _OPEN
        sizes = tuple(size_at(n, self.batch, 3) for n in value.shape)
        return f"a batch of 3 gives {sizes}"

    # --- calls by rule --------------------------------------------------------------------------------------------

    def _apply(self, node: fx.Node, value: Any) -> None:
        single = not isinstance(value, (list, tuple))
        outputs = [value] if single else list(value)
        key = self._key(node)
        leaf = None if key is None else self.exported.leaves[key]
        rule = rule_of(node.target) if leaf is None else leaf.rule
        read = {0} if single else {user.args[1] for user in node.users}
        shapes = [self._shape(v) if isinstance(v, Tensor) and i in read else () for i, v in enumerate(outputs)]
        broken = [Value("", s or ()) for s in shapes]
        self._values[node] = broken[0] if single else tuple(broken)
        if rule is None:
            self._problem(node, NO_RULE)
            return
        if None in shapes:
            bad = outputs[shapes.index(None)]
            self._problem(node, f"mixes the batch: {self._sizes(bad)}")
            return
        if any(isinstance(v, Tensor) and v.dtype != self.dtype for v in outputs[:1]):
            self._problem(node, f"changes the type from {self.dtype} to {outputs[0].dtype}; bounds are of one type")
            return
        try:
            call = self._make_call(node, leaf, tuple(s or () for s in shapes))
            if any(v.shown is not None for v in call.values) and not takes_hidden(rule):
                raise Refused(HIDDEN)
            found = rule(call)
            result = tuple(self._accept(node, r, s) for r, s in zip(several(found, len(outputs)), shapes, strict=True))
        except _FAILURES as error:
            self._problem(node, str(error).splitlines()[0] if str(error) else type(error).__name__)
            return
        self._values[node] = result[0] if single else result

    def _make_call(self, node: fx.Node, leaf: Leaf | None, shapes: tuple[Shape, ...]) -> Call:
        def add(op: Op, *values: Value) -> Value:
            return self._add(node, op, values)

        if leaf is not None:
            whole = arguments_of(leaf, [self._argument(a) for a in node.args[0]])  # type: ignore[union-attr]
            args, kwargs = pytree.tree_map_only(torch.SymInt, lambda _: BATCH, whole)
            call = Call(leaf.name, args, kwargs, shapes, module=leaf.module, add=add, keep=self._keep)
        else:
            given = arguments_by_name(node)
            names = tuple(a.name for a in node.target._schema.arguments)  # type: ignore[union-attr]
            args = tuple(self._argument(given.get(name)) for name in names)
            call = Call(op_name(node.target), args, {}, shapes, names, add=add, keep=self._keep)
        self._read = call.values
        return call

    def _keep(self, read: Source, value: Tensor) -> None:
        self.fixed.append((read, value))

    def _argument(self, argument: object) -> object:
        if isinstance(argument, (list, tuple)):
            return [self._argument(a) for a in argument]
        return self._values[argument] if isinstance(argument, fx.Node) else argument

    def _accept(self, node: fx.Node, found: Any, shape: Shape | None) -> Value | None:
        """The value of one result of a rule; what the rule says must have the shape that the call has."""
        if found is None:
            return None
        if not is_value(found):
            found = self._add(node, found, None)
        if found.shape != shape:
            raise ValueError(f"its rule gives shape {found.shape}, the network {shape}")
        return found

    def _add(self, node: fx.Node, op: Op, values: tuple[Value, ...] | None) -> Value:
        if values is None:
            values = self._read
        if isinstance(op, Activation) and len(values) != 1:
            raise Refused("an activation takes one value")
        if not isinstance(op, Activation) and op.input_shapes != tuple(v.shape for v in values):
            raise ValueError(f"its rule takes shapes {op.input_shapes}, got {tuple(v.shape for v in values)}")
        shape = values[0].shape if isinstance(op, Activation) else op.shape
        path = self._where(node)
        self._paths[path] = seen = self._paths.get(path, 0) + 1
        name = path if seen == 1 else f"{path}#{seen}"
        self.nodes.append(Node(name, name, op, tuple(v.name for v in values), shape))
        return Value(name, shape)

    def _finish(self) -> None:
        self.problems = plainest(self.problems)
        last = {n.name: n for n in self.exported.graph.nodes}
        found_value = self._values.get(last.get(self.exported.output or ""))  # type: ignore[arg-type]
        if is_value(found_value) and found_value.shown is not None:
            self.problems.append(Problem("output", "output", HIDDEN))
        elif is_value(found_value):
            self.output = found_value.name
        else:
            self.problems.append(Problem("output", "output", "does not depend on the input"))
