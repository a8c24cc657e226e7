"""What the networks of `models` are made of: normalisation, residual blocks, chains of layers with ReLUs between."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Constants", "Normalize", "Residual", "Shape"]

PerChannel = float | Sequence[float]  # one number, or one a channel
Constants = tuple[PerChannel, PerChannel] | None  # mean and standard deviation
Shape = Sequence[int]  # [channels, height, width]; fully connected networks take any


class Normalize(nn.Module):
    """(x - mean) / std by channel: affine, with constants that are buffers.

    One number serves an input of any shape; `c` numbers want [batch, c, height, width].
    Raises ValueError unless mean and std have one length and every std is positive and finite.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: PerChannel, std: PerChannel) -> None:
        super().__init__()
        means, stds = (list(v) if isinstance(v, Sequence) else [v] for v in (mean, std))
        if not means or len(means) != len(stds):
            raise ValueError(f"Normalize: mean and std must have one length, got {len(means)} and {len(stds)}")
        if not all(0 < s < math.inf for s in stds) or not all(map(math.isfinite, means)):
            raise ValueError(f"Normalize: std must be positive and all be finite, got mean {mean}, std {std}")
        # A scalar broadcasts to flat inputs too; [c, 1, 1] would turn [batch, n] into [c, batch, n].
        shape = (-1, 1, 1) if len(means) > 1 else ()
        self.register_buffer("mean", torch.tensor(means).reshape(shape))
        self.register_buffer("std", torch.tensor(stds).reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, *shape] -> [batch, *shape]."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Residual(nn.Module):
    """body(x) + shortcut(x); the shortcut is the identity unless the shapes differ."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[batch, *shape] -> [batch, *body's shape]."""
        total: Tensor = self.body(x) + self.shortcut(x)
        return total


@contextlib.contextmanager
def drawn_from(seed: int | torch.Generator | None) -> Iterator[None]:
    """Weights made inside come from `seed` alone; None leaves everything as it is."""
    if seed is None:
        yield
        return
    if isinstance(seed, torch.Generator):
        seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def normalization(normalize: Constants) -> list[nn.Module]:
    """The layer of these constants, if any."""
    return [] if normalize is None else [Normalize(*normalize)]


def linear_layers(*sizes: int, batch_norm: bool = False) -> list[nn.Module]:
    """Linear layers from size to size, with a ReLU between two, and a batch norm in front of it."""
    for size in sizes:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"fc: sizes must be positive integers, got {size!r} in {sizes}")
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if batch_norm else []), nn.ReLU()]
    return layers[: -2 if batch_norm else -1]


@dataclass(frozen=True, slots=True)
class ConvLayer:
    """One convolution, ReLU after it."""

    channels: int
    kernel: int
    stride: int
    padding: int = 0


def threes(*convs: tuple[int, int]) -> list[ConvLayer]:
    """Padded convolutions of kernel 3: channels and stride of each."""
    return [ConvLayer(channels, 3, stride, 1) for channels, stride in convs]


def image_shape(name: str, input_shape: Shape) -> tuple[int, int, int]:
    """Channels, height and width; ValueError for what is no image."""
    if len(input_shape) != 3 or min(input_shape) < 1:
        got = list(input_shape)
        raise ValueError(f"{name}: input_shape must be (channels, height, width), each at least 1, got {got}")
    channels, height, width = input_shape
    return channels, height, width


def conv_network(
    name: str,
    convs: Sequence[ConvLayer],
    widths: Sequence[int],
    input_shape: Shape,
    normalize: Constants,
    batch_norm: bool = False,
    seed: int | torch.Generator | None = None,
) -> nn.Sequential:
    """Convolutions, Flatten, linear layers; ReLU between any two, batch_norm: with a batch norm in front of it."""
    channels, *spatial = image_shape(name, input_shape)
    with drawn_from(seed):
        layers = normalization(normalize)
        for i, c in enumerate(convs):
            spatial = [(n + 2 * c.padding - c.kernel) // c.stride + 1 for n in spatial]
            if min(spatial) < 1:
                needs = f"convolution {i + 1} of {len(convs)} (kernel {c.kernel}) has nothing to slide over"
                raise ValueError(f"{name}: input {list(input_shape)} is too small: {needs}")
            norm = [nn.BatchNorm2d(c.channels)] if batch_norm else []
            layers += [nn.Conv2d(channels, c.channels, c.kernel, c.stride, c.padding), *norm, nn.ReLU()]
            channels = c.channels
        flat = channels * math.prod(spatial)
        return nn.Sequential(*layers, nn.Flatten(), *linear_layers(flat, *widths, batch_norm=batch_norm))
