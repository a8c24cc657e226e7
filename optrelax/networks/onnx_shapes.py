"""Rules of ONNX ops that move numbers: reshape, slices, joins, padding, resizing, and what folds away."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.networks.onnx_nodes import Function, OnnxNode, require_small, rule, text_of
from optrelax.networks.onnx_windows import reversed_pads


def _reshaped(node: OnnxNode, shape: Sequence[int]) -> Function:
    """To a shape that keeps the batch first."""
    old = node.value(0).shape
    if node.is_constant:
        return lambda x, *_: x.reshape(tuple(shape))
    if not shape or shape[0] != 1 or old[0] != 1 or math.prod(shape) != math.prod(old):
        raise ValueError(f"takes {list(old)} to {list(shape)}: the batch must stay the first dimension")
    if tuple(shape) == tuple(old):
        return lambda x, *_: x
    if len(shape) == 2:
        return lambda x, *_: x.flatten(1)
    flat, rest = len(old) == 2, tuple(shape[1:])
    return lambda x, *_: (x if flat else x.flatten(1)).unflatten(1, rest)


@rule("Reshape")
def reshape(node: OnnxNode) -> Function:
    old, wanted = node.value(0).shape, node.integers(1)
    if not node.get("allowzero", 0):
        if any(n == 0 and i >= len(old) for i, n in enumerate(wanted)):
            raise ValueError(f"shape {wanted} keeps a dimension that {list(old)} lacks")
        wanted = [old[i] if n == 0 else n for i, n in enumerate(wanted)]
    if sum(n == -1 for n in wanted) > 1 or min(wanted, default=0) < -1:
        raise ValueError(f"shape {wanted} is none")
    known = math.prod(n for n in wanted if n != -1)
    if -1 in wanted and (known == 0 or math.prod(old) % known):
        raise ValueError(f"cannot reshape {list(old)} to {wanted}")
    return _reshaped(node, [math.prod(old) // known if n == -1 else n for n in wanted])


@rule("Flatten")
def flatten(node: OnnxNode) -> Function:
    old, axis = node.value(0).shape, int(node.get("axis", 1))
    axis = axis + len(old) if axis < 0 else axis
    if not 0 <= axis <= len(old):
        raise ValueError(f"axis {axis} is not there in {len(old)} dimensions")
    return _reshaped(node, [math.prod(old[:axis]), math.prod(old[axis:])])


@rule("Squeeze")
def squeeze(node: OnnxNode) -> Function:
    old = node.value(0).shape
    axes = node.axes(1)
    if axes is None:
        axes = [i for i, n in enumerate(old) if n == 1 and (i > 0 or node.is_constant)]
    dropped = {node.axis(a, len(old)) for a in axes}
    if any(old[a] != 1 for a in dropped):
        raise ValueError(f"axes {sorted(dropped)} of {list(old)} are not all 1")
    return _reshaped(node, [n for i, n in enumerate(old) if i not in dropped])


@rule("Unsqueeze")
def unsqueeze(node: OnnxNode) -> Function:
    old, axes = node.value(0).shape, node.axes(1) or []
    rank = len(old) + len(axes)
    added = {node.axis(a, rank) for a in axes}
    if len(added) != len(axes):
        raise ValueError(f"axes {axes} name one twice")
    rest = iter(old)
    return _reshaped(node, [1 if i in added else next(rest) for i in range(rank)])


@rule("Transpose")
def transpose(node: OnnxNode) -> Function:
    rank = len(node.value(0).shape)
    order = [int(p) for p in node.get("perm", range(rank - 1, -1, -1))]
    if sorted(order) != list(range(rank)):
        raise ValueError(f"perm {order} is no order of {rank} dimensions")
    if not node.is_constant and order[0] != 0:
        raise ValueError(f"perm {order} moves the batch dimension, which must stay the first")
    return lambda x: x.permute(order)


@rule("Concat")
def concat(node: OnnxNode) -> Function:
    axis = node.axis(int(node.get("axis", 1)), len(node.value(0).shape))
    batch = [i for i, v in enumerate(node.inputs) if v is not None and v.constant is not None]
    for value in node.inputs:
        if value is not None and value.constant is not None and not node.is_constant and value.shape[:1] != (1,):
            raise ValueError(f"{value.name} {list(value.shape)} differs along the batch dimension")

    def function(*xs: Tensor) -> Tensor:
        parts = list(xs)
        if len(batch) < len(parts):
            size = next(x.shape[0] for i, x in enumerate(parts) if i not in batch)
            for i in batch:
                parts[i] = parts[i].expand(size, *parts[i].shape[1:])
        return torch.cat(parts, axis)

    return function


@rule("Slice")
def slices(node: OnnxNode) -> Function:
    shape = node.value(0).shape
    if "starts" in node.attributes:
        starts, ends = ([int(n) for n in node.attributes[name]] for name in ("starts", "ends"))
        axes = [int(n) for n in node.get("axes", range(len(starts)))]
        steps = [1] * len(starts)
    else:
        starts, ends = node.integers(1), node.integers(2)
        axes = node.integers(3) if node.has(3) else list(range(len(starts)))
        steps = node.integers(4) if node.has(4) else [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise ValueError(f"starts {starts}, ends {ends}, axes {axes} and steps {steps} do not fit")
    index: dict[int, slice] = {}
    turned: dict[int, list[int]] = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = axis + len(shape) if axis < 0 else axis
        if not 0 <= place < len(shape):
            raise ValueError(f"axis {axis} is not there in {len(shape)} dimensions")
        picked = range(*slice(start, end, step).indices(shape[place])) if step > 0 or end >= 0 else None
        if picked is None:  # an end below -n means "to the first", which Python's slices say with None
            last = None if end < -shape[place] else end
            picked = range(*slice(start, last, step).indices(shape[place]))
        if list(picked) == list(range(shape[place])):
            continue
        node.axis(axis, len(shape))
        if not len(picked):
            raise ValueError(f"keeps nothing of axis {axis}")
        if step > 0:
            index[place] = slice(picked[0], picked[-1] + 1, step)
        else:
            turned[place] = list(picked)
    whole = tuple(index.get(i, slice(None)) for i in range(len(shape)))

    def function(x: Tensor, *_: object) -> Tensor:
        x = x[whole] if index else x
        for dim, order in turned.items():
            x = x.index_select(dim, torch.tensor(order, device=x.device))
        return x

    return function


@rule("Gather")
def gather(node: OnnxNode) -> Function:
    shape, axis = node.value(0).shape, int(node.get("axis", 0))
    where = node.constant(1)
    dim = node.axis(axis, len(shape))
    size = shape[dim]
    if where.dtype not in (torch.int32, torch.int64) or (
        where.numel() and not -size <= int(where.min()) <= int(where.max()) < size
    ):
        raise ValueError(f"indices must be integers in [{-size}, {size - 1}]")
    node.consumed.add(1)
    chosen = (where % size).long()
    if where.dim() == 0:
        place = int(chosen)
        return lambda x, _: x.select(dim, place)
    rest = tuple(where.shape)

    def function(x: Tensor, _: object) -> Tensor:
        y = x.index_select(dim, chosen.reshape(-1).to(x.device))
        return y if len(rest) == 1 else y.unflatten(dim, rest)

    return function


@rule("Split")
def split(node: OnnxNode) -> Function:
    shape = node.value(0).shape
    dim = node.axis(int(node.get("axis", 0)), len(shape))
    sizes = node.axes(1, "split")
    if sizes is None:
        count = int(node.get("num_outputs", node.outputs))
        each = -(-shape[dim] // max(1, count))
        sizes = [each] * (count - 1) + [shape[dim] - each * (count - 1)]
    if sum(sizes) != shape[dim] or min(sizes) < 0 or len(sizes) != node.outputs:
        raise ValueError(f"sizes {sizes} do not part {shape[dim]} into {node.outputs}")
    return lambda x, *_: torch.split(x, sizes, dim)


@rule("Pad")
def pad(node: OnnxNode) -> Function:
    rank = len(node.value(0).shape)
    mode = text_of(node.get("mode", "constant"))
    if mode != "constant":
        raise ValueError(f"mode {mode!r} has no rule; constant has")
    pads = [int(p) for p in node.attributes["pads"]] if "pads" in node.attributes else node.integers(1)
    fill = float(node.get("value", 0.0))
    if node.has(2):
        fill = float((node.numbers(2) or [0.0])[0])
    if node.has(3):
        axes = [a + rank if a < 0 else a for a in node.integers(3)]
        if len(pads) != 2 * len(axes) or not all(0 <= a < rank for a in axes):
            raise ValueError(f"axes {axes} do not fit pads {pads}")
        given = dict(zip(axes, zip(pads[: len(axes)], pads[len(axes) :], strict=True), strict=True))
        pads = [given.get(i, (0, 0))[side] for side in (0, 1) for i in range(rank)]
    if len(pads) != 2 * rank:
        raise ValueError(f"pads must be {2 * rank} numbers, got {pads}")
    begin, end = pads[:rank], pads[rank:]
    if rank and (begin[0] or end[0]) and not node.is_constant:
        raise ValueError("pads the batch dimension")
    if not math.isfinite(fill):
        raise ValueError(f"pads with {fill}")
    sides = reversed_pads(begin[1:], end[1:]) if not node.is_constant else reversed_pads(begin, end)
    while sides[-2:] == [0, 0]:
        sides = sides[:-2]
    if not sides:
        return lambda x, *_: x
    return lambda x, *_: F.pad(x, sides, value=fill)


@rule("Expand")
def expand(node: OnnxNode) -> Function:
    shape = torch.broadcast_shapes(node.value(0).shape, tuple(node.integers(1)))
    require_small(shape)
    if node.is_constant:
        return lambda x, _: x.expand(shape)
    if len(shape) != len(node.value(0).shape) or shape[0] != 1:
        raise ValueError(f"expands {list(node.value(0).shape)} to {list(shape)}, across the batch dimension")
    return lambda x, _: x.expand(-1, *shape[1:])


@rule("Tile")
def tile(node: OnnxNode) -> Function:
    times = node.integers(1)
    if not node.is_constant and (not times or times[0] != 1):
        raise ValueError(f"repeats {times}: the batch dimension must stay as it is")
    return lambda x, _: x.repeat(times)


@rule("Cast")
def cast(node: OnnxNode) -> Function:
    import onnx

    names = {"FLOAT": torch.float32, "DOUBLE": torch.float64, "INT64": torch.int64, "INT32": torch.int32}
    name = onnx.TensorProto.DataType.Name(int(node.get("to", 0)))
    if name not in names or not (node.is_constant or names[name] == node.value(0).dtype):
        raise ValueError(f"to {name} has no rule")
    return lambda x: x.to(names[name])


@rule("Shape")
def shape(node: OnnxNode) -> Function:
    start, end = node.get("start", 0), node.get("end", None)
    found = list(node.value(0).shape)[start:end]
    node.consumed.add(0)
    return lambda *_: torch.tensor(found, dtype=torch.int64, device="cpu")


@rule("ConstantOfShape")
def constant_of_shape(node: OnnxNode) -> Function:
    size = node.integers(0)
    require_small(size)
    value = node.get("value", None)
    fill = torch.zeros(1, device="cpu") if value is None else value
    return lambda _: fill.reshape(()).expand(size).clone()


@rule("Range")
def numbers_between(node: OnnxNode) -> Function:
    (start,), (limit,), (step,) = (node.numbers(i) for i in range(3))
    if step == 0 or not math.isfinite(step):
        raise ValueError(f"step {step}")
    require_small([max(0, math.ceil((limit - start) / step))])
    dtype = node.value(0).dtype
    return lambda *_: torch.arange(start, limit, step, dtype=dtype, device="cpu")


@rule("DepthToSpace", "SpaceToDepth")
def depth_and_space(node: OnnxNode) -> Function:
    block, mode = int(node.get("blocksize", 0)), text_of(node.get("mode", "DCR"))
    if node.op == "DepthToSpace" and mode == "CRD":
        return lambda x: F.pixel_shuffle(x, block)
    _, c, h, w = node.value(0).shape
    if node.op == "DepthToSpace":
        c = c // block**2
        split, order, merged = (block, block, c, h, w), (0, 3, 4, 1, 5, 2), (c, h * block, w * block)
    else:
        h, w = h // block, w // block
        split, order, merged = (c, h, block, w, block), (0, 3, 5, 1, 2, 4), (c * block**2, h, w)
    return lambda x: x.reshape(-1, *split).permute(order).reshape(-1, *merged)
