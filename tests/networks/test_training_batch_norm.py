"""Batch norms in training mode: the affine maps of a clean batch, against references written by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optrelax as ox
from optrelax.training.interval_training import IntervalRegularised, initialise
from optrelax.training.losses import AdversarialLoss, CertifiedLoss
from optrelax.training.robust_losses import ExpressiveLoss
from optrelax.training.smoothing import GradientSmoothing

SHAPE, EPS = (1, 5, 5), 0.05


def network(seed: int = 0, **options: object) -> nn.Sequential:
    """A convolution and a linear layer, each with its batch norm, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = nn.BatchNorm2d(3, **options), nn.BatchNorm1d(6, **options)
        hidden = nn.Linear(27, 6)
        net = nn.Sequential(nn.Conv2d(1, 3, 3), first, nn.ReLU(), nn.Flatten(), hidden, second, nn.ReLU())
        net.append(nn.Linear(6, 3))
        for norm in (first, second):
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
    return net.double().train()


def images(count: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.arange(count) % 3


def norm_ends(norm: nn.Module, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch norm of clean values, and of the ends of intervals by the clean values' statistics."""
    dims = [0, *range(2, x.dim())]
    view = (1, -1, *[1] * (x.dim() - 2))
    mean = x.mean(dims).reshape(view)
    deviation = ((x - mean) ** 2).mean(dims).reshape(view).add(norm.eps).sqrt()
    scale = norm.weight.reshape(view) / deviation
    shift = norm.bias.reshape(view) - mean * scale
    center, radius = scale * (low + high) / 2 + shift, scale.abs() * (high - low) / 2
    return scale * x + shift, center - radius, center + radius


def by_hand(net: nn.Sequential, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Clean outputs and interval bounds, as certified training writes them."""
    low, high = x - eps, x + eps
    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):

            def linear(v: Tensor, w: Tensor, layer: nn.Module = layer) -> Tensor:
                return F.conv2d(v, w) if isinstance(layer, nn.Conv2d) else F.linear(v, w)

            bias = layer.bias[:, None, None] if isinstance(layer, nn.Conv2d) else layer.bias
            center, radius = linear((low + high) / 2, layer.weight), linear((high - low) / 2, layer.weight.abs())
            x, low, high = linear(x, layer.weight) + bias, center - radius + bias, center + radius + bias
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            x, low, high = norm_ends(layer, x, low, high)
        else:
            x, low, high = layer(x), layer(low), layer(high)
    return x, low, high


def gradients(value: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(net.parameters()), retain_graph=True))


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in net.state_dict().items()}


def test_capture_and_check_change_nothing_and_say_what_bounds_need():
    net = network()
    before = state(net)
    captured = ox.capture(net, SHAPE)
    report = ox.check(net, SHAPE)
    assert [p.where for p in report.problems] == ["1", "5"]
    assert "BatchNorm2d: is in training mode; call .eval(), or bound optrelax.on_batch(net, x)" in str(report)
    x, _ = images()
    for given in (net, captured):
        with pytest.raises(ox.UnsupportedOpError, match="is in training mode"):
            ox.bounds(given, ox.LinfBall(x, EPS), "box")
    torch.testing.assert_close(state(net), before, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.1}], ids=str)
def test_a_clean_pass_is_the_module_s_own(options):
    """Outputs, and the running statistics, after two batches."""
    net = network(**options)
    twin = copy.deepcopy(net)
    for count in (6, 5):
        x, _ = images(count)
        _, outputs = ox.on_batch(net, x)
        torch.testing.assert_close(outputs, twin(x))
        torch.testing.assert_close(state(net), state(twin))
    torch.testing.assert_close(ox.capture(net, SHAPE)(x), twin(x))
    torch.testing.assert_close(state(net), state(twin))


def test_bounds_and_gradients_agree_with_a_reference_by_hand():
    net = network()
    x, _ = images()
    fixed, outputs = ox.on_batch(net, x)
    found = ox.bounds(fixed, ox.LinfBall(x, EPS), "box:rounding=nearest")
    wanted, low, high = by_hand(net, x, EPS)
    torch.testing.assert_close(outputs, wanted)
    direction = torch.randn(low.shape, generator=torch.Generator().manual_seed(2), dtype=low.dtype)
    # The last layer is folded into the rows: its interval is the same.
    torch.testing.assert_close((found.lower, found.upper), (low, high))
    for mine, theirs in ((found.lower, low), (found.upper, high), (outputs, wanted)):
        torch.testing.assert_close(gradients((mine * direction).sum(), net), gradients((theirs * direction).sum(), net))


@pytest.mark.parametrize("name", ["crown", "crown-ibp", "hbox", "deepz", "alpha-crown", "triangle", "layerwise"])
def test_every_kind_of_bound_takes_the_map_of_the_batch(name):
    """At radius 0 it is the output; the folded network in eval mode has the same bounds at any radius."""
    net = network()
    x, _ = images(3)
    fixed, outputs = ox.on_batch(net, x)
    eye = torch.eye(3, dtype=torch.float64)
    exact = ox.lower_bounds(fixed, ox.LinfBall(x, 0.0), eye, name)
    torch.testing.assert_close(exact, outputs)
    torch.testing.assert_close(gradients(exact.sum(), net), gradients(outputs.sum(), net), rtol=1e-6, atol=1e-8)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for norm, (mean, variance) in zip((twin[1], twin[5]), statistics_of(net, x), strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
    region = ox.LinfBall(x, EPS)
    low, wanted = (ox.lower_bounds(n, region, eye, name) for n in (fixed, twin.eval()))
    torch.testing.assert_close(low, wanted, rtol=1e-6, atol=1e-8)


def statistics_of(net: nn.Sequential, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    found = []
    for layer in net:
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            dims = [0, *range(2, x.dim())]
            found.append((x.mean(dims), x.var(dims, correction=0)))
        x = copy.deepcopy(layer)(x)
    return found


def test_the_population_s_statistics_are_constants_that_move_once():
    net = network()
    x, _ = images()
    twin = copy.deepcopy(net)
    twin(x)
    fixed, outputs = ox.on_batch(net, x, "population")
    torch.testing.assert_close(state(net), state(twin))
    twin.eval()
    torch.testing.assert_close(outputs, twin(x))
    region = ox.LinfBall(x, EPS)
    low, wanted = ox.bounds(fixed, region, "crown").lower, ox.bounds(twin, region, "crown").lower
    torch.testing.assert_close(low, wanted)
    torch.testing.assert_close(gradients(low.sum(), net), gradients(wanted.sum(), twin))


def losses() -> dict[str, object]:
    attack = AdversarialLoss(steps=2)
    certified = CertifiedLoss("crown-ibp", kappa=0.3, beta=0.5)
    return {
        "certified": certified,
        "no natural part": CertifiedLoss("box"),
        "expressive": ExpressiveLoss(alpha=0.5, attack=attack),
        "regularised": IntervalRegularised(certified, eps=1.0),
    }


@pytest.mark.parametrize("name", losses())
def test_losses_make_one_clean_pass(name):
    """Attacks and regularisers take its statistics; the running ones move once."""
    net, loss = network(), losses()[name]
    x, labels = images()
    twin = copy.deepcopy(net)
    twin(x)
    terms = loss(net, ox.LinfBall(x, EPS), labels, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(state(net), state(twin))
    fixed, _ = ox.on_batch(net, x)
    again = loss(fixed, ox.LinfBall(x, EPS), labels, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(terms.total, again.total)
    torch.testing.assert_close(gradients(terms.total, net), gradients(again.total, net))


def test_a_loss_agrees_with_a_reference_by_hand():
    net = network()
    x, labels = images()
    terms = CertifiedLoss("box", kappa=0.4, elision=False)(net, ox.LinfBall(x, EPS), labels)
    wanted, low, high = by_hand(net, x, EPS)
    worst = torch.where(F.one_hot(labels, 3).bool(), low, high)
    total = 0.4 * F.cross_entropy(wanted, labels) + 0.6 * F.cross_entropy(worst, labels)
    torch.testing.assert_close(terms.total, total)
    torch.testing.assert_close(gradients(terms.total, net), gradients(total, net))


def test_what_cannot_be_is_refused():
    x, labels = images()
    with pytest.raises(ValueError, match="more than one value a channel"):
        ox.on_batch(network(), x[:1])
    with pytest.raises(ValueError, match="none of the population"):
        ox.on_batch(network(track_running_stats=False), x, "population")
    with pytest.raises(ValueError, match="statistics must be"):
        ox.on_batch(network(), x, "running")  # type: ignore[arg-type]
    smoothed = GradientSmoothing(CertifiedLoss("box"), sigma=0.1)
    with pytest.raises(ValueError, match="would move with the weights"):
        smoothed(network(), ox.LinfBall(x, EPS), labels)


def test_saving_wants_evaluation(tmp_path):
    net = network()
    with pytest.raises(ox.UnsupportedOpError, match=r"call \.eval\(\)"):
        ox.save(net, tmp_path / "net.safetensors", input_shape=SHAPE)
    fixed, _ = ox.on_batch(net, images()[0], "population")
    ox.save(fixed, tmp_path / "net.safetensors")
    x, _ = images()
    torch.testing.assert_close(ox.load(tmp_path / "net.safetensors")(x), net.eval()(x))


def test_a_network_follows_the_mode_of_its_module():
    net = network()
    captured = ox.capture(net, SHAPE)
    x, _ = images()
    captured(x)
    net.eval()
    region = ox.LinfBall(x, EPS)
    torch.testing.assert_close(ox.bounds(captured, region).lower, ox.bounds(net, region).lower)
    net.train()
    with pytest.raises(ox.UnsupportedOpError, match="is in training mode"):
        ox.bounds(captured, region)


def test_a_batch_norm_with_a_forward_of_its_own_is_refused_in_training():
    class Own(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    net = nn.Sequential(nn.Linear(3, 4), Own(4)).train()
    with pytest.raises(ox.UnsupportedOpError, match=r"is in training mode; call \.eval\(\)"):
        ox.capture(net, (3,))


def test_networks_that_mix_the_batch_elsewhere_are_refused_in_training():
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    with pytest.raises(ox.UnsupportedOpError, match="mixes the batch"):
        ox.capture(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Centred()).train(), (3,))


def test_pools_become_relus_with_the_statistics_of_the_batch():
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    net = net.append(nn.Linear(8, 2)).double().train()
    x, _ = images()
    for _ in range(2):
        fixed, outputs = ox.on_batch(net, x)
        low = ox.lower_bounds(fixed, ox.LinfBall(x, 0.0), torch.eye(2, dtype=torch.float64), "triangle")
        torch.testing.assert_close(low, outputs)


def test_an_initialisation_leaves_batch_norms_alone():
    net = network()
    before = [net[i].weight.clone() for i in (1, 5)]
    initialise(net, torch.Generator().manual_seed(0), input_shape=SHAPE)
    assert all(torch.equal(net[i].weight, w) for i, w in zip((1, 5), before, strict=True))
