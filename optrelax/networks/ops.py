"""Affine ops: y = M_1 x_1 + ... + M_p x_p + b, each with its image, its absolute image and its transpose.

Every op works on tensors with any leading dimensions in front of its input or output shape. Parameters are read
from their module at each call, never copied, so bounds follow the weights and their gradient reaches them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.kernels.convolutions import ConvGeometry, pull_rows
from optrelax.networks.storage import NUMBERS, Settings, Storable, Tensors, stored
from optrelax.networks.storage import Shape as Shape
from optrelax.networks.storage import Source as Source
from optrelax.rounding import tiny


def _flat(x: Tensor, shape: Shape) -> Tensor:
    """[*lead, *shape] -> [n, *shape]."""
    return x.reshape(-1, *shape)


def flatten_from(x: Tensor, lead: int) -> Tensor:
    """[*lead, *shape] -> [*lead, n]; unlike reshape(..., -1) also where a dimension is empty or the shape is ()."""
    return x.reshape(*x.shape[:lead], math.prod(x.shape[lead:]))


def wide(x: Tensor) -> Tensor:
    """In float64 where the device has it, so that a constant computed from others is good for either type."""
    return x if x.device.type == "mps" else x.double()


def _lead(x: Tensor, shape: Shape) -> torch.Size:
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
    def absolute(self, *rs: Tensor) -> Tensor:
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

    def cost(self) -> int:
        """Multiply-adds of one image or transpose."""
        return math.prod(self.shape) * self.fan_in


class _Magnitude(torch.autograd.Function):
    """|w| with the gradient sign(w), 0 at 0, made in one buffer: torch's own takes two of the weight's size."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w.abs()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return w.sign() * grad if torch.is_grad_enabled() else w.sign().mul_(grad)


def magnitude(w: Tensor) -> Tensor:
    """|w| elementwise; differentiable."""
    found: Tensor = _Magnitude.apply(w)
    return found


@stored("linear")
class Linear(Affine):
    """Matrix product on the last dimension: weight [out, in], bias [out]."""

    def __init__(self, input_shape: Shape, weight: Source, bias: Source | None) -> None:
        out, fan_in = weight().shape
        if not input_shape or input_shape[-1] != fan_in:
            raise ValueError(f"Linear: takes {fan_in} features, got input of shape {input_shape}")
        self.input_shapes = (input_shape,)
        self.shape = (*input_shape[:-1], out)
        self.fan_in, self.fan_out = fan_in, out
        self._weight, self._bias = weight, bias

    def weight(self, like: Tensor) -> Tensor:
        """[out, in] in the dtype of `like`."""
        return self._weight().to(like)

    def linear(self, *xs: Tensor) -> Tensor:
        return xs[0] @ self.weight(xs[0]).mT

    def apply(self, *xs: Tensor) -> Tensor:
        return F.linear(xs[0], self.weight(xs[0]), self.bias(xs[0]))

    def absolute(self, *rs: Tensor) -> Tensor:
        return rs[0] @ magnitude(self.weight(rs[0])).mT

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return (a @ self.weight(a),)

    def bias(self, like: Tensor) -> Tensor | None:
        return None if self._bias is None else self._bias().to(like.dtype)

    def describe(self) -> dict[str, object]:
        return {}

    def tensors(self) -> dict[str, Source]:
        return {"weight": self._weight} | ({} if self._bias is None else {"bias": self._bias})

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Linear:
        weight = tensors.source("weight", dims=2)
        return cls(shapes[0], weight, tensors.optional("bias", shape=weight().shape[:1]))


def _describe(geometry: ConvGeometry) -> dict[str, object]:
    return {"stride": geometry.stride, "padding": geometry.padding, "dilation": geometry.dilation}


