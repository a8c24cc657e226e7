"""The registry of every contract: relaxations, networks and regions. A new one is its file plus one row here."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optrelax as ox
from optrelax.relaxations import resolve

# --- relaxations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RelaxationCase:
    """One relaxation and what it promises."""

    name: str
    make: Callable[[], Any]
    sound: bool = True
    monotone: bool = False
    """Lower bounds never rise with eps."""
    continuous: bool = True
    """The bound is a continuous function of the weights."""
    tight_at_points: bool = True
    """At eps = 0 the bounds are the output: not for forms that relax stable neurons or loosen intervals."""
    max_pool: bool = True
    variant: bool = False
    """Another setting of a row: sound on everything like it, but not put through every other contract."""
    closed_form: bool = True
    """Not an LP: cheap enough for every contract on every network."""

    def __str__(self) -> str:
        return self.name


def _row(name: str, **flags: Any) -> RelaxationCase:
    return RelaxationCase(name, lambda: resolve(name), **flags)


def _object(name: str, make: Callable[[], Any], **flags: Any) -> RelaxationCase:
    return RelaxationCase(name, make, **flags)


RELAXATIONS = [
    _row("box", monotone=True),
    _row("box-widen", monotone=True, tight_at_points=False),
    _row("box-widen:omega=2", variant=True, monotone=True, tight_at_points=False),
    _row("box-round", continuous=False, tight_at_points=False),
    _row("box-round:omega=1,F=100", variant=True, continuous=False, tight_at_points=False),
    _row("hbox", continuous=False),
    _row("hbox-diag", continuous=False),
    _row("hbox-diag-c", tight_at_points=False),
    _row("hbox-switch", continuous=False),
    _row("hzono"),
    _row("deepz"),
    _row("deepz-box", continuous=False),
    _row("deepz-diag", continuous=False),
    _row("deepz-diag-c", tight_at_points=False),
    _row("deepz-switch", continuous=False),
    _row("deepz-soft"),
    _row("deepz-soft:gamma=10", variant=True),
    _row("deepz-slanted", continuous=False),
    _row("deepz-slanted:kappa=0.3", continuous=False, variant=True),
    _object("deepz forward", lambda: ox.DeepZ(direction="forward")),
    _object("deepz backward", lambda: ox.DeepZ(direction="backward")),
    _object("deepz-soft backward", lambda: ox.DeepZ(slope="soft", direction="backward"), variant=True),
    _row("fast-lin"),
    _row("crown", continuous=False),
    _row("crown-0", continuous=False),
    _row("crown-1", continuous=False),
    _row("crown-0-c"),
    _row("crown-1-c", tight_at_points=False),
    _row("crown-0-tria", continuous=False),
    _row("crown-1-tria", continuous=False),
    _row("crown-0-tria-c"),
    _row("crown-1-tria-c", tight_at_points=False),
    _row("crown-soft"),
    _row("crown-soft:gamma=10", variant=True),
    _row("crown-ibp", continuous=False),
    _row("crown-ibp-soft"),
    _object("crown on the best of box and fast-lin", lambda: ox.Crown(preactivation=BEST()), continuous=False),
    _object("crown in chunks", lambda: ox.Crown(max_bytes=60_000), continuous=False),
    _object("deepz forward in chunks", lambda: ox.DeepZ(direction="forward", max_bytes=20000)),
    _object("intersect", lambda: BEST()),
    _row("cauchy", sound=False, max_pool=False),
    _row("cauchy:k=7,seed=3", variant=True, sound=False, max_pool=False),
]
SOUND = [case for case in RELAXATIONS if case.sound]
PLAIN = [case for case in RELAXATIONS if not case.variant]
CLOSED_FORMS = [
    "box",
    "hbox",
    "hbox-diag",
    "hbox-diag-c",
    "hbox-switch",
    "hzono",
    "deepz",
    "deepz-box",
    "deepz-diag",
    "deepz-diag-c",
    "deepz-switch",
    "deepz-soft",
    "deepz-slanted",
    "fast-lin",
    "crown",
    "crown-0",
    "crown-1",
    "crown-0-c",
    "crown-1-c",
    "crown-0-tria",
    "crown-1-tria",
    "crown-0-tria-c",
    "crown-1-tria-c",
    "crown-soft",
    "crown-ibp",
    "crown-ibp-soft",
    "box-widen",
    "box-round",
    "cauchy",
]
"""The names of design.md that are closed forms."""


def BEST() -> ox.Intersect:
    """The default source of pre-activation bounds of the LP layers."""
    return ox.Intersect(ox.Box(), ox.FastLin())


# --- networks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkCase:
    """A small network in eval mode, float64, weights from a seed."""

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    relu_only: bool = True
    """Affine ops and ReLU: what the LP and MILP oracles take."""
    max_pool: bool = False
    in_float32: bool = True
    """Whether it adds an op or a size to the float32 contract."""

    def __str__(self) -> str:
        return self.name

    def module(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + seed)
            net = self.build().double()
            for m in net.modules():
                if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    assert m.running_mean is not None
                    assert m.running_var is not None
                    nn.init.normal_(m.running_mean, std=0.3)
                    nn.init.uniform_(m.running_var, 0.3, 2.0)
                    nn.init.uniform_(m.weight, -1.5, 1.5)
                    nn.init.normal_(m.bias, std=0.3)
        return net.eval()

    def network(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> ox.Network:
        """Captured once a process, for all tests: one that changes its network captures `module()`."""
        network, made = _captured(self, seed, dtype)
        assert _state(network) == made, f"{self}: a test changed the network of all; capture module() there"
        for p in network.module.parameters():
            p.grad = None
        return network


@cache
def _captured(case: NetworkCase, seed: int, dtype: torch.dtype) -> tuple[ox.Network, list[object]]:
    network = ox.capture(case.module(seed).to(dtype), case.input_shape)
    return network, _state(network)


def _state(network: ox.Network) -> list[object]:
    """What a test may have changed: numbers, kinds, modes."""
    tensors = (*network.module.parameters(), *network.module.buffers())
    state: list[object] = [(t.dtype, t.requires_grad, t.detach().numpy().tobytes()) for t in tensors]
    return [*state, *(module.training for module in network.module.modules())]


class Functional(nn.Module):
    """Residual branches, a value added to itself, constants, and functions instead of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.tensor([0.3, -0.2, 0.1, 0.0, 0.5, -0.4]))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.1307) / 0.3081
        a = F.relu(self.first(x))
        b = torch.relu(self.second(a) - self.shift)
        c = b + a
        d = (c + c).relu() - 0.5 * b
        return -self.last(d.view(d.shape[0], -1)) + 0.1


