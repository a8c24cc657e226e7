"""Passes over vectors of an ascent layer by layer, one a layer and direction: eager, or compiled (`ascent.c`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from optrelax.kernels import native
from optrelax.layers.ascent.schedule import FIRST, SECOND, Rates, climbed, tiny


class LayerLines(NamedTuple):
    """Of one layer of each example, [E, n]: lower slope at weight 0, what weight 1 adds, upper slope and intercept."""

    flat: Tensor
    spread: Tensor
    slope: Tensor
    intercept: Tensor


@dataclass(slots=True)
class Layer:
    """What an ascent knows about the weights of one layer, [R, n] each."""

    w: Tensor
    best: Tensor
    on_lower: Tensor
    best_on_lower: Tensor
    moment: Tensor
    square: Tensor

    @staticmethod
    def at(w: Tensor) -> Layer:
        """At the start."""
        return Layer(w.clone(), w.clone(), *(torch.zeros_like(w) for _ in range(4)))

    def select(self, index: Tensor) -> Layer:
        """Some of the problems."""
        return Layer(*(getattr(self, name)[index] for name in Layer.__slots__))


class EagerPasses:
    """The passes over vectors in PyTorch's operations, on any device."""

    def __init__(self, example: Tensor, lines: Sequence[LayerLines], center: Tensor, radius: Tensor) -> None:
        self.lines = [LayerLines(*(t[example] for t in of)) for of in lines]
        self.center, self.radius = center[example], radius[example]

    def backward(self, t: int, A: Tensor, w: Tensor, m: Tensor, nu: Tensor, before: Tensor, value: Tensor) -> None:
        """Coefficients A of a layer's values become those of its pre-activations, nu; value gains the intercepts."""
        flat, spread, slope, intercept = self.lines[t]
        up = A.relu()
        down = A - up
        torch.addcmul(up * torch.addcmul(flat, spread, w), down, slope, out=nu)
        torch.add(before, torch.linalg.vecdot(down, intercept) + nu @ m, out=value)

    def corner(self, a: Tensor, rate: float, v: Tensor, mean: Tensor, value: Tensor, best: Tensor) -> Tensor:
        """The corner v of the box with the least a.v, its average, and where the value is the best so far."""
        torch.sub(self.center, torch.copysign(self.radius, a), out=v)
        mean.lerp_(v, rate)
        value += torch.linalg.vecdot(a, v)
        better = value > best
        best.copy_(torch.where(better, value, best))
        return better

    def forward(
        self,
        t: int,
        p: Tensor,
        m: Tensor,
        A: Tensor,
        state: Layer,
        y: Tensor,
        mean: Tensor | None,
        better: Tensor,
        rates: Rates,
    ) -> None:
        """Values y of a layer on the lines its coefficients took; averages; the step of Adam on its weights."""
        flat, spread, slope, intercept = self.lines[t]
        index = better.nonzero()[:, 0]
        state.best[index] = state.w[index]
        if mean is not None:
            mean.lerp_(p, rates.average)
        z = p + m
        up = A.relu()
        lower = up.sign()
        low = torch.addcmul(flat, spread, state.w) * z
        torch.lerp(torch.addcmul(intercept, slope, z), low, lower, out=y)
        state.on_lower.lerp_(lower, rates.average)
        state.w = climbed(state.w, up * spread * z, state.moment, state.square, rates.correction, rates.step)

    def primal(self, t: int, p: Tensor, m: Tensor, on_lower: Tensor, y: Tensor) -> None:
        """Feasible values y: from the hull's floor up by the share of iterations that took the upper line."""
        flat, spread, slope, intercept = self.lines[t]
        z = p + m
        low = torch.maximum(flat * z, (flat + spread) * z)
        torch.addcmul(low, 1 - on_lower, torch.addcmul(intercept, slope, z) - low, out=y)


class NativePasses:
    """The same, compiled: each reads and writes its vectors once."""

    def __init__(
        self, kernels: native.Build, example: Tensor, lines: Sequence[LayerLines], center: Tensor, radius: Tensor
    ) -> None:
        self.kernels, self.example = kernels, example.contiguous()
        self.lines = lines
        self.center, self.radius = center, radius
        self.dtype, self.count = center.dtype, len(center)

    def backward(self, t: int, A: Tensor, w: Tensor, m: Tensor, nu: Tensor, before: Tensor, value: Tensor) -> None:
        """As `EagerPasses.backward`."""
        of = self.lines[t]
        self.kernels.call("backward", self.dtype, *A.shape, self.count, self.example, A, w, *of, m, nu, before, value)

    def corner(self, a: Tensor, rate: float, v: Tensor, mean: Tensor, value: Tensor, best: Tensor) -> Tensor:
        """As `EagerPasses.corner`."""
        better = torch.empty(len(a), dtype=torch.bool, device=a.device)
        box = (self.center, self.radius)
        self.kernels.call(
            "corner", self.dtype, *a.shape, self.count, self.example, a, *box, rate, v, mean, value, best, better
        )
        return better

    def forward(
        self,
        t: int,
        p: Tensor,
        m: Tensor,
        A: Tensor,
        state: Layer,
        y: Tensor,
        mean: Tensor | None,
        better: Tensor,
        rates: Rates,
    ) -> None:
        """As `EagerPasses.forward`."""
        given = (*p.shape, self.count, self.example, p, m, A, state.w, *self.lines[t], y, state.on_lower, mean)
        adam = (state.moment, state.square, better, state.best, FIRST, SECOND, rates.correction, rates.step)
        self.kernels.call("forward", self.dtype, *given, rates.average, *adam, tiny(self.dtype))

    def primal(self, t: int, p: Tensor, m: Tensor, on_lower: Tensor, y: Tensor) -> None:
        """As `EagerPasses.primal`."""
        self.kernels.call("primal", self.dtype, *p.shape, self.count, self.example, p, m, *self.lines[t], on_lower, y)


Passes = EagerPasses | NativePasses


_SIGNATURES = (
    "backward(R, n, E, int64 example[R], A[R * n], w[R * n], flat[E * n], spread[E * n], slope[E * n], "
    "intercept[E * n], m[n], nu[R * n], before[R], value[R])",
    "corner(R, d, E, int64 example[R], a[R * d], center[E * d], radius[E * d], double rate, v[R * d], mean[R * d], "
    "value[R], best[R], bool better[R])",
    "forward(R, n, E, int64 example[R], p[R * n], m[n], A[R * n], w[R * n], flat[E * n], spread[E * n], slope[E * n], "
    "intercept[E * n], y[R * n], on_lower[R * n], mean?[R * n], double average, moment[R * n], square[R * n], "
    "bool better[R], best[R * n], double first, double second, double correction, double step, double tiny)",
    "primal(R, n, E, int64 example[R], p[R * n], m[n], flat[E * n], spread[E * n], slope[E * n], intercept[E * n], "
    "on_lower[R * n], y[R * n])",
)


@functools.cache
def kernels() -> native.Build:
    """The compiled passes, or why there are none."""
    return native.build(Path(__file__).with_name("ascent.c"), *_SIGNATURES)


def passes(example: Tensor, lines: Sequence[LayerLines], center: Tensor, radius: Tensor) -> Passes:
    """Compiled passes where they work, eager ones elsewhere."""
    found = kernels()
    if found.supports(center):
        return NativePasses(found, example, lines, center, radius)
    return EagerPasses(example, lines, center, radius)
