"""Random programs of everyday ops: graph and module are one function, and its bounds hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optrelax as ox
from tests.cases import random_points

# On values [batch, 2, 4]; each gives such a value again, and a weight w [4, 4] stands by.
STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda x, w: F.relu(x - 0.1),
    "abs": lambda x, w: x.abs() - 0.2,
    "hardtanh": lambda x, w: F.hardtanh(x, -0.3, 0.6),
    "product": lambda x, w: x @ w,
    "product from the left": lambda x, w: w[:2, :2] @ x,
    "flip": lambda x, w: x.flip(2),
    "roll": lambda x, w: x.roll(1, 1),
    "turned": lambda x, w: x.transpose(1, 2).reshape(-1, 2, 4),
    "joined": lambda x, w: torch.cat([x[:, :1], F.relu(x[:, 1:])], 1),
    "crossed": lambda x, w: torch.cat([x[..., 2:], -x[..., :2]], -1),
    "stacked": lambda x, w: torch.stack([x.mean(1), x.sum(1) / 2], 1),
    "residual": lambda x, w: x + F.relu(x @ w),
    "centred": lambda x, w: x - x.mean(2, keepdim=True),
    "larger": lambda x, w: torch.maximum(x, x.flip(1) - 0.1),
    "spread": lambda x, w: x.amax(2, keepdim=True) - x,
    "pooled": lambda x, w: F.max_pool1d(x, 2, 1)[..., [0, 1, 2, 2]],
    "convolved": lambda x, w: F.conv1d(F.pad(x, (1, 0)), w.reshape(2, 2, 4)[..., :2]),
    "parts": lambda x, w: torch.cat(x.chunk(2, 2)[::-1], 2) * w[0],
    "picked": lambda x, w: x[:, [1, 1], 0:4],
    "clamped": lambda x, w: torch.minimum(x.clamp_min(-0.4), w[1]),
    "mixed": lambda x, w: torch.einsum("bij,kj->bik", x, w),
}


class Program(nn.Module):
    """Steps behind one another; `back`: how far back each also reads a value, which it adds."""

    def __init__(self, steps: list[tuple[str, int]], seed: int) -> None:
        super().__init__()
        self.steps = steps
        self.w = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for name, back in self.steps:
            value = STEPS[name](values[-1], self.w)
            values.append(value + values[-back] if 0 < back <= len(values) else value)
        return values[-1].flatten(1)


programs = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 3)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(programs, st.integers(0, 99))
def test_graph_is_the_module_and_bounds_hold(steps, seed):
    program = Program(steps, seed).eval()
    network = ox.capture(program, (2, 4))
    x = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    region = ox.LinfBall(x, 0.2)
    points = torch.cat([random_points(region, 30), region.lower[None], region.upper[None]])
    with torch.no_grad():
        values = program(points.flatten(0, 1))
        torch.testing.assert_close(network(points.flatten(0, 1)), values, rtol=1e-11, atol=1e-11)
        values = values.unflatten(0, points.shape[:2])
        slack = 1e-10 * (1 + values.abs().amax())
        for relaxation in ("box", "deepz", "crown"):
            found = ox.bounds(network, region, relaxation)
            assert ((found.lower - slack <= values) & (values <= found.upper + slack)).all(), relaxation
            outward = ox.bounds(network, region, relaxation, rounding="outward")
            assert ((outward.lower <= values) & (values <= outward.upper)).all(), relaxation
