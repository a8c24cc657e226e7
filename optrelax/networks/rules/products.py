"""Sums, means and products with constant tensors: matmul and its kin, einsum."""

from __future__ import annotations

import math
import string
from typing import Any

import torch

from optrelax.networks import activations
from optrelax.networks.calls import PRODUCT, Call, Op, Refused, Value, as_source, is_value
from optrelax.networks.linear_maps import Product, Separable, Sum
from optrelax.networks.live_tensors import LiveTensor
from optrelax.networks.ops import Add, Linear, Reshape, Scale, Shape, Source, wide
from optrelax.networks.products import Multiply
from optrelax.networks.registry import rule
from optrelax.networks.rules.moves import widened
from optrelax.networks.views import Expand, Permute

aten = torch.ops.aten
_BATCH = "mixes the batch: the product sums over dimension 0, or has it elsewhere in its result"


@rule(aten.sum.dim_IntList, aten.sum.default)
def total(call: Call) -> Op:
    call.only(0)
    dims, keepdim = (call["dim"], call["keepdim"]) if "dim" in call.names else (None, False)
    return Sum(call.shape(), call.dims(dims), keepdim)


@rule(aten.mean.dim, aten.mean.default)
def mean(call: Call) -> Op:
    call.only(0)
    dims, keepdim = (call["dim"], call["keepdim"]) if "dim" in call.names else (None, False)
    found, shape = call.dims(dims), call.shape()
    return Sum(shape, found, keepdim, divisor=math.prod(shape[d] for d in found))


@rule(aten.cumsum)
def running_sum(call: Call) -> Op:
    call.only(0)
    (dim,), shape = call.dims(call["dim"]), call.shape()
    return Separable(shape, {dim: torch.ones(shape[dim], shape[dim], dtype=torch.float64, device="cpu").tril()})


@rule(aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot)
def matmul(call: Call) -> Value:
    return multiplied(call, call.args[0], call.args[1])


@rule(aten.inner)
def inner(call: Call) -> Value:
    first, second = call.args[:2]
    if not is_value(first):
        raise Refused(_BATCH)
    read, shape = _constant(second), second.shape
    if len(shape) < 2:
        return multiplied(call, first, second)
    return multiplied(call, first, LiveTensor(lambda: read().mT, (*shape[:-2], shape[-1], shape[-2]), second.dtype))


def _constant(argument: object) -> Source:
    read = as_source(argument)
    if read is None:
        raise Refused("a factor is missing")
    return read


def multiplied(call: Call, first: Any, second: Any) -> Value:
    """The matrix product of a value and a constant, in either order, or of two values."""
    if is_value(first) and is_value(second):
        return _matrix_product(call, first, second)
    right = is_value(first)
    value, constant = (first, second) if right else (second, first)
    read, shape = _constant(constant), constant.shape
    if constant.batched and len(shape) != len(value.shape):
        raise Refused(_BATCH)
    if right and len(shape) == 2 and value.shape:
        return call.add(Linear(value.shape, lambda: read().mT, None), value)
    letters = string.ascii_letters
    lead = value.shape[: -1 if right and len(value.shape) == 1 else -2]
    if not value.shape or (len(value.shape) < 2 and (not right or len(shape) > 2)):
        raise Refused(_BATCH)
    names = letters[3 : 3 + len(lead)]
    inside = value.shape[len(lead) :]
    rows = "ab"[: len(inside)] if right else "bc"  # [a, b] @ [b, c]: b is summed
    if right and len(inside) == 1:
        rows = "b"
    own: Shape = tuple(shape[:-2])
    if len(own) == len(lead) + 1 and own[0] == 1:
        own, shape = own[1:], shape[1:]
    if len(own) > len(lead):
        raise Refused("the constant has more dimensions than the value; expand the value first")
    own_names = names[len(names) - len(own) :]
    widened = [m if n == 1 else n for n, m in zip(lead[len(lead) - len(own) :], own, strict=True)]
    full = (*lead[: len(lead) - len(own)], *widened, *inside)
    if full != value.shape:
        value = call.add(Expand(value.shape, full), value)
    kept = [i for i, n in enumerate(own) if n != 1]
    matrix = ("bc" if right else "ab") if len(shape) > 1 else "b"
    subscripts = "".join(own_names[i] for i in kept) + matrix
    sizes = (*(own[i] for i in kept), *shape[len(own) :])
    out = names + (rows + matrix if right else matrix + rows).replace("b", "")
    return call.add(Product(full, lambda: read().reshape(sizes), names + rows, subscripts, out), value)


def times(call: Call, first: Value, second: Value) -> Value:
    """The product of two values of one shape, entry by entry; of one with itself its square."""
    if first == second:
        return call.add(activations.square(), first)
    return call.add(Multiply(first.shape), first, second)


def _matrix_product(call: Call, first: Value, second: Value) -> Value:
    """[*lead, n, m] @ [*lead, m, p] of two values."""
    if len(call.output) < 1 or len(first.shape) < 2 or len(second.shape) < 2:
        if len(first.shape) == len(second.shape) == 1 and not call.output:
            return pairs(call, first, "a", second, "a", "")
        raise Refused(_BATCH)
    letters = string.ascii_letters[3:]
    lead = letters[: max(len(first.shape), len(second.shape)) - 2]
    own = [lead[len(lead) - len(value.shape) + 2 :] for value in (first, second)]
    return pairs(call, first, own[0] + "ab", second, own[1] + "bc", lead + "ac")


