"""Convolutions in one, two and three dimensions and their transposes; `Conv2d`, which has kernels, is in `images`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from optrelax.kernels.convolutions import ConvGeometry
from optrelax.networks.ops import Shape, Source, WeightedOp, lead_of, magnitude
from optrelax.networks.storage import Settings, Tensors, stored

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class _Convolving(WeightedOp):
    """Shared by a convolution and its transpose: parameters, bias, and leading dimensions made one."""

    def __init__(self, weight: Source, bias: Source | None, geometry: ConvGeometry) -> None:
        self._weight, self._bias, self.geometry = weight, bias, geometry
        self.kernel = tuple(int(k) for k in weight().shape[2:])
        self.rank = len(self.kernel)
        if self.rank not in CONVOLUTIONS or any(
            len(numbers) != self.rank for numbers in (geometry.stride, geometry.padding, geometry.dilation)
        ):
            raise ValueError(f"{type(self).__name__}: weight of shape {tuple(weight().shape)} with {geometry}")

    def bias(self, like: Tensor) -> Tensor | None:
        found = super().bias(like)
        return None if found is None else found.reshape(-1, *[1] * self.rank)

    def _down(self, x: Tensor, weight: Tensor, before: Shape, after: Shape, bias: Tensor | None = None) -> Tensor:
        """The convolution: [*lead, *before] -> [*lead, *after]; what an output has beyond `after` is not wanted."""
        g = self.geometry
        y = CONVOLUTIONS[self.rank](x.reshape(-1, *before), weight, bias, g.stride, g.padding, g.dilation, g.groups)
        for d, n in enumerate(after[1:], start=2):
            y = y.narrow(d, 0, n)
        return y.reshape(*lead_of(x, before), *after)

    def _up(self, a: Tensor, weight: Tensor, before: Shape, after: Shape, extra: Sequence[int]) -> Tensor:
        """Its transpose: [*lead, *after] -> [*lead, *before]."""
        g = self.geometry
        x = TRANSPOSED[self.rank](
            a.reshape(-1, *after), weight, None, g.stride, g.padding, tuple(extra), g.groups, g.dilation
        )
        return x.reshape(*lead_of(a, after), *before)

    def _span(self, inside: Sequence[int]) -> list[int]:
        """Extent of what `inside` positions of the kernel cover, the padding cut off."""
        g = self.geometry
        numbers = zip(inside, g.stride, g.padding, g.dilation, self.kernel, strict=True)
        return [(o - 1) * s - 2 * p + d * (k - 1) + 1 for o, s, p, d, k in numbers]

    def describe(self) -> dict[str, object]:
        g = self.geometry
        return {"stride": g.stride, "padding": g.padding, "dilation": g.dilation, "groups": g.groups}


def _restored(settings: Settings, tensors: Tensors, shape: Shape) -> tuple[Source, ConvGeometry]:
    """Weight and geometry from a file, for inputs of this shape."""
    weight, groups = tensors.source("weight", dims=len(shape) + 1), settings.integer("groups", least=1)
    sizes = tuple(weight().shape)
    if 0 in sizes or sizes[0] % groups:
        raise ValueError(f"weight: wants no empty dimension and {groups} groups, got shape {sizes}")
    rank = len(shape) - 1
    stride, dilation = (settings.integers(name, rank, least=1) for name in ("stride", "dilation"))
    padding = settings.integers("padding", rank)
    settings.require_size("padding", (n + 2 * p for n, p in zip(shape, (0, *padding), strict=True)))
    return weight, ConvGeometry(stride, padding, dilation, groups)


@stored("convolution")
class Convolution(_Convolving):
    """Zero-padded convolution: weight [out, in / groups, *kernel], bias [out]; input [in, *spatial]."""

    def __init__(self, input_shape: Shape, weight: Source, bias: Source | None, geometry: ConvGeometry) -> None:
        super().__init__(weight, bias, geometry)
        w, g = weight(), geometry
        if len(input_shape) != self.rank + 1 or input_shape[0] != w.shape[1] * g.groups:
            raise ValueError(
                f"{type(self).__name__}: takes {w.shape[1] * g.groups} channels and {self.rank} spatial dimensions, "
                f"got input of shape {tuple(input_shape)}"
            )
        spans = self._span([1] * self.rank)
        spatial = [(n - span) // s + 1 for n, span, s in zip(input_shape[1:], spans, g.stride, strict=True)]
        if min(spatial) < 1:
            name = type(self).__name__
            raise ValueError(f"{name}: kernel {self.kernel} does not fit input of shape {tuple(input_shape)}")
        self.input_shapes, self.shape = (tuple(input_shape),), (int(w.shape[0]), *spatial)
        self.fan_in = int(w.shape[1]) * math.prod(self.kernel)
        self.fan_out = int(w.shape[0]) // g.groups * math.prod(self.kernel)
        # What the strides left over at the far edge is part of the image too (as zeros).
        self._leftover = [n - span for n, span in zip(input_shape[1:], self._span(spatial), strict=True)]

    def linear(self, *xs: Tensor) -> Tensor:
        return self._down(xs[0], self.weight(xs[0]), self.input_shapes[0], self.shape)

    def apply(self, *xs: Tensor) -> Tensor:
        x, bias = xs[0], WeightedOp.bias(self, xs[0])
        return self._down(x, self.weight(x), self.input_shapes[0], self.shape, bias)

    def apply_abs(self, *rs: Tensor) -> Tensor:
        return self._down(rs[0], magnitude(self.weight(rs[0])), self.input_shapes[0], self.shape)

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return (self._up(a, self.weight(a), self.input_shapes[0], self.shape, self._leftover),)

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Convolution:
        weight, geometry = _restored(settings, tensors, shapes[0])
        return cls(shapes[0], weight, tensors.optional("bias", shape=weight().shape[:1]), geometry)


@stored("transposed_convolution")
class TransposedConvolution(_Convolving):
    """Transpose of a convolution: weight [in, out / groups, *kernel], bias [out]; `extra` rows at the far edges."""

    def __init__(
        self, input_shape: Shape, weight: Source, bias: Source | None, geometry: ConvGeometry, extra: Sequence[int]
    ) -> None:
        super().__init__(weight, bias, geometry)
        w, g = weight(), geometry
        if len(input_shape) != self.rank + 1 or input_shape[0] != w.shape[0]:
            raise ValueError(
                f"TransposedConvolution: takes {w.shape[0]} channels and {self.rank} spatial dimensions, "
                f"got input of shape {tuple(input_shape)}"
            )
        self.extra = tuple(int(n) for n in extra)
        spatial = [n + e for n, e in zip(self._span(input_shape[1:]), self.extra, strict=True)]
        if min(spatial) < 1:
            raise ValueError(f"TransposedConvolution: nothing is left of an input of shape {tuple(input_shape)}")
        self.input_shapes, self.shape = (tuple(input_shape),), (int(w.shape[1]) * g.groups, *spatial)
        self.fan_in = int(w.shape[0]) // g.groups * math.prod(self.kernel)
        self.fan_out = int(w.shape[1]) * math.prod(self.kernel)

    def linear(self, *xs: Tensor) -> Tensor:
        return self._up(xs[0], self.weight(xs[0]), self.shape, self.input_shapes[0], self.extra)

    def apply_abs(self, *rs: Tensor) -> Tensor:
        return self._up(rs[0], magnitude(self.weight(rs[0])), self.shape, self.input_shapes[0], self.extra)

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return (self._down(a, self.weight(a), self.shape, self.input_shapes[0]),)

    def describe(self) -> dict[str, object]:
        return super().describe() | {"extra": self.extra}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> TransposedConvolution:
        weight, geometry = _restored(settings, tensors, shapes[0])
        bias = tensors.optional("bias", shape=(weight().shape[1] * geometry.groups,))
        return cls(shapes[0], weight, bias, geometry, settings.integers("extra", len(geometry.stride)))
