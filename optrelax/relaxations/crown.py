"""CROWN and its forms, CROWN-IBP, and Fast-Lin: which lines rows are pulled back through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from optrelax.checks import require_number, require_range
from optrelax.domains import lines as named
from optrelax.domains.lines import Lines, LowerSlope
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network
from optrelax.relaxations.box import Box
from optrelax.relaxations.jumps import LOWER, TIE, UPPER, Jumps, joined
from optrelax.relaxations.substitution import Substitution


@dataclass(frozen=True, kw_only=True)
class Crown(Substitution):
    """Back-substitution with one line below and one above (CROWN, DeepPoly).

    Args:
        preactivation: another relaxation's pre-activation bounds (`Crown(preactivation=Box())` is CROWN-IBP (R)); None:
            its own.
        lower: line below a crossing neuron: "adaptive" (smaller area), 0, 1, or "soft" (gamma).
        tria: the other side of the triangle above.
        continuous: the paper's -C forms, which relax stable neurons too.
        gamma: steepness of lower "soft", > 0.

    Raises:
        ValueError: for another `lower`; for tria or continuous without lower 0 or 1; for an estimate as preactivation.

    Sound: yes.  Exact: with no crossing neuron.  Gradient: exact almost everywhere; jumps in the weights at
    |l| = |u| (adaptive), l = 0 (lower 0), u = 0 (lower 1), both (tria); nowhere for "soft" and continuous.
    Source: Zhang et al. 2018; Singh et al. 2019; arXiv 2102.06700, table 3.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.1)
        >>> own, boxes = (ox.bounds(net, region, ox.Crown(preactivation=part)) for part in (None, ox.Box()))
        >>> bool((own.lower >= boxes.lower - 1e-6).all())  # to rounding
        True
    """

    lower: LowerSlope = "adaptive"
    tria: bool = False
    continuous: bool = False
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lower, (bool, float)) or self.lower not in ("adaptive", "soft", 0, 1):
            raise ValueError(f"Crown: lower must be 'adaptive', 'soft', 0 or 1, got {self.lower!r}")
        if (self.tria or self.continuous) and self.lower not in (0, 1):
            raise ValueError(f"Crown: tria and continuous need lower 0 or 1, got lower={self.lower!r}")
        require_number("Crown", "gamma", self.gamma)
        require_range("Crown", "> 0 and finite", gamma=self.gamma)

    @property
    def jumps(self) -> Jumps:
        return joined(frozenset(self._switches()), *(part.jumps for part in self.parts))

    def _switches(self) -> tuple[str, ...]:
        if self.continuous or self.lower == "soft":
            return ()
        if self.lower == "adaptive":
            return (TIE,)
        if self.tria:
            return (LOWER, UPPER)
        return (LOWER,) if self.lower == 0 else (UPPER,)

    def refusal(self, activation: Activation) -> str | None:
        fits = self.lower in ("adaptive", "soft") or activation.piecewise is not None
        return None if fits else named.NO_PIECES

    def lines(self, activation: Activation, l: Tensor, u: Tensor) -> Lines:
        return named.crown_lines(
            activation, l, u, lower=self.lower, tria=self.tria, continuous=self.continuous, gamma=self.gamma
        )


def CrownIBP(*, lower: LowerSlope = "adaptive", gamma: float = 1.0, **options: Any) -> Crown:
    """CROWN with pre-activation bounds from Box: CROWN-IBP (R).

    Args:
        lower: "adaptive" or "soft" (gamma), as for `Crown`.
        gamma: as for `Crown`.
        options: any other option of `Crown`.

    Returns:
        A `Crown` whose `preactivation` is a Box of the same rounding.

    Sound: yes.  Exact, gradient: as `Crown`.

    Example:
        >>> type(ox.CrownIBP()).__name__, type(ox.CrownIBP().preactivation).__name__
        ('Crown', 'Box')
        >>> ox.CrownIBP() == ox.Crown(preactivation=ox.Box())
        True
    """
    return Crown(lower=lower, gamma=gamma, preactivation=Box(), **options)


@dataclass(frozen=True, kw_only=True)
class FastLin(Substitution):
    """Back-substitution with both slopes u / (u - l): Fast-Lin, CAP, DeepZ as lines.

    Of a smooth activation, for which its authors went on to CROWN, it takes CROWN's lines.

    Args:
        preactivation: another relaxation's pre-activation bounds; None: its own.

    Raises:
        ValueError: for an estimate as preactivation.

    Sound: yes.  Exact: with no crossing neuron.  Gradient: exact; continuous in the weights.
    Source: Weng et al. 2018; Wong and Kolter 2018.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.1)
        >>> lines, noise = ox.bounds(net, region, ox.FastLin()), ox.bounds(net, region, "deepz")
        >>> torch.allclose(lines.upper, noise.upper, atol=1e-5)
        True
    """

    parallel: ClassVar[bool] = True

    @property
    def jumps(self) -> Jumps:
        return joined(frozenset(), *(part.jumps for part in self.parts))

    def lines(self, activation: Activation, l: Tensor, u: Tensor) -> Lines:
        if activation.piecewise is not None:
            return named.band_lines(activation, l, u, slope="chord")
        return named.crown_lines(activation, l, u)

    def _one_row(self, network: Network) -> bool:
        return super()._one_row(network) and all(n.piecewise for n in network.activations)
