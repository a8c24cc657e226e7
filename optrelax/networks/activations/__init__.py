"""Activations by name, the contract that all of them keep, and its kinds."""

from optrelax.networks.activations.contract import Activation, Hull, Line, least_width
from optrelax.networks.activations.elementary import (
    atan,
    cos,
    elu,
    erf,
    exp,
    log,
    power,
    reciprocal,
    rsqrt,
    sigmoid,
    sin,
    sinh,
    softplus,
    softsign,
    sqrt,
    square,
    tanh,
)
from optrelax.networks.activations.gates import gelu, gelu_tanh, hardswish, mish, silu
from optrelax.networks.activations.piecewise_functions import (
    absolute,
    ceiling,
    clamp,
    floor,
    leaky_relu,
    relu,
)
from optrelax.networks.activations.piecewise_linear import PiecewiseLinear
from optrelax.networks.activations.smooth import Smooth
from optrelax.networks.activations.steps import Step, slopes_of

__all__ = [
    "Activation",
    "Hull",
    "Line",
    "PiecewiseLinear",
    "Smooth",
    "Step",
    "absolute",
    "atan",
    "ceiling",
    "clamp",
    "cos",
    "elu",
    "erf",
    "exp",
    "floor",
    "gelu",
    "gelu_tanh",
    "hardswish",
    "leaky_relu",
    "least_width",
    "log",
    "mish",
    "power",
    "reciprocal",
    "relu",
    "rsqrt",
    "sigmoid",
    "silu",
    "sin",
    "sinh",
    "slopes_of",
    "softplus",
    "softsign",
    "sqrt",
    "square",
    "tanh",
]
