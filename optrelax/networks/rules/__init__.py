"""One rule an ATen op, a file a subject; importing this package registers all of them."""

from optrelax.networks.rules import arithmetic, layers, nonlinear, shapes

__all__ = ["arithmetic", "layers", "nonlinear", "shapes"]
