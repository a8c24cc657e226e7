"""The entry points: bounds of a network over a region by any relaxation."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn

from optrelax.checks import require_dense
from optrelax.disjunctions import group_bounds
from optrelax.enclosures import Bounds
from optrelax.joined_specifications import Spec, as_specification
from optrelax.margin_rows import check_specification
from optrelax.networks.capturing import capture
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import Relaxation, resolve, with_rounding
from optrelax.rounding import Rounding
from optrelax.specifications import Specification

Net = nn.Module | Network


def bounds(
    net: Net, region: Region, relaxation: Relaxation | str = "crown", *, rounding: Rounding | None = None
) -> Bounds:
    """Bounds of every output over the region.

    Args:
        net: a module of supported ops, or a captured network.
        region: what inputs are bounded over, [*batch, *input_shape].
        relaxation: an object or a name, options after a colon ("crown:lower=0").
        rounding: overrides the relaxation's own ("outward" holds in real arithmetic).

    Returns:
        Lower and upper bounds, [*batch, *output_shape].

    Raises:
        UnsupportedOpError: for ops, or activations of the relaxation's, without a rule.
        ValueError: where shapes, types or devices do not fit.

    Sound, exact, gradient: as the relaxation says; differentiable in weights and region. An example of which a bound
    overflowed gives no gradient, so that it makes none of the others' NaN.

    Example:
        >>> net, x = ox.models.fc(4, 8, 2, seed=0), torch.zeros(1, 4)
        >>> b = ox.bounds(net, ox.LinfBall(x, eps=0.1), "crown")
        >>> bool((b.lower <= net(x)).all() and (net(x) <= b.upper).all())
        True
    """
    network, flat, batch = prepare(net, region)
    chosen = _resolve(relaxation, rounding)
    found = chosen.output_bounds(network, flat)
    kept = _with_gradient(found.lower, found.upper)
    if kept is not None:
        some = chosen.output_bounds(network, flat.select(kept))
        found = Bounds.known(_put(found.lower, kept, some.lower), _put(found.upper, kept, some.upper))
    return _unflatten(found, batch)


def lower_bounds(
    net: Net,
    region: Region,
    spec: Spec,
    relaxation: Relaxation | str = "crown",
    *,
    rounding: Rounding | None = None,
) -> Tensor:
    """Lower bounds of rows of the output.

    Rows are folded into the last affine ops (elision).

    Args:
        net: as for `bounds`.
        region: as for `bounds`.
        spec: rows [*batch, k, outputs] or [k, outputs], such as `margins(labels, classes)`; or a `Specification`, or
            several by name: every group's greatest value is bounded then, see `optrelax.disjunctions.group_bounds`.
        relaxation: as for `bounds`.
        rounding: as for `bounds`.

    Returns:
        [*batch, k]; [*batch, groups] of a specification.

    Raises:
        UnsupportedOpError: as `bounds`.
        ValueError: as `bounds`, and for rows that do not fit the outputs.

    Sound, exact, gradient: as the relaxation says; none of an example of which a bound overflowed, see `bounds`.

    Example:
        >>> net, x = ox.models.fc(4, 8, 3, seed=0), torch.zeros(1, 4)
        >>> spec = ox.margins(net(x).argmax(1), classes=3)
        >>> low = ox.lower_bounds(net, ox.LinfBall(x, eps=0.01), spec, "crown")
        >>> low.shape, bool((low > 0).all())
        (torch.Size([1, 2]), True)
    """
    network, flat, batch = prepare(net, region)
    chosen = _resolve(relaxation, rounding)
    if isinstance(spec, Tensor):
        rows = prepare_rows(network, spec, flat, batch)
        found = chosen.lower_bounds(network, flat, rows)
        kept = _with_gradient(found)
        if kept is not None:
            mine = rows if len(rows) == 1 else rows[kept]
            found = _put(found, kept, chosen.lower_bounds(network, flat.select(kept), mine))
    else:
        found = group_bounds(chosen, network, flat, prepare_specification(network, spec, flat, batch))
    return found.reshape(*batch, found.shape[-1])


def _with_gradient(*found: Tensor) -> Tensor | None:
    """The examples whose bounds [batch, ...] are all finite, where others overflowed; None: nothing is to be done.

    The gradient of what overflowed is 0 times infinity, on the way through the weights that all examples share.
    """
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in found):
        return None
    finite = torch.stack([t.detach().reshape(len(t), math.prod(t.shape[1:])).isfinite().all(1) for t in found]).all(0)
    return None if bool(finite.all()) else finite.nonzero()[:, 0]


def _put(found: Tensor, index: Tensor, some: Tensor) -> Tensor:
    """Bounds without gradient, but those of some examples."""
    return found.detach().index_put((index,), some)


def preactivation_bounds(
    net: Net, region: Region, relaxation: Relaxation | str = "crown", *, rounding: Rounding | None = None
) -> dict[str, Bounds]:
    """Bounds of the input of every activation, in topological order.

    Args:
        net: as for `bounds`.
        region: as for `bounds`.
        relaxation: as for `bounds`.
        rounding: as for `bounds`.

    Returns:
        Path of the activation -> bounds [*batch, *shape].

    Raises:
        UnsupportedOpError: as `bounds`.
        ValueError: as `bounds`.

    Sound, exact, gradient: as the relaxation says.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.1)
        >>> {path: tuple(b.lower.shape) for path, b in ox.preactivation_bounds(net, region, "box").items()}
        {'2': (1, 8), '4': (1, 8)}
    """
    network, flat, batch = prepare(net, region)
    found = _resolve(relaxation, rounding).preactivation_bounds(network, flat)
    return {network[name].path: _unflatten(b, batch) for name, b in found.items()}


def prepare(net: Net, region: Region) -> tuple[Network, Region, torch.Size]:
    """The captured network, the region with one batch dimension, and the batch shape it had."""
    if not isinstance(region, Region):
        cure = "; write ox.LinfBall(x, eps) or ox.InputBox(lower, upper)" if isinstance(region, Tensor) else ""
        raise TypeError(f"region: wants an InputBox, LinfBall or another Region, got {type(region).__name__}{cure}")
    if torch.is_autocast_enabled(region.device.type):
        raise ValueError(
            "autocast is on, and half precision gives no sound bounds; leave the autocast region, or put "
            f"torch.autocast({region.device.type!r}, enabled=False) around this call"
        )
    if isinstance(net, Network):
        network, batch = _fitting(net, region)
        network.require_eval()
    else:
        network, batch = capture(net, region.shape[1:]), region.shape[:1]
        network.require_statistics()
    network.require_weights(region.device, region.dtype)
    return network, region.reshape(-1, *network.input_shape), batch


def _fitting(net: Network, region: Region) -> tuple[Network, torch.Size]:
    """The network as it takes the region's inputs, and the region's batch shape."""
    shape, own = region.shape, net.input_shape
    lead = len(shape) - len(own)
    if lead > 0 and tuple(shape[lead:]) == own:
        return net, shape[:lead]
    if len(shape) > 1:
        with contextlib.suppress(ValueError):
            return net.taking(tuple(shape[1:])), shape[:1]
    raise ValueError(f"region: the network takes inputs [*batch, {', '.join(map(str, own))}], got {tuple(shape)}")


def prepare_rows(network: Network, spec: Tensor, flat: Region, batch: torch.Size) -> Tensor:
    """Rows [batch or 1, k, *output_shape] in the region's type; ValueError where they do not fit."""
    if not isinstance(spec, Tensor):
        raise TypeError(f"specification: wants a tensor of rows, got {type(spec).__name__}")
    require_dense("lower_bounds", "specification", spec)
    check_specification(spec, batch, network.outputs)
    spec = spec.to(flat.like)
    k = spec.shape[-2]
    lead = 1 if spec.dim() == 2 else flat.shape[0]
    return spec.reshape(lead, k, *network.output_shape)


def prepare_specification(network: Network, spec: Spec, flat: Region, batch: torch.Size) -> Specification:
    """The specification with one batch dimension or none, in the region's type; ValueError where it does not fit."""
    found = as_specification(spec)
    found.require_fit("specification", network.outputs, batch)
    return found.flat().to(flat.device, flat.dtype)


def _unflatten(found: Bounds, batch: torch.Size) -> Bounds:
    shape = (*batch, *found.lower.shape[1:])
    return Bounds(found.lower.reshape(shape), found.upper.reshape(shape))


def _resolve(relaxation: Relaxation | str, rounding: Rounding | None) -> Relaxation:
    found = resolve(relaxation)
    return found if rounding is None else with_rounding(found, rounding)
