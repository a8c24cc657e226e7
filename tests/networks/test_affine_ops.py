"""Every affine op is one matrix: image, absolute image, transpose, bias and counts against it written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optrelax.kernels.convolutions import ConvGeometry
from optrelax.networks.batch_norms import BatchNorm
from optrelax.networks.convolutions import Convolution, TransposedConvolution
from optrelax.networks.images import AveragePool2d, Conv2d
from optrelax.networks.linear_maps import Product, Separable, Slope, Sum, axis_matrix
from optrelax.networks.ops import Add, Affine, Linear, Reshape, Scale
from optrelax.networks.views import Concatenate, Expand, Gather, Pad, Permute


def weight(*shape: int) -> Tensor:
    """A parameter of both signs, with zeros in it."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return nn.Parameter(w * (w.abs() > 0.2))


def numbers(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(shape)


@dataclass(frozen=True)
class Case:
    """An op of parameters, and the function that PyTorch has for it (of all inputs behind one another), if any."""

    name: str
    build: Callable[..., Affine]
    parameters: tuple[tuple[int, ...], ...] = ()
    reference: Callable[..., Tensor] | None = None

    def __str__(self) -> str:
        return self.name

    def op(self, dtype: torch.dtype = torch.float64) -> tuple[Affine, list[Tensor]]:
        given = [nn.Parameter(weight(*shape).detach().to(dtype)) for shape in self.parameters]
        return self.build(*((lambda p=p: p) for p in given)), given


def bilinear(n: int, out: int) -> Tensor:
    return axis_matrix(lambda x: F.interpolate(x, size=out, mode="linear", align_corners=False), n)


CASES = [
    Case("linear", lambda w, b: Linear((2, 4), w, b), ((3, 4), (3,)), F.linear),
    Case("conv2d", lambda w, b: Conv2d((2, 4, 5), w, b, ConvGeometry((2, 1), (1, 0))), ((3, 2, 3, 2), (3,)),
         lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 0))),
    Case("scale", lambda s, t: Scale((2, 3), s, t), ((2, 1), (3,)), lambda x, s, t: x * s + t),
    Case("batch norm", lambda m, w, b: BatchNorm((3, 2), 1e-5, m, lambda: torch.tensor([0.5, 1.0, 2.0]), w, b),
         ((3,), (3,), (3,)),
         lambda x, m, w, b: F.batch_norm(x, m.detach(), torch.tensor([0.5, 1.0, 2.0], dtype=x.dtype), w, b)),
    Case("average pool", lambda: AveragePool2d((2, 5, 4), (3, 2), ConvGeometry((2, 1), (1, 1))), (),
         lambda x: F.avg_pool2d(x, (3, 2), (2, 1), (1, 1), count_include_pad=False)),
    Case("average pool by a negative number", lambda: AveragePool2d((2, 4, 4), (2, 2), ConvGeometry((2, 2)), -3.0), (),
         lambda x: F.avg_pool2d(x, 2, divisor_override=-3)),
    Case("reshape", lambda: Reshape((2, 3), (6,)), (), lambda x: x.flatten(1)),
    Case("add", lambda: Add((2, 3), (1.0, -1.0, 1.0))),
    Case("permute", lambda: Permute((2, 3, 4), (1, 2, 0)), (), lambda x: x.permute(0, 2, 3, 1)),
    Case("pad", lambda: Pad((2, 3), [(1, 0), (2, 1)]), (), lambda x: F.pad(x, (2, 1, 1, 0))),
    Case("slice", lambda: Pad.slicing((4, 3), 0, 1, 3), (), lambda x: x[:, 1:3]),
    Case("slice and pad", lambda: Pad((4, 3), [(-1, 2), (1, -2)]), (), lambda x: F.pad(x, (1, -2, -1, 2))),
    Case("slice of nothing", lambda: Pad.slicing((4, 3), 1, 2, 2), (), lambda x: x[:, :, 2:2]),
    Case("concatenate", lambda: Concatenate([(2, 3), (2, 1), (2, 3)], -1)),
    Case("expand", lambda: Expand((2, 1), (3, 2, 4)), (), lambda x: x[:, None].expand(-1, 3, 2, 4)),
    Case("expand of a number", lambda: Expand((), (3,)), (), lambda x: x[:, None].expand(-1, 3)),
    Case("expand to itself", lambda: Expand((2, 3), (2, 3)), (), lambda x: x),
    Case("gather", lambda: Gather((2, 3), torch.tensor([[5, -1], [0, 0], [5, 3]])), (),
         lambda x: F.pad(x.flatten(1), (0, 1))[:, [[5, -1], [0, 0], [5, 3]]]),
    Case("flip", lambda: Gather((2, 3), numbers(2, 3).flip(1)), (), lambda x: x.flip(2)),
    Case("reflect", lambda: Gather((2, 4), numbers(2, 4)[:, [2, 1, 0, 1, 2, 3, 2]]), (),
         lambda x: F.pad(x, (2, 1), mode="reflect")),
    Case("sum", lambda: Sum((2, 3, 4), (0, -1))),
    Case("mean", lambda: Sum((2, 3), (1,), keepdim=True, divisor=3), (), lambda x: x.mean(2, keepdim=True)),
    Case("sum over a negative number", lambda: Sum((4,), (0,), divisor=-2)),
    Case("sum over nothing", lambda: Sum((2, 3), ()), (), lambda x: x),
    Case("rows times matrix", lambda w: Product((2, 3), w, "ij", "jk", "ik"), ((3, 4),), torch.matmul),
    Case("matrix times columns", lambda w: Product((2, 3), w, "jk", "ij", "ik"), ((4, 2),), lambda x, w: w @ x),
    Case("batched product", lambda w: Product((2, 3, 4), w, "bij", "bjk", "bik"), ((2, 4, 2),), torch.matmul),
    Case("outer product", lambda w: Product((2,), w, "i", "j", "ij"), ((3,),), lambda x, w: x[:, :, None] * w),
    Case("separable", lambda: Separable((2, 4, 3), {1: bilinear(4, 6), 2: bilinear(3, 2)}), (),
         lambda x: F.interpolate(x, size=(6, 2), mode="bilinear", align_corners=False)),
    Case("slope", lambda a: Slope((3, 2), a), ((3,),), lambda x, a: x * a[:, None]),
    Case("rest of a slope", lambda a: Slope((3, 2), a, rest=True), ((1,),), lambda x, a: x * (1 - a)),
    Case("separable in three", lambda: Separable((3, 2, 2), {0: -bilinear(3, 4), 1: bilinear(2, 3)})),
    Case("conv1d", lambda w, b: Convolution((2, 7), w, b, ConvGeometry((2,), (1,), (1,), 2)), ((4, 1, 3), (4,)),
         lambda x, w, b: F.conv1d(x, w, b, 2, 1, 1, 2)),
    Case("conv3d", lambda w: Convolution((2, 3, 4, 3), w, None, ConvGeometry((1, 2, 1), (1, 0, 0), (1, 1, 2))),
         ((1, 2, 2, 3, 2),), lambda x, w: F.conv3d(x, w, None, (1, 2, 1), (1, 0, 0), (1, 1, 2))),
    Case("transposed conv1d", lambda w, b: TransposedConvolution((2, 3), w, b, ConvGeometry((2,), (1,), (1,)), (1,)),
         ((2, 3, 3), (3,)), lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1, 1)),
    Case("transposed conv2d",
         lambda w, b: TransposedConvolution((4, 2, 3), w, b, ConvGeometry((2, 1), (0, 1), (1, 2), 2), (1, 0)),
         ((4, 1, 2, 3), (2,)), lambda x, w, b: F.conv_transpose2d(x, w, b, (2, 1), (0, 1), (1, 0), 2, (1, 2))),
    Case("transposed conv whose extra rows exceed its stride",
         lambda w: TransposedConvolution((1, 3), w, None, ConvGeometry((1,), (1,), (3,)), (2,)),
         ((1, 2, 2),), lambda x, w: F.conv_transpose1d(x, w, None, 1, 1, 2, 1, 3)),
    Case("transposed conv3d",
         lambda w: TransposedConvolution(
             (1, 2, 1, 2), w, None, ConvGeometry((1, 2, 2), (0, 0, 1), (1, 1, 1)), (0, 1, 0)),
         ((1, 2, 2, 1, 3),), lambda x, w: F.conv_transpose3d(x, w, None, (1, 2, 2), (0, 0, 1), (0, 1, 0))),
]  # fmt: skip
each = pytest.mark.parametrize("case", CASES, ids=str)


