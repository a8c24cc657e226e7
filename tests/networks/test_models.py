"""The papers' networks: sizes as published, weights from the seed alone."""

import inspect
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import optrelax as ox
from optrelax.data.datasets import load_dataset, normalization
from optrelax.networks import models
from optrelax.networks.models import Normalize, Residual, build, fc

pytestmark = pytest.mark.smoke

CIFAR = (3, 32, 32)
DIGITS = (1, 8, 8)


def hidden_units(net: nn.Module, input_shape: tuple[int, ...]) -> list[int]:
    """Neurons of each ReLU, in order of evaluation."""
    sizes: list[int] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: sizes.append(output[0].numel()))
        for module in net.modules()
        if isinstance(module, nn.ReLU)
    ]
    with torch.no_grad():
        net(torch.rand(2, *input_shape))
    for hook in hooks:
        hook.remove()
    return sizes


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_fc_takes_flat_inputs_and_images():
    net = fc(784, 100, 100, 10)
    assert [type(m).__name__ for m in net] == ["Flatten", "Linear", "ReLU", "Linear", "ReLU", "Linear"]
    images = torch.rand(3, 1, 28, 28)
    assert net(images).shape == (3, 10)
    assert torch.equal(net(images), net(images.reshape(3, 784)))


def test_fc_computes_what_it_says():
    net = fc(4, 3, 2, normalize=(0.5, 0.25))
    x = torch.rand(5, 4)
    w0, b0, w1, b1 = (p.detach().numpy() for p in net.parameters())
    hidden = np.maximum((x.numpy() - 0.5) / 0.25 @ w0.T + b0, 0)
    np.testing.assert_allclose(net(x).detach().numpy(), hidden @ w1.T + b1, rtol=1e-5, atol=1e-6)


def test_fc_with_one_width_is_one_linear_layer():
    assert [type(m).__name__ for m in fc(4, 2)] == ["Flatten", "Linear"]


@pytest.mark.parametrize("sizes", [(784,), (784, 0, 10), (0, 10), (784, -1)])
def test_fc_refuses_sizes_that_make_no_network(sizes):
    with pytest.raises(ValueError, match="fc: "):
        fc(*sizes)


# Jovanovic et al. 2021 give FC and CONV; Gowal et al. 2018 print 8.3K, 47K and 230K hidden units and 471K,
# 1.2M and 17M parameters for small, medium and large on CIFAR-10.
@pytest.mark.parametrize(
    ("name", "input_shape", "units"),
    [
        ("fc", (1, 28, 28), [400, 200, 100, 100]),
        ("fc-small", (1, 28, 28), [100, 100]),
        ("conv", (1, 28, 28), [3136, 100]),
        ("convplus", (1, 28, 28), [2704, 3200, 100]),
    ],
)
def test_hidden_units_on_mnist(name, input_shape, units):
    assert hidden_units(build(name, input_shape, 10), input_shape) == units


@pytest.mark.parametrize(
    ("name", "units", "weights"),
    [("convplus", 8.3e3, 471e3), ("dm-medium", 47e3, 1.2e6), ("dm-large", 230e3, 17e6)],
)
def test_published_sizes_on_cifar(name, units, weights):
    net = build(name, CIFAR, 10)
    assert sum(hidden_units(net, CIFAR)) == pytest.approx(units, rel=0.01)
    assert parameters(net) == pytest.approx(weights, rel=0.05)


def test_conv_is_built_as_the_paper_says():
    net = build("conv", (1, 28, 28), 10)
    assert [type(m).__name__ for m in net] == ["Conv2d", "ReLU", "Flatten", "Linear", "ReLU", "Linear"]
    first = net[0]
    assert (first.out_channels, first.kernel_size, first.stride, first.padding) == (
        16,
        (4, 4),
        (2, 2),
        (1, 1),
    )


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("input_shape", [(1, 28, 28), (3, 19, 23)])
def test_every_network_maps_its_input_shape_to_the_classes(name, input_shape):
    net = build(name, input_shape, 7, normalize=([0.3] * input_shape[0], [0.2] * input_shape[0]))
    x = torch.rand(2, *input_shape)
    assert net(x).shape == (2, 7)
    net.eval()  # batch norms look at one image at a time
    assert torch.allclose(net(x)[1], net(x[1:])[0], atol=1e-5)
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", ["fc", "fc-small", "conv", "residual"])
def test_networks_for_the_embedded_data(name):
    test = load_dataset("digits")
    net = build(name, test.input_shape, test.classes, normalize=normalization("digits"))
    assert net(test.images).shape == (360, 10)


@pytest.mark.parametrize("name", ["convplus", "dm-medium"])
def test_an_input_too_small_is_an_error_of_the_builder(name):
    with pytest.raises(ValueError, match=rf"{name}: input \[1, 8, 8\] is too small"):
        build(name, DIGITS, 10)


@pytest.mark.parametrize("name", ["conv", "residual"])
@pytest.mark.parametrize("input_shape", [(28, 28), (1, 0, 28)])
def test_convolutions_want_an_image(name, input_shape):
    with pytest.raises(ValueError, match=rf"{name}: input_shape must be \(channels, height, width\)"):
        build(name, input_shape, 10)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown network 'dm_medum'; did you mean 'dm-medium'"):
        build("dm_medum")


