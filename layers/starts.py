"""The dual points that a solve starts from: the closed forms' own, and those of an earlier solve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from optrelax.enclosures import Bounds
from optrelax.layers.problems import DualPoint, HullLines, Weights, chord_start, crown_start
from optrelax.layers.solutions import Solution
from optrelax.networks.graph import Network


@dataclass(frozen=True, slots=True)
class Warm:
    """What a later solve of the same rows may start from."""

    dual: DualPoint
    target: str


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
