"""Interval bound propagation, and its loosened controls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from optrelax import memory
from optrelax.checks import require_number, require_range
from optrelax.domains import backsubstitution, interval
from optrelax.domains.noise_terms import Zonotope
from optrelax.domains.row_rules import end_in
from optrelax.domains.zonotope_rows import frontier, project
from optrelax.enclosures import Bounds, from_below, ordered
from optrelax.networks.activations import Activation, Hull
from optrelax.networks.graph import Network
from optrelax.regions import InputBox, Region
from optrelax.relaxations.base import (
    Found,
    Loosen,
    Preactivation,
    Propagation,
    Relaxation,
    examples_at_a_time,
    identity_rows,
)
from optrelax.relaxations.jumps import EVERYWHERE, Jumps


@dataclass(frozen=True, kw_only=True)
class Box(Relaxation):
    """Interval bound propagation, the last affine ops folded into the rows.

    Args:
        omega: with `F`, the paper's loosened controls; alone it widens every pre-activation interval by omega at each
            end (`box-widen`).
        F: the ends move outward by omega times their distance to a grid of F steps a unit (`box-round`, discontinuous
            everywhere); None: no grid.

    Raises:
        ValueError: unless omega >= 0 and F > 0, both finite.

    Sound: yes.  Exact: for one affine layer.  Gradient: exact; continuous in the weights unless F is set.
    Source: Gowal et al. 2018; controls: arXiv 2102.06700, section 5.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU())
        >>> _ = nn.init.constant_(net[0].weight, 1.0)
        >>> region = ox.LinfBall(torch.tensor([[0.5, 0.5]]), eps=0.25)
        >>> b = ox.bounds(net, region, ox.Box())
        >>> b.lower.tolist(), b.upper.tolist()
        ([[0.5]], [[1.5]])
    """

    omega: float = 0.0
    F: float | None = None

    cached: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("Box", "omega", self.omega)
        require_range("Box", ">= 0 and finite", omega=self.omega)
        if self.F is not None:
            require_number("Box", "F", self.F)
            require_range("Box", "> 0 and finite", F=self.F)

    @property
    def monotone(self) -> bool:
        return self.F is None or self.omega == 0

    @property
    def jumps(self) -> Jumps:
        return frozenset() if self.F is None or self.omega == 0 else frozenset({EVERYWHERE})

    def neuron_hull(self, activation: Activation, l: Tensor, u: Tensor) -> Hull | None:
        if self.omega > 0:
            return None
        low, high = activation.image(l, u)
        flat = torch.zeros_like(l)
        return Hull(((flat, low), (flat, low)), ((flat, high), (flat, high)))

    def propagated(self, by: Propagation[Found]) -> Found | None:
        return by.intervals(self._loosening)

    @property
    def _loosening(self) -> Loosen | None:
        return self._loosen if self.omega > 0 else None

    def _loosen(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        if self.F is None:
            return l - self.omega, u + self.omega
        # F l rounds, so ceil(F l) - F l can come out slightly negative: it may only widen.
        below = ((self.F * l).ceil() - self.F * l).clamp_min(0)
        above = (self.F * u - (self.F * u).floor()).clamp_min(0)
        return l - self.omega * below, u + self.omega * above

    def intervals(self, network: Network, region: Region, targets: frozenset[str] | None = None) -> interval.Intervals:
        """Balls and pre-activation bounds of every node, or of those that `targets` depend on."""
        region = self.prepare(region)
        return interval.propagate(network, region, loosen=self._loosening, rounding=self.rounding, targets=targets)

    def bytes_needed(self, network: Network, region: Region, k: int) -> int:
        folded = sum(math.prod(network.shape_of(name)) for name in frontier(network))
        each = (9 if torch.is_grad_enabled() else 5) * memory.value_entries(network) + 4 * k * folded
        return region.dtype.itemsize * region.shape[0] * each

    def preactivation_bounds(self, network: Network, region: Region) -> Preactivation:
        size = examples_at_a_time(self, network, region, 0)
        # Nothing behind the last activation; what is loosened is so on the way.
        wanted = frozenset(n.inputs[0] for n in network.activations) if self.omega == 0 else None
        walk = partial(self.intervals, network, targets=wanted)
        return memory.in_pieces(network, lambda r, _: walk(r).preactivation, region, None, size)

    def lower_bounds(self, network: Network, region: Region, rows: Tensor) -> Tensor:
        size = examples_at_a_time(self, network, region, rows.shape[1])
        return memory.in_pieces(network, partial(self._lower_bounds, network), region, rows, size)

    def _lower_bounds(self, network: Network, region: Region, rows: Tensor) -> Tensor:
        if self.outward and region.as_box is not None:
            center, radius = self._project(network, region.as_box, rows)
            return from_below(center - radius)
        front = frontier(network) - {network.input}
        balls = self.intervals(network, region, None if self.outward else front).balls
        magnitude = backsubstitution.magnitudes(network, balls) if self.outward else None
        walk = backsubstitution.pull(network, network.output, rows, region.shape[0], {}, magnitude, stop=front)
        for name, a in walk.stops.items():
            ball = balls[name]
            ends = ball.bounds if self.outward else Bounds.known(ball.center - ball.radius, ball.center + ball.radius)
            end_in(ends, a, walk)
        return backsubstitution.concretise(walk, region)

    def output_bounds(self, network: Network, region: Region) -> Bounds:
        if region.as_box is None:
            return super().output_bounds(network, region)
        eye = identity_rows(network.output_shape, region.like)
        size = examples_at_a_time(self, network, region, eye.shape[1])
        center, radius = memory.in_pieces(network, partial(self._project, network), region, eye, size)
        shape = (-1, *network.output_shape)
        return ordered((center - radius).reshape(shape), (center + radius).reshape(shape))

    def _project(self, network: Network, region: InputBox, rows: Tensor) -> tuple[Tensor, Tensor]:
        balls = self.intervals(network, region).balls
        kept = {
            name: Zonotope(balls[name].center, beta=balls[name].radius, outward=self.outward)
            for name in frontier(network)
        }
        return project(network, kept, rows, self.outward)
