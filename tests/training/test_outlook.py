"""What a run is expected to take, before its first step: told once, and nothing of the run changes by it."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from optrelax.layers import DualAscent, Triangle
from optrelax.training import Training, train
from optrelax.training.losses import CertifiedLoss
from optrelax.training.lp_losses import LPLoss
from optrelax.training.schedules import LinearRamp


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5).eval(), nn.Linear(6, 3))


def data():
    return torch.rand(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def settings(**changes):
    chosen = {"epochs": 3, "batch": 6, "eps": LinearRamp(0.0, 0.05, 0, 2), "loss": CertifiedLoss("box")}
    return Training(**(chosen | changes))


@pytest.mark.parametrize(
    "loss", [CertifiedLoss("crown-ibp"), LPLoss(layer=Triangle(solver=DualAscent(max_iterations=3)))]
)
def test_weights_statistics_and_draws_are_those_of_a_run_that_was_not_asked(loss):
    states = []
    for before in (None, lambda _: None):
        net = network()
        train(net, data(), settings(loss=loss), before=before)
        states.append([*net.state_dict().values(), torch.rand(3)])
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


def test_it_is_told_once_and_of_what_is_left(tmp_path):
    told, seen = [], []

    def stop(progress):
        seen.append(progress)
        if (progress.epoch, progress.step) == (2, 1):
            raise KeyboardInterrupt

    given = {"folder": tmp_path, "before": told.append, "checkpoint_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        train(network(), data(), settings(), watch=stop, **given)
    train(network(), data(), settings(), resume=True, **given)
    train(network(), data(), settings(), resume=True, **given)  # nothing is left
    assert [(p.epoch, p.step, p.epochs, p.steps) for p in told] == [(1, 0, 3, 2), (2, 1, 3, 2)]
    assert all(p.expected > 0 for p in told)
    assert all(p.expected is None for p in seen)


@dataclass(frozen=True)
class Timed:
    """A loss that takes a second an example, by a clock of its own."""

    clock: list[float]

    def __call__(self, network, region, labels, x=None, **given):
        self.clock[0] += len(labels)
        return CertifiedLoss("box")(network, region, labels, x, **given)


def test_it_counts_every_image_of_every_epoch_left(monkeypatch):
    from optrelax.certification import estimates

    clock, told = [0.0], []
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: clock[0])
    train(network(), data(), settings(loss=Timed(clock)), before=told.append)
    assert told[0].expected == pytest.approx(36)


def test_a_loss_that_raises_leaves_it_unknown():
    def spiteful(*_, **__):
        raise RuntimeError

    told = []
    with pytest.raises(RuntimeError, match="the loss raised RuntimeError"):
        train(network(), data(), settings(loss=spiteful), before=told.append)
    assert told[0].expected is None
