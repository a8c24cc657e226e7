"""The networks of the papers, and fully connected ones of any size: `nn.Sequential` modules of supported ops.

`normalize=(mean, std)` puts the data set's constants into the network, so that an input box stays in pixels.
Weights are PyTorch's default initialisation, drawn as any module draws them or from `seed` alone.

Example:
    >>> net = ox.models.fc(4, 8, 3, seed=0)
    >>> net(torch.zeros(5, 4)).shape
    torch.Size([5, 3])
    >>> ox.models.names()[:3]
    ['fc', 'fc-small', 'conv']
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import nn

from optrelax.checks import require_choice
from optrelax.errors import suggest
from optrelax.networks.model_parts import (
    Constants,
    ConvLayer,
    Normalize,
    Residual,
    Shape,
    conv_network,
    drawn_from,
    image_shape,
    linear_layers,
    normalization,
    threes,
)

__all__ = [
    "Normalize",
    "Residual",
    "build",
    "builder",
    "cnn5",
    "cnn5_wide",
    "cnn7",
    "cnn7_wide",
    "conv",
    "conv_plus",
    "dm_large",
    "dm_medium",
    "fc",
    "fc_large",
    "fc_small",
    "model",
    "names",
    "residual",
    "resnet",
    "resnet_2b",
    "resnet_4b",
]

MNIST = (1, 28, 28)


Builder = Callable[..., nn.Sequential]  # (input_shape, classes, *, normalize)
_REGISTRY: dict[str, Builder] = {}
_WIDTHS: dict[str, Builder] = {}  # those that come in any width, with options width and features
_FEATURES = 8  # of the hidden layer, by the width


def model(name: str) -> Callable[[Builder], Builder]:
    """Register a function under `name`, for `build` and the command line."""
    if name in _REGISTRY:
        raise ValueError(f"model: {name!r} is registered already")

    def register(builder: Builder) -> Builder:
        _REGISTRY[name] = builder
        return builder

    return register


def names() -> list[str]:
    """Names that `build` takes, beside those with a width, such as cnn7-w16."""
    return list(_REGISTRY)


def builder(name: str) -> Builder:
    """What makes the network of a name; "cnn7-w16" is CNN7 with a first layer of 16 channels and all else to scale.

    Raises ValueError for an unknown name.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    stem, _, width = name.rpartition("-w")
    if stem in _WIDTHS and width.isdecimal() and int(width) > 0:
        return partial(_WIDTHS[stem], width=int(width), features=_FEATURES * int(width))
    raise ValueError(f"unknown network {name!r}; {suggest(name.lower(), _REGISTRY)}")


def build(
    name: str,
    input_shape: Shape = MNIST,
    classes: int = 10,
    seed: int | torch.Generator | None = None,
    *,
    normalize: Constants = None,
) -> nn.Sequential:
    """A named network, in training mode: [batch, *input_shape] -> [batch, classes].

    With a seed the weights depend on nothing else, are made on the CPU, and no global generator moves; a
    `torch.Generator` gives one number as seed. Raises ValueError for an unknown name, and for an input
    that is too small for the network's convolutions.
    """
    make = builder(name)
    with drawn_from(seed):
        return make(input_shape, classes, normalize=normalize)


def fc(
    inputs: int,
    *widths: int,
    normalize: Constants = None,
    seed: int | torch.Generator | None = None,
) -> nn.Sequential:
    """Fully connected ReLU network: fc(784, 100, 100, 10) has two hidden layers and ten outputs.

    [batch, *shape] of `inputs` numbers each, flat or not -> [batch, widths[-1]].
    Raises ValueError without a width, or where one is not a positive integer.
    """
    if not widths:
        raise ValueError(f"fc: expected the input size and at least one width, got fc({inputs})")
    with drawn_from(seed):
        return nn.Sequential(*normalization(normalize), nn.Flatten(), *linear_layers(inputs, *widths))


