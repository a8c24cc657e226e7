"""The named relaxations a user chooses from: frozen objects with their options, and the registry of their names."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from optrelax import lines as named
from optrelax import memory
from optrelax.activations import Activation
from optrelax.domains import backsubstitution, interval, zonotope
from optrelax.domains.interval import Ball
from optrelax.domains.relax_step import kernels as relax_step_kernels
from optrelax.domains.relax_step import least_over_box
from optrelax.domains.triton_steps import passes
from optrelax.enclosures import Bounds, ordered
from optrelax.errors import require_number, suggest
from optrelax.graph import Network
from optrelax.lines import Lines, LowerSlope
from optrelax.ops import Affine, MaxPool2d
from optrelax.regions import InputBox
from optrelax.rounding import Rounding, check_rounding, require_exact_products

Preactivation = dict[str, Bounds]  # activation node -> bounds of its input, [batch, *shape]


@dataclass(frozen=True, kw_only=True)
class Relaxation:
    """A way to bound a network over a region of its inputs.

    rounding: "outward" for bounds that hold in real arithmetic, "nearest" for training and benchmarks.
    max_bytes: most memory of a pass, forward and backward together, beyond weights, inputs and what is returned. A pass
    that would take more is cut into chunks of rows and of examples, each computed a second time for its gradient; the
    results are the same to rounding. None: half of what the device has free when the pass begins, at least 256 MiB;
    `math.inf`: no limit. One row of one example is the least: a limit below what that takes is exceeded.
    Subclasses implement `preactivation_bounds` and `lower_bounds` on a flat batch.
    """

    rounding: Rounding = "nearest"
    max_bytes: memory.Limit = None

    sound: ClassVar[bool] = True
    """Whether every bound holds; an estimate is refused wherever a certificate is made."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_rounding(name, self.rounding)
        memory.require_limit(name, self.max_bytes)

    @property
    def outward(self) -> bool:
        """Whether rounding is outward."""
        return self.rounding == "outward"

    def preactivation_bounds(self, network: Network, region: InputBox) -> Preactivation:
        """Bounds of the input of every activation, in topological order."""
        raise NotImplementedError

    def lower_bounds(self, network: Network, region: InputBox, rows: Tensor) -> Tensor:
        """Lower bounds of rows [batch or 1, k, *output_shape] of the output: [batch, k]."""
        raise NotImplementedError

    def output_bounds(self, network: Network, region: InputBox) -> Bounds:
        """Bounds of every output: [batch, *output_shape]."""
        eye = identity_rows(network.output_shape, region.lower)
        both = self.lower_bounds(network, region, torch.cat([eye, -eye], 1))
        k = both.shape[1] // 2
        shape = (-1, *network.output_shape)
        return ordered(both[:, :k].reshape(shape), -both[:, k:].reshape(shape))

    def bytes_needed(self, network: Network, region: InputBox, k: int) -> int:
        """The peak of a pass for k rows that is not cut, counted from shapes; 0 where nothing is ever cut."""
        return 0

    def least_bytes(self, network: Network, region: InputBox, k: int) -> int:
        """What a pass for k rows takes that is cut as small as it goes."""
        return self.bytes_needed(network, region.select(slice(0, 1)), k)

    def prepare(self, region: InputBox) -> InputBox:
        """Check the settings that outward rounding depends on."""
        if self.outward:
            require_exact_products(region.lower)
        return region


