"""Windows of coefficients pulled back through a convolution, and maps cut into windows. Channels come last.

On a CPU both are compiled (`window_step.c`). Without a compiler, on other devices, and for grouped or dilated
convolutions PyTorch's operations do the same.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from optrelax.autograd_contexts import Context
from optrelax.kernels import native
from optrelax.kernels.convolutions import ConvGeometry, Pair, pair

_SIGNATURES = (
    "multiply(n, k, m, a[n * k], w[k * m], found[n * m])",
    "spread(n, high, wide, out, into, kh, kw, step_y, step_x, apart, top, left, rows, columns, "
    "a[n * high * wide * out], weight[kh * out * kw * into], found[n * rows * columns * into])",
    "back(n, high, wide, out, into, kh, kw, step_y, step_x, apart, top, left, rows, columns, "
    "a[n * high * wide * out], grad[n * rows * columns * into], turned[kh * kw * into * out], "
    "to_a?[n * high * wide * out], to_weight?[kh * out * kw * into])",
    "relax(n, given, kh, kw, c, high, wide, step_y, step_x, offset_y, offset_x, int64 place[n * 3], int64 which?[n], "
    "a[given * kh * kw * c], ls?[high * wide * c], li[high * wide * c], us?[high * wide * c], ui[high * wide * c], "
    "w?[n * kh * kw * c], ds?[high * wide * c], di?[high * wide * c], pulled?[n * kh * kw * c], constant[n])",
    "relax_back(n, given, kh, kw, c, high, wide, step_y, step_x, offset_y, offset_x, int64 place[n * 3], "
    "int64 which?[n], a[given * kh * kw * c], ls?[high * wide * c], li[high * wide * c], us?[high * wide * c], "
    "ui[high * wide * c], w?[n * kh * kw * c], ds?[high * wide * c], di?[high * wide * c], grad?[n * kh * kw * c], "
    "column[n], to_a[n * kh * kw * c], to_ls?[high * wide * c], to_li?[high * wide * c], to_us?[high * wide * c], "
    "to_ui?[high * wide * c], to_w?[n * kh * kw * c], to_ds?[high * wide * c], to_di?[high * wide * c])",
    "gather(batch, maps, lists, places, high, wide, c, kh, kw, back, int64 corners[lists * places * 2], "
    "map[maps * high * wide * c], windows[batch * places * kh * kw * c])",
)


@functools.cache
def kernels() -> native.Build:
    """The compiled passes, or why there are none."""
    return native.build(Path(__file__).with_name("window_step.c"), *_SIGNATURES)


def extent(size: Pair, kernel: Pair, g: ConvGeometry) -> Pair:
    """What pixels of a convolution, `size` next to each other, read of its input."""
    sides = zip(size, kernel, g.stride, g.dilation, strict=True)
    return pair((n - 1) * s + d * (k - 1) + 1 for n, k, s, d in sides)


def spread(a: Tensor, weight: Tensor, geometry: ConvGeometry, corner: Pair, size: Pair) -> Tensor:
    """The transpose of a convolution: a [n, high, wide, out], weight [out, in / groups, kh, kw] -> [n, *size, in].

    The geometry's padding is not read: of the pixels that the windows read, those from `corner` on are returned.
    Gradient: exact, to any order.
    """
    if geometry.groups == 1 and geometry.dilation[1] == 1 and kernels().supports(a, weight) and a.numel():
        found: Tensor = _Spread.apply(a, weight, geometry, corner, size)
        return found
    g = geometry
    image = F.conv_transpose2d(a.permute(0, 3, 1, 2), weight, None, g.stride, 0, 0, g.groups, g.dilation)
    top, left = corner
    return image.permute(0, 2, 3, 1)[:, top : top + size[0], left : left + size[1]]


class _Spread(torch.autograd.Function):
    """Keeps the rows and the weight."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, weight: Tensor, g: ConvGeometry, corner: Pair, size: Pair) -> Tensor:
        a = a.contiguous()
        ctx.save_for_backward(a, weight)
        ctx.settings = g, corner, size
        out, into, kh, kw = weight.shape
        turned = weight.permute(2, 0, 3, 1).reshape(kh, out, kw * into).contiguous()
        found = a.new_empty(a.shape[0], *size, into)
        sizes = (*a.shape[:3], out, into, kh, kw, *g.stride, g.dilation[0], *corner, *size)
        kernels().call("spread", a.dtype, *sizes, a, turned, found)
        return found

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        a, weight = ctx.saved_tensors
        g, corner, size = ctx.settings
        if grad.dtype == torch.float64 and not torch.is_grad_enabled():  # which oneDNN has no convolutions of
            return *_spread_gradients(a, weight, grad, ctx), None, None, None
        kernel = (weight.shape[2], weight.shape[3])
        whole = extent((a.shape[1], a.shape[2]), kernel, g)
        (top, bottom), (left, right) = ((c, n - c - s) for c, n, s in zip(corner, whole, size, strict=True))
        if top or bottom or left or right:
            grad = F.pad(grad, (0, 0, left, right, top, bottom))
        image = grad.contiguous().permute(0, 3, 1, 2)  # channels last, which the convolutions are fastest on
        need = ctx.needs_input_grad
        to_a = to_weight = None
        if need[0]:
            to_a = F.conv2d(image, weight, None, g.stride, 0, g.dilation).permute(0, 2, 3, 1)
        if need[1]:
            to_weight = conv2d_weight(image, weight.shape, a.permute(0, 3, 1, 2), g.stride, 0, g.dilation)
        return to_a, to_weight, None, None, None


