"""Memory: how much a pass may take, what it takes whole, and its work cut into pieces that are computed twice.

A piece keeps nothing for the backward pass but what it was called with; there it is computed once more, and its
gradient taken, before the next piece's turn (`torch.utils.checkpoint`). So the peak is that of one piece.

What a pass takes is counted from the shapes it works on: the tensors that autograd keeps, and the greatest ones alive
beside them. `python -m benchmarks memory` holds the counts against the peak of a process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from optrelax.enclosures import Bounds
from optrelax.networks.graph import Network, Node
from optrelax.networks.images import Conv2d
from optrelax.networks.ops import Reshape
from optrelax.regions import Region

Found = TypeVar("Found")
Limit = int | float | None
"""max_bytes: bytes, `math.inf` for no limit, None for half of what is free."""

SMALL = 2**28
"""Bytes below which a pass with max_bytes=None is never cut, nor the machine asked what is free."""
SHARE = 0.5
"""Share of the free memory that a pass with max_bytes=None may take."""


def require_limit(owner: str, value: object) -> None:
    """ValueError unless `value` is a positive integer, infinity or None."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not (value is None or whole or value == math.inf):
        wanted = "a positive integer or None (or math.inf: no limit)"
        raise ValueError(f"{owner}: max_bytes must be {wanted}, got {value}")


def limit(given: Limit, need: float, device: torch.device) -> float:
    """The most bytes a pass may take that whole takes `need`."""
    if given is not None:
        return given
    return math.inf if need <= SMALL else max(SMALL, SHARE * free_bytes(device))


def free_bytes(device: torch.device) -> float:
    """Bytes a process could still take on a device; infinity where nobody tells."""
    if device.type == "cuda":
        # Blocks that PyTorch keeps for itself are free too.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    found = [_machine(), _group()]
    return min((f for f in found if f is not None), default=math.inf)


def _machine() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _group() -> float | None:
    """What a container's limit leaves, given that its idle file cache yields."""
    try:
        most, taken, stat = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current", "stat"))
    except OSError:
        return None
    if most.strip() == "max":
        return None
    idle = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file ")), 0)
    return max(0, int(most) - int(taken) + idle)