def identity_rows(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """One row an entry: [1, n, *shape]."""
    n = math.prod(shape)
    return torch.eye(n, dtype=like.dtype, device=like.device).reshape(1, n, *shape)


@dataclass(frozen=True, kw_only=True)
class Box(Relaxation):
    """Interval bound propagation, the last affine ops folded into the rows.

    omega, F: the paper's loosened controls; omega alone widens every pre-activation interval by omega at each end
    (`box-widen`), with F it moves the ends outward by omega times their distance to a grid of F steps a unit
    (`box-round`, discontinuous everywhere).
    Sound: yes.  Exact: for one affine layer.  Gradient: exact; continuous in the weights unless F is set.
    Source: Gowal et al. 2018; controls: arXiv 2102.06700, section 5.
    """

    omega: float = 0.0
    F: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("Box", "omega", self.omega)
        if not 0 <= self.omega < math.inf:
            raise ValueError(f"Box: omega must be >= 0 and finite, got {self.omega}")
        if self.F is not None:
            require_number("Box", "F", self.F)
            if not 0 < self.F < math.inf:
                raise ValueError(f"Box: F must be > 0 and finite, got {self.F}")

    def _loosen(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        if self.F is None:
            return l - self.omega, u + self.omega
        # F l rounds, so ceil(F l) - F l can come out slightly negative: it may only widen.
        below = ((self.F * l).ceil() - self.F * l).clamp_min(0)
        above = (self.F * u - (self.F * u).floor()).clamp_min(0)
        return l - self.omega * below, u + self.omega * above

    def intervals(
        self, network: Network, region: InputBox, targets: frozenset[str] | None = None
    ) -> interval.Intervals:
        """Balls and pre-activation bounds of every node, or of those that `targets` depend on."""
        loosen = self._loosen if self.omega > 0 else None
        region = self.prepare(region)
        return interval.propagate(network, region, loosen=loosen, rounding=self.rounding, targets=targets)

    def bytes_needed(self, network: Network, region: InputBox, k: int) -> int:
        folded = sum(math.prod(network.shape_of(name)) for name in zonotope.frontier(network))
        each = (9 if torch.is_grad_enabled() else 5) * memory.value_entries(network) + 4 * k * folded
        return region.lower.element_size() * region.shape[0] * each

    def preactivation_bounds(self, network: Network, region: InputBox) -> Preactivation:
        size = _examples(self, network, region, 0)
        return memory.in_pieces(network, lambda r, _: self.intervals(network, r).preactivation, region, None, size)

    def lower_bounds(self, network: Network, region: InputBox, rows: Tensor) -> Tensor:
        size = _examples(self, network, region, rows.shape[1])
        return memory.in_pieces(network, partial(self._lower_bounds, network), region, rows, size)

    def _lower_bounds(self, network: Network, region: InputBox, rows: Tensor) -> Tensor:
        if self.outward:
            center, radius = self._project(network, region, rows)
            return center - radius
        front = zonotope.frontier(network)
        balls = self.intervals(network, region, front).balls
        walk = backsubstitution.pull(network, network.output, rows, region.shape[0], {}, stop=front)
        for name, a in walk.stops.items():
            ball = balls[name]
            walk.add_constant(least_over_box(a, ball.center - ball.radius, ball.center + ball.radius))
        return backsubstitution.concretise(walk, region)

    def output_bounds(self, network: Network, region: InputBox) -> Bounds:
        eye = identity_rows(network.output_shape, region.lower)
        size = _examples(self, network, region, eye.shape[1])
        center, radius = memory.in_pieces(network, partial(self._project, network), region, eye, size)
        shape = (-1, *network.output_shape)
        return ordered((center - radius).reshape(shape), (center + radius).reshape(shape))

    def _project(self, network: Network, region: InputBox, rows: Tensor) -> tuple[Tensor, Tensor]:
        balls = self.intervals(network, region).balls
        kept = {
            name: zonotope.Zonotope(balls[name].center, beta=balls[name].radius, outward=self.outward)
            for name in zonotope.frontier(network)
        }
        return zonotope.project(network, kept, rows, self.outward)


@dataclass(frozen=True, kw_only=True)
class _Zonotope(Relaxation):
    """Shared by the zonotope family: a slope for crossing neurons and a home for new errors."""

    slope: named.BandSlope = "chord"
    continuous: bool = False
    gamma: float = 1.0
    kappa: float = 0.9

    errors: ClassVar[zonotope.Errors] = "generators"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.slope not in ("chord", "box", "diag", "switch", "soft", "slanted"):
            raise ValueError(
                f"{name}: slope must be 'chord', 'box', 'diag', 'switch', 'soft' or 'slanted', got {self.slope!r}"
            )
        if self.continuous and self.slope != "diag":
            raise ValueError(f"{name}: continuous=True is the -diag-c form, it needs slope='diag', got {self.slope!r}")
        require_number(name, "gamma", self.gamma)
        require_number(name, "kappa", self.kappa)
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"{name}: gamma must be > 0 and finite, got {self.gamma}")
        if not 0 <= self.kappa <= 1:
            raise ValueError(f"{name}: kappa must lie in [0, 1] (unsound beyond), got {self.kappa}")

    def lines(self, activation: Activation, l: Tensor, u: Tensor) -> Lines:
        """The band of parallel lines at pre-activation bounds [l, u]."""
        lines = named.band_lines(
            activation, l, u, slope=self.slope, continuous=self.continuous, gamma=self.gamma, kappa=self.kappa
        )
        return named.outward_lines(lines, activation, l, u) if self.outward else lines

    def _walk(self) -> zonotope.Walk:
        return zonotope.Walk(self.lines, self.errors, outward=self.outward)

    def bytes_needed(self, network: Network, region: InputBox, k: int) -> int:
        noise = self._noise(network)
        values = (30 if torch.is_grad_enabled() else 10) * memory.value_entries(network)
        return region.lower.element_size() * region.shape[0] * (noise.whole + values)

    def _noise(self, network: Network) -> memory.Pull:
        return memory.carry(network, math.prod(network.input_shape), born=self.errors == "generators")

    def _forward(
        self, network: Network, region: InputBox, rows: Tensor | None
    ) -> tuple[Preactivation, Tensor | None, Tensor | None]:
        """Pre-activation bounds and, for given rows, centre and radius; examples in chunks under max_bytes."""
        size = _examples(self, network, region, 0 if rows is None else rows.shape[1])
        found: tuple[Preactivation, Tensor | None, Tensor | None] = memory.in_pieces(
            network, partial(self._whole, network), self.prepare(region), rows, size
        )
        return found

    def _whole(
        self, network: Network, region: InputBox, rows: Tensor | None
    ) -> tuple[Preactivation, Tensor | None, Tensor | None]:
        keep = zonotope.frontier(network) if rows is not None else frozenset()
        found = zonotope.propagate(network, region, self._walk(), keep)
        if rows is None:
            return found.preactivation, None, None
        return (found.preactivation, *zonotope.project(network, found.kept, rows, self.outward))

    def preactivation_bounds(self, network: Network, region: InputBox) -> Preactivation:
        return self._forward(network, region, None)[0]

    def lower_bounds(self, network: Network, region: InputBox, rows: Tensor) -> Tensor:
        _, center, radius = self._forward(network, region, rows)
        assert center is not None
        assert radius is not None
        return center - radius

    def output_bounds(self, network: Network, region: InputBox) -> Bounds:
        _, center, radius = self._forward(network, region, identity_rows(network.output_shape, region.lower))
        assert center is not None
        assert radius is not None
        shape = (-1, *network.output_shape)
        return ordered((center - radius).reshape(shape), (center + radius).reshape(shape))


def _examples(relaxation: Relaxation, network: Network, region: InputBox, k: int) -> float:
    """Examples at a time for a pass that is cut along the batch alone."""
    need = relaxation.bytes_needed(network, region, k)
    most = memory.limit(relaxation.max_bytes, need, region.device)
    return math.inf if need <= most else most * region.shape[0] // need


@dataclass(frozen=True, kw_only=True)
class _EitherWay(_Zonotope):
    """A zonotope whose bounds may come from rows pulled back, where that is the cheaper direction."""

    def _backward(self, network: Network, rows: int) -> _Substitution | None:
        """The same relaxation as rows pulled back; None where noise terms are carried forward."""
        raise NotImplementedError

    def bytes_needed(self, network: Network, region: InputBox, k: int) -> int:
        backward = self._backward(network, k)
        return (
            super().bytes_needed(network, region, k) if backward is None else backward.bytes_needed(network, region, k)
        )

    def least_bytes(self, network: Network, region: InputBox, k: int) -> int:
        backward = self._backward(network, k)
        return super().least_bytes(network, region, k) if backward is None else backward.least_bytes(network, region, k)

    def preactivation_bounds(self, network: Network, region: InputBox) -> Preactivation:
        backward = self._backward(network, 0)
        if backward is not None:
            return backward.preactivation_bounds(network, region)
        return super().preactivation_bounds(network, region)

    def lower_bounds(self, network: Network, region: InputBox, rows: Tensor) -> Tensor:
        backward = self._backward(network, rows.shape[1])
        if backward is not None:
            return backward.lower_bounds(network, region, rows)
        return super().lower_bounds(network, region, rows)

    def output_bounds(self, network: Network, region: InputBox) -> Bounds:
        backward = self._backward(network, network.outputs)
        if backward is not None:
            return backward.output_bounds(network, region)
        return super().output_bounds(network, region)


@dataclass(frozen=True, kw_only=True)
class HBox(_EitherWay):
    """Hybrid zonotope (symbolic intervals): the input's noise is shared, new errors join an interval part.

    slope: "box" (hbox), "diag", "switch" or "chord" (hzono); continuous=True with "diag" is hbox-diag-c.
    Sound: yes.  Gradient: exact; jumps in the weights at l = 0 (box), u = 0 (diag), |l| = |u| (switch).
    Source: Mirman et al. 2018; arXiv 2102.06700.
    """

    slope: named.BandSlope = "box"
    errors: ClassVar[zonotope.Errors] = "interval"

    def _backward(self, network: Network, rows: int) -> _Substitution | None:
        if self.outward or _pooled(network) or not _backward_pays(network, rows, sides=1, born=False):
            return None
        return _Hybrid(lines_of=self, max_bytes=self.max_bytes)


@dataclass(frozen=True, kw_only=True)
class DeepZ(_EitherWay):
    """Zonotope: every error is a noise term of its own.

    slope: "chord" (deepz, smallest area), "box", "diag", "switch", "soft" (gamma), "slanted" (kappa in [0, 1]).
    direction: "forward" carries noise terms, "backward" pulls rows with the same parallel lines back (the same
    bounds); "auto" counts the multiply-adds of both.
    Sound: yes.  Gradient: exact; continuous in the weights for chord, soft and continuous=True.
    Source: Singh et al. 2018; arXiv 2102.06700, table 3.
    """

    direction: Literal["auto", "forward", "backward"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction not in ("auto", "forward", "backward"):
            raise ValueError(f"DeepZ: direction must be 'auto', 'forward' or 'backward', got {self.direction!r}")

    def _backward(self, network: Network, rows: int) -> _Substitution | None:
        sides = 2 if self.outward or _pooled(network) else 1
        pays = not _pooled(network) and _backward_pays(network, rows, sides)
        if self.direction == "forward" or (self.direction == "auto" and not pays):
            return None
        return _Bands(lines_of=self, rounding=self.rounding, max_bytes=self.max_bytes)


def _pooled(network: Network) -> bool:
    return any(isinstance(node.op, MaxPool2d) for node in network)


def _backward_pays(network: Network, rows: int, sides: int, born: bool = True) -> bool:
    """Whether pulling rows back takes fewer multiply-adds than carrying every noise term forward.

    sides: rows for the bounds of a neuron, one where it gives both.  born: every neuron adds a noise term.
    """
    forward = backward = 0
    terms = math.prod(network.input_shape)
    depth = 0  # multiply-adds of one row from here to the input
    for node in network:
        cost = getattr(node.op, "cost", lambda: 0)()
        forward += terms * cost
        if isinstance(node.op, Activation):
            width = math.prod(node.shape)
            if node.inputs[0] not in network.exact_intervals:
                backward += sides * width * depth
            terms += width if born else 0
        depth += cost
    return backward + rows * depth < forward


@dataclass(frozen=True, kw_only=True)
class Cauchy(_Zonotope):
    """DeepZ with its radii estimated by the median of k Cauchy projections: cost independent of the noise terms.

    Sound: no, an estimate for training only; certification and the LP layers refuse it.
    Gradient: of the estimate.  Source: Wong et al. 2018.
    """

    k: int = 50
    seed: int = 0

    sound: ClassVar[bool] = False
    errors: ClassVar[zonotope.Errors] = "projection"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.k, int) and self.k >= 1):
            raise ValueError(f"Cauchy: k must be an integer of at least 1, got {self.k}")
        if not isinstance(self.seed, int):
            raise ValueError(f"Cauchy: seed must be an integer, got {self.seed!r}")
        if self.outward:
            raise ValueError("Cauchy: an estimate cannot be rounded outward into a bound")

    def _walk(self) -> zonotope.Walk:
        return zonotope.Walk(self.lines, self.errors, self.k, self.seed)

    def _noise(self, network: Network) -> memory.Pull:
        return memory.carry(network, self.k, born=False, estimated=True)


