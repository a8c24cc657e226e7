"""A default device decides nothing, the inputs' does. "meta" holds no numbers, so that every slip is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import optrelax as ox
from optrelax.layers import LinearProgram, MixedIntegerProgram, QuadraticProgram, Regularised


class Everyday(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)
        self.pools = nn.Sequential(nn.AvgPool2d(2, 1, 1), nn.MaxPool2d(2, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.pools(torch.relu(self.first(x))).flatten(1)[:, :8])
        return y


@pytest.fixture
def meta() -> Iterator[Callable[[], None]]:
    try:
        yield lambda: torch.set_default_device("meta")
    finally:
        torch.set_default_device("cpu")


@pytest.mark.parametrize("relaxation", ["crown", "cauchy", "layerwise"])
def test_bounds_and_the_capture_before_them(relaxation: str, meta: Callable[[], None]) -> None:
    torch.manual_seed(0)
    nets, x = [Everyday().eval() for _ in range(2)], torch.rand(2, 1, 5, 5)
    nets[1].load_state_dict(nets[0].state_dict())
    if relaxation != "crown":
        nets, x = [ox.models.fc(4, 5, 3, seed=0) for _ in range(2)], torch.rand(2, 4)
    labels = nets[0](x).argmax(1)
    wanted = ox.bounds(nets[0], ox.LinfBall(x, 0.1, (0.0, 1.0)), relaxation)
    meta()
    assert ox.check(nets[1], tuple(x.shape[1:]), relaxation).ok
    found = ox.bounds(nets[1], ox.LinfBall(x, 0.1, (0.0, 1.0)), relaxation)
    torch.testing.assert_close(found.lower, wanted.lower)
    if relaxation != "cauchy":
        assert len(ox.certify(nets[1], (x, labels), 0.01, relaxation=relaxation).examples) == 2


def test_programs(meta: Callable[[], None]) -> None:
    f64 = {"dtype": torch.float64, "device": "cpu"}
    c = torch.tensor([[-1.0, -2.0], [-2.0, 1.0]], **f64).requires_grad_()
    A, b, ends = torch.ones(1, 2, **f64), torch.ones(1, **f64), {"lower": torch.zeros(2, **f64)}
    P, closed = torch.eye(2, **f64), {**ends, "upper": torch.ones(2, **f64)}
    whole = torch.ones(2, dtype=torch.bool)

    def values() -> list[Tensor]:
        whole_program = MixedIntegerProgram(whole, primal_gradient=Regularised(0.1))(c, A, b, **closed)
        return [
            LinearProgram()(c, A, b, **ends).lower,
            LinearProgram()(c, A, -b, **ends).lower,
            LinearProgram()(c, **ends).lower,
            QuadraticProgram()(P, c, A, b, **ends).primal,
            whole_program.value,
            whole_program.primal,
        ]

    wanted = values()
    meta()
    for found, before in zip(values(), wanted, strict=True):
        torch.testing.assert_close(found, before)
        if found.isfinite().all():
            found.sum().backward()
