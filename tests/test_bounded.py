"""`Bounded`: one module from inputs, radius and labels to margins, whatever bounds them."""

import pytest
import torch
from torch import nn

import optrelax as ox


@pytest.mark.parametrize("relaxation", ["box", "crown", "triangle"])
def test_margins_equal_those_of_the_parts_and_train_the_network(relaxation):
    net = ox.models.fc(6, 8, 4, seed=0)
    bounded = ox.Bounded(net, relaxation)
    x, labels = torch.rand(5, 6), torch.tensor([0, 1, 2, 3, 0])
    found = bounded(x, 0.05, labels)
    wanted = ox.lower_bounds(net, ox.LinfBall(x, 0.05, clip=(0.0, 1.0)), ox.margins(labels, 4), relaxation)
    assert torch.equal(found, wanted)
    ox.certified_cross_entropy(found).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())
    b = bounded.bounds(x, 0.05)
    assert bool(((b.lower <= net(x) + 1e-5) & (net(x) <= b.upper + 1e-5)).all())


def test_it_is_a_module_with_the_networks_parameters():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    bounded = ox.Bounded(net, "crown-ibp", clip=None)
    assert list(bounded.parameters()) == list(net.parameters())
    assert {name.partition(".")[0] for name in bounded.state_dict()} == {"net"}
    x = torch.full((2, 2, 2), 1.5)
    assert bounded(x, 0.1, torch.tensor([0, 2])).shape == (2, 2)


def test_an_input_in_the_place_of_a_region_is_named():
    with pytest.raises(TypeError, match=r"got Tensor; write ox.LinfBall\(x, eps\)"):
        ox.bounds(ox.models.fc(4, 3, 2, seed=0), torch.rand(1, 4))
