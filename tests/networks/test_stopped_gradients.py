"""`detach`, `no_grad` and backwards of one's own inside a network: the same value, and the gradient that it has."""

import functools

import pytest
import torch
from torch import Tensor, nn

import optrelax as ox


class Net(nn.Module):
    """Two layers, with or without a gradient into the first."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.how = how
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detach":
            return self.last(torch.relu(self.norm(self.first(x))).detach())
        if self.how == "everything":
            with torch.no_grad():
                return self.last(torch.relu(self.norm(self.first(x))))
        if self.how == "both ways":
            h = torch.relu(self.norm(self.first(x)))
            return self.last(h + h.detach())
        if self.how == "weights":
            with torch.no_grad():
                weight = self.first.weight * 2
            return self.last(torch.relu(self.norm(nn.functional.linear(x, weight, self.first.bias))))
        with torch.no_grad():
            h = torch.relu(self.norm(self.first(x)))
        return self.last(h) if self.how == "no_grad" else self.last(Half.apply(self.norm(self.first(x))))


class Half(torch.autograd.Function):
    """ReLU with half its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g / 2


@pytest.mark.parametrize("name", ["box", "deepz", "crown", "triangle"])
@pytest.mark.parametrize("how", ["detach", "no_grad", "weights"])
def test_no_gradient_reaches_what_is_before(how, name):
    """At a point a bound is the network, so its gradient is the network's; in a ball it reaches the same weights."""
    net, x = Net(how), torch.rand(6, 4)
    net(x).sum().backward()
    wanted = {path: p.grad for path, p in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    ox.bounds(net, ox.LinfBall(x, 0.0), name).lower.sum().backward()
    for path, p in net.named_parameters():
        assert (p.grad is None) == (wanted[path] is None), path
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[path], rtol=1e-4, atol=1e-5)
    found = ox.bounds(net, ox.LinfBall(x, 0.1), name)
    assert bool((found.lower <= net(x) + 1e-5).all() & (net(x) <= found.upper + 1e-5).all())


def test_a_network_without_gradient_is_bounded():
    net, x = Net("everything"), torch.rand(6, 4)
    torch.testing.assert_close(ox.bounds(net, ox.LinfBall(x, 0.0), "crown").lower, net(x))


def test_values_that_are_read_both_ways_are_refused():
    assert "detach: stops a gradient that reaches the same values another way" in str(ox.check(Net("both ways"), (4,)))


def test_a_backward_of_ones_own_is_refused_while_weights_take_a_gradient():
    net, x = Net("half"), torch.rand(6, 4)
    (problem,) = ox.check(net, (4,)).problems
    assert (problem.where, problem.op) == ("Half", "torch.autograd.Function")
    assert problem.source.startswith(__file__)
    assert "net.requires_grad_(False)" in problem.reason
    net.requires_grad_(False)
    torch.testing.assert_close(ox.bounds(net, ox.LinfBall(x, 0.0), "crown").lower, net(x))
    net.last.requires_grad_(True)  # behind it: its gradient is as it should be
    assert ox.check(net, (4,)).ok
    net.first.requires_grad_(True)
    assert not ox.check(net, (4,)).ok


def _of_form(form: str) -> type[torch.autograd.Function]:
    """Half, its forward decorated, made on the spot, or without a context."""

    def forward(ctx, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    if form == "apart":

        class Apart(Half):
            forward = staticmethod(lambda x: x.clamp(min=0))
            setup_context = staticmethod(lambda ctx, inputs, output: None)

        return Apart
    ways = {"no_grad": torch.no_grad(), "amp": torch.amp.custom_fwd(device_type="cpu"), "partial": functools.partial}
    return type("Decorated", (Half,), {"forward": staticmethod(ways[form](forward))})


@pytest.mark.parametrize("form", ["apart", "no_grad", "amp", "partial"])
def test_a_backward_of_ones_own_is_known_however_its_forward_is_written(form):
    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(_of_form(form).apply(self.norm(self.first(x))))

    (problem,) = ox.check(Own("half"), (4,)).problems
    assert problem.op == "torch.autograd.Function"


def test_what_shares_a_decorator_with_a_backward_of_ones_own_is_none():
    decorated = _of_form("no_grad")

    class Plain(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.norm(self.first(x)))) + self.constant(x)

        @torch.no_grad()
        def constant(self, x: Tensor) -> Tensor:
            return self.last.bias * 2

    assert ox.check(Plain("half"), (4,)).ok
    assert decorated.forward.__code__ is Plain.constant.__code__  # so that there is something to tell apart


def test_a_weight_of_a_stopped_part_is_stored(tmp_path):
    net, x = Net("no_grad"), torch.rand(6, 4)
    ox.save(net, tmp_path / "net.safetensors", input_shape=(4,))
    torch.testing.assert_close(ox.load(tmp_path / "net.safetensors")(x), net(x))
