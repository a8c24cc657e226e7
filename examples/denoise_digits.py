"""Total-variation denoising of digits as a layer: how much each pair of neighbours is smoothed, learned from examples.

    x(y, w) = argmin |x - y|^2 / 2 + sum over neighbours (i, j) of w_ij |x_i - x_j|

is solved by its dual, a quadratic program in a box: x = y - D^T u with min |D^T u|^2 / 2 - u.D y, -w <= u <= w, where D
takes the differences of neighbours. Source: Amos & Kolter 2017 (OptNet), section 4.2; the weights are learned here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import optrelax as ox
from optrelax.layers import QuadraticProgram

SIDE = 8


def differences() -> Tensor:
    """[112, 64]: right neighbour less pixel, lower neighbour less pixel."""
    eye = torch.eye(SIDE * SIDE, dtype=torch.float64).reshape(SIDE, SIDE, -1)
    return torch.cat([(eye[:, 1:] - eye[:, :-1]).flatten(0, 1), (eye[1:] - eye[:-1]).flatten(0, 1)])


class TotalVariation(nn.Module):
    """[batch, 64] -> [batch, 64], one weight a pair of neighbours."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.register_buffer("D", differences())
        self.log_weights = nn.Parameter(torch.full((len(self.D),), weight, dtype=torch.float64).log())
        self.program = QuadraticProgram()

    def forward(self, y: Tensor) -> Tensor:
        """Denoise."""
        w = self.log_weights.exp()
        u = self.program(self.D @ self.D.mT, -y @ self.D.mT, lower=-w, upper=w).primal
        return y - u @ self.D


def main(steps: int = 20, batch: int = 20) -> tuple[float, float, float]:
    """Returns the held-out mean squared error of the noisy digits, of equal weights, and of the learned ones."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for split in ("train", "test"):
        clean = ox.load_dataset("digits", split=split)[:100][0].reshape(-1, SIDE * SIDE).double()
        found.append((clean, clean + 0.2 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)))
    (clean, noisy), (test_clean, test_noisy) = found
    layer = TotalVariation(0.1)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1)
    with torch.no_grad():
        errors = [float((part - test_clean).square().mean()) for part in (test_noisy, layer(test_noisy))]
    for step in range(steps):
        chosen = torch.arange(step * batch, (step + 1) * batch) % len(clean)
        loss = (layer(noisy[chosen]) - clean[chosen]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        errors.append(float((layer(test_noisy) - test_clean).square().mean()))
    print("squared error, held out: noisy {:.4f}, equal weights {:.4f}, learned {:.4f}".format(*errors))
    return errors[0], errors[1], errors[2]


if __name__ == "__main__":
    main()
