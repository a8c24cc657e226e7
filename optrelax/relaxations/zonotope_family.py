"""What the relaxations of the zonotope family share: noise terms carried forward through parallel lines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from optrelax import memory, memory_counts
from optrelax.checks import require_number, require_range
from optrelax.domains import lines as named
from optrelax.domains import zonotope
from optrelax.domains.lines import Lines
from optrelax.domains.zonotope_rows import frontier, project
from optrelax.enclosures import Bounds, from_below, ordered
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network
from optrelax.regions import Region, require_box
from optrelax.relaxations.base import LineRelaxation, Preactivation, examples_at_a_time, identity_rows
from optrelax.relaxations.jumps import LOWER, TIE, UPPER, Jumps
from optrelax.relaxations.registry import name_of

INSTEAD = "deepz, fast-lin and crown take any region"


@dataclass(frozen=True, kw_only=True)
class ZonotopeFamily(LineRelaxation):
    """Shared by the zonotope family: a slope for crossing neurons and a home for new errors."""

    slope: named.BandSlope = "chord"
    continuous: bool = False
    gamma: float = 1.0
    kappa: float = 0.9

    errors: ClassVar[zonotope.Errors] = "generators"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.slope not in ("chord", "box", "diag", "switch", "soft", "slanted"):
            raise ValueError(
                f"{name}: slope must be 'chord', 'box', 'diag', 'switch', 'soft' or 'slanted', got {self.slope!r}"
            )
        if self.continuous and self.slope != "diag":
            raise ValueError(f"{name}: continuous=True is the -diag-c form, it needs slope='diag', got {self.slope!r}")
        require_number(name, "gamma", self.gamma)
        require_number(name, "kappa", self.kappa)
        require_range(name, "> 0 and finite", gamma=self.gamma)
        require_range(name, "in [0, 1] (unsound beyond)", kappa=self.kappa)

    @property
    def jumps(self) -> Jumps:
        if self.continuous:
            return frozenset()
        steep = () if self.kappa == 1 else (LOWER,)
        causes: dict[str, tuple[str, ...]] = {
            "chord": (),
            "box": (LOWER,),
            "diag": (UPPER,),
            "switch": (TIE,),
            "soft": (),
            "slanted": steep,
        }
        return frozenset(causes[self.slope])

    @property
    def chord_shares(self) -> tuple[float, ...]:
        return (1.0, self.kappa)

    def refusal(self, activation: Activation) -> str | None:
        fits = activation.piecewise is not None or self.slope in ("chord", "box")
        return None if fits else named.NO_PIECES

    def lines(self, activation: Activation, l: Tensor, u: Tensor) -> Lines:
        """The band of parallel lines at pre-activation bounds [l, u]."""
        lines = named.band_lines(
            activation, l, u, slope=self.slope, continuous=self.continuous, gamma=self.gamma, kappa=self.kappa
        )
        return named.outward_lines(lines, activation, l, u) if self.outward else lines

    def _walk(self) -> zonotope.Walk:
        return zonotope.Walk(self.lines, self.errors, outward=self.outward)

    def bytes_needed(self, network: Network, region: Region, k: int) -> int:
        noise = self._noise(network)
        values = memory_counts.noise_values(torch.is_grad_enabled()).of(values=memory.value_entries(network))
        return region.dtype.itemsize * region.shape[0] * (noise.whole + values)

    def _noise(self, network: Network) -> memory.Pull:
        return memory.carry(network, math.prod(network.input_shape), born=self.errors == "generators")

    def _forward(
        self, network: Network, region: Region, rows: Tensor | None
    ) -> tuple[Preactivation, Tensor | None, Tensor | None]:
        """Pre-activation bounds and, for given rows, centre and radius; examples in chunks under max_bytes."""
        self.require_supported(network)
        size = examples_at_a_time(self, network, region, 0 if rows is None else rows.shape[1])
        return memory.in_pieces(network, partial(self._whole, network), self.prepare(region), rows, size)

    def _whole(
        self, network: Network, region: Region, rows: Tensor | None
    ) -> tuple[Preactivation, Tensor | None, Tensor | None]:
        region = require_box(name_of(self), region, INSTEAD)
        keep = frontier(network) if rows is not None else frozenset()
        found = zonotope.propagate(network, region, self._walk(), keep)
        if rows is None:
            return found.preactivation, None, None
        return (found.preactivation, *project(network, found.kept, rows, self.outward))

    def preactivation_bounds(self, network: Network, region: Region) -> Preactivation:
        return self._forward(network, region, None)[0]

    def lower_bounds(self, network: Network, region: Region, rows: Tensor) -> Tensor:
        _, center, radius = self._forward(network, region, rows)
        assert center is not None
        assert radius is not None
        return from_below(center - radius)

    def output_bounds(self, network: Network, region: Region) -> Bounds:
        _, center, radius = self._forward(network, region, identity_rows(network.output_shape, region.like))
        assert center is not None
        assert radius is not None
        shape = (-1, *network.output_shape)
        return ordered((center - radius).reshape(shape), (center + radius).reshape(shape))
