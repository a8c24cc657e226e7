"""Lines of a smooth function that slide along its envelope: a point of tangency of one's own choice.

The envelope of one side follows the function over one stretch, and a chord elsewhere. A share in [0, 1] of the way
through that stretch is a tangent; at the end where the chord begins it is the chord. No other line of that side is of
use: each lies beyond one of these over the whole interval.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.networks.activations.contract import Line
from optrelax.networks.activations.supporting import Supports, Touching

if TYPE_CHECKING:
    from optrelax.networks.activations.smooth import Smooth


def sliding_line(f: Smooth, l: Tensor, u: Tensor, share: Tensor, sign: float) -> tuple[Line, Tensor]:
    """The line above (sign 1) or below (-1) at a share, and where there is one: not over several inflections.

    l, u, share: alike.  Sound: yes, where it is.  Gradient: in the share, and in l and u with points of tangency held.
    """
    supports = Supports(f, l, u)
    touching, low, high, curved = _stretch(supports, sign)
    x = torch.where(curved, torch.lerp(low, high, share), supports.m)
    begins = ((x == touching.p) & (x != supports.l)) | ((x == touching.q) & (x != supports.u))
    steep = f.derivative(x)
    chord = supports.chord(touching.p, touching.q)
    slope = torch.where(curved, steep + torch.where(begins, chord - steep.detach(), 0.0), chord)
    points = [x] if supports.single is None else [*map(supports.attached, (touching.p, touching.q)), x]
    line = supports.known(supports.line(slope, sign, tuple(points)))
    there = torch.ones_like(curved) if supports.several is None else ~supports.several
    return line, there.reshape(supports.shape)


def closest_share(f: Smooth, l: Tensor, u: Tensor, sign: float) -> Tensor:
    """The share of the line that encloses the least area: in the middle, or the chord over it."""
    with torch.no_grad():
        supports = Supports(f, l, u)
        _, low, high, curved = _stretch(supports, sign)
        x = torch.minimum(torch.maximum(supports.m, low), high)
        wide = curved & (high > low)
        share = (x - low) / torch.where(wide, high - low, 1.0)
        return torch.where(wide, share, 0.5).nan_to_num(0.5).clamp(0, 1).reshape(supports.shape)


def _stretch(supports: Supports, sign: float) -> tuple[Touching, Tensor, Tensor, Tensor]:
    """The chord of a side, both ends of where its envelope follows the function, and where it does at all."""
    with torch.no_grad():
        touching = supports.over_one_cut(sign)
    low = torch.where(touching.at_l, supports.l, touching.q)
    high = torch.where(touching.at_u, supports.u, touching.p)
    return touching, low, high, touching.at_l | touching.at_u
