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

__all__ = [
    "Activation",
    "Hull",
    "Line",
    "PiecewiseLinear",
    "absolute",
    "ceiling",
    "clamp",
    "floor",
    "leaky_relu",
    "least_width",
    "relu",
]
