"""`AlphaCrown`: back-substitution with the slopes of all layers, intermediate ones included, optimised jointly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from optrelax import memory
from optrelax.domains import interval
from optrelax.enclosures import Bounds, ordered
from optrelax.layers.network_lp import shared
from optrelax.layers.problems import (
    DualPoint,
    HullLines,
    Problems,
    backward_sweep,
    crown_start,
    dual_value,
    hull_lines,
)
from optrelax.networks.activations import Activation, Hull
from optrelax.networks.graph import Network, Node
from optrelax.regions import Region
from optrelax.relaxations import (
    Crown,
    Preactivation,
    Relaxation,
    limited,
    name_of,
    resolve,
    with_rounding,
)

Slopes = dict[str | None, DualPoint]
"""Mixing weights behind each activation, two rows a crossing neuron; None: of the rows of the output."""


@dataclass(frozen=True, kw_only=True)
class AlphaCrown(Relaxation):
    """CROWN whose lower slopes are variables, one set a row of the specification and one a hidden neuron's bound.

    Gradient ascent (Adam) on the sum of the lower bounds through the bounds of every layer; the best slopes of each
    example are kept. The start is CROWN's, so the bound is never below it; it never exceeds the layerwise LP.

    Args:
        iterations: gradient steps.
        step: size of the first.
        decay: factor an iteration.
        preactivation: bounds that say which neurons cross, and that optimised ones never loosen.

    Raises:
        ValueError: for an option out of range, and for an estimate as preactivation.

    Sound: yes, at any slopes.  Gradient: that of the bound at the slopes found, through every layer.
    Source: Xu et al. 2021 (alpha-CROWN).

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.2)
        >>> ways = AlphaCrown(iterations=5), "crown"
        >>> found, crown = (ox.lower_bounds(net, region, torch.eye(2), way) for way in ways)
        >>> bool((found >= crown - 1e-6).all())
        True
    """

    iterations: int = 20
    step: float = 0.1
    decay: float = 0.98
    preactivation: Relaxation = field(default_factory=Crown)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 0:
            raise ValueError(f"AlphaCrown: iterations must be >= 0, got {self.iterations}")
        if not self.step > 0:
            raise ValueError(f"AlphaCrown: step must be > 0, got {self.step}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"AlphaCrown: decay must lie in (0, 1], got {self.decay}")
        source = resolve(self.preactivation)
        if not source.sound:
            raise ValueError(f"AlphaCrown: preactivation={name_of(source)} is an estimate, not a bound")
        object.__setattr__(self, "preactivation", source)

    @property
    def parts(self) -> tuple[Relaxation, ...]:
        return (self.preactivation,)

    def neuron_hull(self, activation: Activation, l: Tensor, u: Tensor) -> Hull | None:
        return activation.hull(l, u)

    def preactivation_bounds(self, network: Network, region: Region) -> Preactivation:
        """Bounds whose slopes make the sum of all widths small."""
        return shared(network, self._bounded(network.lowered, region, None)[0])

    def lower_bounds(self, network: Network, region: Region, rows: Tensor) -> Tensor:
        found = self._bounded(network.lowered, region, rows)[1]
        assert found is not None
        return found

    def bytes_needed(self, network: Network, region: Region, k: int) -> int:
        network = network.lowered
        return self.preactivation.bytes_needed(network, region, 0) + region.shape[0] * self._each(network, region, k)

    def least_bytes(self, network: Network, region: Region, k: int) -> int:
        network = network.lowered
        rows = self._neuron_rows(network) + k
        slopes = region.dtype.itemsize * rows * memory.hidden_entries(network)
        first = self.preactivation.least_bytes(network, region, 0)
        return first + region.shape[0] * slopes + self._each(network, region, k)

    def _each(self, network: Network, region: Region, k: int) -> int:
        """Bytes of one example: slopes, lines and coefficients of every row, kept for the gradient by the slopes."""
        hidden = memory.hidden_entries(network)
        rows = self._neuron_rows(network) + k
        return 12 * region.dtype.itemsize * rows * (hidden + math.prod(network.input_shape))

    def _neuron_rows(self, network: Network) -> int:
        """Rows of the neurons whose bounds are optimised, as if all crossed."""
        return sum(2 * math.prod(n.shape) for n in network.activations if n.inputs[0] not in network.exact_intervals)

    def _bounded(self, network: Network, region: Region, rows: Tensor | None) -> tuple[Preactivation, Tensor | None]:
        """The bounds, as many examples at a time as fit; of the others the slopes found are kept."""
        region = self.prepare(region)
        batch = region.shape[0]
        source = self.preactivation.bytes_needed(network, region, 0)
        own = batch * self._each(network, region, 0 if rows is None else rows.shape[1])
        most = memory.limit(self.max_bytes, source + own, region.device)
        if source + own <= most:
            given = self._given(network, region, math.inf)
            search = _Search(network, region, given, rows)
            return search.evaluate(region, given, rows, search.ascend(self), self.outward)
        # The bounds that the pieces start from live beside them: a third for these.
        room, size = most / 3, max(1, int(most * 2 / 3 * batch // own))
        call = partial(self._piece, network, room)
        found: tuple[Preactivation, Tensor | None] = memory.in_pieces(network, call, region, rows, size, again=False)
        return found

    def _piece(
        self, network: Network, room: float, region: Region, rows: Tensor | None
    ) -> tuple[Preactivation, Tensor | None]:
        """Slopes found once; bounds whose graph is made in the backward pass."""
        with torch.no_grad():
            search = _Search(network, region, self._given(network, region, room), rows)
            slopes = search.ascend(self)

        def evaluate() -> tuple[Preactivation, Tensor | None]:
            return search.evaluate(region, self._given(network, region, room), rows, slopes, self.outward)

        found: tuple[Preactivation, Tensor | None] = memory.recomputed(network, evaluate)()
        return found

    def _given(self, network: Network, region: Region, room: float) -> Preactivation:
        source = limited(with_rounding(self.preactivation, self.rounding), room)
        return source.preactivation_bounds(network, region)


class _Search:
    """The variables of one batch: mixing weights for every target with crossing neurons before it."""

    def __init__(self, network: Network, region: Region, given: Preactivation, rows: Tensor | None) -> None:
        self.network = network
        self.batch = region.shape[0]
        self.places: dict[str, tuple[Tensor, Tensor]] = {}  # activation -> examples and flat neurons that cross
        constants = {name: Bounds(b.lower.detach(), b.upper.detach()) for name, b in given.items()}
        known = interval.exact_nodes(network, region)
        for node in network.activations:
            if node.inputs[0] in known:
                continue
            b = constants[node.name]
            assert isinstance(node.op, Activation)
            crossing = node.op.crossing(b.lower.flatten(1), b.upper.flatten(1))
            self.places[node.name] = crossing.nonzero(as_tuple=True)  # type: ignore[assignment]
        self.region = region.detach()
        self.given, self.rows = constants, None if rows is None else rows.detach()
        self.k = 0 if rows is None else rows.shape[1]
        self.searching = False

    def start(self) -> Slopes:
        """CROWN's choice for every target."""
        hulls = {n.name: hull_lines(n.op, self.given[n.name]) for n in self.network.activations}
        crown = crown_start(self.network, self.given, hulls)
        slopes: Slopes = {name: crown.select(example.repeat(2)) for name, (example, _) in self.places.items()}
        slopes[None] = crown.select(torch.arange(self.batch, device=self.region.device).repeat_interleave(self.k))
        return slopes

    def ascend(self, options: AlphaCrown) -> Slopes:
        """Adam on every weight at once; per example the best set of slopes met."""
        slopes = self.start()
        leaves = [t for point in slopes.values() for part in (point.alpha, point.beta) for t in part.values()]
        best = [t.clone() for t in leaves]
        if options.iterations == 0 or not leaves:
            return slopes
        owners = [
            owner
            for target, point in slopes.items()
            for owner in [self._owner(target)] * (len(point.alpha) + len(point.beta))
        ]
        self.searching = True
        with torch.enable_grad():
            for t in leaves:
                t.requires_grad_(True)
            optimiser = torch.optim.Adam(leaves, lr=options.step, maximize=True)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, options.decay)
            top = None
            for _ in range(options.iterations + 1):
                found, lower = self.evaluate(self.region, self.given, self.rows, slopes, False)
                score = self._score(found, lower)
                if not score.requires_grad:  # no neuron crosses
                    break
                better = score.detach() > top if top is not None else torch.ones_like(score, dtype=torch.bool)
                top = score.detach() if top is None else torch.maximum(score.detach(), top)
                with torch.no_grad():
                    for kept, t, owner in zip(best, leaves, owners, strict=True):
                        mask = better[owner].reshape(-1, *[1] * (t.dim() - 1))
                        kept.copy_(torch.where(mask, t, kept))
                grads = torch.autograd.grad(score.sum(), leaves, allow_unused=True)
                for t, g in zip(leaves, grads, strict=True):
                    t.grad = torch.zeros_like(t) if g is None else g
                optimiser.step()
                schedule.step()
                with torch.no_grad():
                    for t in leaves:
                        t.clamp_(0, 1)
        self.searching = False
        for t, kept in zip(leaves, best, strict=True):
            t.requires_grad_(False)
            t.copy_(kept)
        return slopes

    def _owner(self, target: str | None) -> Tensor:
        """Example of each row of a target."""
        if target is None:
            return torch.arange(self.batch, device=self.region.device).repeat_interleave(self.k)
        return self.places[target][0].repeat(2)

    def _score(self, found: Preactivation, lower: Tensor | None) -> Tensor:
        """What is maximised, an example: its lower bounds, or without rows its tightness everywhere."""
        if lower is not None:
            return lower.sum(1)
        widths = [b.width.flatten(1).sum(1) for name, b in found.items() if name in self.places]
        return -torch.stack(widths).sum(0) if widths else self.region.like.new_zeros(self.batch)

    def evaluate(
        self, region: Region, given: Preactivation, rows: Tensor | None, slopes: Slopes, outward: bool
    ) -> tuple[Preactivation, Tensor | None]:
        """Bounds of every layer at these slopes, and of the rows; differentiable."""
        bounds: Preactivation = {}
        hulls: dict[str, HullLines] = {}
        for node in self.network.activations:
            before = given[node.name]
            if node.name in self.places and self.places[node.name][0].numel():
                before = self._neurons(region, node, before, bounds, hulls, slopes[node.name], outward)
            bounds[node.name] = before
            assert isinstance(node.op, Activation)
            hulls[node.name] = hull_lines(node.op, before)
        if rows is None:
            return bounds, None
        example = self._owner(None)
        flat = rows.expand(self.batch, *rows.shape[1:]).reshape(-1, *self.network.output_shape)
        value = self._value(self.network.output, flat, region, bounds, hulls, example, slopes[None], outward)
        return bounds, value.reshape(self.batch, rows.shape[1])

    def _neurons(
        self,
        region: Region,
        node: Node,
        before: Bounds,
        bounds: Preactivation,
        hulls: Mapping[str, HullLines],
        slopes: DualPoint,
        outward: bool,
    ) -> Bounds:
        example, neuron = self.places[node.name]
        source = node.inputs[0]
        shape = self.network.shape_of(source)
        rows = region.like.new_zeros(example.numel(), math.prod(shape))
        rows[torch.arange(example.numel(), device=rows.device), neuron] = 1
        both = torch.cat([rows, -rows]).reshape(-1, *shape)
        value = self._value(source, both, region, bounds, hulls, example.repeat(2), slopes, outward)
        low, high = value.chunk(2)
        lower, upper = before.lower.flatten(1), before.upper.flatten(1)
        place = (example, neuron)
        floor, ceiling = lower[place], upper[place]
        if self.searching:
            # At the start both agree to rounding, and the slopes of a bound that loses get no gradient: near ties go
            # to the optimised bound, sound as well.
            slack = 1e-6 * (ceiling - floor)
            floor, ceiling = floor - slack, ceiling + slack
        tight = ordered(torch.where(low >= floor, low, floor), torch.where(-high <= ceiling, -high, ceiling))
        return Bounds(
            lower.index_put(place, tight.lower).reshape(before.lower.shape),
            upper.index_put(place, tight.upper).reshape(before.upper.shape),
        )

    def _value(
        self,
        target: str,
        rows: Tensor,
        region: Region,
        bounds: Preactivation,
        hulls: Mapping[str, HullLines],
        example: Tensor,
        slopes: DualPoint,
        outward: bool,
    ) -> Tensor:
        wanted = self.network.ancestors(target)
        picked = {name: h.select(example) for name, h in hulls.items() if name in wanted}
        problems = Problems(self.network, target, rows, region.select(example), picked)
        if outward:
            before = {n: Bounds.known(b.lower[example], b.upper[example]) for n, b in bounds.items() if n in wanted}
            value = dual_value(problems, slopes, "outward", before)
        else:
            value = backward_sweep(problems, slopes).value
        # What overflows is no bound.
        return torch.where(value.detach().isfinite(), value, -torch.inf)
