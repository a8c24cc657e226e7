"""Convolutions and averages of images [c, h, w]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.kernels.convolutions import ConvGeometry, pull_rows
from optrelax.networks.ops import Affine, Shape, Source, lead_of, magnitude
from optrelax.networks.storage import Settings, Tensors, stored


def _flat(x: Tensor, shape: Shape) -> Tensor:
    """[*lead, *shape] -> [n, *shape]."""
    return x.reshape(-1, *shape)


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
        return y.reshape(*lead_of(x, self.input_shapes[0]), *self.shape)

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
        return (x.reshape(*lead_of(a, self.shape), *self.input_shapes[0]),)

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