def split(op: Affine, flat: Tensor) -> list[Tensor]:
    """[*lead, all entries of all inputs] -> one [*lead, *input_shape] an input."""
    sizes = [math.prod(shape) for shape in op.input_shapes]
    parts = flat.split(sizes, -1)
    return [p.reshape((*flat.shape[:-1], *s)) for p, s in zip(parts, op.input_shapes, strict=True)]


@torch.no_grad()
def dense(op: Affine, dtype: torch.dtype = torch.float64) -> Tensor:
    """The op's matrix [outputs, all inputs]."""
    n = sum(math.prod(shape) for shape in op.input_shapes)
    return op.linear(*split(op, torch.eye(n, dtype=dtype))).reshape(n, math.prod(op.shape)).mT


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lead", [(), (2,), (3, 1), (0,)], ids=str)
@each
def test_image_absolute_image_and_transpose_are_one_matrix(case, lead, dtype):
    op, _ = case.op(dtype)
    matrix = dense(op, dtype)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    x, a = draw(*lead, matrix.shape[1], dtype=dtype), draw(*lead, *op.shape, dtype=dtype)
    flat_a = a.reshape(*lead, matrix.shape[0])
    image = op.linear(*split(op, x)).detach()
    assert image.shape == (*lead, *op.shape)
    assert image.dtype == dtype
    torch.testing.assert_close(image.reshape(flat_a.shape), x @ matrix.mT, **close)
    absolute = op.apply_abs(*split(op, x.abs()))
    torch.testing.assert_close(absolute.reshape(flat_a.shape), x.abs() @ matrix.abs().mT, **close)
    pulled = op.transpose(a)
    for part, wanted in zip(pulled, split(op, flat_a @ matrix), strict=True):
        assert part.shape == wanted.shape
        torch.testing.assert_close(part, wanted, **close)
    bias = op.bias(x)
    shifted = image if bias is None else image + bias.expand(op.shape)
    torch.testing.assert_close(op.apply(*split(op, x)), shifted, **close)
    if bias is not None:
        assert bias.dtype == dtype
        assert (op.bias_size(x) >= bias.abs() * (1 - 1e-5)).all()