@dataclass(frozen=True, kw_only=True)
class _Substitution(Relaxation):
    """Shared by every relaxation by back-substitution: lines, and a source of pre-activation bounds."""

    preactivation: Relaxation | str | None = None
    """Another relaxation (or its name) for the pre-activation bounds; None: this method's own, layer by layer."""

    parallel: ClassVar[bool] = False
    """Whether both lines of every activation share their slope."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preactivation is not None:
            source = resolve(self.preactivation)
            if not source.sound:
                raise ValueError(f"{type(self).__name__}: preactivation {name_of(source)} is an estimate, not a bound")
            object.__setattr__(self, "preactivation", source)

    def lines(self, activation: Activation, l: Tensor, u: Tensor) -> Lines:
        """Lines at pre-activation bounds [l, u], to nearest."""
        raise NotImplementedError

    def _lines(self, activation: Activation, before: Bounds) -> Lines:
        lines = self.lines(activation, before.lower, before.upper)
        return named.outward_lines(lines, activation, before.lower, before.upper) if self.outward else lines

    def preactivation_bounds(self, network: Network, region: InputBox) -> Preactivation:
        if self.preactivation is not None:
            return self._given(network, region, math.inf if self.max_bytes is None else self.max_bytes)
        region = self.prepare(region)
        size, rooms = self._cut(network, region, 0)
        if size < region.shape[0]:
            whole = replace(self, max_bytes=_whole_bytes(rooms))
            return memory.in_pieces(network, lambda r, _: whole.preactivation_bounds(network, r), region, None, size)
        return self._layers(network, region, rooms)[0]

    def lower_bounds(self, network: Network, region: InputBox, rows: Tensor) -> Tensor:
        region = self.prepare(region)
        size, rooms = self._cut(network, region, rows.shape[1])
        if size < region.shape[0]:
            whole = replace(self, max_bytes=_whole_bytes(rooms))
            return memory.in_pieces(network, partial(whole.lower_bounds, network), region, rows, size)
        return self._lower_bounds(network, region, rows, rooms)

    def _lower_bounds(self, network: Network, region: InputBox, rows: Tensor, rooms: _Rooms) -> Tensor:
        """Lower bounds of rows, the examples not cut any more."""
        _, lines = self._layers(network, region, rooms)
        magnitude = None
        if self.outward:
            magnitude = self._magnitude(network, interval.propagate(network, region, rounding="outward").balls)
        return self._substitute(network, network.output, rows, region, lines, magnitude, rooms.rows)

    def _given(self, network: Network, region: InputBox, room: float) -> Preactivation:
        """The pre-activation bounds of the relaxation they come from."""
        assert self.preactivation is not None
        source = with_rounding(resolve(self.preactivation), self.rounding)
        return limited(source, room).preactivation_bounds(network, region)

    def _layers(
        self, network: Network, region: InputBox, rooms: _Rooms
    ) -> tuple[Preactivation, dict[str, Lines | Bounds]]:
        """Pre-activation bounds and lines of every activation (and of poolings, the bounds they read)."""
        balls = interval.propagate(network, region, rounding=self.rounding).balls
        magnitude = self._magnitude(network, balls)
        given = None if self.preactivation is None else self._given(network, region, rooms.source)
        bounds: Preactivation = {}
        lines: dict[str, Lines | Bounds] = {}
        for node in network:
            if not isinstance(node.op, (Activation, MaxPool2d)):
                continue
            source = node.inputs[0]
            if given is not None and node.name in given:
                before = given[node.name]
            elif source in network.exact_intervals or (given is not None and isinstance(node.op, MaxPool2d)):
                before = balls[source].bounds
            else:
                before = self._both(network, source, region, lines, magnitude, rooms.rows)
            if isinstance(node.op, MaxPool2d):
                lines[node.name] = before
            else:
                bounds[node.name] = before
                lines[node.name] = self._lines(node.op, before)
        return bounds, lines

    def _magnitude(self, network: Network, balls: Mapping[str, Ball]) -> dict[str, Tensor] | None:
        return backsubstitution.magnitudes(network, balls) if self.outward else None

    def _both(
        self,
        network: Network,
        source: str,
        region: InputBox,
        lines: Mapping[str, Lines | Bounds],
        magnitude: Mapping[str, Tensor] | None,
        room: float,
    ) -> Bounds:
        """Lower and upper bounds of every entry of a node."""
        shape = network.shape_of(source)
        eye = identity_rows(shape, region.lower)
        parallel = {name: pair for name, pair in lines.items() if isinstance(pair, Lines) and pair.parallel}
        if self._one_row(network) and len(parallel) == len(lines):
            low, high = self._ranges(network, source, eye, region, parallel, room)
            return ordered(low.reshape(-1, *shape), high.reshape(-1, *shape))
        both = self._substitute(network, source, torch.cat([eye, -eye], 1), region, lines, magnitude, room)
        n = eye.shape[1]
        return ordered(both[:, :n].reshape(-1, *shape), -both[:, n:].reshape(-1, *shape))

    def _substitute(
        self,
        network: Network,
        target: str,
        rows: Tensor,
        region: InputBox,
        lines: Mapping[str, Lines | Bounds],
        magnitude: Mapping[str, Tensor] | None,
        room: float,
    ) -> Tensor:
        """Back-substitution; with a finite room in chunks of rows, computed again in the backward pass."""

        def part(chunk: Tensor) -> Tensor:
            return backsubstitution.substitute(network, target, chunk, region, lines, magnitude=magnitude)

        return self._in_chunks(part, network, target, rows, region, room)

    def _ranges(
        self, network: Network, target: str, rows: Tensor, region: InputBox, lines: Mapping[str, Lines], room: float
    ) -> Tensor:
        """Both bounds of every row by parallel lines, [2, batch, k]."""

        def part(chunk: Tensor) -> Tensor:
            return torch.stack(backsubstitution.substitute_both(network, target, chunk, region, lines))

        return self._in_chunks(part, network, target, rows, region, room)

    def _in_chunks(
        self,
        part: Callable[[Tensor], Tensor],
        network: Network,
        target: str,
        rows: Tensor,
        region: InputBox,
        room: float,
    ) -> Tensor:
        """`part` of as many rows at a time as there is room for; [..., k]."""
        if room == math.inf:
            return part(rows)
        each = self._pull(network, target, region, rows.shape[0] == 1).whole * rows.element_size()
        again = memory.recomputed(network, part)
        return torch.cat([again(chunk) for chunk in rows.split(max(1, int(room // each)), dim=1)], -1)

    def _one_row(self, network: Network) -> bool:
        """Whether one row gives both bounds of a neuron: parallel lines, to nearest, no pooling."""
        return self.parallel and not self.outward and not _pooled(network)

    # --- memory ---

    def bytes_needed(self, network: Network, region: InputBox, k: int) -> int:
        return self._source_bytes(network, region) + sum(self._bytes(network, region, k))

    def least_bytes(self, network: Network, region: InputBox, k: int) -> int:
        source = 0
        if self.preactivation is not None:
            source = least_bytes(resolve(self.preactivation), network, region, 0)
        one = region.select(slice(0, 1))
        pulled = max(self._pull(network, node.name, one, shared=False).whole for node in network)
        return source + self._bytes(network, one, 0)[0] + region.lower.element_size() * pulled

    def _cut(self, network: Network, region: InputBox, k: int) -> tuple[float, _Rooms]:
        """Examples at a time, and the memory for each part of the work."""
        source = self._source_bytes(network, region)
        fixed, pulled = self._bytes(network, region, k)
        need = source + fixed + pulled
        most = memory.limit(self.max_bytes, need, region.device)
        if need <= most:
            return math.inf, _Rooms(most, math.inf, math.inf)
        for_source, own = memory.shares(most, [source, fixed + pulled])
        if region.shape[0] > 1 and fixed > own / 2:
            return max(1, own / 2 * region.shape[0] // fixed), _Rooms(most, for_source, own)
        return math.inf, _Rooms(most, for_source, own - fixed)

    def _source_bytes(self, network: Network, region: InputBox) -> int:
        return 0 if self.preactivation is None else bytes_needed(resolve(self.preactivation), network, region, 0)

    def _bytes(self, network: Network, region: InputBox, k: int) -> tuple[int, int]:
        """Bytes of bounds, lines and room for products, and of the rows of every node that is bounded by them."""
        size, batch = region.lower.element_size(), region.shape[0]
        hidden, values = memory.hidden_entries(network), memory.value_entries(network)
        fixed = batch * (30 * hidden + 8 * values if torch.is_grad_enabled() else 10 * hidden + 6 * values)
        sources = [node.inputs[0] for node in network if isinstance(node.op, (Activation, MaxPool2d))]
        sides = 1 if self._one_row(network) else 2
        targets = [
            (sides * math.prod(network.shape_of(source)), source)
            for source in dict.fromkeys(sources)
            if self.preactivation is None and source not in network.exact_intervals
        ]
        held = most = 0
        for rows, target in (*targets, (k, network.output)):
            end = None if self.outward else backsubstitution.bytes_at_entrance(network, region, rows)
            pull = self._pull(network, target, region, target != network.output, end is not None)
            there, back = end or (0, 0)
            if torch.is_grad_enabled():  # the last rows go back first, and take what they kept with them
                held += size * rows * pull.kept
                most = max(most, held + max(size * rows * pull.passing + back, there))
            else:
                most = max(most, size * rows * pull.passing + there)
        return size * fixed, most

    def _pull(self, network: Network, target: str, region: InputBox, shared: bool, end: bool = False) -> memory.Pull:
        eager = passes(relax_step_kernels(), region.lower) is None
        return memory.pull(network, target, region.shape[0], shared=shared, outward=self.outward, eager=eager, end=end)


@dataclass(frozen=True, slots=True)
class _Rooms:
    """Bytes for a pass, for the relaxation of its pre-activation bounds, and for its rows; infinite: not cut."""

    whole: float
    source: float
    rows: float


def _whole_bytes(rooms: _Rooms) -> int:
    return max(1, int(rooms.whole))


@dataclass(frozen=True, kw_only=True)
class _Bands(_Substitution):
    """The zonotope family as back-substitution: parallel lines, so one row gives both bounds."""

    lines_of: DeepZ = None  # type: ignore[assignment]

    parallel: ClassVar[bool] = True

    def lines(self, activation: Activation, l: Tensor, u: Tensor) -> Lines:
        return named.band_lines(
            activation,
            l,
            u,
            slope=self.lines_of.slope,
            continuous=self.lines_of.continuous,
            gamma=self.lines_of.gamma,
            kappa=self.lines_of.kappa,
        )


@dataclass(frozen=True, kw_only=True)
class _Hybrid(_Substitution):
    """The hybrid zonotope with its shared noise as rows pulled back, and its interval part carried forward.

    Without errors of their own the noise terms see an affine map at every activation: the row of a neuron pulled back
    through the maps has the input's generators as coefficients. Values are to nearest, of networks without pooling.
    """

    lines_of: HBox = None  # type: ignore[assignment]

    parallel: ClassVar[bool] = True

    def _layers(
        self, network: Network, region: InputBox, rooms: _Rooms
    ) -> tuple[Preactivation, dict[str, Lines | Bounds]]:
        bounds, maps, _ = self._hybrid(network, region, rooms)
        return bounds, {**maps}

    def _hybrid(
        self, network: Network, region: InputBox, rooms: _Rooms
    ) -> tuple[Preactivation, dict[str, Lines], dict[str, Tensor]]:
        """Pre-activation bounds, each activation's affine map (as two equal lines), half widths of interval parts."""
        exact = interval.propagate(network, region, targets=_exact_sources(network)).balls
        bounds: Preactivation = {}
        maps: dict[str, Lines] = {}
        betas: dict[str, Tensor] = {}
        for node in network:
            if not isinstance(node.op, Activation):
                if any(name in betas for name in node.inputs):
                    zero = region.lower.new_zeros(())
                    shapes = [(region.shape[0], *network.shape_of(name)) for name in node.inputs]
                    parts = [betas.get(n, zero.expand(s)) for n, s in zip(node.inputs, shapes, strict=True)]
                    assert isinstance(node.op, Affine), "pooled networks go forward"
                    betas[node.name] = node.op.absolute(*parts)
                continue
            source = node.inputs[0]
            beta = betas.get(source)
            if source in network.exact_intervals:
                before = exact[source].bounds
            else:
                shape = network.shape_of(source)
                low, high = self._ranges(network, source, identity_rows(shape, region.lower), region, maps, rooms.rows)
                low, high = low.reshape(-1, *shape), high.reshape(-1, *shape)
                before = ordered(low, high) if beta is None else ordered(low - beta, high + beta)
            band = self.lines_of.lines(node.op, before.lower, before.upper)
            lam, shift = band.lower_slope, (band.lower_intercept + band.upper_intercept) / 2
            error = (band.upper_intercept - band.lower_intercept) / 2
            bounds[node.name] = before
            maps[node.name] = Lines(lam, shift, lam, shift)
            betas[node.name] = error if beta is None else error + lam.abs() * beta
        return bounds, maps, betas

    def _lower_bounds(self, network: Network, region: InputBox, rows: Tensor, rooms: _Rooms) -> Tensor:
        _, maps, betas = self._hybrid(network, region, rooms)
        shared = self._substitute(network, network.output, rows, region, maps, None, rooms.rows)
        front = backsubstitution.pull(
            network, network.output, rows, region.shape[0], {}, stop=zonotope.frontier(network) - {network.input}
        )
        for name, a in front.stops.items():
            shared = shared - backsubstitution.dot(a.abs(), betas[name])
        return shared