def _geometry(settings: Settings, shape: Shape, groups: int = 1) -> ConvGeometry:
    """A stored geometry for images of this shape; a padded one may be no larger than a file may ask for."""
    stride, padding = settings.pair("stride", least=1), settings.pair("padding")
    # Average pooling was stored without.
    dilation = (1, 1) if settings.absent("dilation") else settings.pair("dilation", least=1)
    settings.require_size("padding", (n + 2 * p for n, p in zip(shape, (0, *padding), strict=False)))
    return ConvGeometry(stride, padding, dilation, groups)


def _pool_settings(settings: Settings, shape: Shape) -> tuple[tuple[int, int], ConvGeometry]:
    kernel, geometry = settings.pair("kernel", least=1), _geometry(settings, shape)
    settings.require_size("kernel", (*shape[:1], *kernel))
    if any(2 * p > k for p, k in zip(geometry.padding, kernel, strict=True)):
        raise ValueError(f"padding: wants at most half of the kernel {kernel}, got {geometry.padding}")
    return kernel, geometry


@stored("conv2d")
class Conv2d(Affine):
    """Zero-padded convolution: weight [out, in / groups, kh, kw], bias [out]."""

    def __init__(
        self, input_shape: Shape, weight: Source, bias: Source | None, geometry: ConvGeometry | None = None
    ) -> None:
        w = weight()
        geometry = geometry or ConvGeometry()
        if len(input_shape) != 3 or input_shape[0] != w.shape[1] * geometry.groups:
            raise ValueError(
                f"Conv2d: takes {w.shape[1] * geometry.groups} channels [c, h, w], got input of shape {input_shape}"
            )
        self.geometry = geometry
        self.kernel = kernel = (int(w.shape[2]), int(w.shape[3]))
        spatial = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                input_shape[1:], kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True
            )
        )
        if min(spatial) < 1:
            raise ValueError(f"Conv2d: kernel {kernel} does not fit input of shape {input_shape}")
        self.input_shapes = (input_shape,)
        self.shape = (int(w.shape[0]), *spatial)
        self.fan_in = int(w.shape[1]) * kernel[0] * kernel[1]
        self.fan_out = int(w.shape[0]) // geometry.groups * kernel[0] * kernel[1]
        self._weight, self._bias = weight, bias

    def weight(self, like: Tensor) -> Tensor:
        """[out, in / groups, kh, kw] in the dtype of `like`."""
        return self._weight().to(like)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        g = self.geometry
        y = F.conv2d(_flat(x, self.input_shapes[0]), weight, bias, g.stride, g.padding, g.dilation, g.groups)
        return y.reshape(*_lead(x, self.input_shapes[0]), *self.shape)

    def linear(self, *xs: Tensor) -> Tensor:
        return self._convolve(xs[0], self.weight(xs[0]))

    def apply(self, *xs: Tensor) -> Tensor:
        bias = None if self._bias is None else self._bias().to(xs[0].dtype)
        return self._convolve(xs[0], self.weight(xs[0]), bias)

    def absolute(self, *rs: Tensor) -> Tensor:
        return self._convolve(rs[0], magnitude(self.weight(rs[0])))

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        _, high, wide = self.input_shapes[0]
        x = pull_rows(_flat(a, self.shape), self.weight(a), self.geometry, (high, wide))
        return (x.reshape(*_lead(a, self.shape), *self.input_shapes[0]),)

    def bias(self, like: Tensor) -> Tensor | None:
        return None if self._bias is None else self._bias().to(like.dtype)[:, None, None]

    def describe(self) -> dict[str, object]:
        return {**_describe(self.geometry), "groups": self.geometry.groups}

    def tensors(self) -> dict[str, Source]:
        return {"weight": self._weight} | ({} if self._bias is None else {"bias": self._bias})

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Conv2d:
        weight, groups = tensors.source("weight", dims=4), settings.integer("groups", least=1)
        out = weight().shape[0]
        if weight().numel() == 0 or out % groups:
            raise ValueError(f"weight: wants no empty dimension, and {groups} groups, got {tuple(weight().shape)}")
        geometry = _geometry(settings, shapes[0], groups)
        return cls(shapes[0], weight, tensors.optional("bias", shape=(out,)), geometry)


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

    def absolute(self, *rs: Tensor) -> Tensor:
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


