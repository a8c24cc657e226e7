"""Agreement with an independent implementation: margins of two networks by every relaxation that it had."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optrelax as ox

DATA = Path(__file__).parent / "data"
NETWORKS = {
    "fc-20-16-16-5": [nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)],
    "conv-8x8": [
        nn.Conv2d(1, 4, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    ],
}


def load(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, ox.LinfBall, Tensor, dict[str, Tensor]]:
    """Network, region, specification and the margins' lower bounds by relaxation."""
    with np.load(DATA / f"{name}.npz") as file:
        content = {key: torch.from_numpy(file[key]) for key in file.files}
    net = nn.Sequential(*NETWORKS[name]).to(dtype)
    layers = [m for m in net if hasattr(m, "weight")]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.weight.copy_(content[f"weight{i}"])
            layer.bias.copy_(content[f"bias{i}"])
    x = content["x"].to(dtype)
    torch.testing.assert_close(net(x).detach(), content["logits"].to(dtype))
    region = ox.LinfBall(x, float(content["eps"]), clip=(0.0, 1.0))
    margins = {k.partition("/")[2]: v for k, v in content.items() if k.startswith("margin_lower/")}
    return net, region, ox.margins(content["labels"], content["logits"].shape[1]), margins


def names(network: str) -> list[str]:
    with np.load(DATA / f"{network}.npz") as file:
        return [key.partition("/")[2] for key in file.files if key.startswith("margin_lower/")]


@pytest.mark.parametrize(("network", "name"), [(n, name) for n in NETWORKS for name in names(n)])
def test_margins_agree_with_the_reference(network, name):
    net, region, spec, expected = load(network)
    found = ox.lower_bounds(net, region, spec, name).detach()
    error = (found - expected[name]).abs() / expected[name].abs().clamp_min(1)
    assert float(error.max()) <= 1e-5


@pytest.mark.parametrize("name", ["box", "deepz", "crown"])
@pytest.mark.parametrize("network", NETWORKS)
def test_float32_agrees_to_its_own_rounding(network, name):
    net, region, spec, expected = load(network, torch.float32)
    found = ox.lower_bounds(net, region, spec, name).detach()
    assert found.dtype == torch.float32
    error = (found.double() - expected[name]).abs() / expected[name].abs().clamp_min(1)
    assert float(error.max()) <= 1e-4


@pytest.mark.parametrize("network", NETWORKS)
def test_fast_lin_is_what_deepz_gives(network):
    """deepz and fast-lin are one relaxation, as lines and as noise terms, wherever the rows go."""
    net, region, spec, expected = load(network)
    found = ox.lower_bounds(net, region, spec, "fast-lin").detach()
    error = (found - expected["deepz"]).abs() / expected["deepz"].abs().clamp_min(1)
    assert float(error.max()) <= 1e-5
