"""What forward reads may change after a capture: bounds are of the module as it is now, or the network says so."""

import collections
import functools
import os
import pathlib
import sys
import types
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optrelax as ox

ORDER = torch.tensor([3, 1, 1, 0])
OTHER = torch.tensor([0, 1, 2, 2])


class Settings:
    factor = 2.0
    table: ClassVar[list[float]] = [2.0]

    @classmethod
    def read(cls) -> float:
        return cls.table[0]


class Holder:
    def __init__(self) -> None:
        self.factor = 2.0

    @property
    def twice(self) -> float:
        return 2 * self.factor


class Slotted:
    __slots__ = "__factor"  # one name, which Python mangles

    def __init__(self, factor: float) -> None:
        self.__factor = factor

    def read(self) -> float:
        return self.__factor


found = ox.Bounds(torch.zeros(1), torch.ones(1))  # an object of ours that no weak reference can be made of
settings = types.ModuleType("settings_of_a_test")
exec("factor = 2.0\nclass Inner:\n    factor = 2.0\nheld = Inner()\ndef read():\n    return factor", vars(settings))
sys.modules[settings.__name__] = settings
package = types.ModuleType("package_of_a_test")
package.inner = types.ModuleType("package_of_a_test.inner")
package.inner.factor, package.inner.outer = 2.0, package
sys.modules |= {m.__name__: m for m in (package, package.inner)}
scale, many, weight = torch.tensor(2.0), torch.full((300,), 2.0), torch.full((300,), 2.0, requires_grad=True)
holder, queue, slotted = Holder(), collections.deque([2.0]), Slotted(2.0)


@functools.lru_cache
def remembered() -> float:
    return Settings.factor


