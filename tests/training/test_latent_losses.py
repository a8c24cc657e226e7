"""COLT's loss: the points lie in the zonotope, the layers before stand still, the last stage is nearly DeepZ's."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optrelax as ox
from optrelax.training import Training, train
from optrelax.training.latent_losses import LatentLoss, cut_after, values_after
from optrelax.training.losses import AdversarialLoss, CertifiedLoss
from optrelax.training.schedules import ConstantSchedule, Stages

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
    return ox.LinfBall(torch.rand(5, 6, generator=generator, dtype=torch.float64), 0.2, (0.0, 1.0))


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_network_is_evaluated_from_any_cut(net):
    network = ox.capture(net)
    x = torch.rand(3, 6, dtype=torch.float64)
    for stage in (1, 2):
        cut = cut_after(network, stage)
        torch.testing.assert_close(values_after(network, cut, network.values(x)[cut]), net(x))


def test_stage_0_is_the_attack(net, region, labels):
    found = LatentLoss(stage=0, steps=5)(net, region, labels, generator=drawn())
    expected = AdversarialLoss(steps=5)(net, region, labels, generator=drawn())
    torch.testing.assert_close(found.total, expected.total)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_loss_lies_between_the_attacks_and_deepz(net, region, labels, stage):
    """The bound is DeepZ's of each logit by itself: an attack weighs all of them at once."""
    found = LatentLoss(stage=stage, steps=40, step=0.1)(net, region, labels, generator=drawn())
    attacked = AdversarialLoss(steps=40)(net, region, labels, generator=drawn())
    bound = CertifiedLoss("deepz")(net, region, labels)
    assert attacked.robust < found.robust < bound.robust
    assert (found.margins >= bound.margins - 1e-12).all()


def test_with_two_classes_the_last_stage_reaches_deepz(region):
    """One margin is linear in the noise: sign steps end at the corner that DeepZ's bound is attained at."""
    net = ox.models.fc(6, 8, 7, 2, seed=1).double()
    labels = torch.tensor([0, 1, 1, 0, 1])
    found = LatentLoss(stage=2, steps=20)(net, region, labels, generator=drawn())
    torch.testing.assert_close(found.margins, ox.lower_bounds(net, region, ox.margins(labels, 2), "deepz"))


def test_layers_before_the_stage_get_no_gradient(net, region, labels):
    LatentLoss(stage=1)(net, region, labels, generator=drawn()).total.backward()
    assert net[1].weight.grad is None
    assert net[3].weight.grad.abs().sum() > 0
    before = net[1].weight.detach().clone()
    made = Training(loss=LatentLoss(stage=1), epochs=2, eps=ConstantSchedule(0.1), lr=ConstantSchedule(1e-2), batch=5)
    train(net, (region.x, labels), made)
    assert torch.equal(net[1].weight, before)


def test_stages_train(net, region, labels):
    stages = Stages((LatentLoss(stage=0), LatentLoss(stage=1)), (0.0, 10.0))
    history = train(
        net,
        (region.x, labels),
        Training(loss=stages, epochs=40, eps=ConstantSchedule(0.02), lr=ConstantSchedule(2e-2), batch=5),
    ).history
    assert history[-1].robust_loss < history[10].robust_loss
    assert history[-1].natural_loss < history[0].natural_loss - 0.1


def test_a_region_without_width_is_the_natural_loss(net, region, labels):
    found = LatentLoss(stage=2)(net, ox.LinfBall(region.x, 0.0), labels, generator=drawn())
    torch.testing.assert_close(found.robust, F.cross_entropy(net(region.x), labels))


def test_convolutions_have_stages_and_residual_branches_do_not():
    conv = ox.models.build("conv", (1, 8, 8), 10, seed=0)
    region = ox.LinfBall(torch.rand(2, 1, 8, 8), 0.05, (0.0, 1.0))
    labels = torch.tensor([1, 2])
    assert LatentLoss(stage=1)(conv, region, labels, generator=drawn()).total.isfinite()
    residual = ox.models.build("residual", (1, 8, 8), 10, seed=0)
    with pytest.raises(ValueError, match="reads what lies before it; choose a stage at the end of the residual block"):
        LatentLoss(stage=2)(residual, region, labels)
    assert LatentLoss(stage=3)(residual, region, labels, generator=drawn()).total.isfinite()


def test_bad_settings_are_refused(net, region, labels):
    with pytest.raises(ValueError, match="stage must be >= 0"):
        LatentLoss(stage=-1)
    with pytest.raises(ValueError, match="steps must be at least 0"):
        replace(LatentLoss(), steps=-1)
    with pytest.raises(ValueError, match="stage 3, but the network has 2 activations"):
        LatentLoss(stage=3)(net, region, labels)
