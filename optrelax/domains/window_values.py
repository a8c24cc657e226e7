"""Maps cut into windows, products with them, and coefficients from one frame of a node in another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from optrelax.domains.frames import Frame, Seen
from optrelax.kernels.window_step import gather, scatter
from optrelax.networks.ops import flatten_from
from optrelax.regions import InputBox

if TYPE_CHECKING:
    from optrelax.domains.row_walks import Rows


def see(t: Tensor, frame: Frame, walk: Rows) -> Tensor:
    """Windows of a map, one a place: [batch or none, c, high, wide] -> [examples, high, wide, c]; whole: not cut."""
    maps = t.reshape(-1, *t.shape[-3:]).permute(0, 2, 3, 1)
    if frame.whole:
        return maps
    assert walk.places is not None
    return gather(maps, frame.corners(walk.places), frame.size).flatten(0, 1)


def dot(a: Tensor, seen: Tensor, walk: Rows) -> Tensor:
    """Rows times vectors of their examples, as the walk keeps constants: [batch or 1, all rows of an example]."""
    rows, vector = flatten_from(a, 2), flatten_from(seen, 1)
    if rows.shape[0] == 1:
        found = vector @ rows[0].mT
    elif vector.shape[0] in (1, rows.shape[0]):
        found = (rows @ vector[..., None])[..., 0]
    else:  # one of them is that of the places, the same in every example
        places = min(rows.shape[0], vector.shape[0])
        found = (rows.unflatten(0, (-1, places)) @ vector.unflatten(0, (-1, places))[..., None])[..., 0].flatten(0, 1)
    return fold(found, walk)


def fold(found: Tensor, walk: Rows) -> Tensor:
    """[examples, k] -> [batch or 1, places * k]."""
    count = walk.constant.shape[1]
    if found.shape[1] == count:
        return found
    places = count // found.shape[1]
    return (found.expand(places, -1) if found.shape[0] == 1 else found).reshape(-1, count)


def adapt(a: Tensor, seen: Seen, wanted: Seen, walk: Rows) -> Tensor:
    """Coefficients from one frame of a node in another of it."""
    if wanted != "rows" and not wanted.whole:
        assert seen != "rows"
        if (seen.offset, seen.size) == (wanted.offset, wanted.size):
            return a
        (top, left), (bottom, right) = (
            tuple(sign * (p - q) for p, q in zip(ours, theirs, strict=True))
            for sign, ours, theirs in (
                (1, seen.offset, wanted.offset),
                (-1, _end(seen), _end(wanted)),
            )
        )
        return F.pad(a, (0, 0, left, right, top, bottom))
    if seen == "rows":
        return a.permute(0, 1, 3, 4, 2) if wanted != "rows" else a
    if not seen.whole:
        a = _spread_out(a, seen, walk)
    return a if wanted != "rows" else a.permute(0, 1, 4, 2, 3)


def _end(frame: Frame) -> tuple[int, int]:
    return frame.offset[0] + frame.size[0], frame.offset[1] + frame.size[1]


def _spread_out(a: Tensor, frame: Frame, walk: Rows) -> Tensor:
    """Windows as whole images: [examples, k, *size, c] -> [batch or 1, places * k, *image, c]."""
    assert walk.places is not None
    places, k = walk.places.shape[1], a.shape[1]
    if a.shape[0] == 1:
        a = a.expand(places * walk.places.shape[0], *a.shape[1:])
    corners = frame.corners(walk.places)
    corners = corners.repeat(a.shape[0] // (corners.shape[0] * places), 1, 1).reshape(-1, 1, 1, 2)
    corners = corners.expand(-1, k, 1, 2).reshape(-1, 1, 2)
    maps = scatter(a.reshape(-1, 1, *a.shape[2:]), corners, frame.image, a.shape[0] * k)
    return maps.reshape(-1, places * k, *maps.shape[1:])


def each(a: Tensor, examples: int) -> Tensor:
    """Rows of every example, where only the places have their own; shared by all they stay shared."""
    return a if a.shape[0] in (1, examples) else a.repeat(examples // a.shape[0], *[1] * (a.dim() - 1))


def over_box(extreme: Callable[..., Any], a: Tensor, frame: Frame, region: InputBox, walk: Rows) -> Any:
    """Extremes over the region of rows that have reached the input."""
    l, u = see(region.lower, frame, walk), see(region.upper, frame, walk)
    found = extreme(each(a, l.shape[0]), l, u)
    return tuple(fold(t, walk) for t in found) if isinstance(found, tuple) else fold(found, walk)
