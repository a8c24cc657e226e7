"""`Triangle`: the triangle LP with closed-form pre-activation bounds (LP-LAST), one LP a row of the specification."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar, dataclass_transform

import torch
from torch import Tensor, nn

from optrelax import memory, memory_counts
from optrelax.analysis import Net, prepare, prepare_rows
from optrelax.enclosures import Bounds, ordered
from optrelax.errors import Problem, UnsupportedOpError
from optrelax.layers.ascent.dual_ascent import DualAscent
from optrelax.layers.batched import join
from optrelax.layers.evaluation import Evaluation, solved
from optrelax.layers.exported import Solver, network_solver, solved_under_given_bounds
from optrelax.layers.network_gradients import Envelope, attach
from optrelax.layers.network_lp import shared
from optrelax.layers.network_solver import NetworkSolver
from optrelax.layers.problems import (
    DualPoint,
    HullLines,
    Problems,
    Weights,
    chord_start,
    crown_start,
    hulls_at,
)
from optrelax.layers.programs.lp_data import ProgramSolver
from optrelax.layers.solutions import Solution, Status, require_optimal
from optrelax.networks.activations import Activation, Hull, Smooth
from optrelax.networks.graph import Network
from optrelax.networks.products import Multiply
from optrelax.regions import Region
from optrelax.relaxations import (
    Box,
    Crown,
    FastLin,
    Intersect,
    Preactivation,
    Relaxation,
    identity_rows,
    limited,
    name_of,
    resolve,
    with_rounding,
)
from optrelax.relaxations.jumps import Jumps, joined
from optrelax.relaxations.zonotopes import ZonotopeFamily

Layer = TypeVar("Layer", bound=nn.Module)
_MANY = 2048
"""Problems beyond which a CPU takes as long for each, however many go together."""


class GradientRule(Protocol):
    """Turns a solve into a function whose gradient `.backward()` returns."""

    def value(self, problems: Problems, found: Evaluation) -> Tensor:
        """[R]."""
        ...


Review = Callable[[Problems, Sequence[DualPoint], Evaluation], Evaluation]
"""Problems, starts, what was found; and what is to become of it."""


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
    max_bytes: as for every relaxation. LPs that do not fit are solved in lots, of which a primal and a dual point each
    are kept, and the gradient rule alone is evaluated a second time. What solvers in other languages (HiGHS, SCS)
    take by themselves is not counted.
    """

    preactivation: Relaxation | str | Mapping[str, Bounds] = field(default_factory=lambda: Intersect(Box(), FastLin()))
    solver: Solver = field(default_factory=DualAscent)
    gradient: Any = field(default_factory=Envelope)
    throw: bool = False

    solves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        self.review: Review | None = None
        """Who sees every evaluated solve before its gradient rule does."""
        Relaxation.__post_init__(self)
        name = type(self).__name__
        if not isinstance(self.preactivation, Mapping):
            source = resolve(self.preactivation)
            if not source.sound:
                raise ValueError(f"{name}: preactivation={name_of(source)} is an estimate, not a bound")
            object.__setattr__(self, "preactivation", source)
        if not isinstance(self.solver, NetworkSolver | ProgramSolver):
            wanted = "a solver object, such as DualAscent() or Highs()"
            raise TypeError(f"{name}: solver wants {wanted}, got {self.solver!r}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(
            _same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
        )

    def __hash__(self) -> int:
        return hash(type(self))

    def extra_repr(self) -> str:
        """Fields for `print(layer)`."""
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))

    @property
    def parts(self) -> tuple[Relaxation, ...]:
        return (self.preactivation,) if isinstance(self.preactivation, Relaxation) else ()

    def neuron_hull(self, activation: Activation, l: Tensor, u: Tensor) -> Hull | None:
        return activation.hull(l, u)

    def forward(self, net: Net, region: Region, spec: Tensor) -> Tensor:
        """Lower bounds of spec's rows: [*batch, k]."""
        return self.solve(net, region, spec).lower

    def solve(self, net: Net, region: Region, spec: Tensor, start: Solution | None = None) -> Solution:
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

    def solve_flat(self, network: Network, region: Region, rows: Tensor, warm: Warm | None = None) -> Solution:
        """The solve on a flat batch: rows [batch or 1, k, *output_shape]; results [batch, k]."""
        raise NotImplementedError

    def lower_bounds(self, network: Network, region: Region, rows: Tensor) -> Tensor:
        return self.solve_flat(network, region, rows).lower

    def output_bounds(self, network: Network, region: Region) -> Bounds:
        eye = identity_rows(network.output_shape, region.like)
        both = self.lower_bounds(network, region, torch.cat([eye, -eye], 1))
        k = both.shape[1] // 2
        shape = (-1, *network.output_shape)
        return ordered(both[:, :k].reshape(shape), -both[:, k:].reshape(shape))

    def closed_form(self, network: Network, region: Region, room: float = math.inf) -> Preactivation:
        """The pre-activation bounds that the layer starts from, rounded as the layer is, in `room` bytes."""
        source = self.preactivation
        if isinstance(source, Mapping):
            return given_bounds(network, region, source)
        assert isinstance(source, Relaxation)
        return limited(with_rounding(source, self.rounding), room).preactivation_bounds(network, region)

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
        source = self.preactivation
        if isinstance(source, Mapping):
            return False
        parts = source.parts if isinstance(source, Intersect) else (source,)
        curved = any(isinstance(node.op, (Smooth, Multiply)) for node in network.relaxed)
        return not (curved and any(isinstance(part, ZonotopeFamily) for part in parts))


