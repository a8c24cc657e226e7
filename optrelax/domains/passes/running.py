"""Bounds of any rows of a target by its compiled steps, and their gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optrelax.autograd_contexts import Context
from optrelax.domains import backsubstitution
from optrelax.domains.passes.folding import channels_last, diagonals, folded_weight
from optrelax.domains.passes.lanes import LaneSpace, lanes_of
from optrelax.domains.passes.line_maps import LineMaps, MixedMaps
from optrelax.domains.passes.neurons import EveryNeuron, Neurons, PickedNeurons
from optrelax.domains.passes.programs import Program
from optrelax.domains.passes.workspace import PassTensors, RowsAtWork, TracedRows, Workspace, maps_each
from optrelax.domains.row_walks import Enclosure
from optrelax.kernels.pages import huge_pages
from optrelax.networks.graph import Network
from optrelax.regions import Region


def lower_bounds(
    found: Program,
    network: Network,
    rows: Tensor,
    neurons: Neurons | EveryNeuron,
    region: Region,
    lines: Mapping[str, Enclosure] | MixedMaps,
    room: float = math.inf,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Lower bound of each neuron's row over its example's region: [n].

    rows: as `backsubstitution.pull` takes them at the target, [batch or 1, k, ...]; flat over both they are what
    `neurons.which` counts.  room: bytes of coefficients alive at once, where that is less than the workspace.
    weights: with `MixedMaps` for lines, of each row at each activation, [n, high, wide, channels] as `weighed` says.
    Sound: yes, to nearest; weights in [0, 1].  Gradient: as `substitute`, and in the weights.
    """
    assert region.as_box is not None, "asked before by `available`"
    region = region.as_box
    assert isinstance(lines, LineMaps | MixedMaps), "lines that are made once for all targets"
    walk = backsubstitution.pull(
        network,
        found.target,
        rows,
        rows.shape[0],
        {},
        stop=frozenset(found.stops),
        plan=found.before,
        places=torch.zeros(1, 1, 2, dtype=torch.int64, device="cpu") if found.windows else None,
    )
    given: list[Tensor] = []
    shapes = {rows.stop: rows.shape for rows in found.rows}
    given += [walk.stops[name].reshape(-1, *shapes[name]) for name in found.stops]
    for name in found.activations:
        given += lines.maps(network, name)
    matrices = [folded_weight(network, name, region.lower) for name in found.weights]
    given += [t.detach() if lines.constant else t for t in matrices]
    if weights is not None:
        given += [weights[name] for name in found.activations]
    center, radius = region.center, region.radius
    low, high = region.lower, region.upper
    if found.entry != network.input:
        for op in diagonals(network, found.entry):
            center, radius = op.apply(center), op.apply_abs(radius)
        low, high = center - radius, center + radius
    given += [channels_last(low), channels_last(high)]
    bound: Tensor = _Pass.apply(found, neurons, room, weights is not None, *(t.contiguous() for t in given))
    return bound + neurons.of_each(walk.constant)


APART, AGAIN = 1 / 3, 2 / 3
"""Shares of rows of which the gradient is no faster than that of all: side by side, and one by one."""


class _Pass(torch.autograd.Function):
    """Keeps what it was given; coefficients are made again."""

    @staticmethod
    def forward(
        ctx: Context, found: Program, neurons: Neurons | EveryNeuron, room: float, mixed: bool, *given: Tensor
    ) -> Tensor:
        ctx.found, ctx.neurons, ctx.room, ctx.mixed = found, neurons, room, mixed
        like, n = given[0], neurons.count
        constant = like.new_zeros(n)
        hidden = neurons.hidden and not mixed  # whose weights all have a gradient
        keep = any(ctx.needs_input_grad) and room == math.inf and found.keeps(n, like.element_size(), hidden)
        space = _workspace(found, neurons, found.by_name(given, mixed), like, room, gradient=keep, keep=keep)
        ctx.kept = keep
        # As a saved tensor, so that who drops those and computes them again drops this.
        ctx.save_for_backward(*given, *([space.arenas] if keep else []))
        for work in space.parts(neurons, constant):
            _forward(found, work)
            work.finish()
        return constant

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        found, neurons, saved = ctx.found, ctx.neurons, ctx.saved_tensors
        given: Sequence[Tensor] = saved[: len(ctx.needs_input_grad) - 4]
        need, mixed = ctx.needs_input_grad[4:], ctx.mixed
        if torch.is_grad_enabled():  # to be differentiated again
            # Of each tensor by itself: some were computed from others, and that part of the gradient is not ours.
            fresh = [t.view_as(t) for t in given]
            wanted = [t for t, needed in zip(fresh, need, strict=True) if needed]
            again = torch.autograd.grad(_traced(found, neurons, fresh, mixed), wanted, grad, create_graph=True)
            taken = iter(again)
            return None, None, None, None, *(next(taken) if needed else None for needed in need)
        totals = [torch.zeros_like(t) if needed else None for t, needed in zip(given, need, strict=True)]
        _together(found, totals, given, mixed)
        # Gradients are written over coefficients: only the first backward pass finds them.
        kept, ctx.kept = ctx.kept, False
        arena = saved[-1].view(-1) if len(saved) > len(given) else None
        if not mixed and (read := _read(neurons, grad)) is not None:
            neurons, grad, kept = PickedNeurons(neurons, read), grad[read], False
        tensors, sums = found.by_name(given, mixed), found.by_name(totals, mixed)
        space = _workspace(found, neurons, tensors, given[0], ctx.room, gradient=True, arena=arena)
        for work in space.parts(neurons, grad.contiguous()):
            if not kept:
                _forward(found, work.unread())
            _backward(found, work, sums)
        space.finish(sums)
        return None, None, None, None, *(t if needed else None for t, needed in zip(totals, need, strict=True))


