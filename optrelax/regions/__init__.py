"""Regions of inputs: boxes, balls, polytopes, and choices, behind one contract."""

from optrelax.regions.base import Polyhedron, Region, Support, require_polyhedron
from optrelax.regions.boxes import InputBox, LinfBall, require_box
from optrelax.regions.choices import ChoiceBox
from optrelax.regions.l1_ball import L1Ball
from optrelax.regions.l2_ball import L2Ball
from optrelax.regions.numbers import Number, Numbers, as_number, check_finite, check_floating
from optrelax.regions.polytopes import Polytope
from optrelax.regions.registry import ball_of, norms, register_ball

__all__ = [
    "ChoiceBox",
    "InputBox",
    "L1Ball",
    "L2Ball",
    "LinfBall",
    "Number",
    "Numbers",
    "Polyhedron",
    "Polytope",
    "Region",
    "Support",
    "as_number",
    "ball_of",
    "check_finite",
    "check_floating",
    "norms",
    "register_ball",
    "require_box",
    "require_polyhedron",
]