class ResidualConv(nn.Module):
    """A residual block with batch norm, and a pooled head; every module used once."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.49, 0.48]).reshape(2, 1, 1))
        self.register_buffer("std", torch.tensor([0.25, 0.24]).reshape(1, 2, 1, 1))
        self.body = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
        self.inner = nn.Conv2d(3, 3, 3, padding="same")
        self.short = nn.Conv2d(2, 3, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        y = self.inner(self.body(x)) + self.short(x)
        return self.head(torch.flatten(self.pool(F.relu(y)), 1))


class Joined(nn.Module):
    """Branches joined, cut, turned round and summed, one layer for two of them; every op twice removed from another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.mix = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.layer(x))
        b = F.relu(self.layer(a.flip(1))) + a
        rows = torch.stack([a, b, x[:, :1].expand_as(x)], 1)
        left, right = (rows.transpose(1, 2) @ self.mix).chunk(2, dim=2)
        joined = torch.cat([left.squeeze(2), F.pad(right[:, 1:, 0], (0, 1))[:, ::2], -b[:, [0, 2]]], 1)
        return self.last(F.relu(joined.view(-1, 2, 4).mean(1)) - b.roll(1, 1))


class Signals(nn.Module):
    """Convolutions of signals, with an even kernel, strides that leave something over, and back up again."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(1, 2, 2, padding="same")
        self.pool, self.up = nn.AvgPool1d(2, ceil_mode=True), nn.ConvTranspose1d(2, 2, 3, stride=2, output_padding=1)
        self.wide, self.last = nn.Upsample(size=5, mode="linear"), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.down(x)))
        return self.last(self.wide(F.relu(self.up(x))).flatten(1))


class Maxima(nn.Module):
    """Maxima of branches and along a dimension, one-sided clamps, absolute values and slopes that are learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(3, 3)
        self.bend = nn.PReLU(2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.maximum(self.first(x), self.second(x).clamp_min(-0.3))
        x = self.bend(x.reshape(-1, 2, 3)).amax(1)
        return self.last(x).abs().clamp(max=0.8)


class Shared(nn.Module):
    """One layer and one activation module, each used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.relu, self.last = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.relu(self.layer(x))
        return self.last(x)


class Scalar(nn.Module):
    """One number an example: an output of shape ()."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.last(torch.relu(self.first(x))).squeeze(-1)) * 2


class Attention(nn.Module):
    """Scores of queries and keys, cut by a ReLU, times values; and a gate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q, self.k, self.v = (nn.Linear(2, 2) for _ in range(3))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (3, 2))
        weights = torch.relu(self.q(x) @ self.k(x).mT) / 3
        y = torch.einsum("bij,bjd->bid", weights, self.v(x))
        return self.out((y * torch.relu(x) + x * x - y).flatten(1))


def _with_bias(value: float) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    nn.init.constant_(net[0].bias, value)  # type: ignore[arg-type]
    return net


def _scaled(factor: float) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(factor)
    return net


def _pieces(*layers: nn.Module) -> Callable[[], nn.Module]:
    """Layers of their own, with fresh weights, at every call."""

    def build() -> nn.Module:
        net = deepcopy(nn.Sequential(*layers))
        for m in net.modules():
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()
        return net

    return build


NETWORKS = [
    NetworkCase("fc", _pieces(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), (5,)),
    NetworkCase(
        "deep fc",
        lambda: nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 3)),
        (4,),
        in_float32=False,
    ),
    NetworkCase("one neuron", _pieces(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), (1,)),
    NetworkCase("affine only", _pieces(nn.Linear(4, 5), nn.Linear(5, 3)), (4,), in_float32=False),
    NetworkCase(
        "ends in relu", _pieces(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU()), (4,), in_float32=False
    ),
    NetworkCase(
        "starts with relu", _pieces(nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,), in_float32=False
    ),
    NetworkCase("scalar output", Scalar, (3,)),
    NetworkCase(
        "rows of features",
        _pieces(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Unflatten(1, (4, 2)), nn.Linear(2, 2), nn.Flatten()),
        (2, 3),
        in_float32=False,
    ),
    NetworkCase(
        "strided conv",
        _pieces(
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(3, 4, (2, 1), dilation=(1, 2), stride=(1, 2)),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        (2, 5, 6),
    ),
    NetworkCase(
        "grouped conv",
        _pieces(
            nn.Conv2d(2, 4, (3, 2), stride=(2, 3), padding=(0, 1), dilation=(2, 1), groups=2, bias=False),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding="same", groups=4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        (2, 6, 7),
        in_float32=False,
    ),
    NetworkCase("functional residual", Functional, (4,)),
    NetworkCase("residual conv", ResidualConv, (2, 4, 4)),
    NetworkCase(
        "batch norm",
        _pieces(nn.BatchNorm1d(4), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3)),
        (4,),
    ),
    NetworkCase(
        "average pool",
        _pieces(
            nn.Conv2d(1, 3, 3),
            nn.ReLU(),
            nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
            nn.AvgPool2d(2, stride=1, padding=1),
            nn.Conv2d(3, 3, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d((1, 3)),
            nn.Flatten(),
            nn.Linear(9, 3),
        ),
        (1, 6, 6),
    ),
    NetworkCase(
        "max pool",
        _pieces(
            nn.Conv2d(1, 2, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(2, 2, 2),
            nn.MaxPool2d(2, stride=1, dilation=1),
            nn.Flatten(),
            nn.Linear(2, 4),
            nn.ReLU(),
            nn.Linear(4, 3),
        ),
        (1, 6, 6),
        relu_only=False,
        max_pool=True,
    ),
    NetworkCase(
        "dilated max pool",
        _pieces(nn.MaxPool2d((2, 3), stride=(2, 1), dilation=(2, 1)), nn.Flatten(), nn.Linear(8, 3)),
        (1, 6, 6),
        relu_only=False,
        max_pool=True,
        in_float32=False,
    ),
    NetworkCase(
        "dropout and identity",
        _pieces(nn.Identity(), nn.Linear(4, 6), nn.Dropout(0.3), nn.ReLU(), nn.Dropout1d(0.1), nn.Linear(6, 3)),
        (4,),
        in_float32=False,
    ),
    NetworkCase(
        "leaky relu",
        _pieces(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, 3)),
        (4,),
        relu_only=False,
    ),
    NetworkCase(
        "bent leaky relu",
        _pieces(nn.Linear(4, 6), nn.LeakyReLU(1.7), nn.Linear(6, 5), nn.LeakyReLU(-0.6), nn.Linear(5, 3)),
        (4,),
        relu_only=False,
    ),
    NetworkCase(
        "relu6 and hardtanh",
        _pieces(
            nn.Linear(4, 6), nn.Hardtanh(-0.3, 0.4), nn.Linear(6, 5), nn.ReLU6(), nn.Hardtanh(0.1, 0.3), nn.Linear(5, 3)
        ),
        (4,),
        relu_only=False,
    ),
    NetworkCase("joined branches", Joined, (4,)),
    NetworkCase("signals", Signals, (1, 5)),
    NetworkCase("maxima", Maxima, (4,), relu_only=False, max_pool=True),
    NetworkCase("dead layer", lambda: _with_bias(-50.0), (4,)),
    NetworkCase("always active layer", lambda: _with_bias(50.0), (4,), in_float32=False),
    NetworkCase("weights of 1e-12", lambda: _scaled(1e-12), (4,)),
    NetworkCase("weights of 1e6", lambda: _scaled(1e6), (4,)),
    NetworkCase("shared layers", Shared, (4,), in_float32=False),
]

PRODUCTS = [NetworkCase("attention", Attention, (6,))]
"""Networks that multiply their values: no part of the contracts of oracles that know activations alone."""
BY_NAME = {case.name: case for case in NETWORKS}
RELU_NETWORKS = [case for case in NETWORKS if case.relu_only]


# --- regions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegionCase:
    """A region around inputs in [0, 1]."""

    name: str
    make: Callable[[Tensor, torch.Generator], Any]

    def __str__(self) -> str:
        return self.name


def _random(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(x.shape, generator=generator, dtype=x.dtype)


def _zero_width(x: Tensor, g: torch.Generator) -> ox.InputBox:
    width = 0.4 * (_random(x, g) < 0.5)
    return ox.InputBox(x - width, x + width)


REGIONS = [
    RegionCase("clipped ball", lambda x, g: ox.LinfBall(x, 0.2, clip=(0.0, 1.0))),
    RegionCase("wide ball", lambda x, g: ox.LinfBall(x, 1.5)),
    RegionCase("zero width", _zero_width),
    RegionCase("one-sided", lambda x, g: ox.InputBox(x, x + 0.5)),
    RegionCase("eps of 0", lambda x, g: ox.LinfBall(x, 0.0)),
    RegionCase("eps a pixel", lambda x, g: ox.LinfBall(x, 0.6 * (_random(x, g) - 0.4).clamp_min(0))),
    RegionCase("eps an example", lambda x, g: ox.LinfBall(x, torch.linspace(0.01, 0.7, len(x), dtype=x.dtype))),
]


def _cut_box(x: Tensor, g: torch.Generator) -> ox.Polytope:
    slopes = torch.randn(3, x[0].numel(), generator=g, dtype=x.dtype)
    sides = x.flatten(1) @ slopes.mT + 0.1 + 0.3 * torch.rand(len(x), 3, generator=g, dtype=x.dtype)
    return ox.Polytope(slopes, sides, x - 0.4, x + 0.4)


def _choices(x: Tensor, g: torch.Generator) -> ox.ChoiceBox:
    last = x[0].numel() - 1
    values = torch.rand(3, 2, generator=g, dtype=x.dtype)
    groups = {0: torch.tensor([0.0, 0.5, 1.0]), (1, last): values} if last > 1 else {0: torch.tensor([0.0, 1.0])}
    return ox.ChoiceBox(x - 0.1, x + 0.1, groups)


KINDS = [
    RegionCase("l2 ball", lambda x, g: ox.L2Ball(x, 0.5)),
    RegionCase("clipped l2 ball", lambda x, g: ox.L2Ball(x, torch.linspace(0.3, 1.4, len(x)), clip=(0.0, 1.0))),
    RegionCase("l1 ball", lambda x, g: ox.L1Ball(x, 0.8)),
    RegionCase("clipped l1 ball", lambda x, g: ox.L1Ball(x, torch.linspace(0.4, 2.0, len(x)), clip=(0.0, 1.0))),
    RegionCase("point of an l2 ball", lambda x, g: ox.L2Ball(x, 0.0, clip=(0.0, 1.0))),
    RegionCase("polytope", _cut_box),
    RegionCase("choices", _choices),
]
"""One row a kind of region that is no box: the contract of regions, and of every relaxation over them."""


def inputs(shape: tuple[int, ...], batch: int, seed: int = 0) -> Tensor:
    """Inputs in [0, 1], [batch, *shape], float64."""
    return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every_region(shape: tuple[int, ...], batch: int = 2) -> ox.InputBox:
    """All regions behind one another as one batch; example i belongs to REGIONS[i // batch]."""
    generator = torch.Generator().manual_seed(5)
    parts = [case.make(inputs(shape, batch, seed=i), generator) for i, case in enumerate(REGIONS)]
    return ox.InputBox(torch.cat([p.lower for p in parts]), torch.cat([p.upper for p in parts]))


# --- points of a region -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """Points of every region of a network, and what the network makes of them: [points, batch, ...] each."""

    network: ox.Network
    region: ox.InputBox
    points: Tensor
    outputs: Tensor
    preactivation: dict[str, Tensor]


@cache
def sampled(name: str) -> Sampled:
    """Random points, corners and points under attack of `every_region` of a network."""
    case = BY_NAME[name]
    network = case.network()
    region = every_region(case.input_shape)
    points = torch.cat([random_points(region, 60), corners(region, 60), attacked(network.module, region)])
    with torch.no_grad():
        outputs = network.module(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        values = network.values(points.flatten(0, 1))
    before = {n.name: values[n.inputs[0]].unflatten(0, points.shape[:2]) for n in network.activations}
    return Sampled(network, region, points, outputs, before)


def random_points(region: ox.InputBox, count: int, seed: int = 0) -> Tensor:
    """Uniform points, [count, *region.shape]."""
    g = torch.Generator().manual_seed(seed)
    t = torch.rand(count, *region.shape, generator=g, dtype=region.dtype)
    return (region.lower + t * (region.upper - region.lower)).clamp(region.lower, region.upper)


def corners(region: ox.InputBox, count: int, seed: int = 0) -> Tensor:
    """Random corners, the two extreme ones among them: [count, *region.shape]."""
    g = torch.Generator().manual_seed(seed)
    pick = torch.rand(count, *region.shape, generator=g) < torch.linspace(0, 1.01, count).reshape(
        -1, *[1] * len(region.shape)
    )
    return torch.where(pick, region.upper, region.lower)


def attacked(net: nn.Module, region: ox.InputBox, steps: int = 12) -> Tensor:
    """Sign-gradient descent and ascent on every output, from the middle: [steps * outputs, *region.shape]."""
    found = []
    outputs = net(region.center).reshape(len(region.lower), -1).shape[1]
    for row in range(min(outputs, 3)):
        for sign in (1.0, -1.0):
            x = region.center
            for step in range(steps):
                x = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(sign * net(x).reshape(len(x), -1)[:, row].sum(), x)
                x = x - (region.upper - region.lower) / (step + 1) * gradient.sign()
                x = torch.minimum(torch.maximum(x, region.lower), region.upper)
            found.append(x.detach())
    return torch.stack(found)


def specification(outputs: int, k: int = 4, seed: int = 2, batch: int | None = None) -> Tensor:
    """Random rows [k, outputs] (or [batch, k, outputs]), float64."""
    g = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)
    return torch.randn(*lead, k, outputs, generator=g, dtype=torch.float64)
