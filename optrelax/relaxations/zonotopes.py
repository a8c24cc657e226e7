"""The zonotope family: noise terms carried forward, or rows pulled back where that is cheaper; Cauchy's estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from optrelax import memory
from optrelax.checks import require_choice
from optrelax.domains import frames, zonotope
from optrelax.domains import lines as named
from optrelax.enclosures import Bounds
from optrelax.networks.graph import Network
from optrelax.regions import Region, require_box
from optrelax.relaxations.base import (
    Found,
    Preactivation,
    Propagation,
    pooled,
)
from optrelax.relaxations.pulled_zonotopes import Bands, PulledHybrid
from optrelax.relaxations.registry import name_of
from optrelax.relaxations.substitution import Substitution
from optrelax.relaxations.zonotope_family import INSTEAD, ZonotopeFamily


@dataclass(frozen=True, kw_only=True)
class _EitherWay(ZonotopeFamily):
    """A zonotope whose bounds may come from rows pulled back, where that is the cheaper direction."""

    def _backward(self, network: Network, region: Region, rows: int) -> Substitution | None:
        """The same relaxation as rows pulled back; None where noise terms are carried forward."""
        raise NotImplementedError

    def bytes_needed(self, network: Network, region: Region, k: int) -> int:
        backward = self._backward(network, region, k)
        return (
            super().bytes_needed(network, region, k) if backward is None else backward.bytes_needed(network, region, k)
        )

    def least_bytes(self, network: Network, region: Region, k: int) -> int:
        backward = self._backward(network, region, k)
        return super().least_bytes(network, region, k) if backward is None else backward.least_bytes(network, region, k)

    def preactivation_bounds(self, network: Network, region: Region) -> Preactivation:
        backward = self._backward(network, region, 0)
        if backward is not None:
            return backward.preactivation_bounds(network, region)
        return super().preactivation_bounds(network, region)

    def lower_bounds(self, network: Network, region: Region, rows: Tensor) -> Tensor:
        backward = self._backward(network, region, rows.shape[1])
        if backward is not None:
            return backward.lower_bounds(network, region, rows)
        return super().lower_bounds(network, region, rows)

    def output_bounds(self, network: Network, region: Region) -> Bounds:
        backward = self._backward(network, region, network.outputs)
        if backward is not None:
            return backward.output_bounds(network, region)
        return super().output_bounds(network, region)


@dataclass(frozen=True, kw_only=True)
class HBox(_EitherWay):
    """Hybrid zonotope (symbolic intervals): the input's noise is shared, new errors join an interval part.

    Args:
        slope: "box" (hbox), "diag", "switch" or "chord" (hzono), of the parallel lines around a crossing neuron.
        continuous: with "diag", hbox-diag-c, which relaxes stable neurons too.
        gamma: of slope "soft".
        kappa: of slope "slanted", in [0, 1].

    Raises:
        ValueError: for another slope, or numbers out of range.

    Sound: yes.  Gradient: exact; jumps in the weights at l = 0 (box), u = 0 (diag), |l| = |u| (switch).
    Source: Mirman et al. 2018; arXiv 2102.06700.

    Example:
        >>> net, x = ox.models.fc(4, 8, 8, 2, seed=0), torch.zeros(1, 4)
        >>> region = ox.LinfBall(x, eps=0.1)
        >>> hbox, box = (ox.bounds(net, region, way).width.sum() for way in (ox.HBox(), "box"))
        >>> bool(hbox < box)
        True
    """

    slope: named.BandSlope = "box"
    errors: ClassVar[zonotope.Errors] = "interval"

    def propagated(self, by: Propagation[Found]) -> Found | None:
        return by.hybrid(self)

    def _backward(self, network: Network, region: Region, rows: int) -> Substitution | None:
        back = not self.outward and not pooled(network)
        if region.as_box is not None and not (back and _backward_pays(network, rows, sides=1, born=False)):
            return None
        if not back:
            why = "rounded outward" if self.outward else "with max-pooling or products"
            require_box(f"{name_of(replace(self, rounding='nearest'))} {why}", region, INSTEAD)
        return PulledHybrid(lines_of=self, max_bytes=self.max_bytes)


@dataclass(frozen=True, kw_only=True)
class DeepZ(_EitherWay):
    """Zonotope: every error is a noise term of its own.

    Args:
        slope: "chord" (deepz, smallest area), "box", "diag", "switch", "soft" (gamma), "slanted" (kappa).
        continuous: with "diag", the form that relaxes stable neurons too.
        gamma: steepness of slope "soft", > 0.
        kappa: of slope "slanted", in [0, 1].
        direction: "forward" carries noise terms, "backward" pulls rows with the same parallel lines back (the same
            bounds); "auto" counts the multiply-adds of both.

    Raises:
        ValueError: for another slope or direction, or numbers out of range.

    Sound: yes.  Gradient: exact; continuous in the weights for chord, soft and continuous=True.
    Source: Singh et al. 2018; arXiv 2102.06700, table 3.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.1)
        >>> forward, back = (ox.bounds(net, region, ox.DeepZ(direction=way)) for way in ("forward", "backward"))
        >>> torch.allclose(forward.lower, back.lower, atol=1e-5)
        True
    """

    direction: Literal["auto", "forward", "backward"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("DeepZ", "direction", self.direction, "auto", "forward", "backward")

    def _backward(self, network: Network, region: Region, rows: int) -> Substitution | None:
        sides = 2 if self.outward or pooled(network) else 1
        if self.direction == "forward":
            require_box("deepz:direction=forward", region, "leave the direction out, or use crown")
            return None
        pays = region.as_box is None or (not pooled(network) and _backward_pays(network, rows, sides))
        if self.direction == "auto" and not pays:
            return None
        return Bands(lines_of=replace(self, rounding="nearest"), rounding=self.rounding, max_bytes=self.max_bytes)


@dataclass(frozen=True, kw_only=True)
class Cauchy(ZonotopeFamily):
    """DeepZ with its radii estimated by the median of k Cauchy projections: cost independent of the noise terms.

    Args:
        slope: as for `DeepZ`.
        continuous: as for `DeepZ`.
        gamma: as for `DeepZ`.
        kappa: as for `DeepZ`.
        k: projections; the error of a radius falls with the root of k.
        seed: of the projections.

    Raises:
        ValueError: for options out of range, and for outward rounding.

    Sound: no, an estimate for training only; certification and the LP layers refuse it.
    Gradient: of the estimate.  Source: Wong et al. 2018.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.1)
        >>> estimate, bound = (ox.bounds(net, region, way).width.mean() for way in (ox.Cauchy(k=200), "deepz"))
        >>> 0.5 < (estimate / bound).item() < 2
        True
    """

    k: int = 50
    seed: int = 0

    sound: ClassVar[bool] = False
    errors: ClassVar[zonotope.Errors] = "projection"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.k, int) and self.k >= 1):
            raise ValueError(f"Cauchy: k must be an integer of at least 1, got {self.k}")
        if not isinstance(self.seed, int):
            raise ValueError(f"Cauchy: seed must be an integer, got {self.seed!r}")
        if self.outward:
            raise ValueError("Cauchy: an estimate cannot be rounded outward into a bound")

    def propagated(self, by: Propagation[Found]) -> Found | None:
        return None

    def _walk(self) -> zonotope.Walk:
        return zonotope.Walk(self.lines, self.errors, self.k, self.seed)

    def _noise(self, network: Network) -> memory.Pull:
        return memory.carry(network, self.k, born=False, estimated=True)


def _backward_pays(network: Network, rows: int, sides: int, born: bool = True) -> bool:
    """Whether pulling rows back takes fewer multiply-adds than carrying every noise term forward.

    sides: rows for the bounds of a neuron, one where it gives both.  born: every neuron adds a noise term.
    """
    forward = backward = 0
    terms = math.prod(network.input_shape)
    depth = 0  # multiply-adds of one row from here to the input
    for node in network:
        cost = getattr(node.op, "cost", lambda: 0)()
        forward += terms * cost
        if node.activation:
            width = math.prod(node.shape)
            if node.inputs[0] not in network.exact_intervals:
                plan = frames.plan(network, node.inputs[0])
                backward += sides * width * (depth if plan is None else frames.cost(network, plan))
            terms += width if born else 0
        depth += cost
    return backward + rows * depth < forward
