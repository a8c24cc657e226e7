"""Zonotopes and hybrid zonotopes: shared noise, new errors, projections, and the fold into the last affine ops."""

import itertools
import subprocess
import sys

import pytest
import torch
from cases import BY_NAME, inputs, specification
from torch import Tensor, nn

import optrelax as ox
from optrelax.domains.lines import band_lines
from optrelax.domains.noise_terms import Block, Zonotope, median
from optrelax.domains.zonotope import Walk, propagate
from optrelax.domains.zonotope_rows import frontier


class Branches(nn.Module):
    """x - x, where intervals forget that both are one value."""

    def forward(self, x: Tensor) -> Tensor:
        y = 3 * x + 1
        return y - y


class Twice(nn.Module):
    """A value added to itself and read once more."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.layer(x))
        return (h + h) - self.layer(h)


def walk(**options: object) -> Walk:
    return Walk(lambda a, l, u: band_lines(a, l, u, slope="chord"), **options)  # type: ignore[arg-type]


def noise_corners(z: Zonotope) -> Tensor:
    """The zonotope's value at every corner of its noise: [2 ** e, *shape], for one example without beta."""
    generators = torch.cat(
        [b.generators[0] * b.scale[0][:, *[None] * (b.generators.dim() - 2)] for b in z.blocks.values()]
    )
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(generators))), dtype=generators.dtype)
    return z.center[0] + (signs @ generators.flatten(1)).reshape(-1, *generators.shape[1:])


def test_radius_is_attained_at_the_corners_of_the_noise():
    g = torch.Generator().manual_seed(0)
    blocks = {
        "a": Block(torch.randn(1, 3, 2, 2, generator=g), torch.rand(1, 3, generator=g)),
        "b": Block(torch.randn(1, 2, 2, 2, generator=g), torch.rand(1, 2, generator=g)),
    }
    z = Zonotope(torch.randn(1, 2, 2, generator=g), blocks)
    values = noise_corners(z)
    torch.testing.assert_close(values.amax(0), z.bounds.upper[0])
    torch.testing.assert_close(values.amin(0), z.bounds.lower[0])


def test_shared_generators_serve_a_batch_of_scales():
    g = torch.Generator().manual_seed(0)
    shared, scale = torch.randn(1, 3, 4, generator=g), torch.rand(5, 3, generator=g)
    torch.testing.assert_close(Block(shared, scale).radius, Block(shared.expand(5, 3, 4), scale).radius)


@pytest.mark.parametrize("name", ["fc", "functional residual"])
def test_the_output_s_zonotope_holds_the_network_on_its_own_noise(name):
    """Each input of the region is a choice of the input's noise; new errors stay within theirs."""
    case = BY_NAME[name]
    network = case.network()
    region = ox.LinfBall(inputs(case.input_shape, 1), 0.3)
    with torch.no_grad():
        found = propagate(network, region, walk(), frozenset({network.output}))
        z = found.kept[network.output]
        signs = torch.rand(300, *region.lower.shape[1:], generator=torch.Generator().manual_seed(0)).double() * 2 - 1
        x = region.center + signs * region.radius
        own = z.blocks[network.input]
        middle = z.center + (signs.flatten(1) * own.scale) @ own.generators[0].flatten(1)
        rest = sum((b.radius for key, b in z.blocks.items() if key != network.input), torch.zeros_like(z.center))
        values = network.module(x)
    assert (values <= middle + rest + 1e-9).all()
    assert (values >= middle - rest - 1e-9).all()


def test_one_value_read_twice_is_one_value():
    """x - x is 0 for shared noise; intervals, which share nothing, keep twice the width."""
    region = ox.LinfBall(inputs((3,), 2), 0.25)
    for name in ("deepz", "hbox", "crown"):
        found = ox.bounds(Branches(), region, name)
        assert found.lower.abs().max() <= 1e-14
        assert found.upper.abs().max() <= 1e-14
    box = ox.preactivation_bounds(nn.Sequential(Branches(), nn.ReLU()), region, "box")["1"]
    torch.testing.assert_close(box.width, torch.full((2, 3), 3.0).double())


def test_a_value_added_to_itself_stays_for_its_other_readers():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = Twice().double()
    region = ox.LinfBall(inputs((3,), 2), 0.25)
    forward, backward = (ox.bounds(net, region, ox.DeepZ(direction=d)) for d in ("forward", "backward"))
    torch.testing.assert_close(forward.lower, backward.lower)
    torch.testing.assert_close(forward.upper, backward.upper)


