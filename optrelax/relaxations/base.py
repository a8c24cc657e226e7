"""What a relaxation is: bounds of a network over a region, and the memory that a pass takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from optrelax import memory
from optrelax.domains.lines import Lines
from optrelax.enclosures import Bounds, ordered
from optrelax.errors import Problem, UnsupportedOpError
from optrelax.exactness import require_exact_products
from optrelax.networks.activations import Activation, Hull
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations.jumps import Jumps
from optrelax.rounding import Rounding, check_rounding

Preactivation = dict[str, Bounds]  # activation node -> bounds of its input, [batch, *shape]
Loosen = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # ends of an interval to ends further out
Found = TypeVar("Found", covariant=True)


@dataclass(frozen=True, kw_only=True)
class Relaxation:
    """A way to bound a network over a region of its inputs.

    Subclasses implement `preactivation_bounds` and `lower_bounds` on a flat batch; `optrelax.bounds` and its like take
    any batch shape.

    Args:
        rounding: "outward" for bounds that hold in real arithmetic, "nearest" for training and benchmarks.
        max_bytes: most memory of a pass, forward and backward together, beyond weights, inputs and what is returned. A
            pass that would take more is cut into chunks of rows and of examples, each computed a second time for its
            gradient; the results are the same to rounding. None: half of what the device has free when the pass begins,
            at least 256 MiB; `math.inf`: no limit. One row of one example is the least: a limit below what that takes
            is exceeded.

    Raises:
        ValueError: for an option out of range.

    Sound: unless the class says `sound = False`.  Exact, gradient: as each says.

    Example:
        >>> isinstance(ox.Crown(), ox.Relaxation), ox.Cauchy.sound
        (True, False)
        >>> ox.Box().changed(rounding="outward")
        Box(rounding='outward', max_bytes=None, omega=0.0, F=None)
    """

    rounding: Rounding = "nearest"
    max_bytes: memory.Limit = None

    sound: ClassVar[bool] = True
    """Whether every bound holds; an estimate is refused wherever a certificate is made."""
    solves: ClassVar[bool] = False
    """Whether bounds are values of programs that `solve` finds, with gap and status."""
    cached: ClassVar[bool] = True
    """Whether a pass goes fastest in pieces that a CPU's caches hold: one that carries many rows or terms an example.

    Else what is done once a pass, such as absolute values of weights, weighs more.
    """
    tightens: ClassVar[bool] = False
    """Whether pre-activation bounds are its own besides those of its parts."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_rounding(name, self.rounding)
        memory.require_limit(name, self.max_bytes)

    @property
    def outward(self) -> bool:
        """Whether rounding is outward."""
        return self.rounding == "outward"

    @property
    def monotone(self) -> bool:
        """Whether no lower bound ever rises with eps: the largest certified one is then found by bisection.

        CROWN's, for one, do (arXiv 2102.06700).
        """
        return False

    @property
    def jumps(self) -> Jumps:
        """Where the bounds may jump as the weights move (arXiv 2102.06700, section 4); None where nobody knows."""
        return None

    @property
    def parts(self) -> tuple[Relaxation, ...]:
        """Relaxations whose pre-activation bounds this one takes; none: it finds its own."""
        return ()

    @property
    def deciding(self) -> Relaxation:
        """The same relaxation for the signs of margins alone."""
        return self

    def neuron_hull(self, activation: Activation, l: Tensor, u: Tensor) -> Hull | None:
        """The lines around an activation over [l, u]; None where there is no such thing."""
        return None

    def propagated(self, by: Propagation[Found]) -> Found | None:
        """What `by` makes of the way in which these bounds come about; None where it is none of its ways."""
        return None

    def refusal(self, activation: Activation) -> str | None:
        """Why this relaxation has no meaning for an activation, as the end of a sentence; None where it has."""
        return None

    def require_supported(self, network: Network) -> None:
        """UnsupportedOpError naming every activation of the network that the relaxation has no meaning for."""
        problems = [
            Problem(node.path, node.op.name, reason)
            for node in network.activations
            if node.activation and (reason := self.refusal(node.op)) is not None
        ]
        if problems:
            raise UnsupportedOpError(problems)

    def preactivation_bounds(self, network: Network, region: Region) -> Preactivation:
        """Bounds of the input of every activation, in topological order."""
        raise NotImplementedError

    def lower_bounds(self, network: Network, region: Region, rows: Tensor) -> Tensor:
        """Lower bounds of rows [batch or 1, k, *output_shape] of the output: [batch, k]."""
        raise NotImplementedError

    def output_bounds(self, network: Network, region: Region) -> Bounds:
        """Bounds of every output: [batch, *output_shape]."""
        eye = identity_rows(network.output_shape, region.like)
        both = self.lower_bounds(network, region, torch.cat([eye, -eye], 1))
        k = both.shape[1] // 2
        shape = (-1, *network.output_shape)
        return ordered(both[:, :k].reshape(shape), -both[:, k:].reshape(shape))

    def bytes_needed(self, network: Network, region: Region, k: int) -> int:
        """The peak of a pass for k rows that is not cut, counted from shapes; 0 where nothing is ever cut."""
        return 0

    def least_bytes(self, network: Network, region: Region, k: int) -> int:
        """What a pass for k rows takes that is cut as small as it goes."""
        return self.bytes_needed(network, region.select(slice(0, 1)), k)

    def changed(self, **options: Any) -> Relaxation:
        """The same relaxation with other options."""
        return replace(self, **options)

    def prepare(self, region: Region) -> Region:
        """Check the settings that outward rounding depends on."""
        if self.outward:
            require_exact_products(region.like)
        return region


