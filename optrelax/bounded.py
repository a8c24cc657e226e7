"""A network with its relaxation as one module: inputs, radius and labels in, certified margins out."""

from __future__ import annotations

import math

from torch import Tensor, nn

from optrelax.analysis import bounds, lower_bounds
from optrelax.enclosures import Bounds
from optrelax.margin_rows import label_rows
from optrelax.regions import LinfBall
from optrelax.relaxations import Relaxation, resolve

__all__ = ["Bounded"]


class Bounded(nn.Module):
    """What is bounded, how, and over which inputs, as the last module of anyone's loop.

    Args:
        net: a module or Network, whose parameters are this module's.
        relaxation: a name or an object, LP layers included.
        clip: legal range of an input entry, or None.

    Raises:
        ValueError: for an unknown relaxation; called, as `lower_bounds` does.

    Sound, exact, gradient: as the relaxation says.

    Example:
        >>> net, x, labels = ox.models.fc(4, 8, 3, seed=0), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> certified = ox.Bounded(net, "crown-ibp")(x, 0.1, labels)
        >>> certified.shape
        torch.Size([5, 2])
        >>> ox.certified_cross_entropy(certified).backward()
        >>> all(p.grad is not None for p in net.parameters())
        True
    """

    def __init__(
        self,
        net: nn.Module,
        relaxation: Relaxation | str = "crown",
        *,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__()
        self.net, self.relaxation, self.clip = net, resolve(relaxation), clip

    def forward(self, x: Tensor, eps: float | Tensor, labels: Tensor) -> Tensor:
        """Lower bounds of every margin within eps of x: [batch, *input_shape], [batch] -> [batch, classes - 1]."""
        spec = label_rows(labels, self.output_shape(x), "Bounded")
        return lower_bounds(self.net, self._region(x, eps), spec, self.relaxation)

    def bounds(self, x: Tensor, eps: float | Tensor) -> Bounds:
        """Bounds of every output within eps of x: lower, upper [batch, *output_shape]."""
        return bounds(self.net, self._region(x, eps), self.relaxation)

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the network's outputs for inputs such as x, without the batch."""
        from optrelax.networks.capturing import capture

        return capture(self.net, tuple(x.shape[1:])).output_shape

    def outputs(self, x: Tensor) -> int:
        """How many outputs the network has for inputs such as x."""
        return math.prod(self.output_shape(x))

    def extra_repr(self) -> str:
        """The relaxation and the range, beside the network."""
        return f"relaxation={self.relaxation}, clip={self.clip}"

    def _region(self, x: Tensor, eps: float | Tensor) -> LinfBall:
        return LinfBall(x, eps, clip=self.clip)