def _exact_sources(network: Network) -> frozenset[str]:
    """Inputs of activations whose interval is exact."""
    sources = {node.inputs[0] for node in network if isinstance(node.op, Activation)}
    return frozenset(sources & set(network.exact_intervals))


@dataclass(frozen=True, kw_only=True)
class Crown(_Substitution):
    """Back-substitution with one line below and one above (CROWN, DeepPoly).

    lower: "adaptive" (smaller area), 0, 1, or "soft" (gamma); tria: the other side of the triangle above;
    continuous: the paper's -C forms, which relax stable neurons too.
    preactivation: another relaxation's pre-activation bounds (`Crown(preactivation=Box())` is CROWN-IBP (R)).
    Sound: yes.  Exact: with no crossing neuron.  Gradient: exact almost everywhere; jumps in the weights at
    |l| = |u| (adaptive), l = 0 (lower 0), u = 0 (lower 1), both (tria); nowhere for "soft" and continuous.
    Source: Zhang et al. 2018; Singh et al. 2019; arXiv 2102.06700, table 3.
    """

    lower: LowerSlope = "adaptive"
    tria: bool = False
    continuous: bool = False
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lower, (bool, float)) or self.lower not in ("adaptive", "soft", 0, 1):
            raise ValueError(f"Crown: lower must be 'adaptive', 'soft', 0 or 1, got {self.lower!r}")
        if (self.tria or self.continuous) and self.lower not in (0, 1):
            raise ValueError(f"Crown: tria and continuous need lower 0 or 1, got lower={self.lower!r}")
        require_number("Crown", "gamma", self.gamma)
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"Crown: gamma must be > 0 and finite, got {self.gamma}")

    def lines(self, activation: Activation, l: Tensor, u: Tensor) -> Lines:
        return named.crown_lines(
            activation, l, u, lower=self.lower, tria=self.tria, continuous=self.continuous, gamma=self.gamma
        )


