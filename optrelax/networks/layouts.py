"""Values whose batch stands elsewhere than in front, or is folded with a dimension: the same with it in front, alone.

`qkv.permute(2, 0, 3, 1, 4)`, steps in front, windows of an image as a batch of their own: each example still has its
own numbers. Of such a value `front` holds [batch, (n,) *rest], the batch at `place` of the value's own dimensions, n
behind it where the two are one dimension there. Calls are made again on `front`, until the batch is back in front; what
is not known here stays as it is, and is refused.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from optrelax.networks.exported_nodes import SHAPES_ONLY, SIZES, arguments_by_name, is_batch, size_at, tensor_of

aten = torch.ops.aten
_FAILURES = (ValueError, NotImplementedError, RuntimeError, TypeError, IndexError, KeyError, AttributeError)
_PERMUTING = {aten.permute, aten.transpose, aten.movedim, aten.swapaxes, aten.swapdims, aten.moveaxis}
_PERMUTING |= {aten.t, aten.mT, aten.numpy_T}
_VIEWS = {aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze}
_ALIKE = {
    aten.clone,
    aten.contiguous,
    aten.to,
    aten._to_copy,
    aten.detach,
    aten.alias,
    aten.dropout,
    aten.lift_fresh_copy,
}
_ALONG = {aten.select, aten.slice, aten.narrow, aten.unbind, aten.chunk, aten.split, aten.split_with_sizes, aten.flip}
_ALONG |= {
    aten.sum,
    aten.mean,
    aten.amax,
    aten.amin,
    aten.max,
    aten.min,
    aten.softmax,
    aten.log_softmax,
    aten.logsumexp,
}
_LOSING = {aten.select, aten.unbind, aten.sum, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.logsumexp}
_PRODUCTS = {aten.matmul, aten.bmm, aten.mm}


@dataclass(frozen=True, slots=True)
class BatchPlace:
    """Where the batch of a value stands."""

    front: fx.Node
    place: int
    folded: bool

    @property
    def rank(self) -> int:
        """Of the value itself."""
        return int(self.front.meta["val"].dim()) - self.folded

    @property
    def plain(self) -> bool:
        """Whether `front` is the value."""
        return self.place == 0 and not self.folded

    def dim(self, d: int) -> int:
        """A dimension of the value as one of `front`; KeyError where it is the batch's."""
        d = operator.index(d) % self.rank
        if d == self.place:
            raise KeyError(d)
        return d + self.folded + (d < self.place)


def batch_in_front(graph: fx.Graph, given: fx.Node) -> None:
    """Read with the batch in front what calls make of values that have it elsewhere."""
    _Places(graph, given).run()


def _tensors(node: fx.Node) -> list[Tensor]:
    """The example values of a call, of one or several outputs."""
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)]


