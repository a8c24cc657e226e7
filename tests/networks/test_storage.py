"""Every kind of op comes back from a file to the bit, and nothing that its class would not say is restored."""

import json
from pathlib import Path

import pytest
import torch
from cases import NETWORKS, PRODUCTS, NetworkCase, every_region
from test_affine_ops import CASES as AFFINE
from test_affine_ops import Case
from torch import Tensor, nn

import optrelax as ox
from optrelax.networks import storage
from optrelax.networks.ops import Affine
from optrelax.networks.storage import Settings, Tensors, stored

IN_TREE = [name for name in storage.stored_names() if storage._CLASSES[name].__module__.startswith("optrelax.")]
each_network = pytest.mark.parametrize("case", NETWORKS, ids=str)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@each_network
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_an_op_comes_back_to_the_bit(case: NetworkCase, dtype: torch.dtype, tmp_path: Path):
    """Values, bounds and outward bounds, in the weights' own type and in the wider one."""
    network = ox.capture(case.module().to(dtype), case.input_shape)
    ox.save(network, tmp_path / "net.safetensors")
    loaded = ox.load(tmp_path / "net.safetensors")
    for node, other in zip(network, loaded, strict=True):
        mine, others = node.op.tensors(), other.op.tensors()
        assert type(node.op) is type(other.op)
        assert mine.keys() == others.keys()
        assert all(same(mine[name](), others[name]()) for name in mine)
    x = torch.rand(5, *case.input_shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    assert same(network(x), loaded(x))
    for wide in {dtype, torch.float64}:
        region = every_region(case.input_shape, 1)
        region = ox.InputBox(region.lower.to(wide), region.upper.to(wide))
        for rounding in ("nearest", "outward"):
            for name in ("box", "crown"):
                mine, others = (ox.bounds(net, region, name, rounding=rounding) for net in (network, loaded))
                assert same(mine.lower, others.lower), (name, rounding)
                assert same(mine.upper, others.upper), (name, rounding)


@pytest.mark.parametrize("case", AFFINE, ids=str)
def test_an_affine_op_comes_back_to_the_bit_alone(case: Case):
    """Those too that no network of the cases has."""
    op, parameters = case.op()
    settings = Settings(json.loads(json.dumps(op.describe(), allow_nan=False)))
    again = storage.restored(storage.name_of(op), settings, Tensors(op.tensors()), op.input_shapes)
    assert isinstance(again, Affine)
    assert (again.input_shapes, again.shape) == (op.input_shapes, op.shape)
    assert all(any(source() is p for source in again.tensors().values()) for p in parameters)
    xs = [torch.randn(2, *shape, dtype=torch.float64) for shape in op.input_shapes]
    rows = torch.randn(2, *op.shape, dtype=torch.float64)
    for x in (xs, [x.float() for x in xs]):
        assert same(op.apply(*x), again.apply(*x))
        assert same(op.apply_abs(*x), again.apply_abs(*x))
    assert all(map(same, op.transpose(rows), again.transpose(rows)))


def test_every_registered_op_stands_in_a_network_or_among_the_affine_ops():
    """Else the contracts above would leave it out."""
    found = {storage.name_of(node.op) for case in (*NETWORKS, *PRODUCTS) for node in case.network()}
    found |= {storage.name_of(case.op()[0]) for case in AFFINE}
    assert found >= set(IN_TREE)


# --- what saving refuses ------------------------------------------------------------------------------------------


class Lifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.25


@stored("test-lift")
class Lift(Affine):
    """x + by; says less of itself than it reads where told so."""

    diagonal = True

    def __init__(self, shape: tuple[int, ...], by: float, silent: bool = False) -> None:
        self.input_shapes, self.shape, self.by, self.silent = (shape,), shape, by, silent

    def linear(self, *xs: Tensor) -> Tensor:
        return xs[0]

    def apply_abs(self, *rs: Tensor) -> Tensor:
        return rs[0]

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return (a,)

    def bias(self, like: Tensor) -> Tensor:
        return torch.full(self.shape, self.by).to(like)

    def describe(self) -> dict[str, object]:
        return {} if self.silent else {"by": self.by}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[tuple[int, ...], ...]) -> "Lift":
        return cls(shapes[0], 0.0 if settings.absent("by") else settings.number("by"))


def test_an_op_that_leaves_out_what_it_reads_is_not_saved(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), Lifted())
    ox.register_op(Lifted)(lambda site: Lift(site.shape(), 0.25, silent=True))
    with pytest.raises(ValueError, match=r"save: 1: Lift would come back as another function"):
        ox.save(net, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())
    ox.register_op(Lifted)(lambda site: Lift(site.shape(), 0.25))
    ox.save(net, tmp_path / "net.safetensors")
    x = torch.rand(4, 3)
    assert torch.equal(ox.load(tmp_path / "net.safetensors")(x), net(x))