class Scaled(nn.Module):
    """A layer times whatever a function reads."""

    def __init__(self, read: Callable[[], float]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.read()


class Ordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", ORDER.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order] * 2


def bounded(net: nn.Module | ox.Network, x: Tensor) -> Tensor:
    return ox.bounds(net, ox.LinfBall(x, 0.0), "box").lower.detach()


CHANGES = {
    "in place": lambda net: net.order.copy_(OTHER),
    ".data": lambda net: setattr(net.order, "data", OTHER),
    "another tensor": lambda net: setattr(net, "order", OTHER),
    "load_state_dict": lambda net: net.load_state_dict({"order": OTHER}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_indices_that_change_are_followed(change):
    """They decide what is built, which is why a graph holds what they were."""
    net, x = Ordered(), torch.rand(2, 4)
    held = ox.capture(net, (4,))
    torch.testing.assert_close(bounded(held, x), net(x))
    assert ox.capture(net, (4,)).graph is held.graph
    CHANGES[change](net)
    torch.testing.assert_close(bounded(net, x), net(x))
    torch.testing.assert_close(bounded(held, x), net(x))


READS = {
    "class attribute": (lambda: Settings.factor, lambda: setattr(Settings, "factor", 3.0)),
    "class method": (lambda: Settings.read(), lambda: Settings.table.__setitem__(0, 3.0)),
    "property of an object": (lambda: holder.twice, lambda: setattr(holder, "factor", 3.0)),
    "number of a tensor": (lambda: float(scale), lambda: scale.mul_(3)),
    "data of a tensor": (lambda: scale.item(), lambda: scale.data.mul_(3)),
    "numbers of a large tensor": (lambda: many.tolist()[1], lambda: many.mul_(3)),
    "numbers of a weight": (lambda: weight.tolist()[1], lambda: weight.data.mul_(3)),
    "slots": (lambda: slotted.read(), lambda: slotted.__init__(3.0)),  # type: ignore[misc]
    "bounds": (
        lambda: float(found.upper),
        lambda: globals().__setitem__("found", ox.Bounds(found.lower, found.upper + 2)),
    ),
    "class in a module": (lambda: settings.Inner.factor, lambda: setattr(settings.Inner, "factor", 3.0)),
    "object in a module": (lambda: settings.held.factor, lambda: setattr(settings.held, "factor", 4.0)),
    "function in a module": (lambda: settings.read(), lambda: setattr(settings, "factor", 3.0)),
    "by its name": (lambda: getattr(settings, "factor"), lambda: setattr(settings, "factor", 5.0)),  # noqa: B009
    "module in a package": (lambda: package.inner.factor, lambda: setattr(package.inner, "factor", 3.0)),
    "another module in a package": (
        lambda: package.inner.factor,
        lambda: setattr(package, "inner", types.SimpleNamespace(factor=5.0)),
    ),
    "environment": (lambda: float(os.environ["FACTOR"]), lambda: os.environ.__setitem__("FACTOR", "3")),
    "globals": (lambda: len(globals()["READS"]), lambda: READS.__setitem__("one more", READS["globals"])),
    "queue": (lambda: queue[0], lambda: queue.__setitem__(0, 3.0)),
    "memory of a function": (
        lambda: remembered(),
        lambda: (remembered.cache_clear(), setattr(Settings, "factor", 7.0)),
    ),
    "file": (lambda: float(open(os.environ["PLACE"]).read()), lambda: write("3")),  # noqa: SIM115
    "path": (lambda: float(pathlib.Path(os.environ["PLACE"]).read_text()), lambda: write("4")),
}


def write(text: str) -> None:
    pathlib.Path(os.environ["PLACE"]).write_text(text)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("what", list(READS))
def test_what_functions_read_is_followed(what, tmp_path, monkeypatch):
    monkeypatch.setenv("FACTOR", "2")
    monkeypatch.setenv("PLACE", str(tmp_path / "factor"))
    write("2")
    read, change = READS[what]
    net, x = Scaled(read), torch.rand(2, 4)
    held = ox.capture(net, (4,))
    before = net(x).detach()
    torch.testing.assert_close(bounded(held, x), before)
    change()
    wanted = net(x).detach()
    assert not torch.allclose(before, wanted)
    torch.testing.assert_close(bounded(net, x), wanted)
    torch.testing.assert_close(bounded(held, x), wanted)


class Guarded:
    """Refuses, by no AttributeError, whatever it was not made with: as marks of pytest do."""

    factor = 2.0

    def __getattr__(self, name: str) -> object:
        raise LookupError(f"nothing called {name} here")


def test_objects_that_refuse_unknown_names_are_read(monkeypatch):
    monkeypatch.setitem(globals(), "guarded", Guarded())
    net, x = Scaled(lambda: guarded.factor), torch.rand(2, 4)  # noqa: F821
    torch.testing.assert_close(bounded(ox.capture(net, (4,)), x), net(x))


def test_functions_may_call_one_another_deeper_than_pythons_stack():
    deep = types.ModuleType("deep_functions_of_a_test")
    exec("\n".join(f"def f{i}():\n    return f{i + 1}" for i in range(1500)) + "\nf1500 = 2.0", vars(deep))
    net, x = Scaled(lambda: deep.f1500 if deep.f0 else 0.0), torch.rand(2, 4)
    torch.testing.assert_close(bounded(ox.capture(net, (4,)), x), net(x))
    deep.f1500 = 3.0
    torch.testing.assert_close(bounded(net, x), net(x))


def test_weights_that_take_no_gradient_any_more_are_followed():
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * (2.0 if self.layer.weight.requires_grad else 3.0)

    net, x = Asks(), torch.rand(2, 4)
    held = ox.capture(net, (4,))
    torch.testing.assert_close(bounded(held, x), net(x))
    net.requires_grad_(False)
    torch.testing.assert_close(bounded(net, x), net(x))
    torch.testing.assert_close(bounded(held, x), net(x))


def test_modules_of_python_among_attributes_are_followed():
    class Set(Scaled):
        def __init__(self) -> None:
            super().__init__(lambda: 1.0)
            self.settings = package.inner

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.settings.factor

    package.inner = sys.modules["package_of_a_test.inner"]
    net, x = Set(), torch.rand(2, 4)
    for factor in (7.0, 8.0):
        package.inner.factor = factor
        torch.testing.assert_close(bounded(ox.capture(net, (4,)), x), net(x))


def test_hooks_of_all_modules_are_refused():
    net, x = nn.Sequential(nn.Linear(4, 3)), torch.rand(2, 4)
    held = ox.capture(net)
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, found: found * 2)
    try:
        for network in (net, held):
            with pytest.raises(ox.UnsupportedOpError, match="every module has forward hooks"):
                bounded(network, x)
    finally:
        hook.remove()
    torch.testing.assert_close(bounded(held, x), net(x))


HOLE: object = None


def test_a_masked_number_that_forward_reads_is_no_reason_to_fail(monkeypatch):
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if HOLE is not None else x

    monkeypatch.setitem(globals(), "HOLE", np.ma.masked)
    net, x = Reading().eval(), torch.rand(1, 2)
    region = ox.LinfBall(x, eps=0.0)
    assert torch.allclose(ox.bounds(net, region, "box").lower, net(x), atol=1e-6)
    monkeypatch.setitem(globals(), "HOLE", None)
    assert torch.allclose(ox.bounds(net, region, "box").lower, x, atol=1e-6)


class Kept(nn.Module):
    """Keeps a layer where PyTorch does not look for it."""

    def __init__(self, keep: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.first, layer = nn.Linear(4, 3), nn.Linear(3, 3)
        self.kept, self.layer = keep(layer), lambda: layer

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept
        while isinstance(kept, (list, dict)):
            kept = kept[0]
        return kept(torch.relu(self.first(x)))


KEEPS = {
    "list": lambda layer: [layer],
    "deep": lambda layer: [{0: [[{0: [{0: layer}]}]]}],
    "method": lambda layer: layer.forward,
    "function": lambda layer: lambda x: layer(x),
}


def test_what_forward_may_read_of_a_layer_is_followed():
    def other(layer: nn.Module) -> None:
        layer.__class__ = Doubled

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    changes: list[Callable[[nn.Module], object]] = [
        lambda layer: layer.weight.data.mul_(3),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(3, 3))),
        lambda layer: setattr(layer, "bias", None),
        lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(3))),
        other,
    ]
    x = torch.rand(2, 4)
    for name, keep in KEEPS.items():
        net = Kept(keep)
        for change in changes if name != "method" else changes[:-1]:
            before = bounded(net, x)
            change(net.layer())
            assert not torch.allclose(before, net(x)), name
            torch.testing.assert_close(bounded(net, x), net(x))


