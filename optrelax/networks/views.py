"""Ops that move numbers: each output reads one entry of the inputs, or a constant.

Permuting, slicing and padding with zeros, joining and repeating are PyTorch's own views and copies; whatever else only
moves numbers (strided slices, constant indices, flips, reflecting pads) is a `Gather`, whose index is found by moving
the numbers 0, 1, 2, ... the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.networks.ops import EntryMap, Shape, Source, flatten_from, lead_of
from optrelax.networks.storage import Settings, Tensors, stored


def normal_dim(dim: int, rank: int) -> int:
    """A dimension counted from the front; ValueError outside of the shape."""
    if not -rank <= dim < rank:
        raise ValueError(f"dimension {dim} of a value with {rank} dimensions beside the batch")
    return dim % rank


@stored("permute")
class Permute(EntryMap):
    """Dimensions in another order: dims[i] is the input's dimension that output dimension i shows."""

    diagonal = True

    def __init__(self, input_shape: Shape, dims: Sequence[int]) -> None:
        if sorted(dims) != list(range(len(input_shape))):
            raise ValueError(f"cannot permute {len(input_shape)} dimensions by {tuple(dims)}")
        self.dims = tuple(int(d) for d in dims)
        self.input_shapes = (tuple(input_shape),)
        self.shape = tuple(input_shape[d] for d in self.dims)

    def _moved(self, x: Tensor, dims: Sequence[int]) -> Tensor:
        lead = x.dim() - len(dims)
        return x.permute(*range(lead), *(lead + d for d in dims))

    def linear(self, *xs: Tensor) -> Tensor:
        return self._moved(xs[0], self.dims)

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return (self._moved(a, [self.dims.index(d) for d in range(len(self.dims))]),)

    def describe(self) -> dict[str, object]:
        return {"dims": self.dims}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Permute:
        return cls(shapes[0], settings.integers("dims"))


@stored("pad")
class Pad(EntryMap):
    """Zeros around a value, or a slice of it: amounts[i] = (before, after) of dimension i; negative ones cut off."""

    diagonal = True

    def __init__(self, input_shape: Shape, amounts: Sequence[tuple[int, int]]) -> None:
        if len(amounts) != len(input_shape):
            raise ValueError(f"Pad: {len(amounts)} pairs for an input of shape {input_shape}")
        self.amounts = tuple((int(before), int(after)) for before, after in amounts)
        self.input_shapes = (tuple(input_shape),)
        self.shape = tuple(n + sum(pair) for n, pair in zip(input_shape, self.amounts, strict=True))
        if any(n + min(0, a) + min(0, b) < 0 for n, (a, b) in zip(input_shape, self.amounts, strict=True)):
            raise ValueError(f"Pad: cannot cut {self.amounts} off an input of shape {input_shape}")

    @classmethod
    def slicing(cls, input_shape: Shape, dim: int, start: int, stop: int) -> Pad:
        """Entries start to stop of one dimension."""
        n = input_shape[dim]
        return cls(input_shape, [(-start, stop - n) if d == dim else (0, 0) for d in range(len(input_shape))])

    def _padded(self, x: Tensor, sign: int) -> Tensor:
        lead = x.dim() - len(self.amounts)
        if all(sign * n <= 0 for pair in self.amounts for n in pair):  # a view
            for d, (before, after) in enumerate(self.amounts, start=lead):
                before, after = -sign * before, -sign * after
                x = x.narrow(d, before, x.shape[d] - before - after)
            return x
        return F.pad(x, [sign * n for pair in reversed(self.amounts) for n in pair])

    def linear(self, *xs: Tensor) -> Tensor:
        return self._padded(xs[0], 1)

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return (self._padded(a, -1),)

    def describe(self) -> dict[str, object]:
        return {"before": [before for before, _ in self.amounts], "after": [after for _, after in self.amounts]}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Pad:
        before, after = (settings.integers(name, len(shapes[0]), least=-settings.most) for name in ("before", "after"))
        return cls(shapes[0], list(zip(before, after, strict=True)))