def test_every_registered_network_is_a_public_function():
    """`build` by name and a call of the function are one thing."""
    for name, function in models._REGISTRY.items():
        assert function.__name__ in models.__all__
        one, two = build(name, seed=0), build(name, seed=0)
        torch.manual_seed(0)
        three = function()
        for a, b, c in zip(one.parameters(), two.parameters(), three.parameters(), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def test_a_new_network_is_one_function(monkeypatch):
    monkeypatch.setattr(models, "_REGISTRY", dict(models._REGISTRY))

    @models.model("tiny")
    def tiny(input_shape=(2,), classes=2, *, normalize=None):
        return fc(*input_shape, classes)

    assert build("tiny", (5,), 3)(torch.rand(1, 5)).shape == (1, 3)
    with pytest.raises(ValueError, match="'tiny' is registered already"):
        models.model("tiny")


# Seeds


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_seed_alone_decides_the_weights():
    first = fc(6, 5, 4, seed=3)
    torch.rand(7)
    assert same(first, fc(6, 5, 4, seed=3))
    assert not same(first, fc(6, 5, 4, seed=4))


def test_a_seed_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    build("conv", DIGITS, 10, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(5)
    first = fc(6, 5, 4)
    second = fc(6, 5, 4)
    torch.manual_seed(5)
    assert same(first, fc(6, 5, 4))
    assert not same(first, second)


def test_a_generator_is_a_seed_and_moves_on():
    made = [fc(6, 5, 4, seed=generator) for generator in itertools.repeat(torch.Generator().manual_seed(2), 2)]
    again = torch.Generator().manual_seed(2)
    assert same(made[0], fc(6, 5, 4, seed=again))
    assert same(made[1], fc(6, 5, 4, seed=again))
    assert not same(*made)


# Parts


def test_normalize_by_channel():
    x = torch.rand(2, 3, 4, 4)
    mean, std = normalization("cifar10")
    got = Normalize(mean, std)(x)
    for c in range(3):
        assert torch.equal(got[:, c], (x[:, c] - mean[c]) / std[c])


@pytest.mark.parametrize("constants", [(0.1307, 0.3081), ([0.1307], [0.3081])])
@pytest.mark.parametrize("shape", [(2, 784), (2, 1, 28, 28)])
def test_normalize_with_one_number_takes_any_shape(constants, shape):
    x = torch.rand(shape)
    got = Normalize(*constants)(x)
    assert got.shape == shape
    assert torch.equal(got, (x - 0.1307) / 0.3081)


def test_normalize_constants_are_saved_and_cast_but_not_trained():
    module = Normalize(0.5, 0.25)
    assert set(module.state_dict()) == {"mean", "std"}
    assert list(module.parameters()) == []
    assert module.double()(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.1, 0.2], [0.3]), ([], []), (0.5, 0.0), (0.5, -1.0), (0.5, float("nan")), (float("inf"), 1.0)],
)
def test_normalize_refuses_constants_that_make_no_sense(mean, std):
    with pytest.raises(ValueError, match="Normalize: "):
        Normalize(mean, std)


def test_residual_adds_its_branches():
    body, shortcut = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.rand(4, 3)
    assert torch.equal(Residual(body, shortcut)(x), body(x) + shortcut(x))
    square = nn.Linear(3, 3)
    assert torch.equal(Residual(square)(x), square(x) + x)


def test_every_builder_has_the_same_options():
    expected = list(inspect.signature(models.conv).parameters.values())
    for function in models._REGISTRY.values():
        assert list(inspect.signature(function).parameters.values()) == expected


@pytest.mark.parametrize("name", models.names())
def test_every_network_is_made_of_supported_ops(name):
    net = build(name, (1, 28, 28), 10, normalize=normalization("mnist")).eval()
    assert ox.check(net, input_shape=(1, 28, 28)).ok
    x = torch.rand(2, 1, 28, 28)
    assert torch.allclose(ox.capture(net, input_shape=(1, 28, 28))(x), net(x), atol=1e-5)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("build", [models.cnn7, models.cnn5, models.resnet])
def test_the_fields_networks_are_bounded(build, batch_norm):
    small = {} if build is models.resnet else {"width": 2, "features": 8}
    options = {**small, "batch_norm": batch_norm, "normalize": ([0.5, 0.4], [0.2, 0.3])}
    net = build((2, 9, 7), 3, **options, seed=1)
    again = build((2, 9, 7), 3, **options, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == batch_norm
    net.eval()
    x = torch.rand(2, 2, 9, 7, generator=torch.Generator().manual_seed(0))
    found = ox.bounds(net, ox.LinfBall(x, 0.01), "crown-ibp")
    value = net(x)
    assert (found.lower <= value + 1e-4).all()
    assert (value <= found.upper + 1e-4).all()


def test_a_name_may_carry_a_width():
    narrow = build("cnn7-w2", (1, 8, 8), 3, seed=1)
    same = models.cnn7((1, 8, 8), 3, width=2, features=16, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(narrow.parameters(), same.parameters(), strict=True))
    for wrong in ("cnn7-w0", "cnn7-w", "cnn7-wide", "conv-w16"):
        with pytest.raises(ValueError, match=f"unknown network '{wrong}'"):
            build(wrong)


def test_the_fields_networks_have_their_sizes():
    assert parameters(models.cnn7()) == pytest.approx(17.2e6, rel=0.01)
    assert hidden_units(models.cnn7(width=16, features=128), CIFAR) == [16384, 16384, 8192, 8192, 8192, 128]
    assert hidden_units(models.cnn5(width=2, features=8), CIFAR) == [2048, 2048, 1024, 8]
    assert hidden_units(models.cnn7(width=2, features=8, last_stride=2), CIFAR)[-2:] == [256, 8]
    # The competition's resnet_2b: 8 channels at 16 x 16, four maps of 16 at 8 x 8, 100.
    assert hidden_units(models.resnet(), CIFAR) == [2048, 1024, 1024, 1024, 1024, 100]
    assert hidden_units(models.resnet(size="4b"), CIFAR) == [4096, *[2048] * 4, *[512] * 4, 100]
    with pytest.raises(ValueError, match="size must be '2b' or '4b', got '3b'"):
        models.resnet(size="3b")
