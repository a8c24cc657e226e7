"""The field's certified-training losses, regularisers and smoothing: ends that are other losses, hand-made values."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optrelax as ox
from optrelax.training.interval_training import IntervalRegularised, initialise
from optrelax.training.loss_terms import Batch, LossTerms, certified_cross_entropy
from optrelax.training.losses import AdversarialLoss, CertifiedLoss, NaturalLoss
from optrelax.training.robust_losses import ExpressiveLoss, FusedLoss, LandscapeLoss, SmallBoxLoss, bounds_at_slopes
from optrelax.training.smoothing import GradientSmoothing, ParameterExploration

CLASSES = 4


@pytest.fixture
def net() -> nn.Sequential:
    return ox.models.fc(6, 8, 7, CLASSES, seed=3).double()


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 3, 1, 2, 2])


@pytest.fixture
def region() -> ox.LinfBall:
    generator = torch.Generator().manual_seed(5)
    return ox.LinfBall(torch.rand(5, 6, generator=generator, dtype=torch.float64), 0.1, (0.0, 1.0))


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(region: ox.InputBox, count: int = 400) -> Tensor:
    """Corners and inner points of every box: [count, batch, n]."""
    noise = torch.rand(count, *region.shape, generator=drawn(9), dtype=region.dtype)
    noise[: count // 2] = noise[: count // 2].round()
    return region.lower + noise * (region.upper - region.lower)


def gradients(net: nn.Module, value: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))])


def differences(net: nn.Module, value, direction: Tensor, h: float = 1e-6) -> float:
    """Central difference of a function of the weights along a direction."""
    start = nn.utils.parameters_to_vector(net.parameters()).detach()
    ends = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * h * direction, net.parameters())
        ends.append(value().item())
    nn.utils.vector_to_parameters(start, net.parameters())
    return (ends[0] - ends[1]) / (2 * h)


def batch_of(net: nn.Module, region: ox.InputBox, labels: Tensor, seed: int = 0) -> Batch:
    rows = ox.margins(labels, CLASSES).to(region.lower)
    return Batch(ox.capture(net), region, labels, rows, drawn(seed))


# --- loss fusion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxation", ["crown-ibp", "crown", "triangle"])
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_the_fused_loss_bounds_the_cross_entropy(net, region, labels, relaxation, beta):
    fused = FusedLoss(relaxation, beta=beta)(net, region, labels).robust
    worst = torch.stack([F.cross_entropy(net(x), labels, reduction="none") for x in samples(region)]).amax(0)
    assert fused >= worst.mean()
    # The chord cannot beat the exact exp of exact margins, nor be far above Box's own bound here.
    assert fused <= CertifiedLoss("box")(net, region, labels).robust + 1e-9


def test_the_fused_loss_is_the_chords_formula(net, region, labels):
    """One image at a time, written out with Python's exp."""
    expected = []
    for x, label in zip(region.x, labels, strict=True):
        ball = ox.LinfBall(x[None], 0.1, (0.0, 1.0))
        rows = ox.margins(label[None], CLASSES)[0].double()
        t = ox.lower_bounds(net, ball, torch.cat([rows, -rows]), "box")[0]
        l, u = t[CLASSES - 1 :], -t[: CLASSES - 1]
        slope = [(math.exp(b) - math.exp(a)) / (b - a) for a, b in zip(l.tolist(), u.tolist(), strict=True)]
        constant = sum(math.exp(b) - s * b for s, b in zip(slope, u.tolist(), strict=True))
        row = sum(s * r for s, r in zip(slope, rows, strict=True))
        low = ox.lower_bounds(net, ball, row[None], "crown-ibp").item()
        expected.append(math.log(max(1 + constant - low, 1.0)))
    terms = FusedLoss()(net, region, labels)
    assert terms.robust.item() == pytest.approx(sum(expected) / 5, rel=1e-10)
    boxed = ox.lower_bounds(net, region, ox.margins(labels, CLASSES), "box")
    torch.testing.assert_close(terms.margins, boxed)


def test_the_fused_loss_with_beta_0_is_box(net, region, labels):
    fused = FusedLoss(beta=0.0)(net, region, labels)
    torch.testing.assert_close(fused.robust, CertifiedLoss("box")(net, region, labels).robust)


def test_the_fused_loss_has_its_derivative(net, region, labels):
    def value() -> Tensor:
        return FusedLoss("deepz", kappa=0.2)(net, region, labels).total

    gradient = gradients(net, value())
    direction = torch.randn(gradient.shape, generator=drawn(2), dtype=torch.float64)
    assert float(gradient @ direction) == pytest.approx(differences(net, value, direction), rel=1e-5)


