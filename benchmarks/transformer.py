"""A vision transformer of one layer, of the shape that VNN-COMP's have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class VisionTransformer(nn.Module):
    """Patches, one layer of attention and MLP, the mean over places, ten outputs; a norm in front of each part."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.Identity,
        patch: int = 16,
        dim: int = 48,
        heads: int = 3,
        hidden: int = 96,
        size: int = 32,
    ) -> None:
        super().__init__()
        self.heads, self.places = heads, (size // patch) ** 2 + 1
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, self.places, dim))
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norms = nn.ModuleList(norm(dim) for _ in range(3))
        self.wide, self.narrow, self.head = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, size, size] -> [batch, 10]."""
        x = self.embed(x).flatten(2).transpose(1, 2)
        # A multiple of 0: the peer takes no constant that the batch is as wide as.
        x = torch.cat([0 * x[:, :1] + self.first, x], 1) + self.position
        x = x + self.out(self._attention(self.norms[0](x)))
        x = x + self.narrow(torch.relu(self.wide(self.norms[1](x))))
        found: Tensor = self.head(self.norms[2](x.mean(1)))
        return found

    def _attention(self, x: Tensor) -> Tensor:
        dim = x.shape[-1] // self.heads
        query, key, value = (
            part(x).reshape(-1, self.places, self.heads, dim).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        weights = torch.softmax(query @ key.transpose(-1, -2) * dim**-0.5, -1)
        return (weights @ value).transpose(1, 2).reshape(-1, self.places, self.heads * dim)