def test_new_errors_are_born_at_crossing_neurons_alone():
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU()).double()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.copy_(torch.tensor([-5.0, 0.2, 5.0]))  # dead, crossing, active
    network = ox.capture(net)
    region = ox.InputBox(torch.tensor([[-1.0]]).double(), torch.tensor([[1.0]]).double())
    with torch.no_grad():
        z = propagate(network, region, walk(), frozenset({network.output})).kept[network.output]
        hybrid = propagate(network, region, walk(errors="interval"), frozenset({network.output})).kept[network.output]
    born = z.blocks[network.output].generators[0]
    assert born.tolist() == [[0, 1, 0]]
    assert set(hybrid.blocks) == {network.input}
    assert hybrid.beta is not None
    torch.testing.assert_close(hybrid.beta[0], z.blocks[network.output].radius[0])
    assert hybrid.beta[0, 0] == hybrid.beta[0, 2] == 0


def test_noise_is_made_for_pixels_that_move():
    network = BY_NAME["fc"].network()
    x = inputs((5,), 2)
    eps = torch.tensor([[0.1, 0, 0, 0.2, 0], [0, 0, 0.1, 0.2, 0]]).double()
    z = propagate(network, ox.LinfBall(x, eps), walk(), frozenset({network.input})).kept[network.input]
    assert z.blocks[network.input].generators.shape == (1, 3, 5)


def test_rows_are_folded_into_the_last_affine_ops():
    """Elision: a margin's bound is that of the network whose last layer computes the margin."""
    net, rows = BY_NAME["fc"].module(), specification(3)
    folded = nn.Sequential(*net[:-1], nn.Linear(6, 4)).double()
    with torch.no_grad():
        folded[-1].weight.copy_(rows @ net[-1].weight)
        folded[-1].bias.copy_(rows @ net[-1].bias)
    region = ox.LinfBall(inputs((5,), 3), 0.3)
    for name in ("box", "hbox", "hzono", "deepz", "crown", "crown-ibp"):
        low = ox.lower_bounds(net, region, rows, name)
        torch.testing.assert_close(low, ox.bounds(folded, region, name).lower)
        ends = ox.bounds(net, region, name)
        apart = ends.lower @ rows.clamp_min(0).mT + ends.upper @ rows.clamp_max(0).mT
        assert (low >= apart - 1e-12).all()


def test_the_affine_end_begins_at_the_last_activations():
    for name in ("fc", "strided conv", "ends in relu"):
        network = BY_NAME[name].network()
        assert frontier(network) == {network.activations[-1].name}
    network = BY_NAME["functional residual"].network()
    assert frontier(network) == {node.name for node in network.activations[1:]}  # d and b are both added at the end
    assert frontier(BY_NAME["affine only"].network()) == {"input"}


# --- random projection --------------------------------------------------------------------------------------------


def test_projections_estimate_the_radius():
    """Cauchy's median is the l1 norm: the estimate closes in on deepz as k grows."""
    network = BY_NAME["fc"].network()
    region = ox.LinfBall(inputs((5,), 3), 0.3)
    with torch.no_grad():
        exact = ox.bounds(network, region, "deepz")
        errors = []
        for k in (10, 1000, 20_000):
            found = [ox.bounds(network, region, ox.Cauchy(k=k, seed=s)).lower - exact.lower for s in range(3)]
            errors.append(float(torch.stack(found).abs().mean()))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.02 * float(exact.width.mean())