def test_the_fused_loss_neither_overflows_nor_breaks_at_radius_0(net, labels):
    x = torch.rand(5, 6, generator=drawn(), dtype=torch.float64)
    still = FusedLoss()(net, ox.LinfBall(x, 0.0), labels)
    torch.testing.assert_close(still.robust, F.cross_entropy(net(x), labels))
    with torch.no_grad():
        net[-1].weight.mul_(1e5)
    wide = FusedLoss()(net, ox.LinfBall(x, 0.5), labels)
    wide.total.backward()
    assert wide.total.isfinite()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("kind", [FusedLoss, SmallBoxLoss, ExpressiveLoss])
def test_an_estimate_is_drawn_anew_each_step(net, region, labels, kind):
    loss, generator = kind(relaxation="cauchy:k=5"), drawn()
    still = replace(loss, attack=AdversarialLoss(steps=0)) if hasattr(loss, "attack") else loss
    first, second = (still(net, region, labels, generator=generator).robust.item() for _ in range(2))
    assert first != second
    assert still(net, region, labels, generator=drawn()).robust.item() == first


# --- small boxes ---------------------------------------------------------------------------------------------------


def test_the_small_box_lies_in_the_region_and_has_its_share(net, region, labels):
    loss = SmallBoxLoss(share=0.3)
    box = loss.box(batch_of(net, region, labels))
    assert (box.lower >= region.lower).all()
    assert (box.upper <= region.upper).all()
    torch.testing.assert_close(box.radius, 0.3 * region.radius)
    assert (box.center != region.center).any()


def test_small_boxes_go_from_the_attack_to_box(net, region, labels):
    whole = SmallBoxLoss(share=1.0)(net, region, labels, generator=drawn())
    torch.testing.assert_close(whole.robust, CertifiedLoss("box")(net, region, labels).robust)
    attack = AdversarialLoss(steps=4)
    point = SmallBoxLoss(share=0.0, attack=attack)(net, region, labels, generator=drawn())
    torch.testing.assert_close(point.robust, attack(net, region, labels, generator=drawn()).robust)
    between = SmallBoxLoss(share=0.4)(net, region, labels, generator=drawn())
    assert point.robust < between.robust < whole.robust


# --- expressive losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mtl", "cc", "exp"])
def test_expressive_losses_go_from_the_attack_to_the_bound(net, region, labels, form):
    attack = AdversarialLoss(steps=4)
    ends = [
        attack(net, region, labels, generator=drawn()).robust,
        CertifiedLoss("box")(net, region, labels).robust,
    ]
    values = [
        ExpressiveLoss(form=form, alpha=a, attack=attack)(net, region, labels, generator=drawn()).robust
        for a in (0.0, 0.3, 0.7, 1.0)
    ]
    torch.testing.assert_close(values[0], ends[0])
    torch.testing.assert_close(values[-1], ends[1])
    assert all(a < b for a, b in itertools.pairwise(values))


def test_expressive_losses_are_their_formulas(net, region, labels):
    attack = AdversarialLoss(steps=4)
    attacked = attack(net, region, labels, generator=drawn()).margins
    bounds = ox.lower_bounds(net, region, ox.margins(labels, CLASSES), "box")
    first, second = (torch.log1p(torch.exp(-m).sum(1)) for m in (attacked, bounds))
    expected = {
        "mtl": (0.75 * first + 0.25 * second).mean(),
        "cc": torch.log1p(torch.exp(-(0.75 * attacked + 0.25 * bounds)).sum(1)).mean(),
        "exp": (first**0.75 * second**0.25).mean(),
    }
    for form, value in expected.items():
        terms = ExpressiveLoss(form=form, alpha=0.25, attack=attack)(net, region, labels, generator=drawn())
        torch.testing.assert_close(terms.robust, value)
        torch.testing.assert_close(terms.margins, bounds)


def test_a_loss_of_0_has_a_finite_gradient(net, region, labels):
    with torch.no_grad():
        net[-1].weight.zero_()
        net[-1].bias.copy_(torch.tensor([1e4, 0.0, 0.0, 0.0]))
    terms = ExpressiveLoss(form="exp")(net, region, torch.zeros_like(labels), generator=drawn())
    assert gradients(net, terms.total).isfinite().all()


# --- slopes of a favourable landscape ------------------------------------------------------------------------------


def test_bounds_hold_at_any_slopes_and_are_crown_ibp_at_its_own(net, region, labels):
    network, rows = ox.capture(net), ox.margins(labels, CLASSES).double()
    before = ox.Box().preactivation_bounds(network, region)
    adaptive = {name: (b.upper >= -b.lower).double() for name, b in before.items()}
    found = bounds_at_slopes(network, region, rows, adaptive)
    torch.testing.assert_close(found, ox.lower_bounds(net, region, rows, "crown-ibp"))
    random = {name: torch.rand(b.lower.shape, generator=drawn(1)).double() for name, b in before.items()}
    values = torch.stack([(rows @ net(x)[..., None]).squeeze(-1) for x in samples(region)]).amin(0)
    assert (bounds_at_slopes(network, region, rows, random) <= values).all()


