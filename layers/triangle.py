"""`Triangle`: the triangle LP with closed-form pre-activation bounds (LP-LAST), one LP a row of the specification."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, field, fields
from typing import Any, Protocol, TypeVar, dataclass_transform

import torch
from torch import Tensor, nn

from optrelax.analysis import Net, prepare, prepare_rows
from optrelax.enclosures import Bounds, ordered
from optrelax.graph import Network
from optrelax.layers.dual_ascent import Answer, DualAscent
from optrelax.layers.exported import network_solver, solves_networks
from optrelax.layers.network_gradients import Envelope, attach
from optrelax.layers.network_lp import require_piecewise_linear
from optrelax.layers.problems import (
    DualPoint,
    HullLines,
    Problems,
    chord_start,
    crown_start,
    dual_value,
    hull_lines,
)
from optrelax.layers.solutions import Solution, Status, require_optimal
from optrelax.regions import InputBox
from optrelax.relaxations import (
    Box,
    FastLin,
    Intersect,
    Preactivation,
    Relaxation,
    identity_rows,
    name_of,
    resolve,
    with_rounding,
)

Layer = TypeVar("Layer", bound=nn.Module)


class NetworkSolver(Protocol):
    """Solves R network LPs from dual points that are bounds already."""

    def solve_network(self, problems: Problems, starts: list[DualPoint]) -> Answer:
        """Dual and primal points with their values, one status a problem."""
        ...


class GradientRule(Protocol):
    """Turns an answer into a function whose gradient `.backward()` returns."""

    def value(self, problems: Problems, answer: Answer) -> Tensor:
        """[R]."""
        ...


@dataclass(frozen=True, slots=True)
class Warm:
    """What a later solve of the same rows may start from."""

    dual: DualPoint
    target: str


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
    """

    preactivation: Relaxation | str | Mapping[str, Bounds] = field(default_factory=lambda: Intersect(Box(), FastLin()))
    solver: Any = field(default_factory=DualAscent)
    gradient: Any = field(default_factory=Envelope)
    throw: bool = False

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        Relaxation.__post_init__(self)
        name = type(self).__name__
        if not isinstance(self.preactivation, Mapping):
            source = resolve(self.preactivation)
            if not source.sound:
                raise ValueError(f"{name}: preactivation={name_of(source)} is an estimate, not a bound")
            object.__setattr__(self, "preactivation", source)
        if not solves_networks(self.solver):
            wanted = "a solver object, such as DualAscent() or Highs()"
            raise TypeError(f"{name}: solver wants {wanted}, got {self.solver!r}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(getattr(self, f.name) == getattr(other, f.name) for f in fields(self))

    def __hash__(self) -> int:
        return hash(type(self))

    def extra_repr(self) -> str:
        """Fields for `print(layer)`."""
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))

    def forward(self, net: Net, region: InputBox, spec: Tensor) -> Tensor:
        """Lower bounds of spec's rows: [*batch, k]."""
        return self.solve(net, region, spec).lower

    def solve(self, net: Net, region: InputBox, spec: Tensor, start: Solution | None = None) -> Solution:
        """Bounds of rows of the output by linear programming.

        net, region, spec as for `optrelax.lower_bounds`; spec [*batch, k, outputs] or [k, outputs].
        start: an earlier solution of the same examples and rows, whose dual point is the first iterate.
        Sound: `.lower`, at every iteration count.  Gradient: `.lower` by the layer's `gradient` rule.
        Raises UnsolvedError with throw=True unless every problem is OPTIMAL; ValueError for a start of other problems.
        """
        network, flat, batch = prepare(net, region)
        rows = prepare_rows(network, spec, flat, batch)
        warm = None if start is None else _warm(start, (*batch, rows.shape[1]))
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

    def solve_flat(self, network: Network, region: InputBox, rows: Tensor, warm: Warm | None = None) -> Solution:
        """The solve on a flat batch: rows [batch or 1, k, *output_shape]; results [batch, k]."""
        raise NotImplementedError

    def lower_bounds(self, network: Network, region: InputBox, rows: Tensor) -> Tensor:
        return self.solve_flat(network, region, rows).lower

    def output_bounds(self, network: Network, region: InputBox) -> Bounds:
        eye = identity_rows(network.output_shape, region.lower)
        both = self.lower_bounds(network, region, torch.cat([eye, -eye], 1))
        k = both.shape[1] // 2
        shape = (-1, *network.output_shape)
        return ordered(both[:, :k].reshape(shape), -both[:, k:].reshape(shape))

    def closed_form(self, network: Network, region: InputBox) -> Preactivation:
        """The pre-activation bounds that the layer starts from, rounded as the layer is."""
        source = self.preactivation
        if isinstance(source, Mapping):
            return given_bounds(network, region, source)
        assert isinstance(source, Relaxation)
        return with_rounding(source, self.rounding).preactivation_bounds(network, region)

    @property
    def implied(self) -> bool:
        """Whether the LP itself implies its pre-activation bounds: true of sound relaxations, not of given numbers."""
        return not isinstance(self.preactivation, Mapping)


