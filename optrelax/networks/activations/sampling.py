"""What is said of a smooth function, held against samples of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from optrelax.networks.activations.smooth import Smooth

_TOLERANCE = 1e-7
"""Relative, in float64: of a derivative whose terms cancel."""


def require_smooth(f: Smooth) -> None:
    """ValueError where samples contradict what an activation says: derivative, inflections, extrema, poles, period."""
    x = _samples(f)
    with torch.enable_grad():
        at = x.clone().requires_grad_()
        y = f(at)
        if y.shape != x.shape:
            raise ValueError(f"{f.name}: makes {tuple(y.shape)} of {tuple(x.shape)}, which is not elementwise")
        if not y.requires_grad:
            raise ValueError(f"{f.name}: the function cannot be differentiated, so its derivative cannot be checked")
        (true,) = torch.autograd.grad(y.sum(), at)
    if not any(f.curvature):
        raise ValueError(f"{f.name}: is straight between its inflections; make it a PiecewiseLinear")
    with torch.no_grad():
        said = f.derivative(x)
        size = torch.maximum(true.abs(), said.abs())
        _require(f, x, y.detach().isfinite(), "is not finite; give its domain or poles")
        near = (said - true).abs() <= _TOLERANCE * (1 + size)
        _require(f, x, near, "has another derivative than is said", said, true)
        _require_bends(f, x, said)
        _require_turns(f, x, said)
        if f.period is not None:
            again = f(x + 2 * f.period)
            _require(f, x, (again - y).abs() <= 1e-9 * (1 + x.abs()), "does not repeat after two periods", y, again)


def _samples(f: Smooth) -> Tensor:
    """Points around every break, ascending, inside of the domain; none is a break."""
    steps = torch.logspace(-3, 2, 101, dtype=torch.float64, device="cpu")
    low, high = f.domain
    around = [*f.breaks, *(end for end in f.domain if abs(end) != torch.inf), 0.0]
    x = torch.cat([at + sign * steps for at in around for sign in (-1, 1)]).unique()
    inside = (x > low) & (x < high)
    for at in (*f.breaks, low, high):
        inside &= (x - at).abs() > 5e-4
    return x[inside]


def _require(
    f: Smooth, x: Tensor, good: Tensor, what: str, said: Tensor | None = None, got: Tensor | None = None
) -> None:
    if bool(good.all()):
        return
    at = int((~good).nonzero()[0])
    numbers = "" if said is None or got is None else f": {float(said[at]):g} and {float(got[at]):g}"
    raise ValueError(f"{f.name}: at {float(x[at]):g} the function {what}{numbers}")


def _require_bends(f: Smooth, x: Tensor, slope: Tensor) -> None:
    """The derivative rises or falls throughout a stretch, and has no jump but where one side is straight."""
    cuts = torch.tensor(f.cuts, dtype=x.dtype, device="cpu")
    if f.period is None:
        stretch = torch.searchsorted(cuts, x)
        curvature = torch.tensor(f.curvature, dtype=x.dtype, device="cpu")[stretch]
    else:
        stretch = torch.floor((x - f.inflections[0]) / f.period)
        curvature = f.curvature[0] * (1 - 2 * torch.remainder(stretch, 2))
    same = stretch[1:] == stretch[:-1]
    change = slope[1:] - slope[:-1]
    slack = _TOLERANCE * (1e-3 + torch.maximum(slope[1:].abs(), slope[:-1].abs()))
    good = ~same | torch.where(curvature[1:] == 0, change.abs() <= slack, curvature[1:] * change >= -slack)
    _require(f, x[1:], good, "bends the other way than its inflections say")
    for i, c in enumerate(f.inflections if f.period is None else ()):
        if 0 in f.curvature[f.cuts.index(c) : f.cuts.index(c) + 2]:
            continue
        ends = torch.tensor([c - 1e-7, c + 1e-7], dtype=x.dtype, device="cpu")
        left, right = f.derivative(ends).tolist()
        if abs(left - right) > 1e-4 * (1 + abs(left)):
            raise ValueError(f"{f.name}: the derivative jumps at inflection {i}, {c:g}, from {left:g} to {right:g}")


def _require_turns(f: Smooth, x: Tensor, slope: Tensor) -> None:
    """The derivative changes its sign at extrema and poles alone, and is 0 at extrema."""
    turns = torch.tensor(sorted({*f.extrema, *f.poles}), dtype=x.dtype, device="cpu")
    part = torch.searchsorted(turns, x) if f.period is None else torch.floor((x - f.extrema[0]) / f.period)
    slack = _TOLERANCE * 1e-3
    good = (part[1:] != part[:-1]) | (slope[1:] * slope[:-1] >= -slack)
    _require(f, x[1:], good, "turns where no extremum is said")
    for at in f.extrema:
        steep = float(f.derivative(torch.tensor(at, dtype=x.dtype, device="cpu")))
        if abs(steep) > 1e-9:
            raise ValueError(f"{f.name}: at the extremum {at:g} the derivative is {steep:g}, not 0")
