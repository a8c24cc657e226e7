"""What a rule sees of one call of an exported graph: the network's values, live constants and plain settings."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from optrelax.networks.activations import Activation
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Affine, Scale, Shape, Source, constant
from optrelax.networks.products import Multiply

Op = Affine | Activation | Greatest | Multiply

PRODUCT = "the product of two values of the network is not affine"
HIDDEN = "reads entries that minus infinity hides; only a softmax may"


class Refused(ValueError):
    """A rule's reason for not taking a call; any ValueError or NotImplementedError of a rule counts as one."""


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the network: a node's output, or the input."""

    name: str
    """The node's name in the network."""
    shape: Shape
    """Without the batch."""
    shown: Source | None = None
    """False for the entries that minus infinity hides from a softmax, which are 0 in the node; None: all are shown."""


class Constant(Protocol):
    """A tensor that does not depend on the input: called, it is computed anew from the user's live parameters."""

    shape: Shape
    dtype: torch.dtype
    batched: bool
    """Whether it was made with a batch, of which it is one example's."""

    def __call__(self) -> Tensor:
        """The tensor as it is now, differentiable into the parameters it comes from; shape `shape`."""
        ...


class BatchSize:
    """Stands among the arguments for a number that depends on the size of the batch: no number a rule may use."""

    def _refuse(self, *_: object) -> object:
        raise Refused("mixes the batch: an argument depends on the batch size")

    __int__ = __float__ = __index__ = __bool__ = __add__ = __radd__ = __sub__ = __rsub__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __neg__ = __lt__ = __gt__ = __le__ = __ge__ = (
        _refuse
    )

    def __repr__(self) -> str:
        return "batch size"


BATCH = BatchSize()


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an op, a registered function or a registered module.

    Arguments are `Value`s (depend on the network's input), `Constant`s (tensors that do not), `BATCH` (numbers that
    the batch size decides), plain numbers, None, or lists of these.  Arguments of an ATen op are in the order of its
    schema, defaults filled in, all of them positional.  Dimensions in the arguments count the batch as dimension 0;
    every shape here is without it.
    """

    target: str
    """Name for messages, such as `conv2d`."""
    args: tuple[Any, ...]
    kwargs: dict[str, object]
    shapes: tuple[Shape, ...]
    """Of each output, without the batch; () in place of an output that the network does not have to compute."""
    names: tuple[str, ...] = ()
    """Names of the positional arguments, where the op has a schema."""
    module: nn.Module | None = None
    """The module called, of a registered module type (a weak proxy: read its parameters at each use)."""
    add: Callable[..., Value] = field(default=lambda *_: Value("", ()), repr=False)
    """`add(op, *values)`: one more node in front of the call's own, for calls that are several ops; its value."""
    keep: Callable[[Source, Tensor], None] = field(default=lambda *_: None, repr=False)
    """`keep(read, value)`: the network is another one as soon as a constant has another value; see `fixed`."""

    @property
    def output(self) -> Shape:
        """Shape of the (first) output, without the batch."""
        return self.shapes[0]

    @property
    def values(self) -> tuple[Value, ...]:
        """The network's values among the arguments, in order, in lists and keywords too: what the call's op reads."""
        return tuple(filter(is_value, pytree.tree_leaves((self.args, self.kwargs))))

    @property
    def traced(self) -> tuple[int, ...]:
        """Positions of the arguments that depend on the network's input."""
        return tuple(i for i, a in enumerate(self.args) if holds_value(a))

    def argument(self, position: int, name: str = "", default: object = None) -> object:
        """An argument by position or name."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def __getitem__(self, name: str) -> Any:
        """An argument of an ATen op by the name that its schema gives it."""
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[self.names.index(name)]

    def shape(self, position: int = 0) -> Shape:
        """Shape of an argument that is a value (without the batch) or a constant."""
        found: Shape = self.args[position].shape
        return found

    def value(self, position: int = 0) -> Value:
        """An argument that must be a value of the network."""
        found = self.args[position]
        if not is_value(found):
            raise Refused(f"argument {position} must depend on the input")
        return found

    def only(self, position: int = 0) -> Value:
        """An argument that must be the one value the call reads: ops that are linear in that argument alone."""
        if len(self.values) != 1 or not is_value(self.args[position]):
            raise Refused(PRODUCT)
        return self.value(position)

    def constant(self, position: int, name: str = "") -> Source | None:
        """A live constant by position or name; None where it is absent or None; Refused for a value of the network."""
        return as_source(self.argument(position, name))

    def fixed(self, argument: object) -> object:
        """An argument with the constants in it as the tensors that they are now: indices, which decide what is built.

        The network is captured anew once they have changed.
        """
        if isinstance(argument, (list, tuple)):
            return [self.fixed(a) for a in argument]
        read = argument if callable(argument) else None
        if read is None:
            return argument
        found: Tensor = read().detach().clone()
        self.keep(read, found)
        return found.cpu()

    def elementwise(self, position: int, name: str = "") -> Source:
        """A constant that meets each example elementwise: without a leading dimension of one for the batch."""
        found = self.argument(position, name)
        read = as_source(found)
        if read is None:
            raise Refused(f"argument {name or position} is missing")
        shape: tuple[int, ...] = getattr(found, "shape", ())
        if len(shape) <= len(self.output):
            return read
        if shape[0] != 1:
            raise Refused(f"a constant with batch {shape[0]} mixes the batch")
        return lambda: read()[0]

    def scaled(self, value: Value, factor: float) -> Value:
        """The value times a number; itself where that is 1."""
        return value if factor == 1 else self.add(Scale(value.shape, constant(factor), None), value)

    def dims(self, dims: int | Sequence[int] | None, position: int = 0) -> tuple[int, ...]:
        """Dimensions counted without the batch, ascending; Refused where the batch is one of them."""
        rank = len(self.shape(position)) + 1
        wanted = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        found = tuple(sorted(operator.index(d) % rank for d in wanted))
        if 0 in found:
            raise Refused("mixes the batch: dimension 0 is the batch")
        return tuple(d - 1 for d in found)


def as_source(value: object) -> Source | None:
    """A constant argument as a function that reads it; None stays None."""
    if value is None:
        return None
    if holds_value(value):
        raise Refused(PRODUCT)
    if isinstance(value, BatchSize):
        raise Refused("mixes the batch: an argument depends on the batch size")
    if isinstance(value, (bool, int, float)):
        return constant(value)
    if not callable(value):
        raise Refused(f"an argument is no tensor but {value!r}")
    read: Source = value
    return read


def is_value(argument: object) -> TypeGuard[Value]:
    """Whether an argument is a value of the network."""
    return isinstance(argument, Value)


def holds_value(argument: object) -> bool:
    """Whether an argument, or something in its lists, depends on the network's input."""
    return any(map(is_value, pytree.tree_leaves(argument)))


def several(found: object, outputs: int) -> tuple[object, ...]:
    """What a rule returned, one an output."""
    results = found if isinstance(found, tuple) else (found,)
    if len(results) != outputs:
        raise ValueError(f"its rule gives {len(results)} of {outputs} outputs")
    return results