def test_another_class_and_another_order_of_names_are_seen():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    net, x = Pair(), torch.rand(2, 4)
    bounded(net, x)
    net.b.__class__ = nn.Tanh
    torch.testing.assert_close(bounded(net, x), torch.tanh(net.a(x)))
    net.b = nn.Linear(4, 4)
    bounded(net, x)
    net._modules["a"], net._modules["b"] = net.b, net.a  # the same two, each under the other's name
    order = dict(reversed(net._modules.items()))
    net._modules.clear()
    net._modules.update(order)
    torch.testing.assert_close(bounded(net, x), net(x))


def test_what_a_class_finds_in_the_class_of_classes_is_followed():
    class Meta(type):
        factor = 2.0

    class Setting(metaclass=Meta):
        pass

    net, x = Scaled(lambda: Setting.factor), torch.rand(2, 4)
    bounded(net, x)
    Meta.factor = 3.0
    torch.testing.assert_close(bounded(net, x), net(x))


def test_numbers_of_buffers_are_followed():
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("on", torch.tensor(False))
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * 2 if self.on else torch.relu(self.layer(x))

    net, x = Switched(), torch.randn(2, 4)
    torch.testing.assert_close(bounded(net, x), net(x))
    net.on.fill_(True)
    torch.testing.assert_close(bounded(net, x), net(x))


def test_cached_parametrisations_are_those_of_the_module():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.ReLU())
    x = torch.rand(2, 4)
    with nn.utils.parametrize.cached():
        wanted = net(x)
        torch.testing.assert_close(bounded(net, x), wanted)
        assert net[0].weight is net[0].weight
        net(x).sum().backward()
    with torch.no_grad():
        net[0].parametrizations.weight.original0.mul_(3)
    torch.testing.assert_close(bounded(net, x), net(x))


FACTORS: dict[nn.Module, float] = {}


def test_what_hangs_on_the_identity_of_a_module_is_refused():
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * FACTORS.get(self, 1.0)

    net, x = Keyed(), torch.rand(2, 4)
    torch.testing.assert_close(bounded(net, x), net(x))
    FACTORS[net] = 3.0
    with pytest.raises(ox.UnsupportedOpError, match="a copy of the module is another function than the module itself"):
        bounded(net, x)