def given_bounds(network: Network, region: InputBox, given: Mapping[str, Bounds]) -> Preactivation:
    """Pre-activation bounds from the user, by path or node name, checked and flattened to the batch."""
    found: Preactivation = {}
    known = {node.path: node for node in network.activations} | {node.name: node for node in network.activations}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"preactivation: no activation named {unknown[0]!r}; the network has {sorted(known)}")
    for node in network.activations:
        bounds = given.get(node.path, given.get(node.name))
        if bounds is None:
            raise ValueError(f"preactivation: bounds of activation {node.path!r} are missing")
        shape = (region.shape[0], *node.shape)
        for end in (bounds.lower, bounds.upper):
            if end.numel() != region.shape[0] * math.prod(node.shape):
                raise ValueError(f"preactivation: {node.path!r} wants {shape}, got {tuple(end.shape)}")
            if not bool(end.detach().isfinite().all()):
                raise ValueError(f"preactivation: bounds of {node.path!r} must be finite")
        found[node.name] = Bounds(
            bounds.lower.to(region.lower).reshape(shape), bounds.upper.to(region.lower).reshape(shape)
        )
    return found


@network_layer
class Triangle(NetworkLayer):
    """The triangle relaxation as a differentiable LP layer, pre-activation bounds from a closed form (LP-LAST).

    preactivation: a relaxation (or an intersection of several, the default: tight and continuous in the weights), its
    name, or the user's own bounds {path: Bounds}. Those may be tighter than the LP implies (from a MILP, or by
    branching): they are constraints, and where `solver` cannot tell the optimum under them, HiGHS does. Bounds that
    contradict each other have the status INFEASIBLE and the bound -inf.
    solver: `DualAscent` (default) or `InteriorPoint`; or, through the explicit LP of every example, in float64:
    `Highs`, `Cvxpy`, `PDHG`.
    Sound: yes, whatever the solver did.  Exact: the single-neuron convex relaxation, to the certified gap.
    Gradient: of the optimal value (`Envelope`), through weights, biases, region, specification and pre-activation
    bounds; continuous in the weights where those bounds are.
    Source: Ehlers 2017; Salman et al. 2019; arXiv 2102.06700v1.
    """

    def preactivation_bounds(self, network: Network, region: InputBox) -> Preactivation:
        return self.closed_form(network, self.prepare(region))

    def solve_flat(self, network: Network, region: InputBox, rows: Tensor, warm: Warm | None = None) -> Solution:
        require_piecewise_linear(network)
        region = self.prepare(region)
        preactivation = self.closed_form(network, region)
        return solve_rows(self, network, region, rows, preactivation, warm)