def CrownIBP(*, lower: LowerSlope = "adaptive", gamma: float = 1.0, **options: Any) -> Crown:
    """CROWN with pre-activation bounds from Box: CROWN-IBP (R).

    lower: "adaptive" or "soft" (gamma), as for `Crown`.
    """
    return Crown(lower=lower, gamma=gamma, preactivation=Box(), **options)


@dataclass(frozen=True, kw_only=True)
class FastLin(_Substitution):
    """Back-substitution with both slopes u / (u - l): Fast-Lin, CAP, DeepZ as lines.

    Sound: yes.  Gradient: exact; continuous in the weights.
    Source: Weng et al. 2018; Wong and Kolter 2018.
    """

    parallel: ClassVar[bool] = True

    def lines(self, activation: Activation, l: Tensor, u: Tensor) -> Lines:
        return named.band_lines(activation, l, u, slope="chord")


@dataclass(frozen=True, init=False)
class Intersect(Relaxation):
    """The best of several relaxations, entry by entry: pre-activation bounds and margins both.

    `Intersect(Box(), FastLin())`; names work too.  Sound: yes; refuses unsound parts.
    Gradient: of the bound taken; continuous in the weights where every part is.
    """

    parts: tuple[Relaxation, ...] = ()

    def __init__(
        self, *parts: Relaxation | str, rounding: Rounding | None = None, max_bytes: memory.Limit = None
    ) -> None:
        if len(parts) < 1:
            raise ValueError("Intersect: needs at least one relaxation")
        resolved = [resolve(part) for part in parts]
        for part in resolved:
            if not part.sound:
                raise ValueError(f"Intersect: {name_of(part)} is an estimate, not a bound, and cannot be intersected")
        if rounding is not None:
            resolved = [with_rounding(part, rounding) for part in resolved]
        if len({part.rounding for part in resolved}) > 1:
            raise ValueError("Intersect: parts round differently; say rounding='outward' or 'nearest' for all")
        if max_bytes is not None:
            resolved = [_changed(part, max_bytes=max_bytes) for part in resolved]
        object.__setattr__(self, "parts", tuple(resolved))
        object.__setattr__(self, "rounding", resolved[0].rounding)
        object.__setattr__(self, "max_bytes", max_bytes)
        super().__post_init__()

    def preactivation_bounds(self, network: Network, region: InputBox) -> Preactivation:
        first, *others = self._sharing(network, region, 0)
        best = first.preactivation_bounds(network, region)
        for part in others:
            other = part.preactivation_bounds(network, region)
            best = {name: _tighter(bounds, other[name]) for name, bounds in best.items()}
        return best

    def lower_bounds(self, network: Network, region: InputBox, rows: Tensor) -> Tensor:
        parts = self._sharing(network, region, rows.shape[1])
        bounds = [part.lower_bounds(network, region, rows) for part in parts]
        return torch.stack(bounds).amax(0) if len(bounds) > 2 else _greatest(bounds)

    def bytes_needed(self, network: Network, region: InputBox, k: int) -> int:
        return sum(bytes_needed(part, network, region, k) for part in self.parts)

    def least_bytes(self, network: Network, region: InputBox, k: int) -> int:
        return sum(least_bytes(part, network, region, k) for part in self.parts)

    def _sharing(self, network: Network, region: InputBox, k: int) -> Sequence[Relaxation]:
        """The parts with what each may take, where they do not fit together."""
        needs = [bytes_needed(part, network, region, k) for part in self.parts]
        most = memory.limit(self.max_bytes, sum(needs), region.device)
        if sum(needs) <= most:
            return self.parts
        rooms = memory.shares(most, needs)
        force = self.max_bytes is not None
        return [limited(part, room, force) for part, room in zip(self.parts, rooms, strict=True)]


