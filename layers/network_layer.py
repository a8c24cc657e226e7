"""What the LP layers of a network share: options that stay, `nn.Module` behaviour, and the memory of a solve."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field, fields
from typing import Any, ClassVar, Protocol, TypeVar, dataclass_transform, runtime_checkable

import torch
from torch import Tensor, nn

from optrelax import memory, memory_counts
from optrelax.analysis import Net, prepare, prepare_rows
from optrelax.enclosures import Bounds
from optrelax.errors import Problem, UnsupportedOpError
from optrelax.frozen import field_values, filled
from optrelax.layers.ascent.dual_ascent import DualAscent
from optrelax.layers.evaluation import Evaluation
from optrelax.layers.exported import Solver, network_solver
from optrelax.layers.given_bounds import given_bounds, same_options
from optrelax.layers.layer_memory import LayerBudget, LotSizes
from optrelax.layers.network_gradients import Envelope
from optrelax.layers.network_solver import NetworkSolver
from optrelax.layers.problems import DualPoint, Problems
from optrelax.layers.programs.lp_data import ProgramSolver
from optrelax.layers.solutions import Solution, require_optimal
from optrelax.layers.starts import Warm, warm_start
from optrelax.networks.activations import Activation, Hull, Smooth
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import (
    Box,
    FastLin,
    Intersect,
    Preactivation,
    Relaxation,
    limited,
    resolve_bound,
    with_rounding,
)
from optrelax.relaxations.zonotope_family import ZonotopeFamily
from optrelax.uncompiled import uncompiled

Layer = TypeVar("Layer", bound=nn.Module)
_MANY = 2048
"""Problems beyond which a CPU takes as long for each, however many go together."""


@runtime_checkable
class GradientRule(Protocol):
    """Turns a solve into a function whose gradient `.backward()` returns."""

    def value(self, problems: Problems, found: Evaluation) -> Tensor:
        """[R]."""
        ...


Review = Callable[[Problems, Sequence[DualPoint], Evaluation], Evaluation]
"""Problems, starts, what was found; and what is to become of it."""


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False)
def network_layer(cls: type[Layer]) -> type[Layer]:
    """A frozen dataclass whose options stay as they are while `nn.Module` writes its own attributes."""
    made = dataclass(frozen=True, kw_only=True, eq=False)(cls)
    made.__setattr__ = _set  # type: ignore[method-assign]
    return made


def _set(self: nn.Module, name: str, value: Any) -> None:
    if name in {f.name for f in fields(self)}:  # type: ignore[arg-type]
        raise FrozenInstanceError(f"cannot assign to field {name!r}; use dataclasses.replace")
    nn.Module.__setattr__(self, name, value)


@network_layer
class NetworkLayer(Relaxation, nn.Module):
    """Shared by the LP layers: fields that cannot change, `nn.Module` behaviour, and the flat solve.

    Calling the layer gives the lower bounds: layer(net, region, spec) -> [*batch, k].
    max_bytes: as for every relaxation. LPs that do not fit are solved in lots, of which a primal and a dual point each
    are kept, and the gradient rule alone is evaluated a second time. What solvers in other languages (HiGHS, SCS)
    take by themselves is not counted.
    """

    preactivation: Relaxation | str | Mapping[str, Bounds] = field(default_factory=lambda: Intersect(Box(), FastLin()))
    solver: Solver = field(default_factory=DualAscent)
    gradient: GradientRule = field(default_factory=Envelope)
    throw: bool = False

    solves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        self.review: Review | None = None
        """Who sees every evaluated solve before its gradient rule does."""
        Relaxation.__post_init__(self)
        name, source = type(self).__name__, self.preactivation
        if not isinstance(source, Mapping):
            filled(self, preactivation=resolve_bound(name, source))
        if not isinstance(self.solver, NetworkSolver | ProgramSolver):
            wanted = "a solver object, such as DualAscent() or Highs()"
            raise TypeError(f"{name}: solver wants {wanted}, got {self.solver!r}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(
            same_options(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
        )

    def __hash__(self) -> int:
        return hash(type(self))

    def extra_repr(self) -> str:
        """Fields for `print(layer)`."""
        return ", ".join(f"{name}={value!r}" for name, value in field_values(self).items())

    @property
    def given(self) -> Mapping[str, Bounds] | None:
        """The user's own pre-activation bounds, where these take the place of a relaxation."""
        return self.preactivation if isinstance(self.preactivation, Mapping) else None

    @property
    def source(self) -> Relaxation | None:
        """The relaxation that bounds pre-activations, where there is one."""
        return self.preactivation if isinstance(self.preactivation, Relaxation) else None

    @property
    def parts(self) -> tuple[Relaxation, ...]:
        return () if self.source is None else (self.source,)

    def neuron_hull(self, activation: Activation, l: Tensor, u: Tensor) -> Hull | None:
        return activation.hull(l, u)

    def forward(self, net: Net, region: Region, spec: Tensor) -> Tensor:
        """Lower bounds of spec's rows: [*batch, k]."""
        return self.solve(net, region, spec).lower

    @uncompiled
    def solve(self, net: Net, region: Region, spec: Tensor, start: Solution | None = None) -> Solution:
        """Bounds of rows of the output by linear programming.

        net, region, spec as for `optrelax.lower_bounds`; spec [*batch, k, outputs] or [k, outputs].
        start: an earlier solution of the same examples and rows. Where its points show an optimum they stay; elsewhere
            its dual point is the first iterate.
        Sound: `.lower`, at every iteration count.  Gradient: `.lower` by the layer's `gradient` rule.
        Raises UnsolvedError with throw=True unless every problem is OPTIMAL; ValueError for a start of other problems.
        """
        network, flat, batch = prepare(net, region)
        rows = prepare_rows(network, spec, flat, batch)
        warm = None if start is None else warm_start(start, (*batch, rows.shape[1]))
        found = self.solve_flat(network, flat, rows, warm)
        if self.throw:
            require_optimal(type(self).__name__, found.status)
        k = rows.shape[1]
        preactivation = found.preactivation
        if preactivation is not None:
            preactivation = {
                network[name].path: Bounds(
                    b.lower.reshape(*batch, *b.lower.shape[1:]), b.upper.reshape(*batch, *b.upper.shape[1:])
                )
                for name, b in preactivation.items()
            }
        return Solution(
            found.lower.reshape(*batch, k),
            found.gap.reshape(*batch, k),
            found.status.reshape(*batch, k),
            found.iterations.reshape(*batch, k),
            found.warm,
            preactivation,
        )

    def solve_flat(self, network: Network, region: Region, rows: Tensor, warm: Warm | None = None) -> Solution:
        """The solve on a flat batch: rows [batch or 1, k, *output_shape]; results [batch, k]."""
        raise NotImplementedError

    @uncompiled
    def lower_bounds(self, network: Network, region: Region, rows: Tensor) -> Tensor:
        return self.solve_flat(network, region, rows).lower

    def closed_form(self, network: Network, region: Region, room: float = math.inf) -> Preactivation:
        """The pre-activation bounds that the layer starts from, rounded as the layer is, in `room` bytes."""
        if self.given is not None:
            return given_bounds(network, region, self.given)
        assert self.source is not None
        return limited(with_rounding(self.source, self.rounding), room).preactivation_bounds(network, region)

    def problem_count(self, network: Network, batch: int, k: int) -> int:
        """LPs at most for k rows of the output."""
        return batch * k

    def bytes_needed(self, network: Network, region: Region, k: int) -> int:
        network = self.lowered(network)
        lots = self._lots(network, region, k)
        return self._source_bytes(network, region) + lots.fixed + lots.solver + lots.each * lots.count

    def least_bytes(self, network: Network, region: Region, k: int) -> int:
        network = self.lowered(network)
        first = sum(part.least_bytes(network, region, 0) for part in self.parts)
        lots = self._lots(network, region, k)
        solver = 0
        if lots.solver:
            inputs, hidden = math.prod(network.input_shape), memory.hidden_entries(network)
            solver = network_solver(self.solver).bytes_needed(inputs, hidden, 1)
        return int(first + lots.fixed + lots.kept * lots.count + lots.least + 2 * solver)

    def budget(self, network: Network, region: Region, k: int) -> LayerBudget:
        """`max_bytes` shared between the pre-activation bounds and the LPs."""
        source, lots = self._source_bytes(network, region), self._lots(network, region, k)
        needs = [source, lots.fixed + lots.solver + lots.each * lots.count]
        most = memory.limit(self.max_bytes, sum(needs), region.device)
        if sum(needs) <= most:
            for_source, for_lps = math.inf, math.inf
        else:
            for_source, for_lps = memory.shares(most, needs)
        if self.max_bytes is None and region.device.type == "cpu" and not torch.is_grad_enabled():
            # Without a backward pass lots of so many cost next to nothing.
            for_lps = min(for_lps, lots.fixed + lots.solver + lots.kept * lots.count + lots.each * _MANY)
        if needs[1] <= for_lps:
            return LayerBudget(for_source, math.inf, self.solver)
        left = for_lps - lots.fixed - lots.kept * lots.count
        solver = self.solver
        if lots.solver:
            least = min(left / 2, lots.solver)
            solver = network_solver(solver).within(least)
            left -= least
        return LayerBudget(for_source, lots.size(left), solver)

    def _source_bytes(self, network: Network, region: Region) -> int:
        return sum(part.bytes_needed(network, region, 0) for part in self.parts)

    def _lots(self, network: Network, region: Region, k: int) -> LotSizes:
        batch, size = region.shape[0], 8 if self.outward else region.dtype.itemsize
        inputs, hidden = math.prod(network.input_shape), memory.hidden_entries(network)
        gradient, count = torch.is_grad_enabled(), self.problem_count(network, batch, k)
        outputs = math.prod(network.output_shape) if k else 0
        return LotSizes(
            count=count,
            each=size * memory_counts.program(gradient).of(inputs=inputs, hidden=hidden, outputs=outputs),
            kept=size * memory_counts.dual_points(gradient).of(inputs=inputs, hidden=hidden),
            fixed=size * batch * memory_counts.hulls(gradient).of(hidden=hidden),
            graph=memory_counts.graph_bytes(len(network.nodes)) if gradient else 0,
            # A dual ascent's vectors are counted with their problem.
            solver=network_solver(self.solver).bytes_needed(inputs, hidden, count),
        )

    def lowered(self, network: Network) -> Network:
        """The network that the LPs are of; UnsupportedOpError for products that this layer cannot take."""
        found, reason = network.lowered, None
        if not network_solver(self.solver).products:
            reason = "the product of two values is for solver=DualAscent(), without exact=True"
        elif not self.implies(found):
            reason = "the product of two values wants pre-activation bounds that its LP implies; take box or crown"
        if reason is not None and found.products:
            raise UnsupportedOpError([Problem(node.path, "Multiply", reason) for node in found.products])
        return found

    def implies(self, network: Network) -> bool:
        """Whether the LP of a network implies its pre-activation bounds.

        True of sound relaxations, not of given numbers. The two lines a side of a smooth activation, and the planes of
        a product, imply interval bounds and CROWN's, but not a zonotope's.
        """
        source = self.source
        if source is None:
            return False
        parts = source.parts if isinstance(source, Intersect) else (source,)
        curved = any(node.product or node.of(Smooth) for node in network.relaxed)
        return not (curved and any(isinstance(part, ZonotopeFamily) for part in parts))