def shares(bound: float, needs: Sequence[float]) -> list[float]:
    """Bytes for each of several passes whose graphs live at once, together at most `bound`.

    Small ones stay whole while they take less than half; the rest is split between those that are cut.
    """
    left, cut = bound, []
    found = [math.inf] * len(needs)
    for i in sorted(range(len(needs)), key=lambda i: needs[i]):
        if needs[i] <= left - bound / 2:
            left -= needs[i]
        else:
            cut.append(i)
    for i in cut:
        found[i] = max(1, left // len(cut))
    return found


# --- what a pass takes --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pull:
    """Numbers alive while a row is pulled back from a node, for a batch: of one row."""

    kept: int
    """Coefficients of every node on the way, which a gradient needs."""
    passing: int
    """The most alive at one step without a gradient, or beside `kept` with one."""

    @property
    def whole(self) -> int:
        """The peak."""
        return self.kept + self.passing if torch.is_grad_enabled() else self.passing


def pull(
    network: Network, target: str, batch: int, *, shared: bool, outward: bool, eager: bool, end: bool = False
) -> Pull:
    """What one row takes from `target` to the input.

    shared: the batch has one row until it meets an activation.  eager: activations are relaxed by several passes.
    end: rows end at the network's entrance, in products whose memory `sign_products` knows.
    """
    pending = {target: 1 if shared else batch}  # node -> examples of its coefficients
    kept = passing = 0
    for node in reversed(network.nodes):
        if node.name not in pending:
            continue
        examples = pending.pop(node.name)
        own = 0 if node.of(Reshape) else examples * math.prod(node.shape)
        waiting = sum(n * math.prod(network.shape_of(name)) for name, n in pending.items())
        if end and network.entrance[-1:] == (node,):
            kept, passing = kept + own, max(passing, 2 * own)  # and their gradient
            break
        if not node.affine:
            examples = batch
        made = sum(examples * math.prod(network.shape_of(name)) for name in node.inputs)
        joined = sum(examples * math.prod(network.shape_of(name)) for name in node.inputs if name in pending)
        made = 0 if node.of(Reshape) else made
        passing = max(passing, waiting + own + made + joined + _scratch(node, own, made, outward, eager))
        kept += own
        pending |= {name: max(examples, pending.get(name, 0)) for name in node.inputs}
    kept += pending.get(network.input, 0) * math.prod(network.input_shape)
    return Pull(kept, passing)


def _scratch(node: Node, own: int, made: int, outward: bool, eager: bool) -> int:
    """Copies that live within one step: absolute values, a convolution's own layout, signs and parts."""
    found = own + made if outward else 0
    if node.of(Conv2d):
        found += own + made
    elif node.maximum or node.product or (eager and node.activation):
        found += 3 * own
    return found


def carry(network: Network, terms: int, *, born: bool, estimated: bool = False) -> Pull:
    """Numbers alive while `terms` noise terms go forward, of one example.

    born: every neuron adds a term of its own.  estimated: the terms are projections, each example's from the start.
    """
    kept = passing = 0
    relaxed = {node.name for node in network if not node.affine}
    for node in network:
        own = 0 if node.of(Reshape) else math.prod(node.shape)
        before = sum(math.prod(network.shape_of(name)) for name in node.inputs)
        # Until the first activation all examples have the same generators, and only their scales differ.
        first = not estimated and not any(network.ancestors(name) & relaxed for name in node.inputs)
        if node.name not in relaxed:
            if not first:
                kept += 2 * terms * own  # generators and their absolute values
                passing = max(passing, terms * (before + 2 * own))
            continue
        kept += (3 if estimated else 1) * terms * own
        passing = max(passing, (4 if estimated else 2) * terms * own)
        if born:
            terms += own
            kept += own * own
    return Pull(kept, passing)


def value_entries(network: Network) -> int:
    """Numbers in all nodes' values of one example; other shapes of the same numbers do not count."""
    nodes = sum(math.prod(node.shape) for node in network if not node.of(Reshape))
    return nodes + math.prod(network.input_shape)


def hidden_entries(network: Network) -> int:
    """Neurons: numbers that an activation or a product makes, of one example."""
    return sum(math.prod(node.shape) for node in network.relaxed)


def neuron_rows(network: Network) -> int:
    """Rows up and down of the neurons whose intervals are not exact, as if all of these crossed."""
    loose = (node for node in network.activations if node.inputs[0] not in network.exact_intervals)
    return sum(2 * math.prod(node.shape) for node in loose)


# --- pieces -------------------------------------------------------------------------------------------------------


def in_pieces(
    network: Network,
    call: Callable[..., Found],
    region: Region,
    rows: Tensor | None,
    size: float,
    *,
    again: bool = True,
    given: Mapping[str, Bounds] | None = None,
) -> Found:
    """call(region, rows), a tensor, bounds, or a tuple or dict of such [batch, ...], `size` examples at a time.

    rows [batch or 1, ...]; given: bounds of every example, the call's third argument where there are such.
    Gradient: that of the call, which is made again for it, unless it sees to that itself.
    """
    batch = region.shape[0]
    if size >= batch:
        return call(region, rows) if given is None else call(region, rows, given)
    piece = recomputed(network, call) if again else call
    found = []
    for start in range(0, batch, max(1, int(size))):
        part = slice(start, start + max(1, int(size)))
        some = rows if rows is None or rows.shape[0] == 1 else rows[part]
        if given is None:
            found.append(piece(region.select(part), some))
            continue
        own = {name: Bounds.known(b.lower[part], b.upper[part]) for name, b in given.items()}
        found.append(piece(region.select(part), some, own))
    joined: Found = _join(found)
    return joined


def recomputed(network: Network, call: Callable[..., Found]) -> Callable[..., Found]:
    """The same function, which keeps nothing for its gradient and is called again for it.

    RuntimeError where the weights have changed by then.
    """
    unchanged = weights_guard(network)

    def guarded(*given: object) -> Found:
        unchanged()
        return call(*given)

    def run(*given: object) -> Found:
        if not torch.is_grad_enabled():
            return guarded(*given)
        from torch.utils.checkpoint import checkpoint

        found: Found = checkpoint(guarded, *given, use_reentrant=False, preserve_rng_state=False)
        return found

    return run


def _join(parts: Sequence[Any]) -> Any:
    match parts[0]:
        case None:
            return None
        case dict() as first:
            return {key: _join([part[key] for part in parts]) for key in first}
        case tuple():
            return tuple(_join(items) for items in zip(*parts, strict=True))
        case Bounds():
            return Bounds.known(torch.cat([b.lower for b in parts]), torch.cat([b.upper for b in parts]))
    return torch.cat(list(parts))


def weights_guard(network: Network) -> Callable[[], None]:
    """A check that the weights are still those of now: pieces are computed again in the backward pass."""

    def seen() -> list[tuple[int, int]]:
        module = network.module
        tensors = (*module.parameters(), *module.buffers())
        return [(id(t), 0 if t.is_inference() else t._version) for t in tensors]

    before = seen()

    def unchanged() -> None:
        if seen() != before:
            raise RuntimeError(
                "max_bytes: the network's weights changed between the forward and the backward pass, which computes "
                "the chunks again; call backward() first (inside functional_call, too), or set max_bytes=math.inf"
            )

    return unchanged
