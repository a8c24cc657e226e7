"""Rows through the first matrix of a network over the box before it: the last, dearest product of back-substitution.

The range of a row a over W x + b for x in a box is a W center -+ |a W| radius, so the gradient has two products, with W
and with a, of a matrix of signs. In blocks that stay in the cache, the product's ends are taken and its signs kept,
a bit each, instead of its numbers; a product with signs goes by tables (`sign_products.c`), in less than half the time
of a matrix product on the processors where it was measured. Only compiled, on a CPU: `pays` says where.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from optrelax.autograd_contexts import Context
from optrelax.kernels import native
from optrelax.kernels.relax_step import columns

_LEAST = 64  # rows; of fewer the tables are not used often enough, by measurement
_BLOCK = 2**20  # bytes a thread of the product that are in work


_SIGNATURES = (
    "ends(batch, k, n, product[batch * k * n], center[batch * n], radius[batch * n], middle[batch * k], "
    "spread[batch * k], uint8 signs[batch * ((k + 3) // 4) * n], int32 zeros[batch * k])",
    "to_rows(batch, k, n, full, m, uint8 signs[batch * ((k + 3) // 4) * n], weight[full * m], radius[batch * full], "
    "centered[batch * m], to_middle[batch * k], to_spread[batch * k], uint8 index[threads * ((k + 3) // 4) * full], "
    "sums[threads * k], found[batch * k * m])",
    "to_weight(batch, k, n, m, uint8 signs[batch * ((k + 3) // 4) * n], a[batch * k * m], radius[batch * n], "
    "to_spread[batch * k], found[n * m])",
)


@functools.cache
def kernels() -> native.Build:
    """The products compiled for a CPU, or why there are none."""
    return native.build(Path(__file__).with_name("sign_products.c"), *_SIGNATURES)


def pays(k: int, weight: Tensor, center: Tensor, radius: Tensor) -> bool:
    """Whether `ends_through` is the faster way for k rows an example.

    Not for few, nor where the box itself has a gradient, which wants the numbers again.
    """
    if k < _LEAST or center.requires_grad or radius.requires_grad or not kernels().supports(weight, center, radius):
        return False
    return min(weight.shape) >= _tile()[0]


@functools.cache
def _tile() -> tuple[int, int]:
    """Columns of a tile, and what coefficients are filled up to a multiple of."""
    return kernels().constant("WIDTH"), kernels().constant("TABLES")


def _filled(m: int, n: int) -> tuple[int, int]:
    """Columns of a result in whole tiles, and coefficients in whole tables."""
    width, tables = _tile()
    return -(-m // width) * width, -(-n // tables) * tables


def bytes_taken(batch: int, k: int, m: int, n: int, size: int) -> tuple[int, int]:
    """What `ends_through` takes on its way and its gradient on its way, beside rows and theirs: size is a number's."""
    threads, (wide, full) = torch.get_num_threads(), _filled(m, n)
    examples, bits = _examples(batch, k, n, size), -(-k // 4) * n
    there = size * examples * k * n
    back = size * (2 * full * wide + 2 * batch * full + threads * k * _tile()[0]) + threads * k * full // 4
    if not torch.is_grad_enabled():
        return there + bits * examples, 0
    return there + bits * batch, back + bits * batch


def _examples(batch: int, k: int, n: int, size: int) -> int:
    """How many are in work at a time."""
    return max(1, min(batch, _BLOCK * torch.get_num_threads() // (k * n * size)))


def ends_through(a: Tensor, weight: Tensor, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and half width of the range of each row of a W x over a box, [batch, k] each.

    a [batch, k, m], weight W [m, n], center and radius [batch, n].
    Gradient: in rows and weight, exact, to any order; where an entry of a W is 0, the middle of the box.
    """
    found: tuple[Tensor, Tensor] = _SignedEnds.apply(*native.laid_out(a, weight, center, radius))
    return found


class _SignedEnds(torch.autograd.Function):
    """Saves the rows, the weight, the box and a bit for every entry of the product."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, weight: Tensor, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        a, weight, center, radius = (t.contiguous() for t in (a, weight, center, radius))
        (batch, k, m), n = a.shape, weight.shape[1]
        quads = -(-k // 4)
        keep = any(ctx.needs_input_grad)
        size = _examples(batch, k, n, a.element_size())
        block = a.new_empty(size, k, n)
        signs = torch.empty(batch if keep else size, quads, n, dtype=torch.uint8, device="cpu")
        middle, spread = a.new_empty(batch, k), a.new_empty(batch, k)
        zeros = torch.empty(batch, k, dtype=torch.int32, device="cpu")
        places: list[Tensor] = []
        for begin in range(0, batch, size):
            part = slice(begin, min(begin + size, batch))
            count = part.stop - begin
            torch.mm(a[part].view(-1, m), weight, out=block[:count].view(-1, n))
            bits = signs[part] if keep else signs
            ends = middle[part], spread[part]
            kernels().call("ends", a.dtype, count, k, n, block, center[part], radius[part], *ends, bits, zeros[part])
            if keep:
                places += _zeros(block[:count], zeros[part], begin)
        # A bit cannot say 0: a row of zeros has no spread, and a single one is made good behind.
        ctx.save_for_backward(a, weight, center, radius, signs, zeros == n, *places)
        return middle, spread

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, weight, center, radius, signs, bare, *places = ctx.saved_tensors
        need = ctx.needs_input_grad
        to_middle, to_spread = grads
        if torch.is_grad_enabled():  # to be differentiated again
            pulled = a @ weight
            grad = to_middle[..., None] * center[:, None] + to_spread[..., None] * pulled.sign() * radius[:, None]
            to_a = grad @ weight.mT if need[0] else None
            return to_a, a.flatten(0, 1).mT @ grad.flatten(0, 1) if need[1] else None, None, None
        to_middle, to_spread = to_middle.contiguous(), to_spread.masked_fill(bare, 0).contiguous()
        to_a = _to_rows(a, weight, center, radius, signs, to_middle, to_spread) if need[0] else None
        to_weight = None
        if need[1]:
            (batch, k, m), n = a.shape, weight.shape[1]
            found = a.new_empty(n, _filled(m, n)[0])
            kernels().call("to_weight", a.dtype, batch, k, n, m, signs, a, radius, to_spread, found)
            to_weight = columns(a, to_middle).mT @ center
            to_weight += found[:, :m].mT
        for place in places:
            b, row, column = place.unbind(1)
            wrong = (to_spread[b, row] * radius[b, column])[:, None]
            if to_a is not None:
                to_a.index_put_((b, row), -wrong * weight.mT[column], accumulate=True)
            if to_weight is not None:
                to_weight.mT.index_add_(0, column, wrong * a[b, row], alpha=-1)
        return to_a, to_weight, None, None


def _to_rows(
    a: Tensor, weight: Tensor, center: Tensor, radius: Tensor, signs: Tensor, to_middle: Tensor, to_spread: Tensor
) -> Tensor:
    """Gradient in the rows, [batch, k, m]."""
    (batch, k, m), n = a.shape, weight.shape[1]
    wide, full = _filled(m, n)
    turned, filled = a.new_zeros(full, wide), a.new_zeros(batch, full)
    turned[:n, :m] = weight.mT
    filled[:, :n] = radius
    threads = torch.get_num_threads()
    index = torch.empty(threads, -(-k // 4) * 4, full // 4, dtype=torch.uint8, device="cpu")
    sums, found = a.new_empty(threads, k, _tile()[0]), torch.empty_like(a)
    given = (signs, turned, filled, center @ weight.mT, to_middle, to_spread)
    kernels().call("to_rows", a.dtype, batch, k, n, full, m, *given, index, sums, found)
    return found


def _zeros(block: Tensor, zeros: Tensor, begin: int) -> list[Tensor]:
    """Example, row and column of each single 0 in a block of the product, by how many there are in each row."""
    single = (zeros > 0) & (zeros < block.shape[-1])
    if not single.any():
        return []
    b, row = single.nonzero(as_tuple=True)
    each, column = (block[b, row] == 0).nonzero(as_tuple=True)
    return [torch.stack((b[each] + begin, row[each], column), 1)]
