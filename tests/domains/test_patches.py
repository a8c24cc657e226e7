"""Bounds behind two convolutions, patch by patch: those of rows pulled back as images."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import optrelax as ox
from optrelax.domains import patches
from optrelax.relaxations import bytes_needed, resolve

GEOMETRIES = [  # kernel, stride, padding of both; height, width
    ((3, 1, 1), (3, 2, 1), (7, 8)),
    ((4, 2, 1), (4, 2, 1), (12, 13)),
    ((2, 2, 0), (3, 1, 2), (9, 9)),
    (((1, 3), (2, 1), (0, 1)), ((3, 2), (1, 2), (1, 0)), (8, 7)),
    ((3, 3, 2), (2, 1, 1), (10, 7)),  # some windows read the padding alone
]


def network(first, second, image, dtype=torch.float64, between=nn.ReLU, bias=True):
    a, b = nn.Conv2d(2, 3, *first, bias=bias), nn.Conv2d(3, 4, *second, bias=bias)
    body = nn.Sequential(a, between(), b, nn.ReLU(), nn.Flatten())
    net = nn.Sequential(*body, nn.Linear(body(torch.rand(1, 2, *image)).shape[1], 5)).to(dtype)
    return net, ox.capture(net, (2, *image))


def bounds_and_gradients(net, captured, relaxation, found, dtype=torch.float64):
    x = torch.rand(3, *captured.input_shape, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()
    net.zero_grad()
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        find = patches.find
        patch.setattr(patches, "find", lambda *given: calls.append(find(*given)) or calls[-1] if found else None)
        region = ox.LinfBall(x, 0.1, (0.0, 1.0))
        low = ox.lower_bounds(captured, region, torch.eye(5), relaxation)
        before = ox.preactivation_bounds(captured, region, relaxation)
        (low.sum() + sum(b.upper.pow(2).sum() - b.lower.sum() for b in before.values())).backward()
    ends = [t.detach() for b in before.values() for t in (b.lower, b.upper)]
    return [low.detach(), x.grad, *ends, *(p.grad for p in net.parameters())], any(calls)


@pytest.mark.parametrize("relaxation", ["crown", "crown-0-tria", "deepz:direction=backward", "fast-lin", "hbox"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_bounds_and_gradients_are_those_of_whole_rows(geometry, relaxation):
    net, captured = network(*geometry)
    ours, found = bounds_and_gradients(net, captured, relaxation, True)
    theirs, _ = bounds_and_gradients(net, captured, relaxation, False)
    assert found
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


@pytest.mark.parametrize("between", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh])
def test_other_activations_and_no_bias_and_many_channels(between):
    net, captured = network((3, 1, 1), (3, 1, 1), (6, 6), torch.float32, between, bias=False)
    ours, _ = bounds_and_gradients(net, captured, "crown", True, torch.float32)
    theirs, _ = bounds_and_gradients(net, captured, "crown", False, torch.float32)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_the_networks_of_the_paper_and_their_values():
    net = ox.models.build("convplus", seed=0)
    captured = ox.capture(net, ox.models.MNIST)
    x = torch.rand(2, *ox.models.MNIST, generator=torch.Generator().manual_seed(0))
    found = patches.find(captured, captured.activations[1].inputs[0])
    assert found is not None
    assert found.sizes == (100, 256, 100)
    ours, theirs = [], []
    for which, into in ((patches.find, ours), (lambda *_: None, theirs)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(patches, "find", which)
            into += [ox.lower_bounds(captured, ox.LinfBall(x, 0.02), torch.eye(10), "crown")]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    region = ox.LinfBall(x, 0.02)
    low, high = (getattr(ox.bounds(captured, region, "crown"), end) for end in ("lower", "upper"))
    for _ in range(20):
        y = net(x + 0.04 * (torch.rand_like(x) - 0.5))
        assert (low <= y).all()
        assert (y <= high).all()


def test_what_is_not_two_plain_convolutions_is_not_found():
    def source(net, shape):
        captured = ox.capture(net.eval(), shape)
        return patches.find(captured, captured.activations[1].inputs[0])

    def stack(*first, second=None):
        return nn.Sequential(*first, nn.ReLU(), second or nn.Conv2d(4, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))

    assert source(stack(nn.Conv2d(1, 4, 3)), (1, 6, 6)) is not None
    assert source(stack(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3)), (1, 6, 6)) is not None
    assert source(stack(nn.Conv2d(1, 4, 3, dilation=2)), (1, 8, 8)) is None
    assert source(stack(nn.Conv2d(1, 4, 3), second=nn.Conv2d(4, 2, 3, groups=2)), (1, 6, 6)) is None
    assert source(stack(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), (1, 6, 6)) is None
    deep = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.ReLU(), nn.Flatten())
    assert source(nn.Sequential(deep, nn.Linear(8, 2)), (1, 8, 8)) is None


def test_outward_rounding_and_little_memory_take_whole_rows():
    _, captured = network((3, 1, 1), (3, 1, 1), (8, 8), torch.float32)
    region, eye = ox.LinfBall(torch.rand(4, 2, 8, 8), 0.05), torch.eye(5)
    nearest = ox.lower_bounds(captured, region, eye, "crown").detach()
    outward = ox.lower_bounds(captured, region, eye, "crown:rounding=outward").detach()
    assert (outward <= nearest + 1e-5).all()
    crown = resolve("crown")
    least = replace(crown, max_bytes=bytes_needed(crown, captured, region, 5) // 3)
    torch.testing.assert_close(ox.lower_bounds(captured, region, eye, least), nearest, rtol=1e-4, atol=1e-4)
    assert math.isfinite(float(nearest.sum()))


def test_peak_memory_is_that_of_the_count():
    from test_memory import TOLERANCE, peak

    net, captured = network((4, 2, 1), (4, 2, 1), (16, 16), torch.float32)
    region = ox.LinfBall(torch.rand(8, 2, 16, 16), 0.05)
    crown = replace(resolve("crown"), max_bytes=math.inf)

    def step():
        net.zero_grad()
        ox.lower_bounds(captured, region, torch.eye(5), crown).sum().backward()

    need = bytes_needed(crown, captured, region, 5)
    assert peak(step) <= TOLERANCE * need
    assert need <= 2 * peak(step)


@pytest.mark.parametrize("relaxation", ["crown", "fast-lin"])
def test_what_overflows_is_no_bound(relaxation):
    net, captured = network((3, 1, 1), (3, 1, 1), (6, 6), torch.float32)
    with torch.no_grad():
        net[0].bias.fill_(1e30)
        net[2].weight.fill_(1e10)
        net[2].weight[:2] *= -1
    x = torch.rand(2, 2, 6, 6)
    found = list(ox.preactivation_bounds(captured, ox.LinfBall(x, 0.05), relaxation).values())[1]
    assert not (found.lower == math.inf).any()
    assert not (found.upper == -math.inf).any()


@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize("bias", [-50.0, 50.0, "ties"])
@pytest.mark.parametrize("relaxation", ["crown", "fast-lin"])
def test_edges_in_float32(relaxation, bias, eps):
    """Dead and active maps, neurons at l = 0, u = 0 and |l| = |u|, boxes of no width: as whole rows, values inside."""
    net, captured = network((1, 1, 0), (3, 1, 1), (5, 5), torch.float32)
    with torch.no_grad():
        if bias == "ties":  # the pixels are 0.5: with eps 0.3 the maps have l = 0, u = 0 and |l| = |u|
            net[0].weight.zero_()[:, 0] = 1.0
            net[0].bias.copy_(torch.tensor([-0.2, -0.8, -0.5]))
        else:
            net[0].bias.fill_(bias)
    x, found = torch.full((2, 2, 5, 5), 0.5), []
    region = ox.LinfBall(x, eps)
    for which in (patches.find, lambda *_: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(patches, "find", which)
            before = list(ox.preactivation_bounds(captured, region, relaxation).values())[1]
            found.append([before.lower.detach(), before.upper.detach()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    low, high = found[0]
    for _ in range(20):
        y = net[:3](x + eps * (2 * torch.rand_like(x) - 1)).detach()
        assert (low <= y + 1e-4).all()
        assert (y <= high + 1e-4).all()
