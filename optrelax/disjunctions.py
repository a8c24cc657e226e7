"""Bounds of what a specification asks: of rows with offsets, and of the greatest of several rows.

The greatest of rows is at least any average of them, so a lower bound of an average bounds it; over all averages the
best is, for a relaxation that is one LP, the LP of the maximum itself (minimax: rows and points both form convex sets).
The weights are found by cutting planes: the bound is concave in them, its gradient at weights is the rows' values at
the point that attains it, and each gradient is a plane above it (Kelley 1960). Between planes and bound lies a gap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optrelax.domains.row_walks import dot
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import Relaxation
from optrelax.rounding import SLACK, down, gamma, underflow
from optrelax.specifications import Specification

_PLANES = 30
_GAP = 1e-4  # relative to max(1, |bound|), at which the search ends
_ROUNDS = 400  # of the game between weights and planes


def row_bounds(relaxation: Relaxation, network: Network, region: Region, spec: Specification) -> Tensor:
    """Lower bounds of the rows' values, offsets included: [batch, k].  Sound, gradient: as the relaxation."""
    rows = spec.rows.reshape(-1, *spec.rows.shape[-2:-1], *network.output_shape)
    return _moved(relaxation, network, region, relaxation.lower_bounds(network, region, rows), spec.offsets, spec.slack)


def group_bounds(
    relaxation: Relaxation, network: Network, region: Region, spec: Specification, *, sign: bool = False
) -> Tensor:
    """Lower bounds of every group's greatest value: [batch, groups].

    spec: flat, in the region's type.  sign: settle the sign alone: no search where it is known.
    Sound: as the relaxation.  Exact: as the relaxation's LP with the maximum in it, to 1e-4 of max(1, |bound|).
    Gradient: by the relaxation's own, at the weights found (Danskin).
    """
    known = spec.offsets.detach().isfinite().reshape(-1, spec.rows.shape[-2]).all(0).tolist()
    several = {place: [i for i in group if known[i]] for place, group in enumerate(spec.groups)}
    several = {place: group for place, group in several.items() if len(group) > 1}
    if not several:
        return spec.worst(row_bounds(relaxation, network, region, spec))
    rows = spec.rows.expand(region.shape[0], *spec.rows.shape[-2:]).detach().requires_grad_()
    with torch.enable_grad():
        found = relaxation.lower_bounds(network, region, rows.reshape(*rows.shape[:2], *network.output_shape))
        points = _points(found, rows)
    alone = _moved(relaxation, network, region, found.detach(), spec.offsets.detach(), spec.slack)
    worst, weights = spec.worst(alone), rows.new_zeros(region.shape[0], len(several), rows.shape[1])
    for i, (place, group) in enumerate(several.items()):
        best, weights[:, i, group] = _Weighting(relaxation, network, region, spec, group, alone, points, sign).run()
        worst[:, place] = torch.maximum(worst[:, place], best)
    if not torch.is_grad_enabled():
        return worst
    alone = row_bounds(relaxation, network, region, spec)
    averages = _average(relaxation, network, region, spec, weights)
    columns = list(spec.worst(alone).unbind(1))
    for i, place in enumerate(several):
        columns[place] = torch.maximum(columns[place], averages[:, i])
    return torch.stack(columns, 1)


