"""The named relaxations a user chooses from: frozen objects with their options, and the registry of their names."""

from optrelax.relaxations.base import (
    Preactivation,
    Relaxation,
    identity_rows,
    limited,
    with_rounding,
)
from optrelax.relaxations.box import Box
from optrelax.relaxations.crown import Crown, CrownIBP, FastLin
from optrelax.relaxations.intersection import Intersect
from optrelax.relaxations.registry import (
    NamedRelaxations,
    name_of,
    named_relaxations,
    names,
    register_relaxation,
    resolve,
    resolve_bound,
)
from optrelax.relaxations.zonotopes import Cauchy, DeepZ, HBox

__all__ = [
    "Box",
    "Cauchy",
    "Crown",
    "CrownIBP",
    "DeepZ",
    "FastLin",
    "HBox",
    "Intersect",
    "NamedRelaxations",
    "Preactivation",
    "Relaxation",
    "identity_rows",
    "limited",
    "name_of",
    "named_relaxations",
    "names",
    "register_relaxation",
    "resolve",
    "resolve_bound",
    "with_rounding",
]
