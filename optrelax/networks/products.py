"""The product of two values of a network: neither affine nor a function of one number, so a class of op of its own."""

from __future__ import annotations

from torch import Tensor

from optrelax.networks.ops import Shape
from optrelax.networks.storage import Settings, Storable, Tensors, stored

__all__ = ["Multiply"]


@stored("multiply")
class Multiply(Storable):
    """x * y, entry by entry, of two values of one shape; of one value with itself its square.

    Matrix products, attention and normalisations are this op between affine ones: values are expanded to all pairs of
    entries, multiplied and summed.
    """

    def __init__(self, shape: Shape) -> None:
        self.input_shapes: tuple[Shape, ...] = (tuple(shape), tuple(shape))
        self.shape: Shape = tuple(shape)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """[*lead, *shape] each -> [*lead, *shape]."""
        return x * y

    def describe(self) -> dict[str, object]:
        return {}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Multiply:
        if len(shapes) != 2:
            raise ValueError(f"multiply: wants two inputs, got {len(shapes)}")
        return cls(shapes[0])
