"""Convex relaxations of neural networks, from intervals to exact layerwise LPs, as differentiable layers."""

import importlib
from typing import TYPE_CHECKING, Any

from optrelax.analysis import bounds, lower_bounds, preactivation_bounds
from optrelax.bounded import Bounded
from optrelax.domains.lines import Lines
from optrelax.enclosures import Bounds
from optrelax.errors import Problem, UnsupportedOpError
from optrelax.joined_specifications import all_of, any_of
from optrelax.margin_rows import margins, sign_margin
from optrelax.networks.activation_checks import check_activation
from optrelax.networks.activations import Activation, Hull, PiecewiseLinear, Smooth
from optrelax.networks.capturing import Report, capture, check, on_batch
from optrelax.networks.graph import Network
from optrelax.networks.registry import register_activation, register_op
from optrelax.output_properties import ordering, within
from optrelax.regions import ChoiceBox, InputBox, L1Ball, L2Ball, LinfBall, Polytope, Region
from optrelax.relaxations import (
    Box,
    Cauchy,
    Crown,
    CrownIBP,
    DeepZ,
    FastLin,
    HBox,
    Intersect,
    Relaxation,
    register_relaxation,
)
from optrelax.specifications import Specification

__version__ = "0.1.0"

# Names that pull in more than torch, imported on first use.
_LAZY = {
    "certified_cross_entropy": "optrelax.training.loss_terms",
    "CertifiedLoss": "optrelax.training.losses",
    "APGD": "optrelax.certification.auto_pgd",
    "PGD": "optrelax.certification.attacks",
    "Square": "optrelax.certification.strong_attacks",
    "StrongAttack": "optrelax.certification.strong_attacks",
    "certify": "optrelax.certification.certifying",
    "CertificationReport": "optrelax.certification.certifying",
    "compare": "optrelax.certification.comparison",
    "Comparison": "optrelax.certification.comparison",
    "load": "optrelax.networks.checkpoints",
    "save": "optrelax.networks.checkpoints",
    "load_dataset": "optrelax.data.datasets",
    "verify": "optrelax.certification.verifying",
    "PropertyVerdict": "optrelax.certification.verifying",
    "Property": "optrelax.properties",
    "read_property": "optrelax.certification.property_files",
    "jacobian_bounds": "optrelax.lipschitz",
    "layers": "optrelax.layers",
    "lipschitz_bound": "optrelax.lipschitz",
    "measure_continuity": "optrelax.measurements.continuity",
    "Continuity": "optrelax.measurements.continuity",
    "measure_landscape": "optrelax.measurements.landscape",
    "Landscape": "optrelax.measurements.landscape",
    "measure_sensitivity": "optrelax.measurements.sensitivity",
    "Sensitivity": "optrelax.measurements.sensitivity",
    "measure_series": "optrelax.measurements.series",
    "Series": "optrelax.measurements.series",
    "step_degrees": "optrelax.measurements.degrees",
    "measure_tightness": "optrelax.measurements.tightness",
    "Tightness": "optrelax.measurements.tightness",
    "activations": "optrelax.networks.activations",
    "models": "optrelax.networks.models",
}

if TYPE_CHECKING:
    from optrelax import layers
    from optrelax.certification.attacks import PGD
    from optrelax.certification.auto_pgd import APGD
    from optrelax.certification.certifying import CertificationReport, certify
    from optrelax.certification.comparison import Comparison, compare
    from optrelax.certification.property_files import read_property
    from optrelax.certification.property_verdicts import PropertyVerdict
    from optrelax.certification.strong_attacks import Square, StrongAttack
    from optrelax.certification.verifying import verify
    from optrelax.data.datasets import load_dataset
    from optrelax.lipschitz import jacobian_bounds, lipschitz_bound
    from optrelax.measurements.continuity import Continuity, measure_continuity
    from optrelax.measurements.degrees import step_degrees
    from optrelax.measurements.landscape import Landscape, measure_landscape
    from optrelax.measurements.sensitivity import Sensitivity, measure_sensitivity
    from optrelax.measurements.series import Series, measure_series
    from optrelax.measurements.tightness import Tightness, measure_tightness
    from optrelax.networks import models
    from optrelax.networks.checkpoints import load, save
    from optrelax.properties import Property
    from optrelax.training.loss_terms import certified_cross_entropy
    from optrelax.training.losses import CertifiedLoss


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'optrelax' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if _LAZY[name].endswith(f".{name}") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "APGD",
    "PGD",
    "Activation",
    "Bounded",
    "Bounds",
    "Box",
    "Cauchy",
    "CertificationReport",
    "CertifiedLoss",
    "ChoiceBox",
    "Comparison",
    "Continuity",
    "Crown",
    "CrownIBP",
    "DeepZ",
    "FastLin",
    "HBox",
    "Hull",
    "InputBox",
    "Intersect",
    "L1Ball",
    "L2Ball",
    "Landscape",
    "Lines",
    "LinfBall",
    "Network",
    "PiecewiseLinear",
    "Polytope",
    "Problem",
    "Property",
    "PropertyVerdict",
    "Region",
    "Relaxation",
    "Report",
    "Sensitivity",
    "Series",
    "Smooth",
    "Specification",
    "Square",
    "StrongAttack",
    "Tightness",
    "UnsupportedOpError",
    "__version__",
    "all_of",
    "any_of",
    "bounds",
    "capture",
    "certified_cross_entropy",
    "certify",
    "check",
    "check_activation",
    "compare",
    "jacobian_bounds",
    "layers",
    "lipschitz_bound",
    "load",
    "load_dataset",
    "lower_bounds",
    "margins",
    "measure_continuity",
    "measure_landscape",
    "measure_sensitivity",
    "measure_series",
    "measure_tightness",
    "models",
    "on_batch",
    "ordering",
    "preactivation_bounds",
    "read_property",
    "register_activation",
    "register_op",
    "register_relaxation",
    "save",
    "sign_margin",
    "step_degrees",
    "verify",
    "within",
]