def pairs(call: Call, first: Value, one: str, second: Value, two: str, out: str) -> Value:
    """An einsum of two values: all pairs of entries multiplied, then summed over letters that `out` does not show."""
    gone = [letter for letter in dict.fromkeys(one + two) if letter not in out]
    letters = out + "".join(gone)
    sizes: dict[str, int] = {}
    for names, value in ((one, first), (two, second)):
        for letter, size in zip(names, value.shape, strict=True):
            sizes[letter] = size if sizes.get(letter, 1) == 1 else sizes[letter]
    wide_shape = tuple(sizes[letter] for letter in letters)
    laid = []
    for names, value in ((one, first), (two, second)):
        order = [names.index(letter) for letter in letters if letter in names]
        if order != sorted(order):
            value = call.add(Permute(value.shape, order), value)
        held = iter(value.shape)
        spread = tuple(next(held) if letter in names else 1 for letter in letters)
        if spread != value.shape:
            value = call.add(Reshape(value.shape, spread), value)
        laid.append(value if spread == wide_shape else call.add(Expand(spread, wide_shape), value))
    product = times(call, *laid)
    return call.add(Sum(wide_shape, range(len(out), len(letters))), product) if gone else product


@rule(aten.addmm, aten.addmv, aten.addbmm, aten.baddbmm)
def product_and_sum(call: Call) -> Value:
    if call.target == "addbmm":
        raise Refused(_BATCH)
    added, first, second = call.args[:3]
    product = call.scaled(multiplied(call, first, second), float(call["alpha"]))
    beta = float(call["beta"])
    if is_value(added):
        other = call.scaled(widened(call, added, call.output), beta)
        return call.add(Add(call.output, (1.0, 1.0)), product, other)
    if beta == 0:
        return product
    read = call.elementwise(0)
    return call.add(Scale(call.output, None, read if beta == 1 else lambda: wide(read()) * beta), product)


@rule(aten.tensordot)
def tensordot(call: Call) -> Value:
    """Dimensions of a value paired with dimensions of a constant: an einsum."""
    first, second = call.args[:2]
    if not is_value(first) or is_value(second):
        raise Refused(PRODUCT if is_value(second) and is_value(first) else _BATCH)
    mine, theirs = call.dims(call.args[2]), [d % len(second.shape) for d in call.args[3]]
    if [d - 1 for d in call.args[2]] != list(mine):  # in the order in which the pairs are given
        mine = tuple(d % (len(first.shape) + 1) - 1 for d in call.args[2])
    letters = string.ascii_letters[: len(first.shape)]
    own = list(string.ascii_letters[len(letters) : len(letters) + len(second.shape)])
    for m, t in zip(mine, theirs, strict=True):
        own[t] = letters[m]
    out = [letter for d, letter in enumerate(letters) if d not in mine]
    out += [letter for d, letter in enumerate(own) if d not in theirs]
    return _contracted(call, first, letters, second, "".join(own), "".join(out))


@rule(aten.einsum)
def einsum(call: Call) -> Value:
    equation, operands = str(call.args[0]).replace(" ", ""), call.args[1]
    given, _, out = equation.partition("->")
    inputs = given.split(",")
    if "->" not in equation or "." in equation:
        raise Refused("an einsum without '->', or with '...', has no rule; name every dimension")
    if any(len(set(letters)) != len(letters) for letters in inputs):
        raise Refused("an einsum with a letter twice in one operand has no rule; take the diagonal first")
    places = [i for i, operand in enumerate(operands) if is_value(operand)]
    if len(operands) > 2 or not places:
        raise Refused("an einsum of three operands has no rule; multiply two at a time")
    if len(places) == 2:
        batches = {letters[:1] for letters in (*inputs, out)}
        rest = "".join(letters[1:] for letters in (*inputs, out))
        if len(batches) > 1 or batches & set(rest):
            raise Refused(_BATCH)
        return pairs(call, operands[0], inputs[0][1:], operands[1], inputs[1][1:], out[1:])
    value, letters = operands[places[0]], inputs[places[0]]
    batch, letters = letters[0], letters[1:]
    constant, subscripts = None, ""
    if len(operands) == 2:
        constant, subscripts = operands[1 - places[0]], inputs[1 - places[0]]
        if constant.batched and subscripts[0] == batch:
            subscripts = subscripts[1:]
    if out[:1] != batch or batch in subscripts or batch in out[1:]:
        raise Refused(_BATCH)
    return _contracted(call, value, letters, constant, subscripts, out[1:])


def _contracted(call: Call, value: Value, letters: str, constant: Any, subscripts: str, out: str) -> Value:
    """The contraction in ops whose letters each stand in two places."""
    gone = [d for d, letter in enumerate(letters) if letter not in subscripts + out]
    if gone:
        value = call.add(Sum(value.shape, gone), value)
        letters = "".join(letter for letter in letters if letter in subscripts + out)
    if constant is None:
        return call.add(Permute(value.shape, [letters.index(letter) for letter in out]), value)
    sizes = dict(zip(subscripts, constant.shape, strict=True))
    for letter in subscripts:
        if letter not in letters + out:  # the value is the same along it
            wide_shape = (*value.shape, sizes[letter])
            value = call.add(Reshape(value.shape, (*value.shape, 1)), value)
            value = call.add(Expand(value.shape, wide_shape), value)
            letters += letter
    return call.add(Product(value.shape, _constant(constant), letters, subscripts, out), value)
