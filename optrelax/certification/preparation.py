"""What `certify`, `compare`, `verify` and the measurements are asked for: read, and checked before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.checks import require_range
from optrelax.data.samples import Samples, gather
from optrelax.joined_specifications import Spec, as_specification
from optrelax.networks.graph import Network
from optrelax.regions import Number, Region, as_number
from optrelax.relaxations import Intersect, NamedRelaxations, Relaxation, name_of, named_relaxations, with_rounding
from optrelax.specifications import Specification

if TYPE_CHECKING:
    from optrelax.layers.milp import Milp

__all__ = [
    "asked_samples",
    "batch_size_of",
    "device_of",
    "limited",
    "milp_of",
    "named",
    "radius_of",
    "range_of",
    "require_dtype",
    "require_exact_weights",
    "require_region",
]


def asked_samples(
    data: object, subset: int | None, region: Region | None, spec: Spec | None
) -> tuple[Samples, Region | None, Specification | None]:
    """The examples, with the regions and the specification of those alone that a subset takes."""
    asked, samples = None if spec is None else as_specification(spec), gather(data, subset)
    if subset is not None:
        region = region if region is None else region.select(samples.index.to(region.device))
        asked = asked if asked is None else asked.flat().select(samples.index.to(asked.rows.device))
    return samples, region, asked


def milp_of(milp: Milp | bool) -> Milp | None:
    """The MILP solver that is meant: True is one with its defaults, False none."""
    from optrelax.layers.milp import Milp

    if milp is False:
        return None
    return Milp() if milp is True else milp


def radius_of(owner: str, eps: Number | None, region: Region | None) -> float | None:
    """eps as a number, None where a region takes its place; ValueError for both or neither, or one out of range."""
    if (eps is None) == (region is None):
        raise ValueError(f"{owner}: give eps, or a region of every input, and not both")
    if eps is None:
        return None
    eps = _one_number(owner, "eps", eps)
    require_range(owner, "a finite number >= 0", eps=eps)
    return float(eps)


def range_of(owner: str, clip: tuple[Number, Number] | None) -> tuple[float, float] | None:
    """Both ends of clip as numbers."""
    if clip is None:
        return None
    if isinstance(clip, str) or len(clip) != 2:
        raise ValueError(f"{owner}: clip must be (low, high) or None, got {clip!r}")
    return _one_number(owner, "clip's low end", clip[0]), _one_number(owner, "clip's high end", clip[1])


def _one_number(owner: str, what: str, value: object) -> float:
    try:
        return as_number(owner, what, value)
    except ValueError as error:
        if (isinstance(value, Sequence) and not isinstance(value, str)) or getattr(value, "ndim", None):
            raise ValueError(f"{error}; for one a channel or an input: region=ox.LinfBall(x, eps, clip)") from error
        raise


def require_dtype(owner: str, dtype: torch.dtype) -> None:
    """ValueError for a type in which no bound is computed."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{owner}: dtype must be torch.float32 or torch.float64, got {dtype}")


def named(relaxation: NamedRelaxations, owner: str) -> dict[str, Relaxation]:
    """Relaxations by name, in a mapping by the user's own; ValueError for none, one twice, or an unsound one."""
    found = named_relaxations(owner, relaxation, lambda one: name_of(with_rounding(one, "nearest")))
    for name, one in found.items():
        if not one.sound:
            raise ValueError(f"{owner}: {name} is an estimate, not a bound, and certifies nothing; choose another")
    return found


def require_region(region: object, samples: Samples, owner: str) -> None:
    """TypeError or ValueError where a region is not one of every input."""
    if not isinstance(region, Region):
        raise TypeError(f"{owner}: region wants an InputBox, LinfBall or another Region, got {type(region).__name__}")
    if region.shape != samples.x.shape:
        raise ValueError(f"{owner}: region is of inputs {tuple(region.shape)}, the inputs are {tuple(samples.x.shape)}")
    x = samples.x.double().to(region.device)
    inside = region.to(torch.float64).contains(x) | ~x.isfinite().flatten(1).all(1)
    if not bool(inside.all()):
        raise ValueError(f"{owner}: input {int((~inside).nonzero()[0])} lies outside its region")


def require_exact_weights(network: Network, dtype: torch.dtype, owner: str) -> None:
    """ValueError where `dtype` would round the weights: the bounds would be those of another network."""
    for name, value in network.module.state_dict().items():
        if isinstance(value, Tensor) and value.dtype == torch.float64 and dtype != torch.float64:
            raise ValueError(f"{owner}: {name} is float64, which dtype={dtype} would round; use torch.float64")


def limited(relaxation: Relaxation, max_bytes: float | None, *, force: bool = False, every: bool = True) -> Relaxation:
    """The relaxation with a memory limit where it has none of its own.

    force: in place of its own.  every: not those alone that go fastest in pieces that a CPU's caches hold.
    """
    if isinstance(relaxation, Intersect):
        parts = [limited(part, max_bytes, force=force, every=every) for part in relaxation.parts]
        own = max_bytes if force else relaxation.max_bytes
        return Intersect(*parts, rounding=relaxation.rounding, max_bytes=own)
    if not every and (relaxation.solves or not relaxation.cached):
        return relaxation
    return relaxation if relaxation.max_bytes is not None and not force else relaxation.changed(max_bytes=max_bytes)


def device_of(network: Network) -> torch.device:
    """Where the network's parameters live."""
    parameter = next(network.module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def batch_size_of(owner: str, network: Network, given: int | None) -> int:
    """Examples at a time: as given, else by the size of the network.  ValueError for less than 1."""
    size = given if given is not None else _default_batch_size(network)
    if size < 1:
        raise ValueError(f"{owner}: batch_size must be at least 1, got {given}")
    return size


def _default_batch_size(network: Network) -> int:
    """Examples whose values, bounds, lines and margins' rows take some 128 MiB; at most 100 (1000 on a GPU)."""
    values = sum(math.prod(network.shape_of(name)) for name in (network.input, *(node.name for node in network)))
    most = 1000 if device_of(network).type == "cuda" else 100
    rows = network.outputs * (network.outputs - 1)
    return max(1, min(most, 2**27 // (8 * (16 * values + 2 * rows))))