def _same(mine: object, other: object) -> bool:
    """Equality of options, given bounds entry by entry."""
    if not (isinstance(mine, Mapping) and isinstance(other, Mapping)):
        return bool(mine == other)
    return mine.keys() == other.keys() and all(
        torch.equal(b.lower, other[name].lower) and torch.equal(b.upper, other[name].upper) for name, b in mine.items()
    )


@dataclass(frozen=True, slots=True)
class LayerBudget:
    """What a layer's memory allows: bytes for the closed form, LPs at a time (infinite: all), and the solver in it."""

    source: float
    lot: float
    solver: Solver


@dataclass(frozen=True, slots=True)
class LotSizes:
    """LPs at most; bytes of one being solved and differentiated, of one that waits, of what all share, of a solver."""

    count: int
    each: int
    kept: int
    fixed: int
    solver: int
    graph: int = 0
    """What a lot leaves for the backward pass besides numbers."""

    @property
    def least(self) -> float:
        """A lot at work and the graphs of all, where lots are neither too large nor too many.

        As much as is kept of all problems anyway, so that a tight limit makes no lots of single problems.
        """
        return max(self.each, self.kept * self.count, 2 * math.sqrt(self.count * self.each * self.graph))

    def size(self, room: float) -> int:
        """LPs of a lot: the most whose numbers, with the graphs of all lots, fit."""
        room = max(room, self.least)
        spare = max(0.0, room**2 - 4 * self.count * self.each * self.graph)
        return max(1, int((room + math.sqrt(spare)) / (2 * self.each)))


def given_bounds(network: Network, region: Region, given: Mapping[str, Bounds]) -> Preactivation:
    """Pre-activation bounds from the user, by path or node name, checked and flattened to the batch."""
    found: Preactivation = {}
    by_path = {node.path: node.path for node in network.activations}
    by_name = {node.name: node.path for node in network.activations}
    # A name may be another's path: keys are all of one kind.
    if given.keys() == by_name.keys() and given.keys() != by_path.keys():
        given = {by_name[name]: bounds for name, bounds in given.items()}
    unknown = sorted(set(given) - set(by_path))
    if unknown:
        paths = [node.path for node in network.activations]
        raise ValueError(f"preactivation: no activation named {unknown[0]!r}; the network has {paths}")
    for node in network.activations:
        bounds = given.get(node.path)
        if bounds is None:
            raise ValueError(f"preactivation: bounds of activation {node.path!r} are missing")
        shape = (region.shape[0], *node.shape)
        for end in (bounds.lower, bounds.upper):
            if end.numel() != region.shape[0] * math.prod(node.shape):
                raise ValueError(f"preactivation: {node.path!r} wants {shape}, got {tuple(end.shape)}")
            if not bool(end.detach().isfinite().all()):
                raise ValueError(f"preactivation: bounds of {node.path!r} must be finite")
        found[node.name] = Bounds(
            bounds.lower.to(region.like).reshape(shape), bounds.upper.to(region.like).reshape(shape)
        )
    return found


