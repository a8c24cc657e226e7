"""Activations by name, the contract that all of them keep, and its kinds."""

from optrelax.networks.activations.contract import Activation, Hull, Line, least_width
from optrelax.networks.activations.piecewise_linear import (
    PiecewiseLinear,
    absolute,
    ceiling,
    clamp,
    floor,
    leaky_relu,
    relu,
)
from optrelax.networks.activations.steps import Step, slopes_of

__all__ = [
    "Activation",
    "Hull",
    "Line",
    "PiecewiseLinear",
    "Step",
    "absolute",
    "ceiling",
    "clamp",
    "floor",
    "leaky_relu",
    "least_width",
    "relu",
    "slopes_of",
]