def test_projections_are_the_same_for_every_batch_and_in_every_process():
    code = (
        "import torch, optrelax as ox\n"
        "net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).double()\n"
        "[torch.nn.init.constant_(p, 0.3) for p in net.parameters()]\n"
        "x = torch.tensor([[0.1, 0.2]]).double()\n"
        "print(ox.bounds(net, ox.LinfBall(x, 0.5), ox.Cauchy(k=9, seed=4)).lower.tolist())\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    network, state = BY_NAME["fc"].network(), torch.get_rng_state()
    region = ox.LinfBall(inputs((5,), 3), 0.3)
    first = ox.bounds(network, region, "cauchy").lower
    assert torch.equal(first, ox.bounds(network, region, "cauchy").lower)
    assert not torch.equal(first, ox.bounds(network, region, ox.Cauchy(seed=1)).lower)
    assert torch.equal(torch.get_rng_state(), state)


def test_projections_of_different_nodes_differ():
    w = Walk(lambda a, l, u: band_lines(a, l, u), "projection")
    like = torch.zeros(1, dtype=torch.float64)
    made = [w.cauchy(name, (4,), like) for name in ("relu", "relu_1", "_12", "_21")]
    for a, b in itertools.combinations(made, 2):
        assert not torch.equal(a, b)


def test_an_even_number_of_projections_takes_the_mean_of_the_middle_two():
    x = torch.tensor([4.0, 1.0, 3.0, 2.0]).reshape(1, 4, 1)
    assert float(median(x)) == 2.5
    assert float(median(x[:, :3])) == 3


def test_random_projection_has_no_rule_for_pooling_and_says_so():
    case = BY_NAME["max pool"]
    with pytest.raises(ox.UnsupportedOpError, match=r"MaxPool: has no rule for random projection \(cauchy\)"):
        ox.bounds(case.network(), ox.LinfBall(inputs(case.input_shape, 1), 0.1), "cauchy")


@pytest.mark.parametrize("slope", ["box", "diag", "switch", "chord"])
@pytest.mark.parametrize("name", ["fc", "conv", "residual"])
def test_hybrid_zonotopes_are_the_same_by_rows_pulled_back(name, slope, monkeypatch):
    """Where the input is wide, noise terms are never carried forward; margins, bounds and gradients stay."""
    torch.manual_seed(0)
    net, shape = {
        "fc": (ox.models.fc(150, 12, 10, 8, 4), (150,)),
        "conv": (ox.models.build("conv", (1, 14, 14), 4, 0), (1, 14, 14)),
        "residual": (_Residual(), (40,)),
    }[name]
    region = ox.LinfBall(torch.rand(3, *shape, dtype=torch.float64), eps=0.03)
    spec = ox.margins(torch.tensor([0, 2, 3]), 4)
    relaxation = ox.HBox(slope=slope)
    found = []
    for back in (True, False):
        if back:
            assert relaxation._backward(ox.capture(net.double(), shape), region, 3) is not None
        else:
            monkeypatch.setattr(ox.HBox, "_backward", lambda self, network, region, rows: None)
        values = [ox.lower_bounds(net, region, spec, relaxation=relaxation)]
        values += [end for b in _all_bounds(net, region, relaxation) for end in (b.lower, b.upper)]
        loss = sum(v.exp().sum() for v in values)
        found.append([*values, *torch.autograd.grad(loss, list(net.parameters()))])
    for back, forward in zip(*found, strict=True):
        torch.testing.assert_close(back, forward, rtol=1e-11, atol=1e-11)


def _all_bounds(net, region, relaxation):
    yield ox.bounds(net, region, relaxation=relaxation)
    yield from ox.preactivation_bounds(net, region, relaxation=relaxation).values()


class _Residual(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (torch.nn.Linear(*s) for s in ((40, 10), (10, 10), (10, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        return self.last(torch.relu(self.second(h)) + h)


@pytest.mark.parametrize(
    "relaxation", ["hbox", "hbox-diag-c", "hbox-switch", "hzono", "deepz", "deepz-soft", "fast-lin"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_one_row_for_both_bounds_holds_at_the_edges(relaxation, dtype, scale, eps):
    """Dead layers (l = u = 0, below and above), boxes of no width, tiny and huge weights; wide inputs go backward."""
    torch.manual_seed(0)
    net = ox.models.fc(150, 12, 10, 8, 4).to(dtype)
    linear = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        for layer in linear:
            layer.weight.mul_(scale)
        linear[1].weight[:3], linear[1].bias[:3] = 0, torch.tensor([0.0, -1.0, 1.0], dtype=dtype)
    region = ox.LinfBall(torch.rand(5, 150, dtype=dtype), eps=eps, clip=(0.0, 1.0))
    points = region.lower + (region.upper - region.lower) * torch.rand(300, 5, 150, dtype=dtype)
    found = ox.bounds(net, region, relaxation=relaxation)
    gradients = torch.autograd.grad(found.lower.sum(), list(net.parameters()))
    assert all(bool(t.isfinite().all()) for t in (found.lower, found.upper, *gradients))
    with torch.no_grad():
        values = net.double()(points.double().flatten(0, 1)).reshape(300, 5, 4)
        slack = (1e-5 if dtype == torch.float32 else 1e-12) * max(
            1.0, values.abs().max().item(), found.upper.abs().max()
        )
        assert bool((found.lower <= values.amin(0) + slack).all())
        assert bool((found.upper >= values.amax(0) - slack).all())