def _spread_gradients(a: Tensor, weight: Tensor, grad: Tensor, ctx: Context) -> tuple[Tensor | None, Tensor | None]:
    """Those of `_Spread` in its rows and its weight, compiled."""
    g, corner, size = ctx.settings
    out, into, kh, kw = weight.shape
    to_a = torch.empty_like(a) if ctx.needs_input_grad[0] else None
    to_weight = weight.new_zeros(kh, out, kw, into) if ctx.needs_input_grad[1] else None
    sizes = (*a.shape[:3], out, into, kh, kw, *g.stride, g.dilation[0], *corner, *size)
    turned = weight.permute(2, 3, 1, 0).contiguous()
    kernels().call("back", a.dtype, *sizes, a, grad.contiguous(), turned, to_a, to_weight)
    return to_a, None if to_weight is None else to_weight.permute(1, 3, 0, 2)


def gather(maps: Tensor, corners: Tensor, size: Pair) -> Tensor:
    """Windows of maps: [batch or 1, high, wide, c] at corners [batch or 1, places, 2] -> [batch, places, *size, c].

    Zeros beyond the edges.  Gradient: exact, to any order.
    """
    if maps.shape[0] == 0:
        return maps.new_empty(0, corners.shape[1], *size, maps.shape[3])
    if kernels().supports(maps):
        found: Tensor = _Gather.apply(maps, corners, size)
        return found
    index = _index(corners, size, (maps.shape[1], maps.shape[2]))
    flat = F.pad(maps.flatten(1, 2), (0, 0, 0, 1))  # a pixel of zeros, which index -1 reads
    batch = max(flat.shape[0], index.shape[0])
    which = torch.arange(flat.shape[0], device=maps.device)[:, None, None, None]
    return flat[which, index].expand(batch, -1, -1, -1, -1)


def scatter(windows: Tensor, corners: Tensor, image: Pair, maps: int) -> Tensor:
    """The transpose of `gather`: windows [batch, places, h, w, c] added up in `maps` (batch or 1) images."""
    if kernels().supports(windows):
        found: Tensor = _Scatter.apply(windows, corners, image, maps)
        return found
    size = (windows.shape[2], windows.shape[3])
    index = _index(corners, size, image) % (image[0] * image[1] + 1)
    index = index.expand(windows.shape[:4]).reshape(windows.shape[0], -1, 1).expand(-1, -1, windows.shape[4])
    found = windows.new_zeros(windows.shape[0], image[0] * image[1] + 1, windows.shape[4])
    found = found.scatter_add(1, index, windows.flatten(1, 3))[:, :-1]
    found = found.reshape(-1, *image, windows.shape[4])
    return found if maps == found.shape[0] else found.sum(0, keepdim=True)


def _index(corners: Tensor, size: Pair, image: Pair) -> Tensor:
    """Flat pixel of each entry of each window, -1 beyond the edges: [batch or 1, places, *size]."""
    y = corners[..., 0, None] + torch.arange(size[0], device=corners.device)
    x = corners[..., 1, None] + torch.arange(size[1], device=corners.device)
    inside = ((y >= 0) & (y < image[0]))[..., :, None] & ((x >= 0) & (x < image[1]))[..., None, :]
    return torch.where(inside, y[..., :, None] * image[1] + x[..., None, :], -1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, maps: Tensor, corners: Tensor, size: Pair) -> Tensor:
        maps, corners = maps.contiguous(), corners.contiguous()
        ctx.save_for_backward(corners)
        ctx.sizes = (maps.shape[1], maps.shape[2]), maps.shape[0]
        batch, places = max(maps.shape[0], corners.shape[0]), corners.shape[1]
        windows = maps.new_empty(batch, places, *size, maps.shape[3])
        _call(maps, windows, corners, back=False)
        return windows

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        (corners,) = ctx.saved_tensors
        return _Scatter.apply(grad, corners, *ctx.sizes), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, windows: Tensor, corners: Tensor, image: Pair, maps: int) -> Tensor:
        windows, corners = windows.contiguous(), corners.contiguous()
        ctx.save_for_backward(corners)
        ctx.sizes = (windows.shape[2], windows.shape[3]), windows.shape[0]
        found = windows.new_empty(maps, *image, windows.shape[4])
        _call(found, windows, corners, back=True)
        return found

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (corners,) = ctx.saved_tensors
        size, batch = ctx.sizes
        found: Tensor = _Gather.apply(grad, corners, size)
        return found.expand(batch, *found.shape[1:]), None, None, None


def _call(maps: Tensor, windows: Tensor, corners: Tensor, back: bool) -> None:
    sizes = (windows.shape[0], maps.shape[0], *corners.shape[:2], *maps.shape[1:], *windows.shape[2:4], int(back))
    kernels().call("gather", maps.dtype, *sizes, corners, maps, windows)
