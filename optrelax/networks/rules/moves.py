"""Calls that move numbers about: slicing, indexing, permuting, joining, splitting, repeating, padding, shuffling.

Which entry goes where is found by moving the numbers 1, 2, 3, ... by the call itself; the cheapest op that does the
same is taken, a view where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optrelax.networks.calls import Call, Refused, Value, is_value
from optrelax.networks.live_tensors import LiveTensor
from optrelax.networks.ops import Add, Affine, Reshape, Scale, Shape, Source
from optrelax.networks.registry import rule
from optrelax.networks.views import Concatenate, Expand, Gather, Pad, Permute

aten = torch.ops.aten
MIXES = "mixes the batch: an example reads entries of another, or of none that is named"


def numbers(shape: Shape) -> Tensor:
    """1, 2, 3, ... of this shape, in a type that every op takes."""
    return torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64, device="cpu").reshape(shape)


def move(call: Call, value: Value, index: Tensor) -> Value:
    """The value whose entry i is `value`'s entry index[i], or 0 where index[i] is -1, by the cheapest ops."""
    given, wanted = numbers(value.shape), index + 1
    if value.shape == tuple(index.shape) and bool((given == wanted).all()):
        return value
    ops: list[Affine] = [Gather(value.shape, index)]
    for candidate in _candidates(value.shape, index):
        moved = given
        for op in candidate:
            moved = op.linear(moved)
        if bool((moved == wanted).all()):
            ops = candidate
            break
    for op in ops:
        value = call.add(op, value)
    return value


def _candidates(shape: Shape, index: Tensor) -> Iterator[list[Affine]]:
    """Views that could move entries this way."""
    out, rank = tuple(index.shape), len(shape)
    if index.numel() == 0 or int(index.min()) < 0:
        return
    if index.numel() == math.prod(shape):
        yield [Reshape(shape, out)]
        if (dims := _order(shape, index)) is not None:
            yield [Permute(shape, dims)]
    start = [int(i) for i in torch.unravel_index(index.reshape(-1)[0], shape)]
    for d in [None] if len(out) == rank else range(rank) if len(out) == rank - 1 else []:
        box = out if d is None else (*out[:d], 1, *out[d:])
        if all(s + m <= n for s, m, n in zip(start, box, shape, strict=True)):
            cut: Affine = Pad(shape, [(-s, s + m - n) for s, m, n in zip(start, box, shape, strict=True)])
            yield [cut] if d is None else [cut, Reshape(box, out)]
    if len(out) >= rank and all(n in (1, m) for n, m in zip(reversed(shape), reversed(out), strict=False)):
        yield [Expand(shape, out)]


def _order(shape: Shape, index: Tensor) -> list[int] | None:
    """The order of the input's dimensions that would give this index, if any does."""
    if index.dim() != len(shape):
        return None
    left = list(range(len(shape)))
    strides = [math.prod(shape[d + 1 :]) for d in left]
    found = []
    for i, n in enumerate(index.shape):
        step = int(index.select(i, 1).reshape(-1)[0] - index.reshape(-1)[0]) if n > 1 else None
        fits = [d for d in left if shape[d] == n and step in (None, strides[d])]
        if not fits:
            return None
        left.remove(fits[0])
        found.append(fits[0])
    return found


def moving(function: Callable[..., object]) -> Callable[[Call], Any]:
    """The rule of a function that only moves entries of its first argument, or puts zeros between them."""

    def move_by(call: Call) -> Value | tuple[Value, ...]:
        value = call.only(0)
        given = {name: call.fixed(a) for name, a in zip(call.names[1:], call.args[1:], strict=True)}
        found = _moved(function, value.shape, given)
        values = tuple(move(call, value, index) for index in found)
        return values if len(call.shapes) > 1 or len(values) > 1 else values[0]

    return move_by


def _moved(function: Callable[..., Any], shape: Shape, arguments: dict[str, object]) -> list[Tensor]:
    """What the function does to the entries of two examples: the index of each output."""
    one = numbers(shape)
    found = function(torch.stack([one, one + one.numel()]), **arguments)
    indices = []
    for moved in found if isinstance(found, (list, tuple)) else [found]:
        first = moved[0] if moved.dim() and len(moved) == 2 else None
        if first is None or not torch.equal(moved[1], torch.where(first > 0, first + one.numel(), 0.0)):
            raise Refused(MIXES)
        indices.append(first.long() - 1)
    return indices