@model("fc")
def fc_large(input_shape: Shape = MNIST, classes: int = 10, *, normalize: Constants = None) -> nn.Sequential:
    """FC: 400-200-100-100-classes. Source: Jovanovic et al. 2021."""
    return fc(math.prod(input_shape), 400, 200, 100, 100, classes, normalize=normalize)


@model("fc-small")
def fc_small(input_shape: Shape = MNIST, classes: int = 10, *, normalize: Constants = None) -> nn.Sequential:
    """FC-SMALL: 100-100-classes. Source: Jovanovic et al. 2021."""
    return fc(math.prod(input_shape), 100, 100, classes, normalize=normalize)


@model("conv")
def conv(input_shape: Shape = MNIST, classes: int = 10, *, normalize: Constants = None) -> nn.Sequential:
    """CONV: conv(16, k4, s2, p1)-100-classes. Source: Jovanovic et al. 2021."""
    return conv_network("conv", [ConvLayer(16, 4, 2, 1)], [100, classes], input_shape, normalize)


@model("convplus")
def conv_plus(input_shape: Shape = MNIST, classes: int = 10, *, normalize: Constants = None) -> nn.Sequential:
    """CONVPLUS, also dm-small: conv(16, k4, s2)-conv(32, k4, s1)-100-classes. Source: Gowal et al. 2018."""
    return conv_network("convplus", [ConvLayer(16, 4, 2), ConvLayer(32, 4, 1)], [100, classes], input_shape, normalize)


@model("dm-medium")
def dm_medium(input_shape: Shape = MNIST, classes: int = 10, *, normalize: Constants = None) -> nn.Sequential:
    """Four unpadded convolutions (32, k3, s1; 32, k4, s2; 64, k3, s1; 64, k4, s2)-512-512-classes.

    Source: Gowal et al. 2018, table of architectures.
    """
    convs = [ConvLayer(32, 3, 1), ConvLayer(32, 4, 2), ConvLayer(64, 3, 1), ConvLayer(64, 4, 2)]
    return conv_network("dm-medium", convs, [512, 512, classes], input_shape, normalize)


@model("dm-large")
def dm_large(input_shape: Shape = MNIST, classes: int = 10, *, normalize: Constants = None) -> nn.Sequential:
    """Five padded convolutions of kernel 3 (64, s1; 64, s1; 128, s2; 128, s1; 128, s1)-512-classes.

    Source: Gowal et al. 2018, table of architectures. Padding is one on each side; the authors' framework
    pads the far side alone at stride 2, which gives the same sizes.
    """
    convs = threes((64, 1), (64, 1), (128, 2), (128, 1), (128, 1))
    return conv_network("dm-large", convs, [512, classes], input_shape, normalize)


