"""The product of two values of a network: neither affine nor a function of one number, so a class of op of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from optrelax.networks import activations
from optrelax.networks.activations import PiecewiseLinear
from optrelax.networks.ops import Shape
from optrelax.networks.storage import Settings, Storable, Tensors, stored

if TYPE_CHECKING:
    from optrelax.networks.graph import Node

__all__ = ["Multiply", "Operand"]


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

    def lowered(self, node: Node) -> list[Node]:
        """Nodes that compute the same, as linear programs take them; the last has the node's name.

        A value times itself is the activation x^2. Two values are read through operands, whose pre-activation bounds
        are those at which the product is relaxed.
        """
        if node.inputs[0] == node.inputs[1]:
            return [replace(node, op=activations.square(), inputs=node.inputs[:1])]
        nodes = [
            replace(node, name=f"{node.name}__{i}", path=f"{node.path}:{i}", op=operand(), inputs=(source,))
            for i, source in enumerate(node.inputs)
        ]
        return [*nodes, replace(node, inputs=tuple(n.name for n in nodes))]

    def describe(self) -> dict[str, object]:
        return {}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Multiply:
        if len(shapes) != 2:
            raise ValueError(f"multiply: wants two inputs, got {len(shapes)}")
        return cls(shapes[0])


@dataclass(frozen=True)
class Operand(PiecewiseLinear):
    """The identity in front of a product: an activation, so that whatever bounds pre-activations bounds a factor."""

    def crossing(self, l: Tensor, u: Tensor) -> Tensor:
        """Wherever there is a width: a product is relaxed for it."""
        return l < u


def _itself(x: Tensor) -> Tensor:
    return x


def operand() -> Operand:
    """See `Operand`."""
    return Operand("operand", _itself, (0.0,), (1.0, 1.0), (0.0, 0.0))