def _greatest(bounds: list[Tensor]) -> Tensor:
    return bounds[0] if len(bounds) == 1 else torch.maximum(*bounds)


def _tighter(a: Bounds, b: Bounds) -> Bounds:
    return ordered(torch.maximum(a.lower, b.lower), torch.minimum(a.upper, b.upper))


def bytes_needed(relaxation: Relaxation, network: Network, region: InputBox, k: int) -> int:
    """What a relaxation's pass takes whole; 0 for a class that does not say."""
    return relaxation.bytes_needed(network, region, k) if isinstance(relaxation, Relaxation) else 0


def least_bytes(relaxation: Relaxation, network: Network, region: InputBox, k: int) -> int:
    """The least that a relaxation's pass can be cut to; 0 for a class that does not say."""
    return relaxation.least_bytes(network, region, k) if isinstance(relaxation, Relaxation) else 0


def limited(relaxation: Relaxation, room: float, force: bool = False) -> Relaxation:
    """The same relaxation in `room` bytes, unless it has a limit of its own (force: then too) or room is infinite."""
    if not isinstance(relaxation, Relaxation):  # a user's own class
        return relaxation
    if not force and (room == math.inf or relaxation.max_bytes is not None):
        return relaxation
    return _changed(relaxation, max_bytes=room if room == math.inf else max(1, int(room)))