class _Places:
    """The layouts of the values of one graph, from its input on."""

    def __init__(self, graph: fx.Graph, given: fx.Node) -> None:
        self.graph, self.given = graph, given
        self.batch = given.meta["val"].shape[0]
        self.known: dict[fx.Node, BatchPlace] = {given: BatchPlace(given, 0, False)}
        self.here = given

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op != "call_function" or node.target in SHAPES_ONLY | SIZES:
                continue
            read = [n for n in node.all_input_nodes if n in self.known]
            if not read:
                continue
            self.here = node
            if self._in_front(node) and all(self.known[n].plain for n in read):
                self.known[node] = BatchPlace(node, 0, False)
                continue
            with contextlib.suppress(*_FAILURES):
                found = self._layout(node)
                self._require(found, node)
                self.known[node] = found
                if found.plain:
                    node.replace_all_uses_with(found.front)
                    self.known[found.front] = found

    def _require(self, found: BatchPlace, node: fx.Node) -> None:
        """The value that a layout describes has the shape of the call's."""
        for front, value in zip(_tensors(found.front), _tensors(node), strict=True):
            rest, sizes = list(front.shape[1 + found.folded :]), list(value.shape)
            n = self._times(sizes.pop(found.place))
            if sizes != rest or n != (front.shape[1] if found.folded else 1):
                raise ValueError(f"{node} has another shape than its layout says")

    def _in_front(self, node: fx.Node) -> bool:
        return all(v.dim() > 0 and is_batch(v.shape[0], self.batch) for v in _tensors(node))

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call in front of the one that is looked at, with the value it has."""
        with self.graph.inserting_before(self.here):
            found = self.graph.call_function(target, args, kwargs)
        found.meta = dict(self.here.meta)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        found.meta["val"] = target(*values[0], **values[1])
        return found

    # --- calls ----------------------------------------------------------------------------------------------------

    def _layout(self, node: fx.Node) -> BatchPlace:
        """The layout of a call's value; one of _FAILURES where it is not known."""
        if node.target is operator.getitem:
            of = self.known[node.args[0]]  # type: ignore[index]
            return replace(of, front=self._emit(operator.getitem, of.front, node.args[1]))
        packet = node.target.overloadpacket  # type: ignore[union-attr]
        if packet is aten.stack:
            return self._stacked(node)
        if packet in _PRODUCTS:
            return self._product(node)
        if packet not in _ALIKE and torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
            return self._pointwise(node)
        first, *rest = node.args
        of = self.known[first]  # type: ignore[index]
        if any(isinstance(a, fx.Node) and a in self.known for a in rest):
            raise KeyError(node)
        if packet in _PERMUTING:
            return self._permuted(node, of)
        if packet in _VIEWS:
            return self._viewed(node, of)
        if packet in _ALONG:
            return self._along(node, of)
        last = {aten.linear: 1, aten.layer_norm: len(rest[0]) if packet is aten.layer_norm else 0}  # type: ignore[arg-type]
        if packet not in _ALIKE and not of.place < of.rank - last[packet]:
            raise KeyError(node)
        return replace(of, front=self._emit(node.target, of.front, *rest, **node.kwargs))

    def _pointwise(self, node: fx.Node) -> BatchPlace:
        values = [self.known[a] for a in node.args if isinstance(a, fx.Node) and a in self.known]
        of = values[0]
        if any((v.place, v.folded, v.rank) != (of.place, of.folded, of.rank) for v in values):
            raise KeyError(node)
        args = [self._beside(of, a) for a in node.args]
        return replace(of, front=self._emit(node.target, *args, **node.kwargs))

    def _beside(self, of: BatchPlace, argument: Any) -> Any:
        """An argument of an elementwise call on values as it meets their fronts."""
        if not isinstance(argument, fx.Node):
            return argument
        if argument in self.known:
            return self.known[argument].front
        value = tensor_of(argument)
        if value is None or value.dim() <= of.rank - of.place - 1:
            return argument
        at = value.dim() - of.rank + of.place
        if value.shape[at] != 1:
            raise KeyError(argument)
        found = self._emit(aten.squeeze.dim, argument, at)
        missing = of.rank - value.dim()
        shape = (1,) * (1 + of.folded + missing) + tuple(found.meta["val"].shape)
        return self._emit(aten.view.default, found, shape)

    def _product(self, node: fx.Node) -> BatchPlace:
        a, b = node.args
        left, right = (self.known.get(n) for n in (a, b))  # type: ignore[arg-type]
        if left is not None and right is not None:
            same = (left.place, left.folded, left.rank) == (right.place, right.folded, right.rank)
            if not same or left.place >= left.rank - 2:
                raise KeyError(node)
            return replace(left, front=self._emit(aten.matmul.default, left.front, right.front))
        if left is not None and b.meta["val"].dim() <= 2 and left.place < left.rank - 1:  # type: ignore[union-attr]
            return replace(left, front=self._emit(aten.matmul.default, left.front, b))
        if right is not None and right.rank == 2 and right.place == 1 and a.meta["val"].dim() == 2:  # type: ignore[union-attr]
            return replace(right, front=self._emit(aten.linear.default, right.front, a))
        raise KeyError(node)

    def _stacked(self, node: fx.Node) -> BatchPlace:
        pieces: Any = node.args[0]
        values, dim = [self.known[n] for n in pieces], (*node.args[1:], 0)[0]
        if dim != 0 or not all(v.plain for v in values):
            raise KeyError(node)
        return BatchPlace(self._emit(aten.stack.default, [v.front for v in values], 1), 1, False)

    def _permuted(self, node: fx.Node, of: BatchPlace) -> BatchPlace:
        sizes = torch.empty(*range(2, 2 + of.rank), device="meta")
        order = [n - 2 for n in node.target(sizes, *node.args[1:], **node.kwargs).shape]  # type: ignore[operator]
        rest = [of.dim(d) for d in order if d != of.place]
        kept = [0, 1] if of.folded else [0]
        front = of.front
        if rest != sorted(rest):
            front = self._emit(aten.permute.default, front, [*kept, *rest])
        return BatchPlace(front, order.index(of.place), of.folded)

    def _along(self, node: fx.Node, of: BatchPlace) -> BatchPlace:
        given = arguments_by_name(node)
        name = "dims" if "dims" in given else "dim"
        dims: Any = given[name]
        many = isinstance(dims, Sequence)
        found = [of.dim(d) for d in dims] if many else [of.dim(dims)]
        given[name] = found if many else found[0]
        del given["self"]
        front = self._emit(node.target, of.front, **given)
        lost = node.target.overloadpacket in _LOSING and not given.get("keepdim", False)  # type: ignore[union-attr]
        before = sum(operator.index(d) % of.rank < of.place for d in (dims if many else [dims])) if lost else 0
        return replace(of, front=front, place=of.place - before)

    # --- views ----------------------------------------------------------------------------------------------------

    def _viewed(self, node: fx.Node, of: BatchPlace) -> BatchPlace:
        """Dimensions before the batch's stay apart from it; it takes those behind it in, or gives them back."""
        sizes, wanted = tuple(node.args[0].meta["val"].shape), tuple(node.meta["val"].shape)  # type: ignore[union-attr]
        place = next(i for i, n in enumerate(wanted) if self._times(n) is not None)
        n = self._times(wanted[place])
        before, after = sizes[: of.place], sizes[of.place + 1 :]
        new_before, new_after = wanted[:place], wanted[place + 1 :]
        if n is None or math.prod(before) != math.prod(new_before):
            raise KeyError(node)
        # [batch, (n,) before, after] to [batch, (n,) after, before], so that what follows the batch does so in memory.
        front = self._exchanged(of.front, 1 + of.folded, len(before), len(after))
        folded = [] if n == 1 else [n]
        front = self._emit(aten.reshape.default, front, [-1, *folded, *new_after, *new_before])
        front = self._exchanged(front, 1 + len(folded), len(new_after), len(new_before))
        return BatchPlace(front, place, n > 1)

    def _exchanged(self, value: fx.Node, start: int, first: int, second: int) -> fx.Node:
        """A value with the next `first` dimensions after `start` behind the `second` that follow them."""
        if not first or not second:
            return value
        middle, end = start + first, start + first + second
        return self._emit(aten.permute.default, value, [*range(start), *range(middle, end), *range(start, middle)])

    def _times(self, size: Any) -> int | None:
        """n, where a size is n times the batch's."""
        if isinstance(size, int) and not is_batch(size, self.batch):
            return None
        n = size_at(size, self.batch, 1)
        return n if size_at(size, self.batch, 7) == 7 * n else None