@network_layer
class Triangle(NetworkLayer):
    """The triangle relaxation as a differentiable LP layer, pre-activation bounds from a closed form (LP-LAST).

    Pools are composed of ReLUs, and what CROWN's own rule for them gives is taken where it is the tighter bound.

    Args:
        preactivation: a relaxation (or an intersection of several, the default: tight and continuous in the weights),
            its name, or the user's own bounds {path: Bounds}. Those may be tighter than the LP implies (from a MILP, or
            by branching): they are constraints, and where `solver` cannot tell the optimum under them, HiGHS does.
            Bounds that contradict each other have the status INFEASIBLE and the bound -inf.
        solver: `DualAscent` (default) or `InteriorPoint`; or, through the explicit LP of every example, in float64:
            `Highs`, `Cvxpy`, `PDHG`.
        gradient: `Envelope` (default) or `FixedSlopes`.
        throw: whether `solve` raises UnsolvedError unless all problems are OPTIMAL.

    Raises:
        TypeError: for what is no solver.
        ValueError: for an estimate as preactivation, or bounds that do not fit the network.

    Sound: yes, whatever the solver did.  Exact: the single-neuron convex relaxation, to the certified gap.
    Gradient: of the optimal value (`Envelope`), through weights, biases, region, specification and pre-activation
    bounds; continuous in the weights where those bounds are.
    Source: Ehlers 2017; Salman et al. 2019; arXiv 2102.06700v1.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.2)
        >>> spec = ox.margins(torch.tensor([0]), classes=2)
        >>> found = Triangle(preactivation="crown").solve(net, region, spec)
        >>> bool(found.lower >= ox.lower_bounds(net, region, spec, "crown") - 1e-6)
        True
        >>> found.lower.sum().backward()
        >>> net[1].weight.grad.shape
        torch.Size([8, 4])
    """

    @property
    def monotone(self) -> bool:
        return bool(self.parts) and all(part.monotone for part in self.parts)

    @property
    def jumps(self) -> Jumps:
        return joined(frozenset(), *(part.jumps for part in self.parts)) if self.parts else None

    @property
    def deciding(self) -> Relaxation:
        solver = self.solver
        if not isinstance(solver, DualAscent) or solver.threshold is not None:
            return self
        return replace(self, solver=replace(solver, threshold=0.0))

    def preactivation_bounds(self, network: Network, region: Region) -> Preactivation:
        region, lowered = self.prepare(region), self.lowered(network)
        return shared(network, self.closed_form(lowered, region, self.budget(lowered, region, 0).source))

    def solve_flat(self, network: Network, region: Region, rows: Tensor, warm: Warm | None = None) -> Solution:
        region, lowered = self.prepare(region), self.lowered(network)
        budget = self.budget(lowered, region, rows.shape[1])
        preactivation = self.closed_form(lowered, region, budget.source)
        return beside_pools(
            self, network, region, rows, solve_rows(self, lowered, region, rows, preactivation, warm, budget)
        )


def beside_pools(layer: NetworkLayer, network: Network, region: Region, rows: Tensor, found: Solution) -> Solution:
    """A solution, row by row no looser than CROWN with its own rule for pools on the same pre-activation relaxation.

    Composed of ReLUs, a maximum's LP does not imply that it is at most the greatest upper bound of its entries.
    A bound above the LP's feasible point has the gap 0.  Gradient: of the bound taken.
    """
    source = layer.preactivation
    if network.lowered is network or not isinstance(source, Relaxation):
        return found
    crown = Crown(preactivation=source, rounding=layer.rounding, max_bytes=layer.max_bytes)
    lower = torch.maximum(found.lower, crown.lower_bounds(network, region, rows))
    gained = (lower - found.lower).detach()
    gap = torch.where(gained.isfinite() & found.gap.isfinite(), (found.gap - gained).clamp_min(0), found.gap)
    return replace(found, lower=lower, gap=gap)


def solve_rows(
    layer: NetworkLayer,
    network: Network,
    region: Region,
    rows: Tensor,
    preactivation: Preactivation,
    warm: Warm | None = None,
    budget: LayerBudget | None = None,
) -> Solution:
    """Solve one LP for each example and row of the output on given pre-activation bounds: [batch, k].

    budget: None for all at a time.
    """
    budget = LayerBudget(math.inf, math.inf, layer.solver) if budget is None else budget
    batch, k = region.shape[0], rows.shape[1]
    example = torch.arange(batch, device=rows.device).repeat_interleave(k)
    flat_rows = rows.expand(batch, *rows.shape[1:]).reshape(batch * k, *network.output_shape)
    if 0 < k <= budget.lot < math.inf:  # a contradiction concerns all rows of an example
        budget = replace(budget, lot=budget.lot - budget.lot % k)
    found = solve_problems(layer, network, network.output, flat_rows, region, preactivation, example, warm, budget)
    lower, gap, status, iterations = (
        t.reshape(batch, k) for t in (found.lower, found.gap, found.status, found.iterations)
    )
    proved = (status == Status.INFEASIBLE).any(1, keepdim=True)
    if bool(proved.any()):  # an example's rows may have come in several lots
        status = torch.where(proved, int(Status.INFEASIBLE), status).to(torch.int8)
        lower, gap = torch.where(proved, -torch.inf, lower), torch.where(proved, torch.inf, gap)
    return Solution(lower, gap, status, iterations, found.warm)


