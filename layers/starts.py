"""The dual points that a solve starts from: the closed forms' own, and those of an earlier solve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.domains.lines import crown_lines
from optrelax.enclosures import Bounds
from optrelax.layers.hulls import Face, HullLines
from optrelax.layers.problems import DualPoint, PrimalPoint, Weights
from optrelax.layers.solutions import Solution
from optrelax.networks.graph import Network


@dataclass(frozen=True, slots=True)
class Warm:
    """What a later solve of the same rows may start from."""

    dual: DualPoint
    target: str
    primal: PrimalPoint | None = None
    """Kept where all problems were solved together: what shows at once which of them are optimal still."""


def warm_start(start: Solution, shape: tuple[int, ...]) -> Warm:
    """What an earlier solution leaves for a solve of these many rows; ValueError where it cannot be one."""
    if getattr(start, "warm", None) is None:
        got = f"a {type(start).__name__} without state"
        raise ValueError(f"start: wants the Solution of an earlier solve, got {got}")
    if tuple(start.lower.shape) != shape:
        raise ValueError(f"start: has the bounds of {tuple(start.lower.shape)} rows, this solve {shape}")
    found: Warm = start.warm
    return found


def dual_starts(
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


def crown_start(network: Network, preactivation: Mapping[str, Bounds], hulls: Mapping[str, HullLines]) -> DualPoint:
    """The weights that make the dual value CROWN's bound: the line of smaller area, the even plane, per example."""
    alpha: Weights = {}
    beta: Weights = {}
    for node in network.relaxed:
        if node.name not in hulls:
            continue
        h = hulls[node.name]
        if node.product:
            alpha[node.name] = beta[node.name] = torch.full_like(h.below0[0], 0.5)
            continue
        assert node.activation
        b = preactivation[node.name]
        chosen = crown_lines(node.op, b.lower, b.upper)
        alpha[node.name] = _weight_of(chosen.lower_slope, chosen.lower_intercept, h.below0, h.below1)
        if h.above1 is not None:
            beta[node.name] = _weight_of(chosen.upper_slope, chosen.upper_intercept, h.above0, h.above1)
    return DualPoint(alpha, beta)


def chord_start(network: Network, hulls: Mapping[str, HullLines], start: DualPoint) -> DualPoint:
    """The weights whose lower slope is the chord's (Fast-Lin); upper weights, and products, as in `start`."""
    alpha: Weights = {}
    for name, h in hulls.items():
        if network[name].product:
            alpha[name] = start.alpha[name]
            continue
        spread = h.below1[0] - h.below0[0]
        wide = spread != 0
        weight = (h.above0[0] - h.below0[0]) / torch.where(wide, spread, 1.0)
        alpha[name] = torch.where(wide, weight, 0.0).clamp(0, 1)
    return DualPoint(alpha, start.beta)


def _weight_of(slope: Tensor, intercept: Tensor, first: Face, second: Face) -> Tensor:
    return ((slope == second[0]) & (intercept == second[1])).to(slope)