@dataclass(frozen=True, kw_only=True)
class LineRelaxation(Relaxation):
    """A relaxation that puts a line below and a line above every activation."""

    @property
    def chord_shares(self) -> tuple[float, ...]:
        """The constants that a chord's slope is multiplied by in these lines."""
        return (1.0,)

    def lines(self, activation: Activation, l: Tensor, u: Tensor) -> Lines:
        """Lines at pre-activation bounds [l, u]."""
        raise NotImplementedError

    def neuron_hull(self, activation: Activation, l: Tensor, u: Tensor) -> Hull | None:
        lines = self.lines(activation, l, u)
        below, above = (lines.lower_slope, lines.lower_intercept), (lines.upper_slope, lines.upper_intercept)
        return Hull((below, below), (above, above))

    def propagated(self, by: Propagation[Found]) -> Found | None:
        return by.lines(self)


class Propagation(Protocol[Found]):
    """Bounds in another arithmetic: one method for each way in which a relaxation's bounds come about."""

    def intervals(self, loosen: Loosen | None) -> Found:
        """Intervals forward, pre-activation ends moved outward, and the last affine ops folded into the rows."""
        ...

    def hybrid(self, relaxation: LineRelaxation) -> Found:
        """The input's noise forward through parallel lines, and an interval of all other errors beside it."""
        ...

    def lines(self, relaxation: LineRelaxation) -> Found:
        """Rows back through the lines, on the bounds of the relaxation's part or on its own."""
        ...


def identity_rows(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """One row an entry: [1, n, *shape]."""
    n = math.prod(shape)
    return torch.eye(n, dtype=like.dtype, device=like.device).reshape(1, n, *shape)


def limited(relaxation: Relaxation, room: float, force: bool = False) -> Relaxation:
    """The same relaxation in `room` bytes, unless it has a limit of its own (force: then too) or room is infinite."""
    if not force and (room == math.inf or relaxation.max_bytes is not None):
        return relaxation
    return relaxation.changed(max_bytes=room if room == math.inf else max(1, int(room)))


def with_rounding(relaxation: Relaxation, rounding: Rounding) -> Relaxation:
    """The same relaxation with another rounding, its parts included."""
    if relaxation.rounding == rounding:
        return relaxation
    return relaxation.changed(rounding=rounding)


def examples_at_a_time(relaxation: Relaxation, network: Network, region: Region, k: int) -> float:
    """Examples at a time for a pass that is cut along the batch alone."""
    need = relaxation.bytes_needed(network, region, k)
    most = memory.limit(relaxation.max_bytes, need, region.device)
    return math.inf if need <= most else most * region.shape[0] // need


def pooled(network: Network) -> bool:
    return any(node.maximum or node.product for node in network)