@model("residual")
def residual(input_shape: Shape = MNIST, classes: int = 10, *, normalize: Constants = None) -> nn.Sequential:
    """Small residual network: conv(8, k3, s2), a block of 8 channels, one of 16 at stride 2, then 64-classes.

    Padded; the second block's shortcut is a convolution of kernel 1. No paper's: for tests and examples.
    """
    channels, *spatial = image_shape("residual", input_shape)
    spatial = [math.ceil(n / 4) for n in spatial]
    same = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    half = nn.Sequential(nn.Conv2d(8, 16, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    return nn.Sequential(
        *normalization(normalize),
        *(nn.Conv2d(channels, 8, 3, 2, padding=1), nn.ReLU()),
        *(Residual(same), nn.ReLU()),
        *(Residual(half, nn.Conv2d(8, 16, 1, 2)), nn.ReLU()),
        nn.Flatten(),
        *linear_layers(16 * math.prod(spatial), 64, classes),
    )


CIFAR = (3, 32, 32)


def cnn7(
    input_shape: Shape = CIFAR,
    classes: int = 10,
    *,
    width: int = 64,
    features: int = 512,
    last_stride: int = 1,
    batch_norm: bool = True,
    normalize: Constants = None,
    seed: int | torch.Generator | None = None,
) -> nn.Sequential:
    """CNN7: five padded convolutions of kernel 3 (w, w, 2w at stride 2, 2w, 2w)-features-classes.

    width: w.  last_stride: of the fifth, 2 for TinyImageNet.  batch_norm: behind every layer but the last.
    [batch, *input_shape] -> [batch, classes], in training mode.  Source: Shi et al. 2021.
    """
    convs = threes((width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, last_stride))
    return conv_network("cnn7", convs, [features, classes], input_shape, normalize, batch_norm, seed)


def cnn5(
    input_shape: Shape = CIFAR,
    classes: int = 10,
    *,
    width: int = 64,
    features: int = 512,
    batch_norm: bool = True,
    normalize: Constants = None,
    seed: int | torch.Generator | None = None,
) -> nn.Sequential:
    """CNN5: three padded convolutions of kernel 3 (w, w, 2w at stride 2)-features-classes; options as of `cnn7`."""
    convs = threes((width, 1), (width, 1), (2 * width, 2))
    return conv_network("cnn5", convs, [features, classes], input_shape, normalize, batch_norm, seed)


def resnet(
    input_shape: Shape = CIFAR,
    classes: int = 10,
    *,
    size: Literal["2b", "4b"] = "2b",
    batch_norm: bool = False,
    normalize: Constants = None,
    seed: int | torch.Generator | None = None,
) -> nn.Sequential:
    """Residual networks after VNN-COMP 2021: a convolution of 8 (2b) or 16 channels, two or four blocks, 100-classes.

    Blocks are two convolutions of kernel 3 with 16 (2b) or 32 channels; the first of every pair halves the map.
    batch_norm: behind every convolution but the shortcuts' and the first (the competition's files have it folded in).
    [batch, *input_shape] -> [batch, classes], in training mode.
    """
    require_choice("resnet", "size", size, "2b", "4b")
    inputs, *spatial = image_shape("resnet", input_shape)
    width = 8 if size == "2b" else 16
    strides = (2, 1) if size == "2b" else (2, 1, 2, 1)
    with drawn_from(seed):
        layers = [*normalization(normalize), nn.Conv2d(inputs, width, 3, 2, 1), nn.ReLU()]
        channels, out = width, 2 * width
        for stride in strides:
            norms = [[nn.BatchNorm2d(out)] if batch_norm else [] for _ in range(2)]
            first, second = nn.Conv2d(channels, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)
            body = nn.Sequential(first, *norms[0], nn.ReLU(), second, *norms[1])
            layers += [Residual(body, None if stride == 1 else nn.Conv2d(channels, out, 1, stride)), nn.ReLU()]
            channels = out
        halvings = 1 + strides.count(2)
        spatial = [-(-n // 2**halvings) for n in spatial]
        return nn.Sequential(*layers, nn.Flatten(), *linear_layers(channels * math.prod(spatial), 100, classes))


_WIDTHS |= {"cnn7": cnn7, "cnn5": cnn5}


@model("cnn7")
def cnn7_wide(input_shape: Shape = MNIST, classes: int = 10, *, normalize: Constants = None) -> nn.Sequential:
    """CNN7 as published: width 64, batch norms."""
    return cnn7(input_shape, classes, normalize=normalize)


@model("cnn5")
def cnn5_wide(input_shape: Shape = MNIST, classes: int = 10, *, normalize: Constants = None) -> nn.Sequential:
    """CNN5 as published: width 64, batch norms."""
    return cnn5(input_shape, classes, normalize=normalize)


@model("resnet-2b")
def resnet_2b(input_shape: Shape = MNIST, classes: int = 10, *, normalize: Constants = None) -> nn.Sequential:
    """The smaller residual network, with batch norms: `resnet` to be trained."""
    return resnet(input_shape, classes, size="2b", batch_norm=True, normalize=normalize)


@model("resnet-4b")
def resnet_4b(input_shape: Shape = MNIST, classes: int = 10, *, normalize: Constants = None) -> nn.Sequential:
    """The larger residual network, with batch norms: `resnet` to be trained."""
    return resnet(input_shape, classes, size="4b", batch_norm=True, normalize=normalize)
