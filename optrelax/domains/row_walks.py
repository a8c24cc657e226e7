"""A walk of rows back through a network: coefficients at each node, the constant, and what rounding may have cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from optrelax.domains import entrances, window_values
from optrelax.domains.frames import Seen
from optrelax.domains.lines import Lines
from optrelax.domains.planes import Planes
from optrelax.enclosures import Bounds
from optrelax.kernels.band_step import range_over_box
from optrelax.kernels.convolutions import Pair
from optrelax.kernels.relax_step import least_over_box
from optrelax.networks.graph import Network, Node
from optrelax.networks.ops import flatten_from
from optrelax.regions import InputBox, Region, Support
from optrelax.rounding import gamma, peak, tiny, underflow, unit_roundoff

Enclosure = Lines | Planes | Bounds


@dataclass
class Rows:
    """Walk in progress: coefficients [batch or 1, k, *shape] a node, and the constant [batch, k]."""

    network: Network
    lines: Mapping[str, Enclosure]
    """Lines of each activation, planes of a product, bounds of what a maximum is taken of."""
    magnitude: Mapping[str, Tensor] | None
    """Greatest |value| of each node, [batch, *shape]: what outward rounding multiplies; None to round to nearest."""
    constant: Tensor
    upper: Tensor | None = None
    """Between parallel lines the constant of the rows' upper bounds, whose coefficients are the same; else None."""
    region: InputBox | None = None
    """A box: rows may end in its bounds before they reach the input; to nearest only."""
    pending: dict[str, Tensor] = field(default_factory=dict)
    allowance: Tensor | None = None
    terms: Tensor | None = None
    stops: dict[str, Tensor] = field(default_factory=dict)
    frames: Mapping[str, Seen] = field(default_factory=dict)
    """Where each node's coefficients lie; what is not named has them in its own shape."""
    grid: Pair = (1, 1)
    places: Tensor | None = None
    """Places of the grid that rows of windows start from, [batch or 1, places, 2]."""
    settled: set[str] = field(default_factory=set)
    """Nodes whose bias went into the lines behind them."""

    def lines_of(self, node: Node) -> Lines:
        """Lines of an activation."""
        found = self.lines[node.name]
        assert isinstance(found, Lines)
        return found

    def add(self, name: str, a: Tensor, seen: Seen = "rows") -> None:
        """Send coefficients in any frame to a node's value, where branches meet in the frame that it expects."""
        a = window_values.adapt(a, seen, self.frames.get(name, "rows"), self)
        if name not in self.pending:
            self.pending[name] = a
            return
        total = self.pending[name] + a
        if self.magnitude is not None:
            self.allow(unit_roundoff(a.dtype) * self.dot(name, total.abs(), self.magnitude[name]))
        self.pending[name] = total

    def dot(self, name: str, a: Tensor, values: Tensor) -> Tensor:
        """Coefficients of a node times values of it, [batch or none, *shape]: [batch or 1, k]."""
        frame = self.frames.get(name, "rows")
        if frame == "rows":
            return dot(a, values)
        return window_values.dot(a, window_values.see(values, frame, self), self)

    def least(self, a: Tensor, region: Region) -> Tensor:
        """Least value over the region of rows that have reached the input."""
        frame = self.frames.get(self.network.input, "rows")
        if frame != "rows" and region.as_box is not None:
            found: Tensor = window_values.over_box(least_over_box, a, frame, region.as_box, self)
            return found
        return region.support(window_values.adapt(a, frame, "rows", self))

    def extent(self, a: Tensor, region: Region) -> tuple[Tensor, Tensor]:
        """Least and greatest value over the region of rows that have reached the input."""
        frame = self.frames.get(self.network.input, "rows")
        if frame != "rows" and region.as_box is not None:
            found: tuple[Tensor, Tensor] = window_values.over_box(range_over_box, a, frame, region.as_box, self)
            return found
        return region.extent(window_values.adapt(a, frame, "rows", self))

    def least_outward(self, a: Tensor, region: Region) -> Support:
        """A lower bound over the region of rows that have reached the input, with what its rounding scales with."""
        frame = self.frames.get(self.network.input, "rows")
        if frame == "rows" or region.as_box is None:
            return region.outward_support(window_values.adapt(a, frame, "rows", self))
        reach = region.as_box.center.abs() + region.as_box.radius + tiny(a.dtype)
        size = self.dot(self.network.input, a.abs(), reach)
        return Support(self.least(a, region), size, 2 * math.prod(self.network.input_shape) + 4)

    @cached_property
    def entrance(self) -> str | None:
        """The convolution that all paths from the input lead through."""
        return entrances.entrance(self.network)

    def allow(self, amount: Tensor) -> None:
        """Add to the rounding allowance, [batch, k]."""
        self.allowance = amount if self.allowance is None else self.allowance + amount

    def allow_underflow(self, name: str, terms: int) -> None:
        """Allow for coefficients at a node's value that lost up to `terms` products each below the normal range."""
        assert self.magnitude is not None
        # Each example's own: one that overflows must not spoil the others. The greatest value n times, not their sum:
        # that may overflow where none of them does.
        size = self.magnitude[name].detach()
        n = math.prod(size.shape[1:])
        greatest = peak(size).reshape(-1, 1).expand(self.constant.shape)
        self.allow(underflow(terms * n, size.dtype) * (1 + greatest))

    def add_constant(
        self, amount: Tensor, magnitude: Tensor | None = None, terms: int = 0, upper: Tensor | None = None
    ) -> None:
        """Add [batch or 1, k] to the constant; outward, `magnitude` is the sum of the absolute terms behind it.

        upper: what the upper bounds get instead.
        """
        self.constant = self.constant + amount
        if self.upper is not None:
            self.upper = self.upper + (amount if upper is None else upper)
        if self.magnitude is not None and magnitude is not None:
            dtype = amount.dtype
            self.allow(gamma(terms + 2, dtype) * magnitude + underflow(terms + 2, dtype))
            self.terms = magnitude if self.terms is None else self.terms + magnitude


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Rows times a vector: a [batch or 1, k, *shape], b [batch or none, *shape] -> [batch or 1, k]."""
    flat = flatten_from(a, 2)
    if b.dim() == a.dim() - 2:  # one vector for all
        return flat @ b.reshape(-1)
    vector = flatten_from(b, 1)
    if flat.shape[0] == 1 and vector.shape[0] != 1:
        return vector @ flat[0].mT
    return (flat @ vector[..., None])[..., 0]
