"""Affine ops: y = M_1 x_1 + ... + M_p x_p + b, each with its image, its absolute image and its transpose.

Every op works on tensors with any leading dimensions in front of its input or output shape. Parameters are read
from their module at each call, never copied, so bounds follow the weights and their gradient reaches them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.autograd_contexts import Context
from optrelax.networks.storage import NUMBERS, Settings, Storable, Tensors, stored
from optrelax.networks.storage import Shape as Shape
from optrelax.networks.storage import Source as Source


def flatten_from(x: Tensor, lead: int) -> Tensor:
    """[*lead, *shape] -> [*lead, n]; unlike reshape(..., -1) also where a dimension is empty or the shape is ()."""
    return x.reshape(*x.shape[:lead], math.prod(x.shape[lead:]))


def wide(x: Tensor) -> Tensor:
    """In float64 where the device has it, so that a constant computed from others is good for either type."""
    return x if x.device.type == "mps" else x.double()


def constant(value: float) -> Source:
    """A number as what an op reads."""
    number = torch.tensor(value, dtype=torch.float64, device="cpu")  # a Python number is no float32
    return lambda: number


def lead_of(x: Tensor, shape: Shape) -> torch.Size:
    """The leading dimensions of [*lead, *shape]."""
    return x.shape[: x.dim() - len(shape)]


class Affine(Storable, ABC):
    """An affine op between fixed shapes."""

    input_shapes: tuple[Shape, ...]
    shape: Shape
    diagonal: bool = False
    """Whether each output reads at most one input entry and no entry is read twice."""
    fan_in: int = 1
    """Most products summed into one output (for rounding allowances); `fan_out` into one entry of the transpose."""
    fan_out: int = 1
    roundings: int = 2
    """Roundings of a product besides those of the sum: adding the bias, a divisor, a computed coefficient."""

    @abstractmethod
    def linear(self, *xs: Tensor) -> Tensor:
        """M x without the bias: [*lead, *input_shape] each -> [*lead, *shape]."""

    @abstractmethod
    def apply_abs(self, *rs: Tensor) -> Tensor:
        """|M| r without the bias: [*lead, *input_shape] each -> [*lead, *shape]."""

    @abstractmethod
    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        """Rows pulled back, M^T a: [*lead, *shape] -> one [*lead, *input_shape] an input."""

    def bias(self, like: Tensor) -> Tensor | None:
        """b, broadcastable to [*shape], in the dtype of `like`; None where there is none."""
        return None

    def bias_size(self, like: Tensor) -> Tensor | None:
        """Sum of the absolute terms that b is computed from (for rounding allowances): |b| unless b is a sum."""
        b = self.bias(like)
        return None if b is None else b.abs()

    def apply(self, *xs: Tensor) -> Tensor:
        """M x + b."""
        y = self.linear(*xs)
        b = self.bias(y)
        return y if b is None else y + b

    def __call__(self, *xs: Tensor) -> Tensor:
        """The image, by which an op of any kind is called."""
        return self.apply(*xs)

    def cost(self) -> int:
        """Multiply-adds of one image or transpose."""
        return math.prod(self.shape) * self.fan_in


class EntryMap(Affine):
    """An affine op whose coefficients are 0 and 1, one a row: it moves numbers, and is its own absolute value."""

    def apply_abs(self, *rs: Tensor) -> Tensor:
        return self.linear(*rs)

    def cost(self) -> int:
        return math.prod(self.shape) if self.fan_out > 1 else 0


class WeightedOp(Affine):
    """An affine op by a weight, and perhaps a bias, both read at each use."""

    _weight: Source
    _bias: Source | None = None

    def weight(self, like: Tensor) -> Tensor:
        """The weight in the dtype of `like`."""
        return self._weight().to(like)

    def bias(self, like: Tensor) -> Tensor | None:
        return None if self._bias is None else self._bias().to(like.dtype)

    def tensors(self) -> dict[str, Source]:
        return {"weight": self._weight} | ({} if self._bias is None else {"bias": self._bias})


class _Magnitude(torch.autograd.Function):
    """|w| with the gradient sign(w), 0 at 0, made in one buffer: torch's own takes two of the weight's size."""

    @staticmethod
    def forward(ctx: Context, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w.abs()

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return w.sign() * grad if torch.is_grad_enabled() else w.sign().mul_(grad)


def magnitude(w: Tensor) -> Tensor:
    """|w| elementwise; differentiable."""
    found: Tensor = _Magnitude.apply(w)
    return found


@stored("linear")
class Linear(WeightedOp):
    """Matrix product on the last dimension: weight [out, in], bias [out]."""

    def __init__(self, input_shape: Shape, weight: Source, bias: Source | None) -> None:
        out, fan_in = weight().shape
        if not input_shape or input_shape[-1] != fan_in:
            raise ValueError(f"Linear: takes {fan_in} features, got input of shape {input_shape}")
        self.input_shapes = (input_shape,)
        self.shape = (*input_shape[:-1], out)
        self.fan_in, self.fan_out = fan_in, out
        self._weight, self._bias = weight, bias

    def linear(self, *xs: Tensor) -> Tensor:
        return xs[0] @ self.weight(xs[0]).mT

    def apply(self, *xs: Tensor) -> Tensor:
        return F.linear(xs[0], self.weight(xs[0]), self.bias(xs[0]))

    def apply_abs(self, *rs: Tensor) -> Tensor:
        return rs[0] @ magnitude(self.weight(rs[0])).mT

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return (a @ self.weight(a),)

    def describe(self) -> dict[str, object]:
        return {}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Linear:
        weight = tensors.source("weight", dims=2)
        return cls(shapes[0], weight, tensors.optional("bias", shape=weight().shape[:1]))


@stored("scale")
class Scale(Affine):
    """Elementwise scale * x + shift, both broadcastable to the shape: normalisation, batch norm, constants."""

    diagonal = True

    def __init__(self, shape: Shape, scale: Source | None, shift: Source | None) -> None:
        for source in (scale, shift):
            if source is not None and torch.broadcast_shapes(source().shape, shape) != torch.Size(shape):
                raise ValueError(f"constant of shape {tuple(source().shape)} does not broadcast to {shape}")
        self.input_shapes = (shape,)
        self.shape = shape
        self._scale, self._shift = scale, shift

    def factor(self, like: Tensor) -> Tensor | None:
        """The scale, broadcastable to the shape; None for 1."""
        return None if self._scale is None else self._scale().to(like)

    def linear(self, *xs: Tensor) -> Tensor:
        factor = self.factor(xs[0])
        return xs[0] if factor is None else xs[0] * factor

    def apply_abs(self, *rs: Tensor) -> Tensor:
        return rs[0] if self._scale is None else rs[0] * self._scale().to(rs[0]).abs()

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return (self.linear(a),)

    def bias(self, like: Tensor) -> Tensor | None:
        return None if self._shift is None else self._shift().to(like).expand(self.shape)

    def describe(self) -> dict[str, object]:
        return {}

    def tensors(self) -> dict[str, Source]:
        named = {"scale": self._scale, "shift": self._shift}
        return {name: source for name, source in named.items() if source is not None}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Scale:
        scale, shift = (tensors.optional(name, dtypes=NUMBERS) for name in ("scale", "shift"))
        return cls(shapes[0], scale, shift)


@stored("divide")
class Divide(Scale):
    """x / divisor, as the product with its reciprocal in float64; the divisor is read at each use."""

    def __init__(self, shape: Shape, divisor: Source) -> None:
        super().__init__(shape, lambda: 1.0 / wide(divisor()), None)
        self._divisor = divisor

    def tensors(self) -> dict[str, Source]:
        return {"divisor": self._divisor}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Divide:
        return cls(shapes[0], tensors.source("divisor", dtypes=NUMBERS))


@stored("reshape")
class Reshape(EntryMap):
    """The same numbers in another shape: flatten, view, reshape."""

    diagonal = True

    def __init__(self, input_shape: Shape, shape: Shape) -> None:
        if math.prod(input_shape) != math.prod(shape):
            raise ValueError(f"cannot reshape {input_shape} to {shape} without mixing the batch")
        self.input_shapes, self.shape = (input_shape,), shape

    def linear(self, *xs: Tensor) -> Tensor:
        return xs[0].reshape((*lead_of(xs[0], self.input_shapes[0]), *self.shape))

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return (a.reshape((*lead_of(a, self.shape), *self.input_shapes[0])),)

    def describe(self) -> dict[str, object]:
        return {"shape": self.shape}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Reshape:
        return cls(shapes[0], settings.integers("shape"))


@stored("add")
class Add(Affine):
    """Signed sum of branches of one shape: residual connections."""

    def __init__(self, shape: Shape, signs: tuple[float, ...]) -> None:
        self.input_shapes = (shape,) * len(signs)
        self.shape, self.signs = shape, signs
        self.fan_in = len(signs)

    def linear(self, *xs: Tensor) -> Tensor:
        total = xs[0] if self.signs[0] == 1 else -xs[0]
        for sign, x in zip(self.signs[1:], xs[1:], strict=True):
            total = total + x if sign == 1 else total - x
        return total

    def apply_abs(self, *rs: Tensor) -> Tensor:
        total = rs[0]
        for r in rs[1:]:
            total = total + r
        return total

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return tuple(a if sign == 1 else -a for sign in self.signs)

    def describe(self) -> dict[str, object]:
        return {"signs": self.signs}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Add:
        signs = settings.numbers("signs", len(shapes))
        if set(signs) - {1.0, -1.0}:
            raise ValueError(f"signs: wants 1 or -1, got {signs}")
        return cls(shapes[0], signs)
