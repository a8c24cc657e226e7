"""Where the tangent through a point of a smooth function's graph touches it again, beyond one inflection.

For a cut c and a point c - d (or c + d) of the graph, the tangent touches at c + d r(d) (or c - d r(d)): r is tabulated
once a function, by cubics in log(1 + d), each held against roots that were sought at two more points. What a table does
not know - a corner, a far point, a cubic that misses - is sought where it is asked for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.networks.activations.bracketing import root
from optrelax.rounding import unit_roundoff

if TYPE_CHECKING:
    from optrelax.networks.activations.smooth import Smooth

_CELLS = 256
_REACH = 1e4  # greatest d that is tabulated
_SCALE = _CELLS / math.log1p(_REACH)
_NODES = (0.1, 0.35, 0.65, 0.9)  # of a cell; inside, since at d = 0 r is a limit
_PROBES = (0.02, 0.5)


def tolerance(dtype: torch.dtype) -> float:
    """Distance from a point of tangency at which a line is off by rounding alone: what it misses is its square."""
    return float(unit_roundoff(dtype) ** 0.5 / 8)


def sought(f: Smooth, anchor: Tensor, a: Tensor, b: Tensor, start: Tensor, within: float) -> Tensor:
    """Where in [a, b] the tangent goes through the graph at the anchor, by search; b where it never does.

    start: the sign of f'(t) (t - anchor) - (f(t) - f(anchor)) at a.
    """

    def missed(t: Tensor, at: Tensor, value: Tensor) -> Tensor:
        return f.derivative(t) * (t - at) - (f(t) - value)

    return root(missed, a, b, (anchor, f(anchor)), start, within, f.unit)


class TangencyTable:
    """The points of tangency of one function, [cuts, sides, cells] cubics: side 0 for anchors on the left of a cut."""

    def __init__(self, f: Smooth) -> None:
        none = torch.full((_CELLS, 4), torch.nan, dtype=torch.float64, device="cpu")
        cubics = [
            none if 0 in kinds else self._cubics(f, i, side) for i, kinds in enumerate(_sides(f)) for side in (0, 1)
        ]
        nowhere = none[:1]
        self._cubics_of = {torch.float64: torch.cat([*cubics, nowhere])}
        self.cuts = len(f.cuts)

    @staticmethod
    def _cubics(f: Smooth, i: int, side: int) -> Tensor:
        """Of one cut and side, [cells, 4]; NaN where a cubic misses."""
        at = torch.tensor([*_NODES, *_PROBES], dtype=torch.float64, device="cpu")
        cell = torch.arange(_CELLS, dtype=torch.float64, device="cpu")[:, None]
        d = torch.expm1((cell + at) / _SCALE)
        way = 1.0 - 2.0 * side
        cut, beyond = f.cuts[i], [*f.cuts, *f.domain][_next(f, i, side)]
        # To the end of the stretch, or as far as steep functions are numbers.
        reach = torch.full_like(d, way * (beyond - cut)) if math.isfinite(beyond) else _far(d)
        a, b, anchor = torch.full_like(d, cut), cut + way * reach, cut - way * d
        # The tangent at the cut runs below the graph on a convex side.
        found = sought(f, anchor, a, b, torch.full_like(d, float(f.curvature[i + side])), 1e-11)
        never = (f.derivative(b) * (b - anchor) - (f(b) - f(anchor))) * f.curvature[i + side] >= 0
        found = torch.where((found != b) | never, found, torch.nan)
        ratio = way * (found - cut) / d
        powers = at[:, None] ** torch.arange(4, dtype=torch.float64, device="cpu")
        cubics = torch.linalg.solve(powers[:4], ratio[:, :4].mT).mT
        missed = ((cubics @ powers[4:].mT) - ratio[:, 4:]).abs() * d[:, 4:]
        good = missed.amax(1) <= 4 * tolerance(torch.float64) * (cut + d[:, 5] * ratio[:, 5]).abs().clamp_min(1)
        return torch.where(good[:, None], cubics, torch.nan)

    def __call__(self, anchor: Tensor, cut: Tensor, which: Tensor, end: Tensor) -> Tensor:
        """The point of tangency between cut `which` and `end`, which is it where none is; NaN where that is unknown."""
        d = (anchor - cut).abs()
        z = torch.log1p(d) * _SCALE
        cell = z.nan_to_num(torch.inf).clamp_max(_CELLS).long()
        on_left = anchor <= cut
        row = torch.where(cell < _CELLS, (2 * which + (~on_left).long()) * _CELLS + cell, 2 * self.cuts * _CELLS)
        c0, c1, c2, c3 = self._of(anchor)[row].unbind(-1)
        z = z - cell
        way = d * (c0 + z * (c1 + z * (c2 + z * c3)))
        most, unsure = (end - cut).abs(), 0.99 * _far(d)
        way = torch.where((way > unsure) & (most > unsure), torch.nan, torch.minimum(way, most))
        return torch.where(on_left, cut + way, cut - way)

    def _of(self, like: Tensor) -> Tensor:
        """Cubics in a type and on a device."""
        if like.device.type != "cpu":
            return self._cubics_of[torch.float64].to(like)
        if like.dtype not in self._cubics_of:
            self._cubics_of[like.dtype] = self._cubics_of[torch.float64].to(like.dtype)
        return self._cubics_of[like.dtype]


def _far(d: Tensor) -> Tensor:
    """How far a point of tangency is sought in a stretch that has no end."""
    return (2 * d).clamp_min(50.0)


def _sides(f: Smooth) -> list[tuple[int, int]]:
    return list(zip(f.curvature[:-1], f.curvature[1:], strict=True))


def _next(f: Smooth, i: int, side: int) -> int:
    """Where in [*cuts, low, high] the end of the stretch beyond cut i is."""
    if side == 0:
        return i + 1 if i + 1 < len(f.cuts) else len(f.cuts) + 1
    return i - 1 if i > 0 else len(f.cuts)


def touch(
    f: Smooth,
    which: Tensor | None,
    cut: Tensor,
    anchor: Tensor,
    a: Tensor,
    b: Tensor,
    start: Tensor,
    mixed: Tensor,
) -> Tensor:
    """As `sought` in [a, b], an end of which is a cut: off the table where it knows; a where the cut is not inside."""
    within = tolerance(a.dtype)
    if which is None:
        return sought(f, anchor, a, b, start, within)
    t = torch.where(mixed, f.tangencies(anchor, cut, which, torch.where(anchor <= cut, b, a)), a)
    index = t.isnan().nonzero(as_tuple=True)
    if not len(index[0]):
        return t
    return t.index_put(index, sought(f, anchor[index], a[index], b[index], start[index], within))
