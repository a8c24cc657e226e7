"""Random changes of training images, by name: drawn from a generator, one draw an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["AUGMENTATIONS", "augmented"]

_PADDING = 4


def _crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to four pixels a direction, zeros where it came from."""
    n, channels, height, width = images.shape
    padded = F.pad(images, (_PADDING,) * 4)
    moves = torch.randint(2 * _PADDING + 1, (2, n, 1), generator=generator, device="cpu").to(images.device)
    rows = (moves[0] + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (moves[1] + torch.arange(width, device=images.device))[:, None, None, :]
    place = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return padded[place, channel, rows, columns]


def _flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every other image mirrored left to right, by chance."""
    mirrored = (torch.rand(len(images), generator=generator, device="cpu") < 0.5).to(images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


AUGMENTATIONS: Mapping[str, tuple[Callable[[Tensor, torch.Generator], Tensor], ...]] = {
    "crop": (_crop,),
    "flip": (_flip,),
    "crop-flip": (_crop, _flip),
}
"""By name: "crop-flip" is what CIFAR-10 is trained with."""


def augmented(name: str, images: Tensor, generator: torch.Generator) -> Tensor:
    """Images changed as `name` of AUGMENTATIONS says: [n, channels, height, width] -> the same.

    Raises ValueError for what is no image.
    """
    if images.ndim != 4:
        raise ValueError(f"augment: {name!r} wants images [n, channels, height, width], got {list(images.shape)}")
    for change in AUGMENTATIONS[name]:
        images = change(images, generator)
    return images
