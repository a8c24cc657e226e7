"""LPs on given pre-activation bounds, solved in lots that fit the memory, with the gradient of their values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optrelax import memory
from optrelax.enclosures import Bounds
from optrelax.layers.batched import join
from optrelax.layers.evaluation import Evaluation, solved, solved_after
from optrelax.layers.exported import network_solver, solved_under_given_bounds
from optrelax.layers.hulls import HullLines, hulls_at
from optrelax.layers.layer_memory import LayerBudget
from optrelax.layers.network_gradients import attach
from optrelax.layers.network_layer import NetworkLayer
from optrelax.layers.network_solver import Points
from optrelax.layers.problems import DualPoint, Problems
from optrelax.layers.solutions import Solution, Status
from optrelax.layers.starts import Warm, dual_starts
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import Preactivation


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
    given, own = dual_starts(network, target, bounds, hulls, len(rows), warm)
    whole = _Lot(layer, budget, network, target, rows, region, bounds, hulls, example)
    if budget.lot == math.inf:
        if warm is not None and warm.primal is not None:
            whole = replace(whole, earlier=Points(own[0], warm.primal, torch.zeros_like(example)))
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
    earlier: Points | None = None
    """Of an earlier solve of these problems, or of ones near them."""

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
        return Solution(
            lower,
            found.gap,
            found.status,
            found.iterations,
            Warm(found.dual, self.target, None if again else found.primal),
        )

    def _found(self, problems: Problems, starts: list[DualPoint]) -> Evaluation:
        layer, solver = self.layer, self.budget.solver
        if not layer.implies(problems.network):
            found = solved_under_given_bounds(solver, problems, starts, layer.rounding)
        elif self.earlier is None:
            found = solved(network_solver(solver), problems, starts, rounding=layer.rounding)
        else:
            found = solved_after(network_solver(solver), problems, starts, self.earlier, rounding=layer.rounding)
        return found if layer.review is None else layer.review(problems, starts, found)

    def _rule_again(self, found: Evaluation) -> Tensor:
        """The gradient rule's function, whose graph is made in the backward pass, from the two points."""
        points = found.points_alone()
        return memory.recomputed(self.network, lambda: self.layer.gradient.value(self.problems(), points))()


def _joined(parts: Sequence[Solution], target: str) -> Solution:
    """Solutions of consecutive problems as one."""
    if len(parts) == 1:
        return parts[0]
    lower, gap, status, iterations = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("lower", "gap", "status", "iterations")
    )
    return Solution(lower, gap, status, iterations, Warm(join([part.warm.dual for part in parts]), target))
