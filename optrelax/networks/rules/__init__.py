"""One rule an ATen op, a file a subject; importing this package registers all of them."""

from optrelax.networks.rules import (
    arithmetic,
    convolutions,
    layers,
    masks,
    maxima,
    moves,
    nonlinear,
    normalising,
    pooling,
    products,
    reductions,
    shapes,
    smooth,
    writing,
)

__all__ = [
    "arithmetic",
    "convolutions",
    "layers",
    "masks",
    "maxima",
    "moves",
    "nonlinear",
    "normalising",
    "pooling",
    "products",
    "reductions",
    "shapes",
    "smooth",
    "writing",
]
