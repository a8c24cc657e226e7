"""The best of several relaxations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optrelax import memory
from optrelax.frozen import filled
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations.base import Preactivation, Relaxation, limited, with_rounding
from optrelax.relaxations.jumps import Jumps, joined
from optrelax.relaxations.registry import name_of, resolve
from optrelax.relaxations.substitution import Substitution
from optrelax.rounding import Rounding


@dataclass(frozen=True, init=False)
class Intersect(Relaxation):
    """The best of several relaxations, entry by entry: pre-activation bounds and margins both.

    A part that pulls rows back (CROWN and its forms, Fast-Lin) bounds the neurons alone that the parts without rows
    leave crossing, and chooses its lines at the best ends so far.

    Args:
        parts: relaxations or their names.
        rounding: of all parts; None: their own, which must agree.
        max_bytes: of all parts; None: their own.

    Raises:
        ValueError: without parts, for an estimate among them, and where they round differently.

    Sound: yes; refuses unsound parts.
    Gradient: of the bound taken; continuous in the weights where every part is: the lines of a neuron tend to the
    function itself as an end tends to the kink.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.1)
        >>> both, box = (ox.bounds(net, region, way) for way in (ox.Intersect("box", ox.FastLin()), "box"))
        >>> bool((both.lower >= box.lower - 1e-6).all())  # to rounding
        True
    """

    parts: tuple[Relaxation, ...] = ()

    def __init__(
        self, *parts: Relaxation | str, rounding: Rounding | None = None, max_bytes: memory.Limit = None
    ) -> None:
        if len(parts) < 1:
            raise ValueError("Intersect: needs at least one relaxation")
        resolved = [resolve(part) for part in parts]
        for part in resolved:
            if not part.sound:
                raise ValueError(f"Intersect: {name_of(part)} is an estimate, not a bound, and cannot be intersected")
        if rounding is not None:
            resolved = [with_rounding(part, rounding) for part in resolved]
        if len({part.rounding for part in resolved}) > 1:
            raise ValueError("Intersect: parts round differently; say rounding='outward' or 'nearest' for all")
        if max_bytes is not None:
            resolved = [part.changed(max_bytes=max_bytes) for part in resolved]
        filled(self, parts=tuple(resolved), rounding=resolved[0].rounding, max_bytes=max_bytes)
        super().__post_init__()

    @property
    def jumps(self) -> Jumps:
        return joined(frozenset(), *(part.jumps for part in self.parts))

    def changed(self, **options: Any) -> Intersect:
        kept = {"rounding": self.rounding, "max_bytes": self.max_bytes}
        return Intersect(*self.parts, **{**kept, **options})

    def preactivation_bounds(self, network: Network, region: Region) -> Preactivation:
        return self._best(network, region, None)[0]

    def lower_bounds(self, network: Network, region: Region, rows: Tensor) -> Tensor:
        bounds = self._best(network, region, rows)[1]
        return torch.stack(bounds).amax(0) if len(bounds) > 2 else _greatest(bounds)

    def _best(self, network: Network, region: Region, rows: Tensor | None) -> tuple[Preactivation, list[Tensor]]:
        """The best pre-activation bounds, and lower bounds of rows by every part on them."""
        parts = self._sharing(network, region, 0 if rows is None else rows.shape[1])
        best: Preactivation | None = None
        lower = []
        # What bounds every neuron goes first.
        for part in sorted(parts, key=lambda part: _refining(part, network) is not None):
            refining = _refining(part, network)
            if refining is not None and best is not None:
                best, found = refining.refine(network, region, best, rows)
                if found is not None:
                    lower.append(found)
                continue
            own = part.preactivation_bounds(network, region)
            best = own if best is None else {name: b.intersect(own[name]) for name, b in best.items()}
            if rows is not None:
                lower.append(part.lower_bounds(network, region, rows))
        assert best is not None
        return best, lower

    def bytes_needed(self, network: Network, region: Region, k: int) -> int:
        return sum(part.bytes_needed(network, region, k) for part in self.parts)

    def least_bytes(self, network: Network, region: Region, k: int) -> int:
        return sum(part.least_bytes(network, region, k) for part in self.parts)

    def _sharing(self, network: Network, region: Region, k: int) -> Sequence[Relaxation]:
        """The parts with what each may take, where they do not fit together."""
        needs = [part.bytes_needed(network, region, k) for part in self.parts]
        most = memory.limit(self.max_bytes, sum(needs), region.device)
        if sum(needs) <= most:
            return self.parts
        rooms = memory.shares(most, needs)
        force = self.max_bytes is not None
        return [limited(part, room, force) for part, room in zip(self.parts, rooms, strict=True)]


def _refining(part: Relaxation, network: Network) -> Substitution | None:
    """The part, where it can bound those neurons alone that others leave crossing."""
    return part if isinstance(part, Substitution) and part.refines(network) else None


def _greatest(bounds: list[Tensor]) -> Tensor:
    return bounds[0] if len(bounds) == 1 else torch.maximum(*bounds)
