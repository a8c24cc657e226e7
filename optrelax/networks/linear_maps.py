"""Affine ops with fixed or given coefficients: sums, products with a constant tensor, one matrix a dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from optrelax.networks.ops import Affine, Scale, Shape, Source, WeightedOp, lead_of, magnitude, wide
from optrelax.networks.storage import Settings, Tensors, stored
from optrelax.networks.views import normal_dim


@stored("sum")
class Sum(Affine):
    """Sum over dimensions, which remain with size 1 (keepdim) or go; divided by `divisor`, a mean."""

    def __init__(self, input_shape: Shape, dims: Sequence[int], keepdim: bool = False, divisor: float = 1.0) -> None:
        rank = len(input_shape)
        self.dims = tuple(sorted({normal_dim(d, rank) for d in dims}))
        self.keepdim, self.divisor = keepdim, float(divisor)
        self.input_shapes = (tuple(input_shape),)
        self._wide = tuple(1 if d in self.dims else n for d, n in enumerate(input_shape))
        self.shape = self._wide if keepdim else tuple(n for d, n in enumerate(input_shape) if d not in self.dims)
        self.fan_in = math.prod(input_shape[d] for d in self.dims)

    def linear(self, *xs: Tensor) -> Tensor:
        total = xs[0].sum([d - len(self._wide) for d in self.dims], self.keepdim) if self.dims else xs[0]
        return total if self.divisor == 1 else total / self.divisor

    def apply_abs(self, *rs: Tensor) -> Tensor:
        return self.linear(*rs) if self.divisor > 0 else -self.linear(*rs)

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        lead = lead_of(a, self.shape)
        a = a if self.divisor == 1 else a / self.divisor
        return (a.reshape(*lead, *self._wide).expand(*lead, *self.input_shapes[0]),)

    def describe(self) -> dict[str, object]:
        return {"dims": self.dims, "keepdim": self.keepdim, "divisor": self.divisor}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Sum:
        divisor = settings.number("divisor")
        if divisor == 0:
            raise ValueError("divisor: wants a number other than 0")
        return cls(shapes[0], settings.integers("dims"), settings.flag("keepdim"), divisor)


@stored("product")
class Product(WeightedOp):
    """Products with a constant tensor, summed over the letters that the output does not show.

    `value`, `constant` and `out` are subscripts of an einsum without the batch, one letter a dimension, each letter in
    two of the three or in all: `x @ W` of rows is ("ij", "jk", "ik"), `W @ x` is ("jk", "ij", "ik").
    """

    def __init__(self, input_shape: Shape, weight: Source, value: str, constant: str, out: str) -> None:
        w = weight()
        sizes: dict[str, int] = {}
        for letters, shape in ((value, tuple(input_shape)), (constant, tuple(w.shape))):
            if len(letters) != len(shape) or len(set(letters)) != len(letters):
                raise ValueError(f"Product: subscripts {letters!r} do not name the dimensions of shape {shape}")
            for letter, n in zip(letters, shape, strict=True):
                if sizes.setdefault(letter, n) != n:
                    raise ValueError(f"Product: a dimension is {sizes[letter]} in the value and {n} in the constant")
        for letters, others in ((value, constant + out), (constant, value + out), (out, value + constant)):
            if len(set(letters)) != len(letters) or not set(letters) <= set(others):
                raise ValueError(f"Product: every letter of {value!r}, {constant!r} -> {out!r} must be in two of them")
        self.value, self.constant, self.out = value, constant, out
        self.input_shapes, self.shape = (tuple(input_shape),), tuple(sizes[letter] for letter in out)
        self.fan_in = math.prod(sizes[letter] for letter in value if letter not in out)
        self.fan_out = math.prod(sizes[letter] for letter in out if letter not in value)
        self._weight = weight

    def linear(self, *xs: Tensor) -> Tensor:
        return torch.einsum(f"...{self.value},{self.constant}->...{self.out}", xs[0], self.weight(xs[0]))

    def apply_abs(self, *rs: Tensor) -> Tensor:
        weight = magnitude(self.weight(rs[0]))
        return torch.einsum(f"...{self.value},{self.constant}->...{self.out}", rs[0], weight)

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return (torch.einsum(f"...{self.out},{self.constant}->...{self.value}", a, self.weight(a)),)

    def describe(self) -> dict[str, object]:
        return {"value": self.value, "constant": self.constant, "out": self.out}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Product:
        value, constant, out = (settings.word(name) for name in ("value", "constant", "out"))
        if not all(letter.isascii() and letter.isalpha() for letter in value + constant + out):
            raise ValueError(f"subscripts: wants letters, got {value[:9]!r}, {constant[:9]!r} -> {out[:9]!r}")
        return cls(shapes[0], tensors.source("weight"), value, constant, out)


@stored("slope")
class Slope(Scale):
    """x times a slope a channel (or one for all), or with `rest` times what it lacks to 1; read at each use."""

    def __init__(self, shape: Shape, slope: Source, rest: bool = False) -> None:
        view = (-1, *[1] * (len(shape) - 1)) if slope().numel() > 1 else ()
        self._slope, self.rest = slope, rest

        def scale() -> Tensor:
            a = slope().reshape(view)
            return 1 - wide(a) if rest else a

        super().__init__(shape, scale, None)

    def describe(self) -> dict[str, object]:
        return {"rest": self.rest}

    def tensors(self) -> dict[str, Source]:
        return {"slope": self._slope}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Slope:
        return cls(shapes[0], tensors.source("slope"), settings.flag("rest"))


_MOST_GAIN = 2**20


@stored("separable")
class Separable(Affine):
    """One fixed matrix [out, in] on each of some dimensions: pooling means, interpolation.

    The matrices are kept in float64 and are, rounded to the dtype, the op itself.
    """

    def __init__(self, input_shape: Shape, matrices: Mapping[int, Tensor]) -> None:
        shape = list(input_shape)
        for d, matrix in matrices.items():
            if matrix.dim() != 2 or matrix.shape[1] != shape[d]:
                raise ValueError(f"Separable: matrix {tuple(matrix.shape)} on dimension {d} of {tuple(input_shape)}")
            shape[d] = matrix.shape[0]
        self.matrices = {d: matrix.detach().double().cpu() for d, matrix in matrices.items()}
        for dim in (0, 1):
            # What underflows in one product, by 2^-150 in float32, is multiplied by those that follow. The allowance
            # for underflow counts the least normal number, 2^24 times as much: it holds as long as they gain no more.
            gain = math.prod(float(m.abs().sum(dim).max()) for m in self.matrices.values() if m.numel())
            if not gain <= _MOST_GAIN:
                raise ValueError(f"Separable: sums of absolute coefficients may be {_MOST_GAIN} at most, got {gain:g}")
        self.input_shapes, self.shape = (tuple(input_shape),), tuple(shape)
        across, down = ([_most(matrix, dim) for matrix in self.matrices.values()] for dim in (1, 0))
        self.fan_in, self.fan_out = max(1, math.prod(across)), max(1, math.prod(down))
        # One sum a dimension, each of rounded terms: their relative errors add up.
        self.roundings = 2 + 2 * len(matrices) + sum(across) + sum(down)

    def _through(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        rank = len(self.shape)
        for d, matrix in self.matrices.items():
            m = change(matrix.to(x))
            if d == rank - 1:
                x = x @ m.mT
            elif d == rank - 2:
                x = m @ x
            else:
                x = (x.movedim(d - rank, -1) @ m.mT).movedim(-1, d - rank)
        return x

    def linear(self, *xs: Tensor) -> Tensor:
        return self._through(xs[0], lambda m: m)

    def apply_abs(self, *rs: Tensor) -> Tensor:
        return self._through(rs[0], torch.abs)

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return (self._through(a, lambda m: m.mT),)

    def describe(self) -> dict[str, object]:
        return {"dims": tuple(self.matrices)}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Separable:
        matrices = {
            d: tensors.source(f"matrix{d}", dims=2, dtypes=(torch.float64,))() for d in settings.integers("dims")
        }
        return cls(shapes[0], matrices)

    def tensors(self) -> dict[str, Source]:
        return {f"matrix{d}": (lambda m=matrix: m) for d, matrix in self.matrices.items()}  # type: ignore[misc]


def _most(matrix: Tensor, dim: int) -> int:
    """Most entries other than 0 along a dimension."""
    return int((matrix != 0).sum(dim).max()) if matrix.numel() else 0


def axis_matrix(function: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """The matrix [out, n] of a linear function of signals [batch, 1, n], in float64."""
    return function(torch.eye(n, dtype=torch.float64, device="cpu")[:, None])[:, 0].mT
