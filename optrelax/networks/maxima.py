"""Maxima over windows: pools, maxima over dimensions, the larger of two values; and what they are in ReLUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.networks import activations
from optrelax.networks.ops import Add, Affine, Reshape, Shape, Source, flatten_from, lead_of
from optrelax.networks.storage import Settings, Storable, Tensors, stored
from optrelax.networks.views import Concatenate, Gather, Pad

if TYPE_CHECKING:
    from optrelax.networks.activations import Activation
    from optrelax.networks.graph import Node

POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@stored("greatest")
class Greatest(Storable):
    """Greatest entry of each window; not affine, not elementwise: a structure class of its own.

    windows: flat input index of every entry of every window, -1 for none, [*shape, w].
    """

    def __init__(self, input_shape: Shape, windows: Tensor) -> None:
        self.input_shapes = (tuple(input_shape),)
        self.shape: Shape = tuple(windows.shape[:-1])
        self._windows = windows.long().cpu()
        n = math.prod(input_shape)
        if windows.numel() and not (int(self._windows.min()) >= -1 and int(self._windows.max()) < n):
            raise ValueError(f"Greatest: index outside of -1 .. {n - 1} for an input of shape {tuple(input_shape)}")
        if math.prod(self.shape) and not bool((self._windows >= 0).any(-1).all()):
            raise ValueError("Greatest: the maximum of no entries has no value")
        entries = self._windows[self._windows >= 0]
        self.readers = int(torch.bincount(entries).max()) if entries.numel() else 0
        """Windows that one input entry is in, at most."""

    @classmethod
    def over(cls, input_shape: Shape, dims: Sequence[int], keepdim: bool = False) -> Greatest:
        """The greatest entry along dimensions, which remain with size 1 (keepdim) or go."""
        rank = len(input_shape)
        index = torch.arange(math.prod(input_shape), device="cpu").reshape(input_shape)
        left = [d for d in range(rank) if d not in dims]
        shape = tuple(1 if d in dims else n for d, n in enumerate(input_shape) if keepdim or d not in dims)
        entries = math.prod(input_shape[d] for d in dims)
        return cls(input_shape, index.permute(*left, *dims).reshape(*shape, entries))

    @classmethod
    def on_image(cls, input_shape: Shape, places: Sequence[Tensor]) -> Greatest:
        """Windows of an image [c, *spatial]; places: of each spatial dimension, [out, entries], -1 for none."""
        return cls(input_shape, _on_image(input_shape, places))

    def __call__(self, x: Tensor) -> Tensor:
        """[*lead, *input_shape] -> [*lead, *shape]."""
        lead = lead_of(x, self.input_shapes[0])
        windows = self.windows(x.device)
        flat = flatten_from(x, len(lead))
        entries = flat.gather(-1, windows.clamp_min(0).reshape(-1).expand(*lead, -1)).reshape(*lead, *windows.shape)
        return entries.masked_fill(windows < 0, -torch.inf).amax(-1)

    def windows(self, device: torch.device) -> Tensor:
        """Flat input index of every entry of every window, -1 for none: [*shape, w]."""
        return self._windows.to(device)

    def describe(self) -> dict[str, object]:
        return {}

    def tensors(self) -> dict[str, Source]:
        return {"windows": lambda: self._windows}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Greatest:
        windows = tensors.source("windows", dtypes=(torch.int64,))()
        if windows.dim() == 0 or windows.shape[-1] == 0:
            raise ValueError(f"windows: wants entries, got shape {tuple(windows.shape)}")
        return cls(shapes[0], windows)

    def lowered(self, node: Node) -> list[Node]:
        """Nodes that compute the same from affine ops and ReLUs; the last has the node's name.

        max(a, b) = b + relu(a - b), in pairs, then in pairs of what is left.
        """
        build = _Tree(node)
        flat = self._windows.reshape(-1, self._windows.shape[-1])
        some = flat.gather(1, (flat >= 0).int().argmax(1, keepdim=True))
        index = torch.where(flat < 0, some, flat).mT  # [w, windows], an entry of its own in place of none
        value = build.add(Gather(self.input_shapes[0], index), node.inputs[0])
        count, n = index.shape
        while count > 1:
            half = count // 2
            first = build.add(Pad.slicing((count, n), 0, 0, half), value)
            second = build.add(Pad.slicing((count, n), 0, half, 2 * half), value)
            more = build.add(Add((half, n), (1.0, -1.0)), first, second)
            larger = build.add(Add((half, n), (1.0, 1.0)), second, build.add(activations.relu(), more))
            if count % 2:
                last = build.add(Pad.slicing((count, n), 0, count - 1, count), value)
                larger = build.add(Concatenate([(half, n), (1, n)], 0), larger, last)
            value, count = larger, count - half
        return build.finish(Reshape((1, n), self.shape), value)


@stored("max_pool", "max_pool2d")
class MaxPool(Greatest):
    """Greatest value of each window of an image [c, *spatial], in one, two or three dimensions."""

    def __init__(
        self,
        input_shape: Shape,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool = False,
    ) -> None:
        rank = len(kernel)
        if rank not in POOLS or len(input_shape) != rank + 1:
            raise ValueError(f"MaxPool: takes [c, *spatial] with {rank} spatial dimensions, got {tuple(input_shape)}")
        self.kernel, self.stride, self.padding = tuple(kernel), tuple(stride), tuple(padding)
        self.dilation, self.ceil_mode = tuple(dilation), ceil_mode
        probe = torch.empty(1, *input_shape, device="meta")  # its shape is all that is asked
        places = []
        for d, (n, out) in enumerate(zip(input_shape[1:], self._pool(probe).shape[2:], strict=True)):
            place = torch.arange(out, device="cpu")[:, None] * self.stride[d] - self.padding[d]
            place = place + torch.arange(self.kernel[d], device="cpu") * self.dilation[d]
            places.append(torch.where((place >= 0) & (place < n), place, -1))
        super().__init__(input_shape, _on_image(input_shape, places))

    def _pool(self, x: Tensor) -> Tensor:
        return POOLS[len(self.kernel)](x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)

    def __call__(self, x: Tensor) -> Tensor:
        shape = self.input_shapes[0]
        return self._pool(x.reshape(-1, *shape)).reshape(*lead_of(x, shape), *self.shape)

    def describe(self) -> dict[str, object]:
        return {
            "kernel": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "ceil_mode": self.ceil_mode,
        }

    def tensors(self) -> dict[str, Source]:
        return {}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> MaxPool:
        rank = len(shapes[0]) - 1
        kernel, stride, dilation = (settings.integers(n, rank, least=1) for n in ("kernel", "stride", "dilation"))
        padding = settings.integers("padding", rank)
        settings.require_size("kernel", (*shapes[0], *kernel))
        if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
            raise ValueError(f"padding: wants at most half of the kernel {kernel}, got {padding}")
        rounded = not settings.absent("ceil_mode") and settings.flag("ceil_mode")
        return cls(shapes[0], kernel, stride, padding, dilation, rounded)


def _on_image(input_shape: Shape, places: Sequence[Tensor]) -> Tensor:
    """Flat index of every entry of every window: [c, *out, w]."""
    rank = len(places)
    index = torch.arange(input_shape[0], device="cpu").reshape(-1, *[1] * (2 * rank))  # [c, *out, *entries]
    valid = torch.ones((), dtype=torch.bool, device="cpu")
    for d, (place, n) in enumerate(zip(places, input_shape[1:], strict=True)):
        out, entries = ([1] * d + [size] + [1] * (rank - 1 - d) for size in place.shape)
        place = place.reshape(*out, *entries)
        valid = valid & (place >= 0)
        index = index * n + place
    windows = torch.where(valid, index, -1)
    return windows.reshape(*windows.shape[: rank + 1], -1)


class _Tree:
    """Nodes in place of one, named after it."""

    def __init__(self, node: Node) -> None:
        self.node, self.nodes = node, []  # type: tuple[Node, list[Node]]

    def add(self, op: Affine | Activation, *inputs: str) -> str:
        name = f"{self.node.name}__{len(self.nodes)}"
        self._put(name, f"{self.node.path}:{len(self.nodes)}", op, inputs)
        return name

    def finish(self, op: Affine, value: str) -> list[Node]:
        self._put(self.node.name, self.node.path, op, (value,))
        return self.nodes

    def _put(self, name: str, path: str, op: Affine | Activation, inputs: tuple[str, ...]) -> None:
        from optrelax.networks.graph import Node

        shape = op.shape if isinstance(op, Affine) else self.nodes[-1].shape
        self.nodes.append(Node(name, path, op, inputs, shape))