def third(x: Tensor) -> Tensor:
    return torch.where(x > 0, x / 3, 0.0)


torch.fx.wrap("third")


class Third(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return third(x)


def test_an_activation_whose_pieces_round_otherwise_is_not_saved(tmp_path):
    """x / 3 and x * (1 / 3) differ in the last bit of some x: from its pieces it would be another function."""
    ox.register_activation(Third, activation=ox.PiecewiseLinear("third", third, (0.0,), (0.0, 1 / 3), (0.0, 0.0)))
    with pytest.raises(ValueError, match="PiecewiseLinear would come back as another function"):
        ox.save(nn.Sequential(nn.Linear(3, 3), Third()), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_setting_op_is_the_registrys(tmp_path, monkeypatch):
    monkeypatch.setattr(Lift, "describe", lambda self: {"op": "lift"})
    ox.register_op(Lifted)(lambda site: Lift(site.shape(), 0.25))
    with pytest.raises(ValueError, match=r"describe\(\) must not say 'op'"):
        ox.save(nn.Sequential(nn.Linear(3, 3), Lifted()), tmp_path / "net.safetensors")


# --- the checked readers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (lambda s: s.integer("a"), True, "a: wants whole numbers in 0 .. 100, got True"),
        (lambda s: s.integer("a"), 101, "wants whole numbers in 0 .. 100, got 101"),
        (lambda s: s.integer("a", least=1), 0, "wants whole numbers in 1 .. 100, got 0"),
        (lambda s: s.integers("a"), [1, 2.0], "wants whole numbers in 0 .. 100, got 2.0"),
        (lambda s: s.pair("a"), [1, 2, 3], r"wants 2 numbers, got \[1, 2, 3\]"),
        (lambda s: s.integers("a"), {"0": 1}, "wants a list of numbers, got"),
        (lambda s: s.number("a"), float("nan"), "wants finite numbers, got nan"),
        (lambda s: s.number("a"), float("-inf"), "wants finite numbers, got -inf"),
        (lambda s: s.number("a"), 10**400, "wants finite numbers, got 1000"),
        (lambda s: s.number("a"), 2**53 + 1, "wants numbers that float64 holds"),
        (lambda s: s.number("a"), "1", "wants finite numbers, got '1'"),
        (lambda s: s.numbers("a", 1), [None], "wants finite numbers, got None"),
        (lambda s: s.flag("a"), 1, "wants true or false, got 1"),
        (lambda s: s.word("a", "up", "down"), "left", "wants up or down, got 'left'"),
        (lambda s: s.word("a"), 5, "wants a text, got 5"),
        (lambda s: s.integer("b"), 1, "setting 'b' is missing"),
        (lambda s: s.require_size("a", (11, 10)), 1, "a: wants at most 100 numbers, got 110"),
        (lambda s: s.finish(), 1, r"has the unknown settings \['a'\]"),
    ],
)
def test_settings_that_are_none(read, value, message):
    with pytest.raises(ValueError, match=message):
        read(Settings({"a": value}, most=100))


def test_settings_that_are_good():
    settings = Settings({"i": 3, "l": [1, 2], "n": -0.5, "w": "up", "f": False, "z": None}, most=100)
    assert (settings.integer("i"), settings.integers("l"), settings.pair("l")) == (3, (1, 2), (1, 2))
    assert (settings.number("n"), settings.numbers("l"), settings.number("i")) == (-0.5, (1.0, 2.0), 3.0)
    assert (settings.word("w", "up"), settings.flag("f")) == ("up", False)
    assert (settings.absent("z"), settings.absent("gone"), settings.absent("i")) == (True, True, False)
    settings.finish()


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda t: t.source("bias"), "tensor 'bias' is missing"),
        (lambda t: t.source("weight", dims=1), r"weight: wants 1 dimensions, got shape \(2, 3\)"),
        (lambda t: t.source("weight", shape=(3, 2)), r"weight: wants shape \(3, 2\), got \(2, 3\)"),
        (lambda t: t.optional("index"), "index: wants torch.float32 or torch.float64, got torch.int64"),
        (lambda t: t.finish(), r"unknown tensors \['index', 'weight'\]"),
    ],
)
def test_tensors_that_do_not_fit(read, message):
    with pytest.raises(ValueError, match=message):
        read(Tensors({"weight": lambda: torch.zeros(2, 3), "index": lambda: torch.zeros(2, dtype=torch.int64)}))
