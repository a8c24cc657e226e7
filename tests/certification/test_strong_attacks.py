"""APGD, Square and their ensemble: what they find, where they look, what they do that PGD cannot."""

import pytest
import torch
from cases import inputs
from torch import nn

import optrelax as ox
from optrelax.certification.attacks import find_counterexamples
from optrelax.certification.strong_attacks import attack_of

ATTACKS = [
    ox.APGD(steps=20),
    ox.APGD(loss="dlr", steps=20),
    ox.APGD(targets=2, steps=20),
    ox.APGD(loss="dlr", targets=2, steps=20, restarts=2),
    ox.Square(queries=60),
    ox.StrongAttack(steps=10, targets=2, queries=30),
]


def digits_net() -> nn.Module:
    return ox.models.fc(12, 10, 8, 4, seed=3).double()


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_points_stay_inside_are_replayed_and_do_not_depend_on_the_batch(attack):
    net = nn.Sequential(nn.Conv2d(3, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 1 * 2, 4)).double()
    x = inputs((3, 2, 3), 5)
    region = ox.InputBox(x, x + torch.linspace(0, 0.2, x.numel(), dtype=torch.float64).reshape(x.shape))
    spec = ox.margins(net(x).argmax(1), 4)
    before = torch.get_rng_state()
    found = find_counterexamples(net, region, spec, attack)
    assert torch.equal(before, torch.get_rng_state())
    assert bool(region.contains(found.points).all())  # no tolerance
    torch.testing.assert_close(found.margins, (spec.double() @ net(found.points)[..., None])[..., 0].detach())
    middle = (spec.double() @ net(region.center)[..., None])[..., 0].amin(1)
    assert bool((found.worst <= middle).all())
    one = attack.search(ox.capture(net, (3, 2, 3)), region.select(slice(3, 4)), spec[3:4].double(), keys=[3])
    torch.testing.assert_close(one.points[0], found.points[3])


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_linear_network_gets_its_worst_corner(attack):
    net = nn.Linear(3, 2).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, -1.0]]))
        net.bias.copy_(torch.tensor([9.0, 0.0]))
    region = ox.InputBox(torch.tensor([[0.1, 0.0, -1.0]]).double(), torch.tensor([[0.2, 0.7, 4.0]]).double())
    found = find_counterexamples(nn.Sequential(net), region, ox.margins(torch.tensor([0]), 2), attack)
    # margin = x0 - 3 x1 + 1.5 x2 + 9: least at (0.1, 0.7, -1)
    assert found.worst.item() == pytest.approx(0.1 - 2.1 - 1.5 + 9)


def ramp(scale: float = 1.0) -> nn.Module:
    """Margin scale * (1 - 2.5 sum relu(x - 0.85)): without gradient in most of the box, negative in its corner."""
    net = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(10))
        net[0].bias.fill_(-0.85)
        net[2].weight.copy_(scale * torch.tensor([[-2.5], [0.0]]).expand(2, 10))
        net[2].bias.copy_(scale * torch.tensor([1.0, 0.0]))
    return net


def test_square_finds_what_gradients_hide():
    region = ox.LinfBall(torch.full((1, 10), 0.5).double(), 0.4)
    spec = ox.margins(torch.tensor([0]), 2)
    assert not bool(find_counterexamples(ramp(), region, spec, ox.PGD()).found)
    assert bool(find_counterexamples(ramp(), region, spec, ox.Square(queries=2000)).found)
    assert bool(find_counterexamples(ramp(), region, spec, ox.StrongAttack(queries=2000)).found)


def test_dlr_climbs_where_cross_entropy_is_flat():
    """With margins of thousands the gradient of cross-entropy is 0 in floating point; the DLR loss has no scale."""
    net = digits_net()
    x = inputs((12,), 8)
    region, spec = ox.LinfBall(x, 0.3), ox.margins(net(x).argmax(1), 4)
    large = nn.Sequential(net, nn.Linear(4, 4, bias=False).double())
    with torch.no_grad():
        large[1].weight.copy_(1e6 * torch.eye(4))
    plain = find_counterexamples(net, region, spec, ox.APGD(loss="dlr", steps=30)).found
    scaled = find_counterexamples(large, region, spec, ox.APGD(loss="dlr", steps=30)).found
    flat = find_counterexamples(large, region, spec, ox.APGD(loss="ce", steps=30)).found
    assert torch.equal(plain, scaled)
    assert int(flat.sum()) < int(scaled.sum())


def test_the_ensemble_finds_what_pgd_finds():
    net, x = digits_net(), inputs((12,), 10)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    data = (x, net(x).argmax(1))
    attack = ox.StrongAttack(steps=10, targets=2, queries=20)
    report = ox.certify(net, data, eps=0.3, clip=None, attack=attack)
    usual = ox.certify(net, data, eps=0.3, clip=None, attack="pgd")
    assert report.settings["attack"]["type"] == "StrongAttack"
    pairs = zip(usual.examples["attack_margin"], report.examples["attack_margin"], strict=True)
    assert all(strong <= 0 or strong <= pgd for pgd, strong in pairs)
    assert 0 < report.pgd_accuracy <= usual.pgd_accuracy < 1


def test_names_and_bad_options():
    assert attack_of("certify", "none") is None
    assert attack_of("certify", "strong", seed=4) == ox.StrongAttack(seed=4)
    with pytest.raises(ValueError, match=r"certify: attack must be 'pgd', 'strong', 'none' or an attack, got 'hard'"):
        ox.certify(digits_net(), (inputs((12,), 1), torch.zeros(1, dtype=torch.int64)), eps=0.1, attack="hard")
    for make, message in [
        (lambda: ox.APGD(loss="kl"), "APGD: loss must be 'ce' or 'dlr', got 'kl'"),
        (lambda: ox.APGD(steps=0), "APGD: steps must be at least 1, got 0"),
        (lambda: ox.Square(queries=0), "Square: queries must be at least 1, got 0"),
        (lambda: ox.Square(share=0), r"Square: share must lie in \(0, 1\], got 0"),
        (lambda: ox.StrongAttack(targets=0), "StrongAttack: targets must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
