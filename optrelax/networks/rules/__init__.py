"""One rule an ATen op, a file a subject; importing this package registers all of them."""

from optrelax.networks.rules import (
    arithmetic,
    convolutions,
    layers,
    maxima,
    moves,
    nonlinear,
    normalising,
    pooling,
    products,
    shapes,
    smooth,
)

__all__ = [
    "arithmetic",
    "convolutions",
    "layers",
    "maxima",
    "moves",
    "nonlinear",
    "normalising",
    "pooling",
    "products",
    "shapes",
    "smooth",
]
