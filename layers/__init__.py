"""Optimisation layers: linear programs whose optimal values are differentiable.

Names load on first use, so that importing the package pulls in no solver.

Example:
    >>> found = LinearProgram(Highs())(torch.tensor([1.0, -1.0]), lower=torch.zeros(2), upper=torch.ones(2))
    >>> found.lower
    tensor(-1.)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optrelax.layers.alpha_crown import AlphaCrown
    from optrelax.layers.ascent.dual_ascent import DualAscent
    from optrelax.layers.interior_point import InteriorPoint
    from optrelax.layers.layerwise import Layerwise
    from optrelax.layers.milp import Milp
    from optrelax.layers.network_gradients import Envelope, FixedSlopes
    from optrelax.layers.programs.argmin import KKT
    from optrelax.layers.programs.auto import Auto
    from optrelax.layers.programs.cvxpy_solver import Cvxpy
    from optrelax.layers.programs.highs import Highs
    from optrelax.layers.programs.linear_program import LinearProgram
    from optrelax.layers.programs.lp_data import ProgramSolver
    from optrelax.layers.programs.lp_gradients import EnvelopeGradient, FixedDualGradient
    from optrelax.layers.programs.mixed_integer import MIPSolution, MixedIntegerProgram
    from optrelax.layers.programs.pdhg import PDHG
    from optrelax.layers.programs.quadratic_program import QuadraticProgram
    from optrelax.layers.programs.regularised import Regularised
    from optrelax.layers.programs.simplex import DualSimplex
    from optrelax.layers.solutions import LPSolution, Solution, Status
    from optrelax.layers.triangle import Triangle

_HOMES = {
    "AlphaCrown": "alpha_crown",
    "Layerwise": "layerwise",
    "InteriorPoint": "interior_point",
    "FixedSlopes": "network_gradients",
    "Envelope": "network_gradients",
    "DualAscent": "ascent.dual_ascent",
    "Triangle": "triangle",
    "Auto": "programs.auto",
    "DualSimplex": "programs.simplex",
    "KKT": "programs.argmin",
    "ProgramSolver": "programs.lp_data",
    "MIPSolution": "programs.mixed_integer",
    "MixedIntegerProgram": "programs.mixed_integer",
    "QuadraticProgram": "programs.quadratic_program",
    "Cvxpy": "programs.cvxpy_solver",
    "EnvelopeGradient": "programs.lp_gradients",
    "FixedDualGradient": "programs.lp_gradients",
    "Highs": "programs.highs",
    "LPSolution": "solutions",
    "Milp": "milp",
    "LinearProgram": "programs.linear_program",
    "PDHG": "programs.pdhg",
    "Regularised": "programs.regularised",
    "Solution": "solutions",
    "Status": "solutions",
}

__all__ = [
    "KKT",
    "PDHG",
    "AlphaCrown",
    "Auto",
    "Cvxpy",
    "DualAscent",
    "DualSimplex",
    "Envelope",
    "EnvelopeGradient",
    "FixedDualGradient",
    "FixedSlopes",
    "Highs",
    "InteriorPoint",
    "LPSolution",
    "Layerwise",
    "LinearProgram",
    "MIPSolution",
    "Milp",
    "MixedIntegerProgram",
    "ProgramSolver",
    "QuadraticProgram",
    "Regularised",
    "Solution",
    "Status",
    "Triangle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'optrelax.layers' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"optrelax.layers.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
