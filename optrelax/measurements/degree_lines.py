"""Degrees of the lines around a neuron, and of what they are at a point, read off their numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optrelax.measurements.rationals import Ratio
from optrelax.measurements.tracked import Arithmetic, Tracked
from optrelax.networks.activations import PiecewiseLinear
from optrelax.relaxations import name_of
from optrelax.relaxations.base import LineRelaxation

__all__ = ["LineDegrees", "NeuronBounds", "Sides"]

Sides = tuple[tuple[Tracked, Tracked], tuple[Tracked, Tracked]]
"""Slope and intercept of the line below and of the line above."""


@dataclass(frozen=True, slots=True)
class NeuronBounds:
    """Pre-activation bounds of one node, [n] each."""

    l: Tracked
    u: Tracked


@dataclass(slots=True, kw_only=True)
class LineDegrees(Arithmetic):
    """The arithmetic of activations of one kink and of lines around them."""

    def image(self, op: PiecewiseLinear, end: Tracked) -> Tracked:
        """A monotone activation's value at an end."""
        if not op.monotone:
            raise ValueError(f"step_degrees: has no rule for {op.name} under box")
        slope, intercept = (t.numpy() for t in op.piece(torch.from_numpy(end.value)))
        return self.plus(self.scaled(self.constant(slope), end), self.constant(intercept))

    def sides(self, relaxation: LineRelaxation, op: PiecewiseLinear, before: NeuronBounds) -> Sides:
        """Degrees of the relaxation's own lines, read off their numbers: constant slopes, or parts of the chord's."""
        l, u = (torch.from_numpy(end.value) for end in (before.l, before.u))
        lines = relaxation.lines(op, l, u)
        sides = []
        chords: dict[int, Ratio] = {}  # one factor a neuron: both of its lines share it
        for slope, intercept in (
            (lines.lower_slope, lines.lower_intercept),
            (lines.upper_slope, lines.upper_intercept),
        ):
            slopes = np.empty(len(l), dtype=object)
            intercepts = np.empty(len(l), dtype=object)
            for i in range(len(l)):
                ends = before.l.ratio[i], before.u.ratio[i]
                slopes[i] = self._slope(relaxation, op, float(slope[i]), float(l[i]), float(u[i]), ends, chords, i)
                intercepts[i] = self._intercept(op, float(slope[i]), slopes[i], float(intercept[i]), l[i], u[i], ends)
            sides.append((Tracked(slope.numpy(), slopes), Tracked(intercept.numpy(), intercepts)))
        return sides[0], sides[1]

    def _slope(
        self,
        relaxation: LineRelaxation,
        op: PiecewiseLinear,
        slope: float,
        l: float,
        u: float,
        ends: tuple[Ratio | None, Ratio | None],
        chords: dict[int, Ratio],
        place: int,
    ) -> Ratio | None:
        if slope == 0:
            return None
        if slope in op.slopes:
            return Ratio(0)
        chord = float(
            op.chord_slope(
                torch.tensor([l], dtype=torch.float64, device="cpu"),
                torch.tensor([u], dtype=torch.float64, device="cpu"),
            )
        )
        share = slope / chord
        if not any(math.isclose(share, known, rel_tol=1e-12) for known in relaxation.chord_shares):
            raise ValueError(f"step_degrees: the lines of {name_of(relaxation)} are not rational in the bounds")
        if place not in chords:
            chords[place] = self.factors.share(ends[1] or Ratio(0), ends[0] or Ratio(0))
        return chords[place]

    def _intercept(
        self,
        op: PiecewiseLinear,
        slope: float,
        ratio: Ratio | None,
        intercept: float,
        l: Tensor,
        u: Tensor,
        ends: tuple[Ratio | None, Ratio | None],
    ) -> Ratio | None:
        """f(v) - slope v at the end or kink v where the line touches."""
        if intercept == 0:
            return None
        points = [(torch.tensor(k, dtype=torch.float64, device="cpu"), None if k == 0 else Ratio(0)) for k in op.kinks]
        points += [(l, ends[0]), (u, ends[1])]
        for v, degree in points:
            value = float(op(v))
            if not math.isclose(value - slope * float(v), intercept, rel_tol=1e-9, abs_tol=1e-12):
                continue
            image = float(op.piece(v[None] if v.dim() == 0 else v)[0]), float(op.piece(v[None])[1])
            constant = None if image[1] == 0 else Ratio(0)
            if ratio is not None and ratio.denominator:
                straight = degree if image[0] != 0 else None
                return self.factors.add([self.factors.multiply(ratio, degree), straight, constant])
            return self.factors.add([degree if image[0] != slope else None, constant])
        raise ValueError(f"step_degrees: a line of {op.name} touches it at no end or kink")

    def on_line(
        self, op: PiecewiseLinear, z: Tracked, slope: Tracked, intercept: Tracked, ends: NeuronBounds, i: int
    ) -> Ratio | None:
        touched = []
        for end in (ends.l, ends.u):
            at = float(end.value[i])
            if _close(
                slope.value[i] * at + intercept.value[i], float(op(torch.tensor(at, dtype=torch.float64, device="cpu")))
            ):
                image = self.image(op, Tracked(end.value[i : i + 1], end.ratio[i : i + 1])).ratio[0]
                touched.append((at, end.ratio[i], image))
        for at, _, image in touched:
            if _close(float(z.value[i]), at):
                # Equal numbers at generic weights are equal functions: the line meets the activation here.
                return image
        if touched and slope.ratio[i] is not None and slope.ratio[i].denominator:
            # f(v) + slope (z - v): the intercept by itself would hide what cancels.
            _, end_ratio, image = touched[0]
            run = self.factors.add([z.ratio[i], end_ratio])
            return self.factors.add([image, self.factors.multiply(slope.ratio[i], run)])
        return self.factors.add([self.factors.multiply(slope.ratio[i], z.ratio[i]), intercept.ratio[i]])


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-11, abs_tol=1e-12)
