"""Training networks with batch norms: the statistics are the whole batch's, whatever its pieces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import optrelax as ox
from optrelax.training.losses import CertifiedLoss
from optrelax.training.schedules import ConstantSchedule
from optrelax.training.settings import Training
from optrelax.training.trainer import train

SHAPE = (1, 6, 6)
LOSS = CertifiedLoss("crown-ibp", kappa=0.5)
TRAINING = Training(loss=LOSS, epochs=2, eps=ConstantSchedule(0.02), lr=ConstantSchedule(5e-3), batch=7, seed=3)


def network() -> nn.Sequential:
    return ox.models.cnn7(SHAPE, 3, width=2, features=5, seed=1).double()


def data() -> tuple[Tensor, Tensor]:
    x = torch.rand(14, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, (x.mean((1, 2, 3)) > 0.5).long() + (x[:, 0, 0, 0] > 0.7)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in net.state_dict().items()}


def trained(**options: object) -> dict[str, Tensor]:
    net = network()
    train(net, data(), replace(TRAINING, **options))  # type: ignore[arg-type]
    return state(net)


def test_one_step_in_pieces_is_the_loss_of_the_whole_batch(monkeypatch):
    """Plain gradient descent shows the gradient itself."""
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    x, labels = data()
    net, twin = network(), network()
    train(net, (x, labels), replace(TRAINING, epochs=1, batch=14, pieces=3, lr=ConstantSchedule(1.0)))
    LOSS(twin, ox.LinfBall(x, 0.02, clip=(0.0, 1.0)), labels).total.backward()
    with torch.no_grad():
        for p in twin.parameters():
            p -= p.grad
    torch.testing.assert_close(state(net), state(twin))


@pytest.mark.parametrize("statistics", ["batch", "population"])
def test_pieces_change_nothing(statistics):
    whole, pieces = (trained(statistics=statistics, pieces=n) for n in (1, 3))
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-7)
    assert all(int(n) == 4 for name, n in whole.items() if name.endswith("num_batches_tracked"))
    other = trained(statistics="population" if statistics == "batch" else "batch")
    assert any(not torch.allclose(other[name], whole[name], rtol=1e-3) for name in whole)


def test_in_eval_mode_the_statistics_stand_still():
    net = network().eval()
    before = state(net)
    train(net, data(), TRAINING)
    after = state(net)
    assert all(torch.equal(after[n], before[n]) for n in before if "running" in n)
    assert any(not torch.equal(after[n], before[n]) for n in before)


def test_a_run_is_stored_resumed_and_loaded(tmp_path: Path):
    wanted = trained(pieces=2)
    training = replace(TRAINING, pieces=2)

    class Killed(Exception):
        pass

    def kill(progress: object) -> None:
        steps.append(progress)
        if len(steps) == 3:
            raise Killed

    steps: list[object] = []
    with pytest.raises(Killed):
        train(network(), data(), training, folder=tmp_path, checkpoint_every=0, watch=kill)
    net = network()
    result = train(net, data(), training, folder=tmp_path, resume=True, checkpoint_every=0)
    torch.testing.assert_close(state(net), wanted, rtol=0, atol=0)
    x, labels = data()
    loaded = ox.load(tmp_path / "net.safetensors")
    torch.testing.assert_close(loaded(x), net.eval()(x))
    report = ox.certify(result.network, (x, labels), 0.01, relaxation="crown-ibp", attack=None)
    assert report.certified <= report.accuracy


def test_a_batch_that_breaks_is_stored_with_its_network(tmp_path: Path):
    net = network()
    with torch.no_grad():
        net[-1].weight.fill_(torch.inf)
    with pytest.raises(RuntimeError, match="first in parameter"):
        train(net, data(), TRAINING, folder=tmp_path)
    assert (tmp_path / "failed-net.safetensors").exists()
