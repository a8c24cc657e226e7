"""Losses against what they are made of, stated again here; their gradients; what they refuse."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import optrelax as ox
from optrelax.training.loss_terms import certified_cross_entropy, l1_norm
from optrelax.training.losses import AdversarialLoss, CertifiedLoss, NaturalLoss

CLASSES = 4


@pytest.fixture
def net() -> nn.Sequential:
    return ox.models.fc(6, 8, 7, CLASSES, seed=3).double()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(5, 6, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 3, 1, 2, 2])


# --- certified_cross_entropy ---------------------------------------------------------------------------------------


def test_cross_entropy_of_the_true_margins_is_the_natural_loss(net, batch):
    x, labels = batch
    logits = net(x)
    m = (ox.margins(labels, CLASSES).double() @ logits[..., None]).squeeze(-1)
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(logits, labels, reduction=reduction)
        torch.testing.assert_close(certified_cross_entropy(m, reduction), expected)


def test_cross_entropy_takes_any_batch():
    m = torch.randn(2, 3, 9, dtype=torch.float64)
    each = certified_cross_entropy(m, "none")
    assert each.shape == (2, 3)
    torch.testing.assert_close(each, torch.log1p(torch.exp(-m).sum(-1)))
    torch.testing.assert_close(certified_cross_entropy(m), each.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_does_not_overflow(dtype):
    m = torch.tensor([[1e4, 1e4], [-1e4, 3.0], [-1e30, -1e30]], dtype=dtype, requires_grad=True)
    each = certified_cross_entropy(m, "none")
    assert each.dtype == dtype
    torch.testing.assert_close(each.detach(), torch.tensor([0.0, 1e4, 1e30], dtype=dtype))
    each.sum().backward()
    # The loss falls by one for each unit of the margin that decides it; by a half where two tie.
    torch.testing.assert_close(m.grad, torch.tensor([[0, 0], [-1, 0], [-0.5, -0.5]], dtype=dtype))


def test_cross_entropy_of_an_unknown_margin_is_infinite():
    m = torch.tensor([[-math.inf, 1.0]])
    assert certified_cross_entropy(m) == math.inf


def test_cross_entropy_gradcheck():
    m = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(certified_cross_entropy, (m,))


def test_cross_entropy_refuses():
    unchecked = inspect.unwrap(certified_cross_entropy)  # a user has no type checker in between
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none'"):
        unchecked(torch.zeros(3), "median")
    with pytest.raises(ValueError, match="got a scalar"):
        certified_cross_entropy(torch.zeros(()))


# --- CertifiedLoss -------------------------------------------------------------------------------------------------


def test_terms_add_up(net, batch):
    x, labels = batch
    region = ox.LinfBall(x, 0.05, (0.0, 1.0))
    terms = CertifiedLoss("crown", kappa=0.3, l1=1e-3)(net, region, labels)
    m = ox.lower_bounds(net, region, ox.margins(labels, CLASSES), "crown")
    torch.testing.assert_close(terms.margins, m)
    torch.testing.assert_close(terms.robust, torch.log1p(torch.exp(-m).sum(1)).mean())
    torch.testing.assert_close(terms.natural, F.cross_entropy(net(x), labels))
    torch.testing.assert_close(terms.logits, net(x))
    weights = sum(m.weight.abs().sum() for m in net if isinstance(m, nn.Linear))
    torch.testing.assert_close(terms.penalty, weights)
    torch.testing.assert_close(terms.total, 0.3 * terms.natural + 0.7 * terms.robust + 1e-3 * terms.penalty)


def test_beta_mixes_the_margins_of_two_relaxations(net, batch):
    x, labels = batch
    region, spec = ox.LinfBall(x, 0.05), ox.margins(labels, CLASSES)
    tight, loose = (ox.lower_bounds(net, region, spec, name) for name in ("crown-ibp", "box"))
    for beta in (0.0, 0.25, 1.0):
        terms = CertifiedLoss("crown-ibp", beta=beta)(net, region, labels)
        torch.testing.assert_close(terms.margins, beta * tight + (1 - beta) * loose)


def test_without_elision_margins_come_from_the_logits_intervals(net, batch):
    x, labels = batch
    region = ox.LinfBall(x, 0.05)
    found = ox.bounds(net, region, "deepz")
    terms = CertifiedLoss("deepz", elision=False)(net, region, labels)
    for i, label in enumerate(labels.tolist()):
        others = [c for c in range(CLASSES) if c != label]
        torch.testing.assert_close(terms.margins[i], found.lower[i, label] - found.upper[i, others])
    assert (terms.margins <= ox.lower_bounds(net, region, ox.margins(labels, CLASSES), "deepz") + 1e-12).all()


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0])
def test_gradient_is_that_of_the_sum(net, batch, kappa):
    x, labels = batch
    region = ox.LinfBall(x, 0.05)
    CertifiedLoss("deepz", kappa=kappa, l1=1e-3)(net, region, labels).total.backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    m = ox.lower_bounds(net, region, ox.margins(labels, CLASSES), "deepz")
    total = kappa * F.cross_entropy(net(x), labels) + (1 - kappa) * torch.log1p(torch.exp(-m).sum(1)).mean()
    (total + 1e-3 * sum(w.abs().sum() for w in net.parameters() if w.dim() == 2)).backward()
    for gradient, p in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad)


def test_kappa_1_computes_no_bounds(net, batch):
    x, labels = batch

    class Refusing(ox.Box):
        def lower_bounds(self, network, region, rows):
            raise AssertionError("bounds were computed")

    terms = CertifiedLoss(Refusing(), kappa=1.0)(net, ox.LinfBall(x, 0.1), labels)
    assert terms.robust is None
    assert terms.margins is None
    torch.testing.assert_close(terms.total, F.cross_entropy(net(x), labels))


def test_eps_0_gives_the_natural_loss(net, batch):
    x, labels = batch
    for name in ("box", "crown", "deepz"):
        terms = CertifiedLoss(name)(net, ox.LinfBall(x, 0.0), labels)
        torch.testing.assert_close(terms.total, F.cross_entropy(net(x), labels))


def test_the_natural_part_is_at_the_images_not_at_the_clipped_centre(net, batch):
    x, labels = batch
    region = ox.LinfBall(x, 0.3, (0.0, 1.0))
    loss = NaturalLoss()
    torch.testing.assert_close(loss(net, region, labels).natural, F.cross_entropy(net(x), labels))
    box = ox.InputBox(region.lower, region.upper)
    torch.testing.assert_close(loss(net, box, labels).natural, F.cross_entropy(net(box.center), labels))
    torch.testing.assert_close(loss(net, box, labels, x).natural, F.cross_entropy(net(x), labels))


def test_an_estimate_draws_new_projections_each_step(net, batch):
    x, labels = batch
    region, loss = ox.LinfBall(x, 0.05), CertifiedLoss("cauchy:k=5")
    generator = torch.Generator().manual_seed(1)
    first, second = (loss(net, region, labels, generator=generator).total.item() for _ in range(2))
    again = loss(net, region, labels, generator=torch.Generator().manual_seed(1)).total.item()
    assert first != second
    assert first == again


def test_a_shared_weight_is_penalised_once():
    layer = nn.Linear(3, 3)
    net = ox.capture(nn.Sequential(layer, nn.ReLU(), layer))
    torch.testing.assert_close(l1_norm(net), layer.weight.abs().sum())


def test_convolutions_are_penalised_and_normalisation_is_not():
    net = ox.models.build("conv", (1, 8, 8), 10, seed=0, normalize=(0.5, 0.25))
    expected = sum(p.abs().sum() for p in net.parameters() if p.dim() > 1)
    torch.testing.assert_close(l1_norm(ox.capture(net, (1, 8, 8))), expected)


def test_l1_needs_weights():
    with pytest.raises(ValueError, match="no weight tensors"):
        l1_norm(ox.capture(nn.ReLU(), (3,)))


# --- AdversarialLoss -----------------------------------------------------------------------------------------------


def test_adversarial_points_stay_inside_and_raise_the_loss(net, batch):
    x, labels = batch
    region = ox.LinfBall(x, 0.2, (0.0, 1.0))
    points = AdversarialLoss(steps=10).points(ox.capture(net), region, labels, torch.Generator().manual_seed(0))
    assert region.contains(points).all()
    assert not points.requires_grad
    before, after = (F.cross_entropy(net(p), labels, reduction="none") for p in (x, points))
    assert (after > before).all()


def test_adversarial_loss_lies_between_natural_and_certified(net, batch):
    x, labels = batch
    region = ox.LinfBall(x, 0.1, (0.0, 1.0))
    attacked = AdversarialLoss()(net, region, labels, generator=torch.Generator().manual_seed(0))
    certified = CertifiedLoss("crown")(net, region, labels)
    assert attacked.natural < attacked.robust < certified.robust
    assert (attacked.margins >= certified.margins).all()


def test_adversarial_loss_repeats_with_its_generator(net, batch):
    x, labels = batch
    region = ox.LinfBall(x, 0.1)
    runs = [
        AdversarialLoss(steps=1)(net, region, labels, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert runs[0].total == runs[1].total
    assert runs[0].total != runs[2].total


def test_adversarial_loss_leaves_no_gradient_of_its_own(net, batch):
    x, labels = batch
    AdversarialLoss().points(ox.capture(net), ox.LinfBall(x, 0.1), labels)
    assert all(p.grad is None for p in net.parameters())
    with torch.no_grad():  # the search needs gradients whatever the caller's mode
        AdversarialLoss()(net, ox.LinfBall(x, 0.1), labels)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CertifiedLoss("box", kappa=1.5), ValueError, r"CertifiedLoss: kappa must lie in \[0, 1\], got 1.5"),
        (lambda: CertifiedLoss("box", beta=-0.1), ValueError, r"beta must lie in \[0, 1\]"),
        (lambda: CertifiedLoss("box", l1=-1.0), ValueError, "l1 must be >= 0"),
        (lambda: CertifiedLoss("crwon"), ValueError, "did you mean 'crown'"),
        (lambda: CertifiedLoss("box", kapa=1.0), TypeError, "kapa"),
        (lambda: NaturalLoss(kappa=0.5), ValueError, "kappa must stay 1"),
        (lambda: AdversarialLoss(steps=-1), ValueError, "steps must be at least 0"),
        (lambda: AdversarialLoss(step=0.0), ValueError, "step must be positive"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bad_labels_are_refused(net, batch):
    x, labels = batch
    region = ox.LinfBall(x, 0.1)
    with pytest.raises(ValueError, match=r"labels must be \[5\], one an image, got \(4,\)"):
        CertifiedLoss("box")(net, region, labels[:4])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\], got 7"):
        CertifiedLoss("box")(net, region, torch.full((5,), 7))


def test_names_at_the_top_level():
    assert ox.certified_cross_entropy is certified_cross_entropy
    assert ox.CertifiedLoss is CertifiedLoss