@stored("concatenate")
class Concatenate(EntryMap):
    """Values behind one another along a dimension."""

    def __init__(self, input_shapes: Sequence[Shape], dim: int) -> None:
        self.input_shapes = tuple(tuple(shape) for shape in input_shapes)
        first, *others = self.input_shapes
        self.dim = normal_dim(dim, len(first))
        self.sizes = [shape[self.dim] for shape in self.input_shapes if len(shape) == len(first)]
        self.shape = (*first[: self.dim], sum(self.sizes), *first[self.dim + 1 :])
        for shape in others:
            if (*shape[: self.dim], self.shape[self.dim], *shape[self.dim + 1 :]) != self.shape:
                raise ValueError(f"cannot concatenate {first} and {shape} along dimension {self.dim}")

    def linear(self, *xs: Tensor) -> Tensor:
        rank = len(self.shape)
        leads = [lead_of(x, self.shape) for x in xs]
        if len(set(leads)) > 1:  # rows that all examples share beside rows of each
            lead = torch.broadcast_shapes(*leads)
            xs = tuple(x.expand(*lead, *x.shape[-rank:]) for x in xs)
        return torch.cat(xs, self.dim - rank)

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return a.split(self.sizes, self.dim - len(self.shape))

    def describe(self) -> dict[str, object]:
        return {"dim": self.dim}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Concatenate:
        return cls(shapes, settings.integer("dim"))


@stored("expand")
class Expand(EntryMap):
    """A value repeated along dimensions of size 1, or along new ones in front: broadcasting."""

    def __init__(self, input_shape: Shape, shape: Shape) -> None:
        self.input_shapes, self.shape = (tuple(input_shape),), tuple(shape)
        if len(input_shape) > len(shape) or torch.broadcast_shapes(input_shape, shape) != torch.Size(shape):
            raise ValueError(f"cannot expand {tuple(input_shape)} to {tuple(shape)}")
        self._new = len(shape) - len(input_shape)
        wide = (*[1] * self._new, *input_shape)
        self._repeated = [
            d - len(shape) for d, (n, m) in enumerate(zip(wide, shape, strict=True)) if n != m or d < self._new
        ]
        self.diagonal = math.prod(self.shape) == math.prod(self.input_shapes[0])
        self.fan_out = math.prod(self.shape[d] for d in self._repeated)

    def linear(self, *xs: Tensor) -> Tensor:
        x = xs[0]
        lead = lead_of(x, self.input_shapes[0])
        return x.reshape(*lead, *[1] * self._new, *self.input_shapes[0]).expand(*lead, *self.shape)

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        total = a.sum(self._repeated, keepdim=True) if self._repeated else a
        return (total.reshape((*lead_of(a, self.shape), *self.input_shapes[0])),)

    def describe(self) -> dict[str, object]:
        return {"shape": self.shape}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Expand:
        return cls(shapes[0], settings.integers("shape"))


@stored("gather")
class Gather(EntryMap):
    """Output entry i is the input's entry index[i], counted in the order of memory, or 0 where index[i] is -1."""

    def __init__(self, input_shape: Shape, index: Tensor) -> None:
        self.input_shapes, self.shape = (tuple(input_shape),), tuple(index.shape)
        n = math.prod(input_shape)
        flat = index.reshape(-1).long().cpu()
        if flat.numel() and not (int(flat.min()) >= -1 and int(flat.max()) < n):
            raise ValueError(f"Gather: index outside of -1 .. {n - 1} for an input of shape {tuple(input_shape)}")
        self.index = flat
        readers = torch.bincount(flat[flat >= 0], minlength=n)
        self.fan_out = int(readers.max()) if n else 0
        self.diagonal = self.fan_out <= 1
        self._holes = bool((flat < 0).any())

    def linear(self, *xs: Tensor) -> Tensor:
        flat = flatten_from(xs[0], xs[0].dim() - len(self.input_shapes[0]))
        if self._holes:
            flat = F.pad(flat, (0, 1))
        index = self.index.to(flat.device)
        if self._holes:
            index = torch.where(index < 0, flat.shape[-1] - 1, index)
        lead = flat.shape[:-1]
        return flat.gather(-1, index.expand(*lead, -1)).reshape((*lead, *self.shape))

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        flat = flatten_from(a, a.dim() - len(self.shape))
        lead, n = flat.shape[:-1], math.prod(self.input_shapes[0])
        index = self.index.to(flat.device)
        index = torch.where(index < 0, n, index) if self._holes else index
        found = flat.new_zeros(*lead, n + self._holes).scatter_add(-1, index.expand(*lead, -1), flat)
        return (found[..., :n].reshape((*lead, *self.input_shapes[0])),)

    def describe(self) -> dict[str, object]:
        return {"shape": self.shape}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Gather:
        index = tensors.source("index", dims=1, dtypes=(torch.int64,))
        return cls(shapes[0], index().reshape(settings.integers("shape")))

    def tensors(self) -> dict[str, Source]:
        return {"index": lambda: self.index}