def with_rounding(relaxation: Relaxation, rounding: Rounding) -> Relaxation:
    """The same relaxation with another rounding, its parts included."""
    return relaxation if relaxation.rounding == rounding else _changed(relaxation, rounding=rounding)


def _changed(relaxation: Relaxation, **options: Any) -> Relaxation:
    if not isinstance(relaxation, Intersect):
        return replace(relaxation, **options)
    kept = {"rounding": relaxation.rounding, "max_bytes": relaxation.max_bytes}
    return Intersect(*relaxation.parts, **{**kept, **options})


# --- names --------------------------------------------------------------------------------------------------------

_HERE = "optrelax.relaxations:"
_LAYERS = "optrelax.layers:"
_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "box": (_HERE + "Box", {}),
    "hbox": (_HERE + "HBox", {}),
    "hbox-diag": (_HERE + "HBox", {"slope": "diag"}),
    "hbox-diag-c": (_HERE + "HBox", {"slope": "diag", "continuous": True}),
    "hbox-switch": (_HERE + "HBox", {"slope": "switch"}),
    "hzono": (_HERE + "HBox", {"slope": "chord"}),
    "deepz": (_HERE + "DeepZ", {}),
    "deepz-box": (_HERE + "DeepZ", {"slope": "box"}),
    "deepz-diag": (_HERE + "DeepZ", {"slope": "diag"}),
    "deepz-diag-c": (_HERE + "DeepZ", {"slope": "diag", "continuous": True}),
    "deepz-switch": (_HERE + "DeepZ", {"slope": "switch"}),
    "deepz-soft": (_HERE + "DeepZ", {"slope": "soft"}),
    "deepz-slanted": (_HERE + "DeepZ", {"slope": "slanted"}),
    "fast-lin": (_HERE + "FastLin", {}),
    "crown": (_HERE + "Crown", {}),
    "crown-0": (_HERE + "Crown", {"lower": 0}),
    "crown-1": (_HERE + "Crown", {"lower": 1}),
    "crown-0-c": (_HERE + "Crown", {"lower": 0, "continuous": True}),
    "crown-1-c": (_HERE + "Crown", {"lower": 1, "continuous": True}),
    "crown-0-tria": (_HERE + "Crown", {"lower": 0, "tria": True}),
    "crown-1-tria": (_HERE + "Crown", {"lower": 1, "tria": True}),
    "crown-0-tria-c": (_HERE + "Crown", {"lower": 0, "tria": True, "continuous": True}),
    "crown-1-tria-c": (_HERE + "Crown", {"lower": 1, "tria": True, "continuous": True}),
    "crown-soft": (_HERE + "Crown", {"lower": "soft"}),
    "crown-ibp": (_HERE + "CrownIBP", {}),
    "crown-ibp-soft": (_HERE + "CrownIBP", {"lower": "soft", "gamma": 10.0}),
    "box-widen": (_HERE + "Box", {"omega": 0.5}),
    "box-round": (_HERE + "Box", {"omega": 0.5, "F": 10.0}),
    "cauchy": (_HERE + "Cauchy", {}),
    # The one place where the core names the layers.
    "alpha-crown": (_LAYERS + "AlphaCrown", {}),
    "triangle": (_LAYERS + "Triangle", {}),
    "layerwise": (_LAYERS + "Layerwise", {}),
}
_FACTORIES: dict[str, Callable[..., Relaxation]] = {}