@each
def test_counts_hold_every_product(case):
    """What rounding allowances multiply: never fewer than the entries of a row or a column."""
    op, _ = case.op()
    used = dense(op) != 0
    rows, columns = used.sum(1), used.sum(0)
    assert rows.numel() == 0 or op.fan_in * len(op.input_shapes) >= int(rows.max())
    assert columns.numel() == 0 or op.fan_out >= int(columns.max())
    one_each = (rows.numel() == 0 or int(rows.max()) <= 1) and (columns.numel() == 0 or int(columns.max()) <= 1)
    if op.diagonal:
        assert one_each
    if op.cost() == 0:  # no allowance: neither direction may round
        moved = dense(op)
        assert one_each
        assert bool(((moved == 0) | (moved == 1)).all())


@pytest.mark.parametrize("case", [c for c in CASES if c.reference], ids=str)
def test_the_op_is_the_function_of_pytorch(case):
    op, parameters = case.op()
    x = draw(3, *op.input_shapes[0])
    torch.testing.assert_close(op.apply(x), case.reference(x, *parameters), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if c.parameters], ids=str)
def test_gradients_reach_parameters_and_values_through_either_direction(case):
    op, parameters = case.op()
    xs = [draw(2, *shape).requires_grad_() for shape in op.input_shapes]
    rows = draw(2, *op.shape).requires_grad_()

    def image(*given: Tensor) -> Tensor:
        return op.apply(*given[: len(xs)])

    def absolute(*given: Tensor) -> Tensor:
        return op.apply_abs(*(g.square() for g in given[: len(xs)]))

    def back(*given: Tensor) -> tuple[Tensor, ...]:
        return op.transpose(given[0])

    given = [p for p in parameters if p is not None]
    for p in given:
        with torch.no_grad():
            p[p == 0] = 0.5  # |w| has no gradient to compare at 0
    assert torch.autograd.gradcheck(image, (*xs, *given), fast_mode=True)
    assert torch.autograd.gradcheck(absolute, (*xs, *given), fast_mode=True)
    assert torch.autograd.gradcheck(back, (rows, *given), fast_mode=True)


@each
def test_rows_that_all_examples_share_go_with_rows_of_each(case):
    """Zonotopes mix generators [1, e] and [batch, e] of different inputs."""
    op, _ = case.op()
    leads = [(1, 2) if i % 2 else (3, 2) for i in range(len(op.input_shapes))]
    xs = [draw(*lead, *shape) for lead, shape in zip(leads, op.input_shapes, strict=True)]
    wide = [x.expand(3, *x.shape[1:]) for x in xs]
    torch.testing.assert_close(op.linear(*xs), op.linear(*wide))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Permute((2, 3), (0, 0)), "permute 2 dimensions"),
        (lambda: Pad((2, 3), [(0, 0)]), "1 pairs"),
        (lambda: Pad((2,), [(-1, -2)]), "cut"),
        (lambda: Concatenate([(2, 3), (3, 3)], 1), r"concatenate \(2, 3\) and \(3, 3\)"),
        (lambda: Expand((2,), (3,)), "broadcastable|expand"),
        (lambda: Gather((2,), torch.tensor([2])), "index outside"),
        (lambda: Sum((2,), (1,)), "dimension 1"),
        (lambda: Product((2,), lambda: torch.ones(3), "i", "i", ""), "2 in the value and 3"),
        (lambda: Product((2,), lambda: torch.ones(3), "i", "j", "i"), "in two of them"),
        (lambda: Separable((2,), {0: torch.ones(2, 3)}), "matrix"),
        (
            lambda: Convolution((1, 2), lambda: torch.ones(1, 1, 3), None, ConvGeometry((1,), (0,), (1,))),
            "does not fit",
        ),
        (lambda: Convolution((1, 4, 4), lambda: torch.ones(1, 1, 3), None, ConvGeometry((1,), (0,), (1,))), "spatial"),
        (
            lambda: TransposedConvolution(
                (2, 4), lambda: torch.ones(1, 1, 3), None, ConvGeometry((1,), (0,), (1,)), (0,)
            ),
            "channels",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        build()


def test_a_separable_map_may_not_lift_what_underflows_over_its_allowance():
    steep = torch.full((2, 2), 1e4, dtype=torch.float64)
    Separable((3, 2), {1: steep})
    for matrices in ({0: steep, 1: steep}, {1: torch.full((2, 2), torch.nan, dtype=torch.float64)}):
        with pytest.raises(ValueError, match="sums of absolute coefficients may be 1048576 at most"):
            Separable((2, 2), matrices)
