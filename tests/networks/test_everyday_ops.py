"""Every affine and piecewise-linear op of everyday networks: captured as the function it is, and bounded soundly."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optrelax as ox
from optrelax.networks.maxima import Greatest
from tests.cases import random_points

Shape = tuple[int, ...]


class Function(nn.Module):
    """A function of the module and its input; parameters of both signs to take part in it."""

    def __init__(self, function: Callable[[Function, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        g = torch.Generator().manual_seed(1)
        self.w, self.b, self.k = (nn.Parameter(torch.randn(s, generator=g)) for s in ((4, 3), (3,), (4,)))
        self.register_buffer("mean", torch.randn(4, generator=g))
        self.register_buffer("variance", torch.rand(4, generator=g) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Shape]] = {
    "cat": (lambda s, x: torch.cat([x, -x, x[:, :1]], 1), (4,)),
    "cat of a constant": (lambda s, x: torch.cat([s.k.expand(x.shape[0], 4), x, x.new_ones(x.shape[0], 1)], 1), (4,)),
    "stack": (lambda s, x: torch.stack([x, 2 * x], 2), (4,)),
    "stack in front": (lambda s, x: torch.stack([x, 2 * x], dim=1), (2, 2)),
    "hstack": (lambda s, x: torch.hstack([x, x + 1]), (4,)),
    "split": (lambda s, x: x.split([1, 3], 1)[1], (4,)),
    "all parts of a split": (lambda s, x: torch.cat([p * i for i, p in enumerate(x.split(3, 1))], 1), (4,)),
    "chunk": (lambda s, x: x.chunk(2, -1)[0], (2, 4)),
    "unbind": (lambda s, x: x.unbind(1)[1], (2, 2)),
    "unbind to numbers": (lambda s, x: x.unbind(1)[3], (4,)),
    "slice": (lambda s, x: x[:, 1:-1], (4,)),
    "slice with a step": (lambda s, x: x[:, ::2], (5,)),
    "x[:, 0]": (lambda s, x: x[:, 0], (4,)),
    "x[..., -1]": (lambda s, x: x[..., -1], (2, 3)),
    "x[:, [0, 2, 0]]": (lambda s, x: x[:, [0, 2, 0]], (4,)),
    "x[:, [0, 1], [1, 2]]": (lambda s, x: x[:, [0, 1], [1, 2]], (4, 4)),
    "x[:, None]": (lambda s, x: x[:, None], (4,)),
    "index_select": (lambda s, x: x.index_select(1, torch.tensor([3, 1])), (4,)),
    "gather": (lambda s, x: x.gather(1, torch.tensor([[3, 1, 3]]).expand(len(x), 3)), (4,)),
    "take_along_dim": (lambda s, x: torch.take_along_dim(x, torch.tensor([[[1], [0]]]), -1) - x, (2, 2)),
    "narrow": (lambda s, x: x.narrow(1, 1, 2), (4,)),
    "permute": (lambda s, x: x.permute(0, 3, 1, 2), (2, 3, 4)),
    "permute of equal sizes": (lambda s, x: x.permute(0, 2, 3, 1), (2, 2, 2)),
    "transpose": (lambda s, x: x.transpose(1, 2), (2, 3)),
    "mT": (lambda s, x: x.mT, (2, 3)),
    "movedim": (lambda s, x: x.movedim(1, 3), (2, 3, 4)),
    "flatten and unflatten": (lambda s, x: x.flatten(1).unflatten(1, (3, 2)), (2, 3)),
    "squeeze and unsqueeze": (lambda s, x: x.squeeze(1).unsqueeze(-1), (1, 3)),
    "flip": (lambda s, x: x.flip(1), (4,)),
    "roll": (lambda s, x: x.roll(1, 2), (2, 3)),
    "diagonal": (lambda s, x: x.diagonal(dim1=1, dim2=2), (3, 3)),
    "triangle": (lambda s, x: x.tril(), (3, 3)),
    "expand": (lambda s, x: x[:, None].expand(-1, 2, -1), (4,)),
    "repeat": (lambda s, x: x.repeat(1, 2), (4,)),
    "repeat_interleave": (lambda s, x: x.repeat_interleave(2, 1), (4,)),
    "sum": (lambda s, x: x.sum((1, -1)), (2, 3, 2)),
    "mean": (lambda s, x: x.mean(-1, keepdim=True), (2, 3)),
    "cumsum": (lambda s, x: x.cumsum(1), (4,)),
    "pad": (lambda s, x: F.pad(x, (1, 2, 0, 1), value=0.5), (2, 3)),
    "pad and cut": (lambda s, x: F.pad(x, (-1, 2)), (4,)),
    "reflect": (lambda s, x: F.pad(x, (1, 2), mode="reflect"), (1, 4)),
    "replicate": (lambda s, x: F.pad(x, (1, 2), mode="replicate"), (1, 4)),
    "circular": (lambda s, x: F.pad(x, (1, 2), mode="circular"), (1, 4)),
    "x @ W": (lambda s, x: x @ s.w, (4,)),
    "rows @ W": (lambda s, x: x @ s.w, (2, 4)),
    "x @ vector": (lambda s, x: x @ s.k, (4,)),
    "W @ columns": (lambda s, x: s.w.T @ x, (4, 2)),
    "matrices @ columns": (lambda s, x: torch.stack([s.w.T, -s.w.T]) @ x, (2, 4, 2)),
    "rows @ matrices": (lambda s, x: x @ torch.stack([s.w, -s.w]), (1, 2, 4)),
    "mm": (lambda s, x: torch.mm(x, s.w), (4,)),
    "mv": (lambda s, x: torch.mv(x, s.k), (4,)),
    "bmm": (lambda s, x: torch.bmm(x, s.w.expand(x.shape[0], 4, 3)), (2, 4)),
    "addmm": (lambda s, x: torch.addmm(s.b, x, s.w, beta=2, alpha=-3), (4,)),
    "addmm of a value": (lambda s, x: torch.addmm(x[:, :3], x, s.w, alpha=0.5), (4,)),
    "einsum": (lambda s, x: torch.einsum("ij,bci->bjc", s.w, x), (2, 4)),
    "einsum that sums": (lambda s, x: torch.einsum("bci,jk->bij", x, s.w), (2, 4)),
    "tensordot": (lambda s, x: torch.tensordot(x, s.w, ([1], [0])), (4, 2)),
    "batch_norm": (lambda s, x: F.batch_norm(x, s.mean, s.variance), (4,)),
    "batch_norm with weights": (lambda s, x: F.batch_norm(x, s.mean, s.variance, s.k, s.k), (4, 2)),
    "clone, contiguous, to, detach": (lambda s, x: x.detach().clone().contiguous().to(x.dtype) * 2, (4,)),
    "abs": (lambda s, x: x.abs(), (4,)),
    "maximum": (lambda s, x: torch.maximum(x, 0.1 - x), (4,)),
    "maximum of broadcast values": (lambda s, x: torch.maximum(x, x[:, :1]), (4,)),
    "maximum with a constant": (lambda s, x: torch.maximum(x, s.k), (4,)),
    "minimum": (lambda s, x: torch.min(x, -x), (4,)),
    "minimum with a constant": (lambda s, x: torch.minimum(s.k, x), (4,)),
    "amax": (lambda s, x: x.amax((1, 3), keepdim=True), (2, 2, 3)),
    "amin": (lambda s, x: x.amin(1), (5,)),
    "max over a dimension": (lambda s, x: x.max(2).values, (2, 3)),
    "min over a dimension": (lambda s, x: torch.min(x, 1, keepdim=True)[0], (3,)),
    "clamp_min": (lambda s, x: x.clamp_min(0.2), (4,)),
    "clamp(max=1)": (lambda s, x: x.clamp(max=0.3), (4,)),
    "clamp": (lambda s, x: x.clip(-0.2, 0.3), (4,)),
    "clamp by tensors": (lambda s, x: torch.clamp(x, s.k, s.k + 0.2), (4,)),
    "where": (lambda s, x: torch.where(s.k > 0, x, -2 * x), (4,)),
    "masked_fill": (lambda s, x: x.masked_fill(s.k > 0, 0.5), (4,)),
    "rsub with alpha": (lambda s, x: torch.rsub(x, 1, alpha=2), (4,)),
    "add with alpha": (lambda s, x: torch.add(x, x.flip(1), alpha=-3), (4,)),
    "sub with alpha": (lambda s, x: torch.sub(s.k, x, alpha=3), (4,)),
    "value + wider value": (lambda s, x: x[:, :1] + x * 2, (4,)),
    "constant that widens": (lambda s, x: (x[:, :1] - s.k) * s.k, (4,)),
    "quotient that widens": (lambda s, x: x[:, :1] / s.k, (4,)),
    "arithmetic": (lambda s, x: (2 - x / 3) * 0.5 - 1, (4,)),
    "lerp": (lambda s, x: torch.lerp(x, -x, 0.3), (4,)),
    "other names": (lambda s, x: torch.divide(x.negative().multiply(s.k).subtract(x.absolute()), 3).type_as(x), (4,)),
    "addcmul": (lambda s, x: torch.addcmul(x, x.flip(1), s.k, value=0.5), (4,)),
    "diff": (lambda s, x: torch.diff(x.square(), dim=1), (4,)),
    "two that interact": (lambda s, x: torch.cat([x, F.relu(x.flip(1)) - x], 1)[:, 1::2].abs() @ s.w, (4,)),
}
MODULES: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "Conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), (2, 7)),
    "Conv1d same, even": (lambda: nn.Conv1d(1, 2, 4, padding="same"), (1, 6)),
    "Conv2d same, even": (lambda: nn.Conv2d(1, 2, (2, 3), padding="same", dilation=(1, 2)), (1, 4, 5)),
    "Conv2d reflect": (lambda: nn.Conv2d(1, 2, 3, padding=(1, 2), padding_mode="reflect"), (1, 4, 4)),
    "Conv2d circular": (lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (1, 4, 4)),
    "Conv3d": (lambda: nn.Conv3d(1, 2, (1, 2, 3), padding=(0, 0, 1)), (1, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 2, 3, stride=2, output_padding=1, groups=2), (2, 3)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 1, 2, stride=(2, 1), padding=1, dilation=2), (2, 3, 3)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(1, 2, 2, bias=False), (1, 2, 2, 2)),
    "AvgPool1d": (lambda: nn.AvgPool1d(3, 2, padding=1, ceil_mode=True), (1, 6)),
    "AvgPool1d without padding": (lambda: nn.AvgPool1d(3, 2, 1, True, count_include_pad=False), (2, 6)),
    "AvgPool2d, ceil": (lambda: nn.AvgPool2d(2, ceil_mode=True), (1, 5, 5)),
    "AvgPool2d, ceil, padding": (lambda: nn.AvgPool2d(3, 2, 1, True, count_include_pad=False), (1, 4, 6)),
    "AvgPool2d by a divisor": (lambda: nn.AvgPool2d(2, ceil_mode=True, divisor_override=-3), (1, 3, 4)),
    "AvgPool2d by a negative number": (lambda: nn.AvgPool2d(2, divisor_override=-3), (1, 4, 4)),
    "AvgPool3d": (lambda: nn.AvgPool3d(2, 1, 1, divisor_override=5), (1, 2, 3, 2)),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(3), (2, 5)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((3, None)), (1, 5, 4)),
    "AdaptiveAvgPool2d, larger": (lambda: nn.AdaptiveAvgPool2d(5), (1, 3, 4)),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d((1, 2, 2)), (1, 2, 3, 4)),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d((2, 3)), (1, 5, 4)),
    "MaxPool1d": (lambda: nn.MaxPool1d(3, 2, 1, ceil_mode=True), (1, 6)),
    "MaxPool2d": (lambda: nn.MaxPool2d((3, 2), (1, 2), (1, 0), (1, 2), ceil_mode=True), (1, 4, 6)),
    "MaxPool3d": (lambda: nn.MaxPool3d(2, 1, dilation=(1, 1, 2)), (1, 2, 3, 4)),
    "Upsample": (lambda: nn.Upsample(scale_factor=2), (1, 3, 2)),
    "Upsample 2d": (lambda: nn.Upsample(size=(5, 3)), (1, 3, 2)),
    "Upsample linear": (lambda: nn.Upsample(size=7, mode="linear"), (1, 4)),
    "Upsample bilinear": (lambda: nn.Upsample(scale_factor=1.5, mode="bilinear"), (1, 3, 4)),
    "Upsample bilinear, corners": (lambda: nn.Upsample(size=(5, 7), mode="bilinear", align_corners=True), (1, 3, 4)),
    "Upsample bicubic": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), (1, 3, 3)),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), (4, 2, 3)),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), (1, 4, 2)),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), (4, 2, 1)),
    "ZeroPad2d": (lambda: nn.ZeroPad2d((1, 0, 2, 1)), (1, 2, 2)),
    "Unfold": (lambda: nn.Unfold(2, padding=1), (1, 3, 3)),
    "BatchNorm1d without weights": (lambda: nn.BatchNorm1d(4, affine=False), (4,)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), (2, 2, 2, 1)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), (4,)),
    "ReLU6": (lambda: nn.ReLU6(), (4,)),
    "Hardtanh": (lambda: nn.Hardtanh(-0.2, 0.4), (4,)),
    "Hardsigmoid": (lambda: nn.Hardsigmoid(), (4,)),
    "Softshrink": (lambda: nn.Softshrink(0.2), (4,)),
    "Threshold": (lambda: nn.Threshold(0.1, 0.1), (4,)),
    "LeakyReLU": (lambda: nn.LeakyReLU(-0.3), (4,)),
    "PReLU": (lambda: nn.PReLU(), (4,)),
    "PReLU a channel": (lambda: _slopes(nn.PReLU(3)), (3, 2)),
    "Dropout3d": (lambda: nn.Dropout3d(), (1, 2, 2, 2)),
    "Identity": (lambda: nn.Identity(), (4,)),
}  # fmt: skip


def _slopes(module: nn.PReLU) -> nn.PReLU:
    with torch.no_grad():
        module.weight.copy_(torch.tensor([-0.7, 0.3, 1.8]))
    return module


def build(name: str) -> tuple[nn.Module, Shape]:
    """The op between two layers, so that something is relaxed on either side of it."""
    if name in FUNCTIONS:
        function, shape = FUNCTIONS[name]
        return Function(function).eval(), shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make, shape = MODULES[name]
        return make().eval(), shape


def region_of(shape: Shape, dtype: torch.dtype = torch.float64) -> ox.LinfBall:
    return ox.LinfBall(torch.randn(2, *shape, generator=torch.Generator().manual_seed(2)).to(dtype), 0.3)


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
each = pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])


@each
def test_graph_is_the_module_and_no_point_escapes(name):
    module, shape = build(name)
    network = ox.capture(module.double(), shape)
    region = region_of(shape)
    points = torch.cat([random_points(region, 60), region.lower[None], region.upper[None]])
    with torch.no_grad():
        values = module(points.flatten(0, 1))
        torch.testing.assert_close(network(points.flatten(0, 1)), values, rtol=1e-11, atol=1e-11)
        values = values.unflatten(0, points.shape[:2])
        for relaxation in ("box", "deepz", "crown", "triangle"):
            found = ox.bounds(network, region, relaxation)
            outside = (values < found.lower - 1e-9) | (values > found.upper + 1e-9)
            assert not outside.any(), relaxation


@each
def test_outward_in_float32_without_tolerance(name):
    module, shape = build(name)
    network = ox.capture(module, shape)
    region = region_of(shape, torch.float32)
    exact = ox.InputBox(region.lower.double(), region.upper.double())
    points = torch.cat([random_points(exact, 30), exact.lower[None], exact.upper[None]])
    with torch.no_grad():
        found = {r: ox.bounds(network, region, r, rounding="outward") for r in ("box", "crown")}
        values = module.double()(points.flatten(0, 1)).unflatten(0, points.shape[:2])
    for relaxation, b in found.items():
        assert b.lower.dtype == torch.float32
        assert ((b.lower.double() <= values) & (values <= b.upper.double())).all(), relaxation


def learns(name: str) -> bool:
    """Whether any weight takes part."""
    module, shape = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of even kernels
        return bool(module(torch.rand(1, *shape)).requires_grad)


@pytest.mark.parametrize("name", [name for name in (*FUNCTIONS, *MODULES) if learns(name)])
def test_gradients_in_the_weights_are_the_modules_own_at_a_point(name):
    """At eps = 0 the bound is the output, and so are its derivatives in every weight."""
    module, shape = build(name)
    network = ox.capture(module.double(), shape)
    x = region_of(shape).x
    weights = list(module.parameters())
    wanted = torch.autograd.grad(module(x).sum(), weights, materialize_grads=True, allow_unused=True)
    for relaxation in ("box", "crown"):
        low = ox.bounds(network, ox.LinfBall(x, 0.0), relaxation).lower.sum()
        found = torch.autograd.grad(low, weights, materialize_grads=True, allow_unused=True)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_what_is_made_of_others_is_refused_alone_where_one_of_these_has_no_rule():
    net = Function(
        lambda s, x: torch.subtract(x.median(1, keepdim=True)[0], x) + F.huber_loss(x, s.k, reduction="none")
    )
    report = ox.check(net, (4,))
    assert [p.where for p in report.problems] == ["median", "huber_loss"]


def test_what_is_no_function_of_the_input_is_not_rewritten(monkeypatch):
    monkeypatch.setattr(torch.export, "default_decompositions", lambda: pytest.fail("asked for"))
    net = Function(lambda s, x: F.linear(x, torch.subtract(s.w.t(), 1)) + x.new_zeros(x.size(0), 3).negative())
    assert ox.check(net, (4,)).ok
    assert ox.check(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))).ok


REFUSED = {
    "Threshold": (lambda: nn.Threshold(0.1, 20.0), (4,), "jumps at 0.1, where it goes from 20"),
    "Hardshrink": (lambda: nn.Hardshrink(), (4,), "jumps at lambd"),
    "places of values": (lambda: Function(lambda s, x: x.gather(1, x.argmax(1, keepdim=True))), (4,), "argmax"),
    "batch flipped": (lambda: Function(lambda s, x: x.flip(0)), (4,), "mixes the batch"),
    "batch summed": (lambda: Function(lambda s, x: x - x.sum(0, keepdim=True)), (4,), "mixes the batch"),
    "batch rolled": (lambda: Function(lambda s, x: x.roll(1, 0)), (4,), "mixes the batch"),
    "batch transposed": (lambda: Function(lambda s, x: (x.T @ x @ x.T).T), (3,), "mixes the batch"),
    "detached and not": (lambda: Function(lambda s, x: (h := x @ s.w) - h.detach()), (4,), "reaches the same values"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_affine_or_jumps_is_refused_with_its_reason(name):
    make, shape, reason = REFUSED[name]
    with pytest.raises(ox.UnsupportedOpError, match=reason):
        ox.capture(make().eval(), shape)


@pytest.mark.parametrize(
    "name", ["MaxPool1d", "MaxPool2d", "MaxPool3d", "AdaptiveMaxPool2d", "maximum", "amax", "minimum"]
)
def test_maxima_in_relus_are_the_same_function(name):
    module, shape = build(name)
    network = ox.capture(module.double(), shape)
    lowered = network.lowered
    assert any(isinstance(n.op, Greatest) for n in network)
    assert not any(isinstance(n.op, Greatest) for n in lowered)
    x = torch.randn(50, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(lowered(x), module(x), rtol=1e-12, atol=1e-12)
    assert {n.name for n in network} <= {n.name for n in lowered}
    assert ox.capture(nn.ReLU(), (3,)).lowered.nodes == ox.capture(nn.ReLU(), (3,)).nodes


@pytest.mark.parametrize("slope", [-0.7, 0.0, 0.3, 1.0, 1.8])
def test_prelu_has_the_hull_of_its_pieces(slope):
    """Back-substitution and LP bound it as they bound the activation with that slope as a number."""
    learnt = nn.PReLU()
    nn.init.constant_(learnt.weight, slope)
    region = ox.InputBox(
        torch.tensor([[-1.0, -2.0, 0.5, -3.0]]).double(), torch.tensor([[2.0, -1.0, 1.0, 0.5]]).double()
    )
    first, last = nn.Linear(4, 4), nn.Linear(4, 2)
    nets = [nn.Sequential(first, middle, last).double() for middle in (learnt, nn.LeakyReLU(slope))]
    for relaxation in ("crown", "triangle", "layerwise"):
        mine, wanted = (ox.bounds(net, region, relaxation) for net in nets)
        torch.testing.assert_close(mine.lower, wanted.lower, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.upper, wanted.upper, rtol=1e-4, atol=1e-4)