def names() -> tuple[str, ...]:
    """Every registered relaxation, in the order of the documentation."""
    return (*_NAMES, *_FACTORIES)


def register_relaxation(name: str, factory: Callable[..., Relaxation]) -> None:
    """Make `name` (and `name:option=value`) stand for what `factory` returns.  ValueError for a name in use."""
    if name in _NAMES or name in _FACTORIES:
        raise ValueError(f"register_relaxation: {name!r} is registered already")
    if ":" in name or "," in name or not name:
        raise ValueError(f"register_relaxation: a name has no ':' or ',', got {name!r}")
    _FACTORIES[name] = factory


def resolve(relaxation: Relaxation | str) -> Any:
    """An object from a name such as "crown" or "box-round:omega=0.5,F=10"; objects pass through.

    Raises ValueError for an unknown name (with the nearest known one) or option.
    """
    if not isinstance(relaxation, str):
        if isinstance(relaxation, type):
            name = relaxation.__name__
            raise TypeError(f"relaxation: wants a relaxation object, got the class {name}; write {name}()")
        if not hasattr(relaxation, "lower_bounds"):
            raise TypeError(f"relaxation: wants a name or a relaxation object, got {type(relaxation).__name__}")
        return relaxation
    name, _, text = relaxation.partition(":")
    preset: dict[str, Any] = {}
    if name in _FACTORIES:
        factory = _FACTORIES[name]
    elif name in _NAMES:
        target, preset = _NAMES[name]
        module, _, attribute = target.partition(":")
        factory = getattr(importlib.import_module(module), attribute)
    else:
        raise ValueError(f"unknown relaxation {name!r}; {suggest(name, names())}")
    options = dict(preset) | _options(relaxation, text)
    try:
        return factory(**options)
    except TypeError as error:
        raise ValueError(f"relaxation {relaxation!r}: {error}") from None


def _options(whole: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"relaxation {whole!r}: options are written name=value, got {item!r}")
        options[key.strip()] = _value(value.strip())
    return options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def name_of(relaxation: Any) -> str:
    """The name (with options that differ from its defaults) that `resolve` turns back into this object."""
    best: str | None = None
    for name in names():
        target = _NAMES.get(name, ("", {}))[0]
        if target.startswith(_LAYERS) and type(relaxation).__name__ != target.partition(":")[2]:
            continue
        try:
            other = resolve(name)
        except (ImportError, AttributeError):
            continue
        if other == relaxation:
            return name
        if type(other) is type(relaxation) and best is None:
            best = f"{name}:{_differences(relaxation, other)}"
    return best or type(relaxation).__name__


def _differences(relaxation: Any, other: Any) -> str:
    changed = []
    for f in fields(relaxation):
        value = getattr(relaxation, f.name)
        if value != getattr(other, f.name):
            shown = name_of(value) if isinstance(value, Relaxation) else value
            changed.append(f"{f.name}={shown}")
    return ",".join(changed)