def test_a_step_on_the_slopes_tightens_the_bound(net, region, labels):
    still, moved = (LandscapeLoss(step=s)(net, region, labels, generator=drawn()) for s in (0.0, 1.0))
    assert moved.robust < still.robust
    assert all(p.grad is None for p in net.parameters())
    again = LandscapeLoss()(net, region, labels, generator=drawn())
    assert again.total == moved.total
    assert gradients(net, again.total).abs().sum() > 0


# --- intervals that do not explode ---------------------------------------------------------------------------------


def test_the_initialisation_keeps_the_mean_width():
    net = ox.models.fc(400, 400, 400, 400, 10, seed=0)
    region = ox.LinfBall(torch.rand(20, 400, generator=drawn()), 0.05)

    def widths() -> list[float]:
        return [(b.upper - b.lower).mean().item() for b in ox.preactivation_bounds(net, region, "box").values()]

    last = net[-1].weight.clone()
    before = widths()
    initialise(net, drawn(), input_shape=(400,))
    after = widths()
    assert torch.equal(net[-1].weight, last)
    # The first layer's width is |w| summed over the inputs: fan-in x sqrt(2 / pi) x sqrt(2 pi) / fan-in = 2.
    assert after[0] == pytest.approx(2 * 0.1, rel=0.02)
    assert before[2] / before[0] > 10
    assert 0.5 < after[2] / after[0] < 2


def test_regularisers_are_their_formulas(labels):
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, CLASSES)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[4.0, 0.0], [0.0, -2.0], [3.0, -3.0]]))
    region = ox.LinfBall(torch.tensor([[0.5, 0.5]], dtype=torch.float64), 0.1)
    made = IntervalRegularised(NaturalLoss(), eps=0.4)
    tightness, balance = made.penalties(ox.capture(net), region)
    # Half widths 0.4, 0.2, 0.6, mean 0.4: the ratio 0.1 / 0.4 falls short of 0.5 by half.
    assert tightness.item() == pytest.approx(0.5)
    # Centres 2 (active), -1 (inactive), 0 (crossing), mean 1/3: means 2 and 1, spreads 25/9 and 16/9, no shortfall.
    assert balance.item() == pytest.approx(0.0)
    strict = IntervalRegularised(NaturalLoss(), eps=0.4, tolerance=1.0).penalties(ox.capture(net), region)
    assert strict[0].item() == pytest.approx(0.75)
    assert strict[1].item() == pytest.approx((1 - 1 / 2) + (1 - 16 / 25))
    terms = made(net, region, labels[:1])
    plain = NaturalLoss()(net, region, labels[:1])
    assert (terms.total - plain.total).item() == pytest.approx(0.5 * (1 - 0.1 / 0.4) * 0.5)
    at_the_end = made(net, ox.LinfBall(region.x, 0.4), labels[:1])
    torch.testing.assert_close(at_the_end.total, plain.total)


def test_regularisers_have_their_derivative(net, region, labels):
    made = IntervalRegularised(CertifiedLoss("box"), eps=1.0, weight=2.0)

    def value() -> Tensor:
        return made(net, region, labels).total

    gradient = gradients(net, value())
    direction = torch.randn(gradient.shape, generator=drawn(2), dtype=torch.float64)
    assert float(gradient @ direction) == pytest.approx(differences(net, value, direction), rel=1e-5)


# --- smoothing -----------------------------------------------------------------------------------------------------


class Quadratic:
    """sum of a w^2 + b w over the weights: its smoothed gradient is its own, 2 a w + b, at any sigma."""

    def __call__(self, network, region, labels, x=None, *, generator=None) -> LossTerms:
        value = sum((2 * p**2 + p).sum() for p in network.module.parameters())
        zero = torch.zeros_like(value)
        return LossTerms(value, zero, None, zero, network(region.x), None)


class Step(Quadratic):
    """1 where the first bias is positive: a gradient of 0 everywhere but at the jump."""

    def __call__(self, network, region, labels, x=None, *, generator=None) -> LossTerms:
        bias = next(iter(network.module.parameters())).sum()
        return replace(super().__call__(network, region, labels), total=(bias > 0).double() + 0 * bias)