@stored("batch_norm")
class BatchNorm(Scale):
    """Batch norm with running statistics: x * scale + bias - mean * scale, scale = weight / sqrt(variance + eps).

    The statistics are read at each use; [channels] each, weight and bias may be missing.
    """

    # variance + eps, its root, the quotient, mean * scale and the sum; doubled for those of the cast.
    roundings = 12

    def __init__(
        self,
        shape: Shape,
        eps: float,
        mean: Source,
        variance: Source,
        weight: Source | None = None,
        bias: Source | None = None,
    ) -> None:
        view = (-1, *[1] * (len(shape) - 1))
        self.eps = eps
        self._terms = mean, bias
        named = {"running_mean": mean, "running_var": variance, "weight": weight, "bias": bias}
        self._primary = {name: source for name, source in named.items() if source is not None}

        def scale() -> Tensor:
            root = (wide(variance()) + eps).sqrt()
            return ((1 if weight is None else wide(weight())) / root).reshape(view)

        def shift() -> Tensor:
            moved = -wide(mean()).reshape(view) * scale()
            return moved if bias is None else moved + wide(bias()).reshape(view)

        super().__init__(shape, scale, shift)

    def bias_size(self, like: Tensor) -> Tensor | None:
        mean, bias = self._terms
        assert self._scale is not None
        scale = self._scale()
        # Below the normal range the scale's error is a unit of the least normal number, not of its own.
        size = wide(mean()).reshape(scale.shape).abs() * scale.abs().clamp_min(tiny(scale.dtype))
        if bias is not None:
            size = size + wide(bias()).reshape(scale.shape).abs()
        return size.to(like).expand(self.shape)

    def describe(self) -> dict[str, object]:
        return {"eps": self.eps}

    def tensors(self) -> dict[str, Source]:
        return dict(self._primary)

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> BatchNorm:
        channels = shapes[0][:1]
        mean, variance = (tensors.source(name, shape=channels) for name in ("running_mean", "running_var"))
        weight, bias = (tensors.optional(name, shape=channels) for name in ("weight", "bias"))
        return cls(shapes[0], settings.number("eps"), mean, variance, weight, bias)