def solve_problems(
    layer: NetworkLayer,
    network: Network,
    target: str,
    rows: Tensor,
    region: Region,
    preactivation: Preactivation,
    example: Tensor,
    warm: Warm | None,
    budget: LayerBudget,
) -> Solution:
    """Solve R problems, rows[r] . value(target) over example[r]: `Solution` with [R] entries."""
    wanted = network.ancestors(target)
    bounds = {node.name: preactivation[node.name] for node in network.activations if node.name in wanted}
    hulls = hulls_at(network, bounds)
    given, own = _starts(network, target, bounds, hulls, len(rows), warm)
    whole = _Lot(layer, budget, network, target, rows, region, bounds, hulls, example)
    if budget.lot == math.inf:
        return whole.solve([*(p.select(example) for p in given), *own])
    found = []
    for index in torch.arange(len(rows), device=rows.device).split(int(budget.lot)):
        lot = replace(whole, rows=rows[index], example=example[index])
        found.append(lot.solve([*(p.select(lot.example) for p in given), *(p.select(index) for p in own)]))
    return _joined(found, target)


@dataclass(frozen=True)
class _Lot:
    """Problems that are solved together."""

    layer: NetworkLayer
    budget: LayerBudget
    network: Network
    target: str
    rows: Tensor
    region: Region
    bounds: Mapping[str, Bounds]
    hulls: Mapping[str, HullLines]
    example: Tensor

    def problems(self) -> Problems:
        """With every example's region and lines spelt out for each of its rows."""
        example = self.example
        hulls = {name: h.select(example) for name, h in self.hulls.items()}
        return Problems(self.network, self.target, self.rows, self.region.select(example), hulls, example)

    def solve(self, starts: list[DualPoint]) -> Solution:
        """The bounds and, where gradients are wanted, what they are a function of."""
        layer, again = self.layer, self.budget.lot != math.inf
        differentiable = torch.is_grad_enabled()
        with torch.set_grad_enabled(differentiable and not again):
            problems = self.problems()
        constants = problems.detach()
        found = self._found(constants, starts)
        lower = found.lower
        if differentiable and again:
            lower = attach(lower, self._rule_again(found))
        elif differentiable:
            lower = attach(lower, layer.gradient.value(problems, found))
        return Solution(lower, found.gap, found.status, found.iterations, Warm(found.dual, self.target))

    def _found(self, problems: Problems, starts: list[DualPoint]) -> Evaluation:
        layer, solver = self.layer, self.budget.solver
        if layer.implies(problems.network):
            found = solved(network_solver(solver), problems, starts, rounding=layer.rounding)
        else:
            found = solved_under_given_bounds(solver, problems, starts, layer.rounding)
        return found if layer.review is None else layer.review(problems, starts, found)

    def _rule_again(self, found: Evaluation) -> Tensor:
        """The gradient rule's function, whose graph is made in the backward pass, from the two points."""
        points = found.points_alone()
        rule = memory.recomputed(self.network, lambda: self.layer.gradient.value(self.problems(), points))
        value: Tensor = rule()
        return value


def _joined(parts: Sequence[Solution], target: str) -> Solution:
    """Solutions of consecutive problems as one."""
    if len(parts) == 1:
        return parts[0]
    lower, gap, status, iterations = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("lower", "gap", "status", "iterations")
    )
    return Solution(lower, gap, status, iterations, Warm(join([part.warm.dual for part in parts]), target))


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
    count: int,
    warm: Warm | None,
) -> tuple[list[DualPoint], list[DualPoint]]:
    """CROWN's and Fast-Lin's weights of every example; those of an earlier solve, of every problem."""
    with torch.no_grad():
        crown = crown_start(network, bounds, hulls)
        given = [crown, chord_start(network, hulls, crown)]
        if warm is None:
            return given, []
        mine = [(kind, n, (count, *w.shape[1:])) for kind, part in _kinds(crown) for n, w in part.items()]
        theirs = [(kind, n, tuple(w.shape)) for kind, part in _kinds(warm.dual) for n, w in part.items()]
        if warm.target != target or sorted(mine) != sorted(theirs):
            raise ValueError("start: comes from another network, batch or specification")
        dtype = next((w.dtype for w in crown.alpha.values()), torch.float64)
        return given, [warm.dual.to(dtype)]


def _kinds(dual: DualPoint) -> tuple[tuple[int, Weights], tuple[int, Weights]]:
    return (0, dual.alpha), (1, dual.beta)