_MOVES = (
    "slice select narrow index index_select flip fliplr roll rot90 diagonal tril triu permute transpose movedim "
    "moveaxis swapaxes swapdims mT mH adjoint split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk "
    "unbind hsplit repeat tile repeat_interleave unfold im2col pixel_shuffle pixel_unshuffle channel_shuffle "
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d"
)
for _name in _MOVES.split():
    rule(getattr(aten, _name))(moving(getattr(aten, _name)))


@rule(aten.gather)
def gather(call: Call) -> Value:
    value, index = call.only(0), call["index"]
    if not getattr(index, "batched", False):
        raise Refused(MIXES)
    places, wanted = numbers(value.shape).long() - 1, torch.as_tensor(call.fixed(index))
    return move(call, value, places.gather(_inner(call["dim"], len(value.shape)), wanted))


rule(aten.expand, aten.expand_as, aten.broadcast_to)(lambda call: widened(call, call.value(), call.output))


def widened(call: Call, value: Value, shape: Shape) -> Value:
    """A value broadcast to a shape; both without the batch, which broadcasting leaves in front."""
    if value.shape == shape:
        return value
    if len(value.shape) > len(shape):
        raise Refused(f"cannot expand {value.shape} to {shape}")
    if len(value.shape) < len(shape) and value.shape:
        # [batch, 4] beside [batch, 3, 4]: the batch of one meets a dimension of the other.
        raise Refused("mixes the batch: values of a different number of dimensions are broadcast; unsqueeze first")
    return call.add(Expand(value.shape, shape), value)


@rule(aten.pad, aten.constant_pad_nd)
def pad(call: Call) -> Value:
    value = call.only(0)
    if "mode" in call.names and call["mode"] != "constant":
        return moving(aten.pad)(call)
    amounts = [int(n) for n in call["pad"]]
    pairs = [(0, 0)] * len(value.shape)
    for i, pair in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        if i >= len(pairs):
            if any(pair):
                raise Refused("mixes the batch: it pads dimension 0, the batch")
            continue
        pairs[-1 - i] = pair
    padded = call.add(Pad(value.shape, pairs), value)
    fill = call["value"]
    if not fill:
        return padded
    outside = torch.nn.functional.pad(
        torch.zeros(value.shape, dtype=torch.float64, device="cpu"), amounts, value=float(fill)
    )
    return call.add(Scale(padded.shape, None, lambda: outside), padded)


rule(aten.cat, aten.concat, aten.concatenate)(lambda call: joined(call, call.args[0], call.args[1]))
rule(aten.hstack, aten.column_stack)(lambda call: joined(call, call.args[0], 1))
rule(aten.dstack)(lambda call: joined(call, call.args[0], 2))


@rule(aten.stack)
def stack(call: Call) -> Value:
    dim = _inner(call.args[1], len(call.output))
    pieces: list[Value | LiveTensor] = []
    for piece in call.args[0]:
        shape = (*piece.shape[:dim], 1, *piece.shape[dim:])
        if is_value(piece):
            pieces.append(call.add(Reshape(piece.shape, shape), piece))
        else:
            pieces.append(LiveTensor(partial(_reshaped, piece, shape), shape, piece.dtype))
    return joined(call, pieces, dim + 1)


def _reshaped(read: Source, shape: Shape) -> Tensor:
    return read().reshape(shape)


def _inner(dim: int, rank: int) -> int:
    """A dimension of the call without the batch."""
    dim %= rank + 1
    if dim == 0:
        raise Refused("mixes the batch: dimension 0 is the batch")
    return dim - 1


def joined(call: Call, pieces: list[Any], dim: int) -> Value:
    """Values and constants of each example behind one another; dim counts the batch."""
    place = _inner(dim, len(call.output))
    pieces = [p for p in pieces if len(p.shape) == len(call.output)]  # torch.cat skips empty vectors
    values = [p for p in pieces if is_value(p)]
    if len(values) == 1 == len(pieces):
        return values[0]
    if len(values) == len(pieces):
        return call.add(Concatenate([v.shape for v in values], place), *values)
    # Constants stand where the values have zeros.
    start = 0
    run: list[Value] = []
    for piece in pieces:
        stop = start + piece.shape[place]
        if is_value(piece):
            around = [(start, call.output[place] - stop) if d == place else (0, 0) for d in range(len(call.output))]
            run.append(call.add(Pad(piece.shape, around), piece))
        start = stop
    value = run[0] if len(run) == 1 else call.add(Add(call.output, (1.0,) * len(run)), *run)

    def constant() -> Tensor:
        parts = [p.shape if is_value(p) else p() for p in pieces]
        like = next(p for p in parts if isinstance(p, Tensor))
        return torch.cat([p if isinstance(p, Tensor) else like.new_zeros(p) for p in parts], place)

    return call.add(Scale(call.output, None, constant), value)