class _Weighting:
    """Weights of one group's rows for every example."""

    def __init__(
        self,
        relaxation: Relaxation,
        network: Network,
        region: Region,
        spec: Specification,
        group: list[int],
        alone: Tensor,
        points: Tensor,
        sign: bool,
    ) -> None:
        self.relaxation, self.network, self.region, self.sign = relaxation, network, region, sign
        batch = region.shape[0]
        rows = spec.rows.detach().expand(batch, *spec.rows.shape[-2:])[:, group]
        offsets = spec.offsets.detach().expand(batch, -1)[:, group]
        slack = None if spec.slack is None else spec.slack.expand(batch, *spec.rows.shape[-2:])[:, group]
        self.spec = Specification(rows, offsets, slack=slack)
        # Values of every row at the point of every plane, [batch, planes, rows]: the first planes are the rows' own.
        self.planes = (points[:, group] @ rows.mT + offsets[:, None]).detach()
        self.start = alone[:, group]

    def run(self) -> tuple[Tensor, Tensor]:
        """The best bounds [batch] and their weights [batch, rows]."""
        best, place = self.start.nan_to_num(-torch.inf).max(1)
        weights = torch.nn.functional.one_hot(place, self.start.shape[1]).to(best)
        for _ in range(_PLANES):
            tried, top = _game(self.planes)
            # Nothing is left to win where the planes come down to the bound, or the sign is known either way.
            done = ~(top - best > _GAP * best.abs().clamp_min(1))
            if self.sign:
                done = done | (best > 0) | (top <= 0)
            left = (~done).nonzero()[:, 0]
            if not len(left):
                break
            tried = _whole(tried)
            value, point = self._at(tried, left)
            self.planes = torch.cat([self.planes, self.planes[:, :1]], 1)  # a plane twice where nothing is left
            self.planes[left, -1] = point
            better = value > best[left]
            chosen = left[better]
            best[chosen], weights[chosen] = value[better], tried[chosen]
        return best, weights

    def _at(self, weights: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Bound of the average of some examples' rows, and every row's value at the point that attains it."""
        spec, region = self.spec.select(left), self.region.select(left)
        with torch.enable_grad():
            row = (weights[left, None] @ spec.rows).requires_grad_()
            shaped = row.reshape(len(left), 1, *self.network.output_shape)
            found = self.relaxation.lower_bounds(self.network, region, shaped)
            point = _points(found, row)
        bound = _averaged(self.relaxation, self.network, region, spec, weights[left, None], found.detach())
        return bound[:, 0], (point @ spec.rows.mT)[:, 0] + spec.offsets


def _points(found: Tensor, rows: Tensor) -> Tensor:
    """Outputs at which bounds [batch, k] of rows [batch, k, outputs] are attained: their gradient."""
    (points,) = torch.autograd.grad(found.sum(), rows)
    return points.nan_to_num(0.0, 0.0, 0.0)


def _game(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [batch, rows] whose least plane is greatest, near enough, and a number above every such least: [batch].

    Regret matching + on either side in turn, averaged linearly (Tammelin 2014): what the other side can make of an
    average bounds the value.
    """
    batch, m, k = planes.shape
    rise, fall = planes.new_zeros(batch, k), planes.new_zeros(batch, m)
    mean_rows, mean_planes = planes.new_zeros(batch, k), planes.new_zeros(batch, m)
    scale = planes.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(planes.dtype).tiny)
    matrix = planes / scale
    for step in range(1, _ROUNDS + 1):
        rows = _shares(rise)
        losses = (matrix @ rows[..., None])[..., 0]
        fall = (fall + (_shares(fall) * losses).sum(-1, keepdim=True) - losses).clamp_min(0)
        picked = _shares(fall)
        gains = (picked[:, None] @ matrix)[:, 0]
        rise = (rise + gains - (rows * gains).sum(-1, keepdim=True)).clamp_min(0)
        mean_rows, mean_planes = mean_rows + step * rows, mean_planes + step * picked
        if step % 40 == 0:
            least = (matrix @ _shares(mean_rows)[..., None])[..., 0].amin(-1)
            top = (_shares(mean_planes)[:, None] @ matrix)[:, 0].amax(-1)
            if bool((top - least <= _GAP / 10).all()):
                break
    return _shares(mean_rows), (_shares(mean_planes)[:, None] @ planes)[:, 0].amax(-1)


def _shares(x: Tensor) -> Tensor:
    """Entries >= 0 as shares of their sum; equal ones where all are 0."""
    total = x.sum(-1, keepdim=True)
    return torch.where(total > 0, x / torch.where(total > 0, total, 1.0), 1.0 / x.shape[-1])


def _whole(weights: Tensor) -> Tensor:
    """The nearest weights that are whole multiples of a power of two and sum to 1 exactly."""
    unit = 2.0 ** (20 if weights.dtype == torch.float64 else 12)
    counts = (weights * unit).floor()
    place = counts.argmax(-1, keepdim=True)
    return counts.scatter_add(-1, place, unit - counts.sum(-1, keepdim=True)) / unit


def _average(relaxation: Relaxation, network: Network, region: Region, spec: Specification, weights: Tensor) -> Tensor:
    """Bounds of averages of rows, weights [batch, groups, k]: [batch, groups]."""
    rows = (weights @ spec.rows).reshape(*weights.shape[:2], *network.output_shape)
    found = relaxation.lower_bounds(network, region, rows)
    return _averaged(relaxation, network, region, spec, weights, found)


def _averaged(
    relaxation: Relaxation, network: Network, region: Region, spec: Specification, weights: Tensor, found: Tensor
) -> Tensor:
    """Bounds of averages with their offsets, from those `found` of the averaged rows."""
    slack = None if spec.slack is None else weights @ spec.slack
    known = spec.offsets.masked_fill(spec.offsets.isinf(), 0.0)  # of no weight
    offsets = (weights @ known[..., None])[..., 0]
    if relaxation.outward:
        # Averages round, unless the rows are small whole numbers.
        lost, dtype = gamma(spec.rows.shape[-2] + 2, weights.dtype), weights.dtype
        size = (weights @ known.abs()[..., None])[..., 0]
        offsets = down(offsets - SLACK * (lost * size + underflow(spec.rows.shape[-2], dtype)))
        rows = spec.rows.detach()
        if not bool((rows == rows.round()).all()) or float(rows.abs().max()) > 2**10:
            more = SLACK * (lost * (weights @ rows.abs()) + underflow(spec.rows.shape[-2], dtype))
            slack = more if slack is None else SLACK * slack + more
    return _moved(relaxation, network, region, found, offsets, slack)


def _moved(
    relaxation: Relaxation, network: Network, region: Region, lower: Tensor, offsets: Tensor, slack: Tensor | None
) -> Tensor:
    """Bounds with offsets, less what coefficients may be off by; rounded down where the relaxation is."""
    moved = lower + offsets
    lower = torch.where(offsets == 0, lower, down(moved) if relaxation.outward else moved)
    if slack is not None and bool(slack.any()):
        size = relaxation.output_bounds(network, region)
        largest = torch.maximum(size.lower.abs(), size.upper.abs()).flatten(1)
        # Twice the product is more than any rounding of a sum of products >= 0 of this length can hide.
        lost = down(lower - 2 * dot(slack.reshape(-1, *slack.shape[-2:]), largest))
        lower = torch.where(slack.bool().any(-1), lost, lower)
    return lower