def _read(neurons: Neurons | EveryNeuron, grad: Tensor) -> Tensor | None:
    """Rows whose bound counts, where they are few: a line reads the bounds of neurons that cross, and no others."""
    read = grad.nonzero()[:, 0]
    # By these alone, one by one and made again, the gradient takes about as long as by all of them side by side.
    share = APART if neurons.together > 1 else AGAIN
    return read if len(read) < share * neurons.count else None


def _together(found: Program, totals: list[Tensor | None], given: Sequence[Tensor], mixed: bool) -> None:
    """The kernel adds up both slopes or none, and both intercepts; of rows with weights a side's lines or none."""
    groups = ((0, 1, 4, 5), (2, 3)) if mixed else ((0, 2), (1, 3))
    first, each = len(found.stops), maps_each(mixed)
    taken = [[first + each * i + j for j in group] for i in range(len(found.activations)) for group in groups]
    for group in (*taken, [len(given) - 2, len(given) - 1]):
        if any(totals[i] is not None for i in group):
            for i in group:
                totals[i] = torch.zeros_like(given[i]) if totals[i] is None else totals[i]


def _workspace(
    found: Program,
    neurons: Neurons | EveryNeuron,
    tensors: PassTensors,
    like: Tensor,
    room: float,
    gradient: bool,
    keep: bool = False,
    arena: Tensor | None = None,
) -> Workspace:
    """Room for as many rows as may be alive at once, or for all of them, so many at a time."""
    layout, most, n = found.layout(gradient), found.at_once(like, room, gradient), neurons.count
    # Whichever way the rows went, the gradient goes the same: there is most room forward.
    together = 0 if tensors.own else lanes_of(neurons, min(most, found.at_once(like, room, gradient=True)), like.dtype)
    each = together or 1
    if together:
        n = neurons.count // neurons.together * -(-neurons.together // together)
    # In equal parts, so that little is left over of what is kept.
    parts = max(1, -(-n // max(1, most // each)))
    count = max(1, -(-n // parts)) * each
    if arena is None:
        arena = huge_pages(like.new_empty((parts if keep else 1) * count * layout.numbers))
    arena = arena[: arena.numel() // (count * layout.numbers) * count * layout.numbers]
    if together:
        return LaneSpace(found, layout, tensors, count, arena, gradient, together)
    return Workspace(found.rows, layout, tensors, count, arena, gradient)


def _forward(found: Program, work: RowsAtWork) -> None:
    """Coefficients of some rows; their bounds are added to the column."""
    for step in found.steps:
        step.forward(work)


def _backward(found: Program, work: RowsAtWork, sums: PassTensors) -> None:
    """Gradients of some rows, added to those of everything given."""
    seen: set[int] = set()
    for step in reversed(found.steps):
        for slot in step.sources:
            own = work.gradient(slot)
            if slot not in seen:
                step.backward(work, slot, own, sums)
                seen.add(slot)
            else:
                more = work.spare(own)
                step.backward(work, slot, more, sums)
                own += more
    for slot, rows in enumerate(found.rows):
        if rows.stop is not None and (total := sums.stops[rows.stop]) is not None:
            work.add_shared(slot, total)


def _traced(found: Program, neurons: Neurons | EveryNeuron, tensors: Sequence[Tensor], mixed: bool) -> Tensor:
    """The same by operations that can be differentiated again."""
    constant = tensors[0].new_zeros(neurons.count)
    work = TracedRows(found.rows, found.by_name(tensors, mixed), neurons, constant)
    for step in found.steps:
        step.trace(work)
    return work.constant
