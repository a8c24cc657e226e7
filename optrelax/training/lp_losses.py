"""Linear programs in the training loop: the loss on LP margins, and the dual points it keeps from epoch to epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from optrelax.checks import require_choice, require_range
from optrelax.joined_specifications import Spec
from optrelax.layers.evaluation import Evaluation, evaluate
from optrelax.layers.exported import network_solver
from optrelax.layers.layerwise import Layerwise
from optrelax.layers.network_gradients import FixedSlopes
from optrelax.layers.network_layer import GradientRule, NetworkLayer
from optrelax.layers.network_solver import NetworkSolver, Points
from optrelax.layers.problems import DualPoint, Problems, Weights
from optrelax.layers.solutions import Status
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import Relaxation, resolve
from optrelax.rounding import Rounding
from optrelax.training.loss_terms import Batch, LossTerms, Robust, Solved, WeightedLoss, certified_cross_entropy

__all__ = ["DualMemory", "LPLoss"]

Plan = dict[str, tuple[int, int]]  # target of the LPs -> (problems an example, weights a problem)
_UNIT = 255  # weights in [0, 1] are kept in eight bits


class DualMemory:
    """Dual points of a data set's linear programs, from which the next solve of the same example starts.

    Every weight in [0, 1] gives a bound, so eight bits of it are enough: they cost tightness at the start, never
    soundness. An example takes one byte a problem and hidden neuron before it: LP-LAST on a network of 100-100-10
    takes 10 x 200 bytes an example, 120 MB for 60,000. Where the limit is lower, the first examples of the data set
    are kept, and the others start afresh each time.
    """

    def __init__(self, examples: int) -> None:
        require_range("DualMemory", "at least 1", examples=examples)
        self.examples = examples
        self._weights: dict[str, Tensor] = {}  # uint8 [capacity, slots, width]
        self._seen: dict[str, Tensor] = {}  # bool [capacity, slots]

    @property
    def capacity(self) -> int:
        """Examples that are kept; 0 before the first use."""
        return min((len(seen) for seen in self._seen.values()), default=0)

    @property
    def bytes(self) -> int:
        """Memory in use."""
        return sum(t.numel() for t in (*self._weights.values(), *self._seen.values()))

    def reserve(self, plan: Plan, max_bytes: int) -> None:
        """Make room for the LPs of a network; what was kept stays where it is of the same shape."""
        each = sum(slots * (width + 1) for slots, width in plan.values())
        capacity = min(self.examples, max_bytes // each) if each else 0
        wanted = {target: (capacity, *shape) for target, shape in plan.items()}
        if wanted != {target: tuple(t.shape) for target, t in self._weights.items()}:
            self._weights = {
                target: torch.zeros(shape, dtype=torch.uint8, device="cpu") for target, shape in wanted.items()
            }
            self._seen = {
                target: torch.zeros(shape[:2], dtype=torch.bool, device="cpu") for target, shape in wanted.items()
            }

    def read(self, target: str, index: Tensor, slots: Tensor, like: Mapping[str, Tensor]) -> tuple[Tensor, Weights]:
        """Which problems are known [R], and weights by activation: `like`'s where nothing is known."""
        index, slots = index.cpu(), slots.cpu()
        table, seen = self._weights[target], self._seen[target]
        held = index < len(seen)
        known = torch.zeros(len(index), dtype=torch.bool, device="cpu")
        known[held] = seen[index[held], slots[held]]
        some = next(iter(like.values()))
        flat = torch.zeros(len(index), table.shape[2], dtype=torch.uint8, device="cpu")
        flat[known] = table[index[known], slots[known]]
        weights, start, mask = {}, 0, known.to(some.device)
        for name in sorted(like):
            each = like[name].expand(len(index), *like[name].shape[1:])
            size = math.prod(each.shape[1:])
            part = flat[:, start : start + size].to(device=some.device, dtype=each.dtype).div_(_UNIT)
            weights[name] = torch.where(mask.reshape(-1, *[1] * (each.dim() - 1)), part.reshape(each.shape), each)
            start += size
        return known, weights

    def write(self, target: str, index: Tensor, slots: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights [R, *shape] of problems."""
        index, slots = index.cpu(), slots.cpu()
        flat = torch.cat([weights[name].flatten(1) for name in sorted(weights)], 1)
        eight = (flat * _UNIT).round_().to(torch.uint8).cpu()
        held = index < len(self._seen[target])
        self._weights[target][index[held], slots[held]] = eight[held]
        self._seen[target][index[held], slots[held]] = True

    def state_dict(self) -> dict[str, Tensor]:
        """Everything kept, by name."""
        tensors = {f"weights.{target}": t for target, t in self._weights.items()}
        return tensors | {f"seen.{target}": t for target, t in self._seen.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave.  ValueError for one of more examples."""
        kept: dict[str, dict[str, Tensor]] = {"weights": {}, "seen": {}}
        for key, value in tensors.items():
            kind, _, target = key.partition(".")
            if kind not in kept or len(value) > self.examples:
                raise ValueError(f"DualMemory: {key} [{len(value)}, ...] is not of {self.examples} examples")
            kept[kind][target] = value.clone()
        self._weights, self._seen = kept["weights"], kept["seen"]


@dataclass(frozen=True)
class LPLoss(WeightedLoss):
    """Cross-entropy of margins that an LP layer bounds: training with LP-LAST (`Triangle`) or LP-ALL (`Layerwise`).

    layer: the layer or its name; its solver has the iteration budget and the gap target (`tol`) of a step.
    fallback: what becomes of a problem that missed the target, hidden neurons' included: its bound by
    back-substitution, with the slopes that the solver reached ("slopes") or with CROWN's ("crown"), differentiated
    with these slopes held fixed. A closed form, whose gradient belongs to its value; the LP's does only at an optimum.
    memory_bytes: most memory for dual points of earlier epochs, see `DualMemory`; 0 starts every solve afresh.
    Sound: yes, every margin is a bound.  Gradient: of the optimal value by the layer's rule where the target was met.
    """

    layer: Relaxation | str = "triangle"
    fallback: Literal["slopes", "crown"] = "slopes"
    memory_bytes: int = 2**28

    def __post_init__(self) -> None:
        super().__post_init__()
        layer = resolve(self.layer)
        if not isinstance(layer, NetworkLayer):
            raise ValueError(f"LPLoss: layer must be an LP layer, 'triangle' or 'layerwise', got {self.layer!r}")
        if layer.given is not None:
            raise ValueError("LPLoss: the layer's pre-activation bounds must be a relaxation; numbers fit one batch")
        require_choice("LPLoss", "fallback", self.fallback, "slopes", "crown")
        require_range("LPLoss", ">= 0", memory_bytes=self.memory_bytes)
        object.__setattr__(self, "layer", layer)

    def memory(self, examples: int) -> DualMemory | None:
        """An empty memory for a data set of so many examples; None where the loss keeps nothing."""
        return DualMemory(examples) if self.memory_bytes > 0 else None

    def __call__(
        self,
        net: nn.Module | Network,
        region: Region,
        labels: Tensor,
        x: Tensor | None = None,
        *,
        spec: Spec | None = None,
        generator: torch.Generator | None = None,
        memory: DualMemory | None = None,
        index: Tensor | None = None,
    ) -> LossTerms:
        """The terms of the loss for one batch.

        spec: none, its slots are those of margins; CertifiedLoss takes a specification with any LP layer.
        memory, index: dual points of earlier steps, and the examples' places in the data set [batch]: both or none.
        """
        if (memory is None) != (index is None):
            raise ValueError("LPLoss: memory and index go together: the memory is kept by the examples' places")
        return self._terms(net, region, labels, x, generator, memory, index, spec)

    def _robust(self, batch: Batch) -> Robust:
        layer = resolve(self.layer)
        assert isinstance(layer, NetworkLayer)
        if batch.memory is not None:
            batch.memory.reserve(_plan(batch.network, layer), self.memory_bytes)
        review = _FallbackReview(self.fallback, layer.rounding, batch.memory, batch.index)
        solver = _Recalled(network_solver(layer.solver), batch.memory, batch.index)
        watched = replace(layer, solver=solver, gradient=_Safeguard(layer.gradient))
        watched.review = review
        found = watched.solve(batch.network, batch.region, batch.rows).lower
        return Robust(certified_cross_entropy(found), found, review.solved())


def _plan(network: Network, layer: NetworkLayer) -> Plan:
    """The LPs of one example: as many slots as the target has entries, twice that for both ends of hidden neurons."""
    targets = {network.output: 1}
    if isinstance(layer, Layerwise):
        targets |= {n.inputs[0]: 2 for n in network.activations if n.inputs[0] not in network.exact_intervals}
    plan: Plan = {}
    for target, ends in targets.items():
        before = network.ancestors(target)
        width = sum(math.prod(node.shape) for node in network.activations if node.name in before)
        plan[target] = (ends * math.prod(network.shape_of(target)), width)
    return plan


def _slots(problems: Problems) -> Tensor:
    """Which of its example's problems each one is, [R].

    A margin is known by its other class, the one entry of -1; a hidden neuron's LP by its entry and that entry's sign.
    """
    rows = problems.rows.flatten(1)
    if problems.target == problems.network.output:
        return rows.argmin(1)
    place = rows.abs().argmax(1)
    negative = rows.gather(1, place[:, None])[:, 0] < 0
    return place + negative * rows.shape[1]


def _where(problems: Problems, index: Tensor) -> tuple[str, Tensor, Tensor]:
    """The place of every problem in the memory."""
    assert problems.example is not None
    return problems.target, index[problems.example.to(index.device)], _slots(problems)


@dataclass(frozen=True)
class _Recalled(NetworkSolver):
    """A layer's solver that starts from the memory too."""

    solver: NetworkSolver
    memory: DualMemory | None
    index: Tensor | None

    @property
    def tol(self) -> float:  # type: ignore[override]
        """The solver's."""
        return self.solver.tol

    @property
    def threshold(self) -> float | None:  # type: ignore[override]
        """The solver's."""
        return self.solver.threshold

    def bytes_needed(self, inputs: int, hidden: int, count: int) -> int:
        return self.solver.bytes_needed(inputs, hidden, count)

    def within(self, max_bytes: float) -> _Recalled:
        return replace(self, solver=self.solver.within(max_bytes))

    def solve(self, problems: Problems, starts: Sequence[DualPoint]) -> Points:
        """The solver's points."""
        if self.memory is None or self.index is None or problems.example is None:
            return self.solver.solve(problems, starts)
        crown = starts[0]
        known, weights = self.memory.read(*_where(problems, self.index), crown.alpha)
        warm = DualPoint(weights, crown.beta)
        # CROWN's start stays: no bound may be below the closed form's.
        return self.solver.solve(problems, [crown, warm] if bool(known.all()) else [*starts, warm])


class _FallbackReview:
    """Sees what a layer finds during one step: keeps it in the memory, counts how it ended, puts the fallback in."""

    def __init__(self, fallback: str, rounding: Rounding, memory: DualMemory | None, index: Tensor | None) -> None:
        self._fallback, self._rounding, self._memory, self._index = fallback, rounding, memory, index
        self._gaps: list[Tensor] = []
        self._unfinished: list[Tensor] = []

    def __call__(self, problems: Problems, starts: Sequence[DualPoint], found: Evaluation) -> Evaluation:
        """What was found, the fallback in place of what was not finished."""
        if self._memory is not None and self._index is not None and problems.example is not None:
            self._memory.write(*_where(problems, self._index), found.dual.alpha)
        unfinished = found.status != Status.OPTIMAL
        self._gaps.append((found.gap / found.lower.abs().clamp_min(1)).clamp_min(0))
        self._unfinished.append(unfinished)
        if self._fallback == "crown" and bool(unfinished.any()):
            index = unfinished.nonzero()[:, 0]
            points = Points(starts[0].select(index), found.primal.select(index), found.iterations[index])
            part = evaluate(problems.select(index), points, 1.0, rounding=self._rounding)
            part = replace(part.points_alone(), status=found.status[index])
            found = found.points_alone().put(index, part)
        return found

    def solved(self) -> Solved:
        """How every problem of the step ended."""
        none = torch.zeros(0, device="cpu")
        return Solved(torch.cat(self._gaps or [none]), torch.cat(self._unfinished or [none > 0]))


@dataclass(frozen=True, slots=True)
class _Safeguard:
    """A layer's gradient rule where the solve met its target, back-substitution at fixed slopes elsewhere."""

    rule: GradientRule

    def value(self, problems: Problems, found: Evaluation) -> Tensor:
        """A function a problem whose gradient is wanted: [R]."""
        unfinished = found.status != Status.OPTIMAL
        if not bool(unfinished.any()):
            return self.rule.value(problems, found)
        if bool(unfinished.all()):
            return FixedSlopes().value(problems, found)
        total = found.lower.new_zeros(problems.count)
        for rule, mask in ((self.rule, ~unfinished), (FixedSlopes(), unfinished)):
            index = mask.nonzero()[:, 0]
            total = total.index_put((index,), rule.value(problems.select(index), found.select(index)))
        return total