@pytest.mark.parametrize(
    ("smoothing", "samples", "error"), [(GradientSmoothing, 300, 0.3), (ParameterExploration, 2000, 0.6)]
)
def test_the_smoothed_gradient_is_unbiased(smoothing, samples, error, labels):
    """The noise of RGS has a deviation of 1.2 a sample here, that of PGPE some 10 a pair."""
    net = nn.Sequential(nn.Linear(2, 2)).double()
    region = ox.LinfBall(torch.rand(3, 2, dtype=torch.float64), 0.1)
    made = smoothing(Quadratic(), sigma=0.3, samples=samples)
    found = gradients(net, made(net, region, labels[:3], generator=drawn()).total)
    exact = torch.cat([(4 * p + 1).flatten() for p in net.parameters()]).detach()
    torch.testing.assert_close(found, exact, rtol=0.0, atol=error)
    assert not torch.equal(found, exact)


def test_exploration_sees_a_jump_and_gradients_do_not():
    """E 1[w + sigma e > 0] = Phi(w / sigma): its derivative is the normal density."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.fill_(0.1)
    region, labels = ox.LinfBall(torch.ones(1, 1, dtype=torch.float64), 0.0), torch.zeros(1, dtype=torch.int64)
    density = math.exp(-0.5 * (0.1 / 0.2) ** 2) / (0.2 * math.sqrt(2 * math.pi))
    blind = GradientSmoothing(Step(), sigma=0.2, samples=50)(net, region, labels, generator=drawn())
    assert gradients(net, blind.total) == 0
    seeing = ParameterExploration(Step(), sigma=0.2, samples=3000)(net, region, labels, generator=drawn())
    assert gradients(net, seeing.total).item() == pytest.approx(density, rel=0.12)
    assert seeing.total.item() == pytest.approx(0.5 * (1 + math.erf(0.5 / math.sqrt(2))), abs=0.03)


def test_smoothing_with_one_sample_is_the_gradient_at_the_moved_weights(net, region, labels):
    made = GradientSmoothing(CertifiedLoss("crown-ibp", l1=1e-3), sigma=0.05, samples=1)
    terms = made(net, region, labels, generator=drawn(4))
    found = gradients(net, terms.total)
    generator = drawn(4)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    moved = CertifiedLoss("crown-ibp", l1=1e-3)(net, region, labels)
    torch.testing.assert_close(terms.total, moved.total)
    torch.testing.assert_close(terms.margins, moved.margins)
    torch.testing.assert_close(found, gradients(net, moved.total))


def test_smoothing_leaves_the_weights_alone(net, region, labels):
    before = [p.detach().clone() for p in net.parameters()]
    for smoothing in (GradientSmoothing, ParameterExploration):
        made = smoothing(CertifiedLoss("box"), sigma=0.1, samples=2)
        made(net, region, labels, generator=drawn()).total.backward()
        with torch.no_grad():
            assert not made(net, region, labels, generator=drawn()).total.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    still = GradientSmoothing(CertifiedLoss("box"), sigma=0.0)(net, region, labels)
    torch.testing.assert_close(still.total, CertifiedLoss("box")(net, region, labels).total)


def unchecked(made: object, **changes: object) -> None:
    """Check fields again after a change: a user has no type checker in between."""
    for name, value in changes.items():
        object.__setattr__(made, name, value)
    made.__post_init__()


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FusedLoss("bx"), ValueError, "did you mean 'box'"),
        (lambda: FusedLoss(beta=2.0), ValueError, "FusedLoss: beta must lie in"),
        (lambda: SmallBoxLoss(share=1.5), ValueError, "SmallBoxLoss: share must lie in"),
        (lambda: unchecked(ExpressiveLoss(), form="max"), ValueError, "form must be 'mtl', 'cc' or 'exp', got 'max'"),
        (lambda: ExpressiveLoss(alpha=-1.0), ValueError, "alpha must lie in"),
        (lambda: LandscapeLoss(step=-1.0), ValueError, "step must be >= 0"),
        (lambda: IntervalRegularised("box", eps=0.1), TypeError, "loss must be a loss, got str"),
        (lambda: IntervalRegularised(NaturalLoss(), eps=0.0), ValueError, "eps must be > 0"),
        (
            lambda: IntervalRegularised(NaturalLoss(), eps=0.1, tolerance=0.0),
            ValueError,
            r"tolerance must lie in \(0, 1\]",
        ),
        (lambda: GradientSmoothing(NaturalLoss(), sigma=-1.0), ValueError, "sigma must be >= 0"),
        (lambda: GradientSmoothing(NaturalLoss(), samples=0), ValueError, "samples must be at least 1"),
        (lambda: ParameterExploration(NaturalLoss(), samples=3), ValueError, "samples must be even"),
        (lambda: GradientSmoothing(None), TypeError, "loss must be a loss, got NoneType"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_certified_cross_entropy_of_each_example_is_never_negative():
    assert (certified_cross_entropy(torch.tensor([[1e3], [-1e3]]), "none") >= 0).all()