def solve_rows(
    layer: NetworkLayer,
    network: Network,
    region: InputBox,
    rows: Tensor,
    preactivation: Preactivation,
    warm: Warm | None = None,
) -> Solution:
    """Solve one LP for each example and row of the output on given pre-activation bounds: [batch, k]."""
    batch, k = region.shape[0], rows.shape[1]
    example = torch.arange(batch, device=rows.device).repeat_interleave(k)
    flat_rows = rows.expand(batch, *rows.shape[1:]).reshape(batch * k, *network.output_shape)
    found = solve_problems(layer, network, network.output, flat_rows, region, preactivation, example, warm)
    lower, gap, status, iterations = (
        t.reshape(batch, k) for t in (found.lower, found.gap, found.status, found.iterations)
    )
    return Solution(lower, gap, status, iterations, found.warm)


def solve_problems(
    layer: NetworkLayer,
    network: Network,
    target: str,
    rows: Tensor,
    region: InputBox,
    preactivation: Preactivation,
    example: Tensor,
    warm: Warm | None = None,
) -> Solution:
    """Solve R problems, rows[r] . value(target) over example[r]: `Solution` with [R] entries."""
    wanted = network.ancestors(target)
    bounds = {node.name: preactivation[node.name] for node in network.activations if node.name in wanted}
    hulls = {name: hull_lines(network[name].op, b) for name, b in bounds.items()}  # type: ignore[arg-type]
    starts = _starts(network, target, bounds, hulls, example, warm)
    differentiable = torch.is_grad_enabled()
    with torch.set_grad_enabled(differentiable):
        problems = Problems(
            network,
            target,
            rows,
            region.lower[example],
            region.upper[example],
            {name: h.select(example) for name, h in hulls.items()},
            example,
        )
    constants = problems.detach()
    answer = network_solver(layer.solver, layer.implied).solve_network(constants, starts)
    with torch.no_grad():
        lower = answer.lower
        if layer.outward:
            picked = {n: Bounds(b.lower[example], b.upper[example]) for n, b in bounds.items()}
            lower = dual_value(constants, answer.dual, "outward", picked)
            lower = torch.where(answer.status == Status.INFEASIBLE, -torch.inf, lower)
        gap = answer.objective - lower
    if differentiable:
        lower = attach(lower, layer.gradient.value(problems, answer))
    return Solution(lower, gap, answer.status, answer.iterations, Warm(answer.dual, target))


def _warm(start: Solution, shape: tuple[int, ...]) -> Warm:
    """What an earlier solution leaves for a solve of these many rows; ValueError where it cannot be one."""
    if getattr(start, "warm", None) is None:
        got = f"a {type(start).__name__} without state"
        raise ValueError(f"start: wants the Solution of an earlier solve, got {got}")
    if tuple(start.lower.shape) != shape:
        raise ValueError(f"start: has the bounds of {tuple(start.lower.shape)} rows, this solve {shape}")
    found: Warm = start.warm
    return found


def _starts(
    network: Network,
    target: str,
    bounds: Mapping[str, Bounds],
    hulls: Mapping[str, HullLines],
    example: Tensor,
    warm: Warm | None,
) -> list[DualPoint]:
    """CROWN's and Fast-Lin's weights, and those of an earlier solve."""
    with torch.no_grad():
        crown = crown_start(network, bounds, hulls)
        starts = [crown.select(example), chord_start(network, hulls, crown).select(example)]
        if warm is not None:
            alpha, beta = starts[0].alpha, starts[0].beta
            mine, theirs = (
                [(kind, n, w.shape) for kind, part in enumerate(pair) for n, w in part.items()]
                for pair in ((alpha, beta), (warm.dual.alpha, warm.dual.beta))
            )
            if warm.target != target or sorted(mine) != sorted(theirs):
                raise ValueError("start: comes from another network, batch or specification")
            # Multipliers of pre-activation bounds are left behind: they hold for solvers that know them only.
            dtype = next((w.dtype for w in alpha.values()), torch.float64)
            starts.append(DualPoint(warm.dual.alpha, warm.dual.beta).to(dtype))
        return starts
