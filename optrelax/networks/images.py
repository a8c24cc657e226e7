"""Convolutions and averages of images [c, h, w]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optrelax.kernels.convolutions import ConvGeometry, pull_rows
from optrelax.networks.convolutions import Convolution
from optrelax.networks.ops import Affine, Shape, Source, lead_of
from optrelax.networks.storage import Settings, Tensors, stored


def _pool_settings(settings: Settings, shape: Shape) -> tuple[tuple[int, int], ConvGeometry]:
    """Kernel and geometry from a file, for images of this shape; nothing may be larger than a file may ask for."""
    kernel = settings.pair("kernel", least=1)
    stride, padding = settings.pair("stride", least=1), settings.pair("padding")
    if not settings.absent("dilation"):  # files that have it say 1
        settings.pair("dilation", least=1)
    settings.require_size("padding", (n + 2 * p for n, p in zip(shape, (0, *padding), strict=False)))
    settings.require_size("kernel", (*shape[:1], *kernel))
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(f"padding: wants at most half of the kernel {kernel}, got {padding}")
    return kernel, ConvGeometry(stride, padding)


@stored("conv2d")
class Conv2d(Convolution):
    """A convolution of images [c, h, w]; rows are pulled back by a compiled pass where that is faster."""

    kernel: tuple[int, int]

    def __init__(
        self, input_shape: Shape, weight: Source, bias: Source | None, geometry: ConvGeometry | None = None
    ) -> None:
        super().__init__(input_shape, weight, bias, geometry or ConvGeometry())

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        _, high, wide = self.input_shapes[0]
        x = pull_rows(a.reshape(-1, *self.shape), self.weight(a), self.geometry, (high, wide))
        return (x.reshape(*lead_of(a, self.shape), *self.input_shapes[0]),)


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
        ones = torch.ones((), device="cpu").expand(
            channels, 1, *kernel
        )  # one number in memory: a file may ask for any kernel
        self._conv = Conv2d(input_shape, lambda: ones, None, self.geometry)
        self.input_shapes, self.shape = (input_shape,), self._conv.shape
        self.fan_in, self.fan_out = math.prod(kernel), math.prod(kernel)
        self._count = self._covered() if divisor is None else torch.tensor(divisor, dtype=torch.float64, device="cpu")

    def _covered(self) -> Tensor:
        """Pixels that each window covers, padding not counted: [high, wide]."""
        g = self.geometry
        counts = []
        for n, k, s, p, out in zip(
            self.input_shapes[0][1:], self.kernel, g.stride, g.padding, self.shape[1:], strict=True
        ):
            first = torch.arange(out, device="cpu") * s - p
            counts.append(((first + k).clamp(max=n) - first.clamp(min=0)).double())
        return counts[0][:, None] * counts[1]

    def counts(self, like: Tensor) -> Tensor:
        """What sums over windows are divided by: one number, or one a place, [1 or channels, high, wide]."""
        return self._count.to(like)

    def _scaled(self, x: Tensor) -> Tensor:
        return x / self.counts(x)

    def linear(self, *xs: Tensor) -> Tensor:
        return self._scaled(self._conv.linear(xs[0]))

    def apply_abs(self, *rs: Tensor) -> Tensor:
        return self._conv.linear(rs[0]) / self._count.to(rs[0]).abs()

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return self._conv.transpose(self._scaled(a))

    def describe(self) -> dict[str, object]:
        g = self.geometry
        shared = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation}
        return {"kernel": self.kernel, **shared, "divisor": self.divisor}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> AveragePool2d:
        kernel, geometry = _pool_settings(settings, shapes[0])
        return cls(shapes[0], kernel, geometry, None if settings.absent("divisor") else settings.number("divisor"))