class BatchNormInTraining(BatchNorm):
    """Batch norm in training mode: affine once the statistics of a batch are known, see `optrelax.on_batch`.

    layer: the module, by a weak proxy.  Until then it has no coefficients, and whoever asks for them is told so.
    """

    def __init__(self, shape: Shape, layer: Any) -> None:
        Scale.__init__(self, shape, None, None)
        self.eps, self.layer = float(layer.eps), layer
        self._scale = self._shift = self._unknown
        self._terms, self._primary = (self._unknown, None), {}

    def _unknown(self) -> Tensor:
        raise ValueError("a batch norm in training mode is no affine map until on_batch(net, x) gives its statistics")

    def measured(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and (biased) variance of the values [batch, *shape] of one batch: [channels] each, differentiable."""
        if x.numel() == x.shape[1]:
            raise ValueError(f"on_batch: a batch norm wants more than one value a channel, got {tuple(x.shape)}")
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        return mean, variance

    def at(self, mean: Source, variance: Source) -> BatchNorm:
        """The affine map of these statistics, with the layer's own weight and bias."""
        layer = self.layer
        weight, bias = (
            None if getattr(layer, name) is None else partial(getattr, layer, name) for name in ("weight", "bias")
        )
        return BatchNorm(self.shape, self.eps, mean, variance, weight, bias)

    def at_population(self) -> BatchNorm:
        """The map of the running statistics, which evaluation takes.  ValueError where the layer keeps none."""
        if self.layer.running_mean is None:
            raise ValueError("a batch norm without running statistics has none of the population")
        return self.at(partial(getattr, self.layer, "running_mean"), partial(getattr, self.layer, "running_var"))

    @torch.no_grad()
    def update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the layer's running statistics towards those of a batch of so many values a channel, as torch does."""
        layer = self.layer
        if layer.running_mean is None:
            return
        layer.num_batches_tracked.add_(1)
        share = 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
        layer.running_mean.mul_(1 - share).add_(mean, alpha=share)
        layer.running_var.mul_(1 - share).add_(variance, alpha=share * count / (count - 1))


@stored("avg_pool2d")
class AveragePool2d(Affine):
    """Mean over windows, zero padding counted or not: a grouped convolution with constant weights, then a scale."""

    def __init__(
        self,
        input_shape: Shape,
        kernel: tuple[int, int],
        geometry: ConvGeometry,
        divisor: float | None = None,
    ) -> None:
        if len(input_shape) != 3:
            raise ValueError(f"AvgPool2d: takes [c, h, w], got input of shape {input_shape}")
        channels = input_shape[0]
        self.kernel, self.divisor = kernel, divisor
        self.geometry = ConvGeometry(geometry.stride, geometry.padding, (1, 1), channels)
        ones = torch.ones(()).expand(channels, 1, *kernel)  # one number in memory: a file may ask for any kernel
        self._conv = Conv2d(input_shape, lambda: ones, None, self.geometry)
        self.input_shapes, self.shape = (input_shape,), self._conv.shape
        self.fan_in, self.fan_out = math.prod(kernel), math.prod(kernel)
        self._count = self._covered() if divisor is None else torch.tensor(divisor, dtype=torch.float64)

    def _covered(self) -> Tensor:
        """Pixels that each window covers, padding not counted: [high, wide]."""
        g = self.geometry
        counts = []
        for n, k, s, p, out in zip(
            self.input_shapes[0][1:], self.kernel, g.stride, g.padding, self.shape[1:], strict=True
        ):
            first = torch.arange(out) * s - p
            counts.append(((first + k).clamp(max=n) - first.clamp(min=0)).double())
        return counts[0][:, None] * counts[1]

    def counts(self, like: Tensor) -> Tensor:
        """What sums over windows are divided by: one number, or one a place, [1 or channels, high, wide]."""
        return self._count.to(like)

    def _scaled(self, x: Tensor) -> Tensor:
        return x / self.counts(x)

    def linear(self, *xs: Tensor) -> Tensor:
        return self._scaled(self._conv.linear(xs[0]))

    def absolute(self, *rs: Tensor) -> Tensor:
        return self._conv.linear(rs[0]) / self._count.to(rs[0]).abs()

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return self._conv.transpose(self._scaled(a))

    def describe(self) -> dict[str, object]:
        return {"kernel": self.kernel, **_describe(self.geometry), "divisor": self.divisor}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> AveragePool2d:
        kernel, geometry = _pool_settings(settings, shapes[0])
        return cls(shapes[0], kernel, geometry, None if settings.absent("divisor") else settings.number("divisor"))


@stored("reshape")
class Reshape(Affine):
    """The same numbers in another shape: flatten, view, reshape."""

    diagonal = True

    def __init__(self, input_shape: Shape, shape: Shape) -> None:
        if math.prod(input_shape) != math.prod(shape):
            raise ValueError(f"cannot reshape {input_shape} to {shape} without mixing the batch")
        self.input_shapes, self.shape = (input_shape,), shape

    def linear(self, *xs: Tensor) -> Tensor:
        return xs[0].reshape((*_lead(xs[0], self.input_shapes[0]), *self.shape))

    def absolute(self, *rs: Tensor) -> Tensor:
        return self.linear(*rs)

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return (a.reshape((*_lead(a, self.shape), *self.input_shapes[0])),)

    def describe(self) -> dict[str, object]:
        return {"shape": self.shape}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Reshape:
        return cls(shapes[0], settings.integers("shape"))

    def cost(self) -> int:
        return 0


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

    def absolute(self, *rs: Tensor) -> Tensor:
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
