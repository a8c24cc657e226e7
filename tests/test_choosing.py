"""What docs/choosing.md says applies where is what the registry does."""

from collections.abc import Callable
from functools import cache
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

import optrelax as ox
from optrelax.errors import UnsupportedOpError, UnsupportedRegionError
from optrelax.networks.activations import elementary
from optrelax.regions import Region

PAGE = Path(__file__).resolve().parent.parent / "docs" / "choosing.md"


class Middle(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.function = nn.Linear(2, 2), nn.Linear(2, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


X = torch.full((1, 2), 0.5, dtype=torch.float64)
BOX, BALL = ox.LinfBall(X, 0.1), ox.L2Ball(X, 0.1)
COLUMNS: dict[str, tuple[Callable[[Tensor], Tensor], Region, str]] = {
    "ReLU": (torch.relu, BOX, "nearest"),
    "two kinks": (lambda x: x.clamp(0.0, 0.1), BOX, "nearest"),
    "smooth": (torch.tanh, BOX, "nearest"),
    "products": (lambda x: x * x.flip(1), BOX, "nearest"),
    "maxima": (lambda x: torch.maximum(x, x.flip(1)), BOX, "nearest"),
    "balls": (torch.relu, BALL, "nearest"),
    "balls, rounded outward": (torch.relu, BALL, "outward"),
}


@cache
def network(column: str) -> ox.Network:
    return ox.capture(Middle(COLUMNS[column][0]).double(), (2,))


def takes(name: str, column: str) -> str:
    _, region, rounding = COLUMNS[column]
    if name == "cauchy" and rounding == "outward":
        return "-"  # an estimate is no bound, however it is rounded
    try:
        with torch.no_grad():
            ox.bounds(network(column), region, name, rounding=rounding)
    except (UnsupportedOpError, UnsupportedRegionError):
        return "-"
    return "yes"


def test_the_table_of_what_applies_is_what_the_registry_does():
    rows = [(tuple(takes(name, column) for column in COLUMNS), name) for name in ox.relaxations.names()]
    rows.sort(key=lambda row: row[0], reverse=True)  # those that take most first; names stay in their order
    lines = [f"| relaxation | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for said, group in groupby(rows, key=lambda row: row[0]):
        names = ", ".join(f"`{name}`" for _, name in group)
        lines.append(f"| {names} | {' | '.join(said)} |")
    table = "\n".join(lines)
    assert table in PAGE.read_text(), f"docs/choosing.md wants the table\n{table}"


def test_every_smooth_activation_is_named():
    words = {"gelu_tanh": "GELU (exact and by tanh)", "power": "whole powers", "rsqrt": "1 / sqrt"}
    text = PAGE.read_text()
    for name in elementary.names():
        said = words.get(name, name)
        assert said.lower() in text.lower(), name
