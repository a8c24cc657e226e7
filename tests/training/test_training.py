"""Training: reproducible to the bit, through interruptions too; what a run folder holds; what stops a run."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import optrelax as ox
from optrelax.training import Training, TrainingError, TrainingProgress, processes, runs, train
from optrelax.training.loss_terms import LossTerms
from optrelax.training.losses import AdversarialLoss, CertifiedLoss, NaturalLoss
from optrelax.training.schedules import ConstantSchedule, LinearRamp, StepDecay
from optrelax.training.smoothing import GradientSmoothing

EPOCHS = 4


def data(n: int = 60) -> tuple[Tensor, Tensor]:
    """Points of three classes that a small network can tell apart."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(n) % 3
    return 0.25 * labels[:, None] + 0.2 + 0.1 * torch.rand(n, 5, generator=generator), labels


def network(seed: int = 0) -> nn.Module:
    return ox.models.fc(5, 8, 8, 3, seed=seed)


def settings(**changes: object) -> Training:
    chosen = {
        "loss": CertifiedLoss("crown-ibp", l1=1e-5),
        "epochs": EPOCHS,
        "eps": LinearRamp(0.0, 0.05, begin=1.0, length=2.0),
        "kappa": LinearRamp(1.0, 0.5, begin=1.0, length=2.0),
        "beta": LinearRamp(1.0, 0.5, begin=1.0, length=2.0),
        "lr": StepDecay(1e-2, 0.1, at=(3.0,)),
        "batch": 16,
        "seed": 3,
    }
    return Training(**{**chosen, **changes})


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def trained(folder: Path | None = None, **changes: object) -> nn.Module:
    net = network()
    train(net, data(), settings(**changes), folder=folder)
    return net


# --- the loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [NaturalLoss(), AdversarialLoss(), CertifiedLoss("box"), CertifiedLoss("crown")])
def test_training_improves_what_it_trains(loss):
    net, (x, labels) = network(), data()
    ramps = {"eps": LinearRamp(0.0, 0.02, length=10.0), "kappa": None, "beta": None}
    history = train(net, (x, labels), settings(loss=loss, epochs=30, lr=ConstantSchedule(1e-2), **ramps)).history
    assert history[-1].natural_accuracy == 1.0
    if isinstance(loss, NaturalLoss):
        assert history[-1].robust_loss is None
        assert history[-1].robust_accuracy is None
        return
    assert history[-1].robust_accuracy == 1.0
    # A point found by an attack bounds nothing; what a relaxation trained with certifies, it certifies afterwards.
    if isinstance(loss, CertifiedLoss):
        m = ox.lower_bounds(net, ox.LinfBall(x, 0.02, (0.0, 1.0)), ox.margins(labels, 3), loss.relaxation)
        assert (m > 0).all()


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    first = weights(trained())
    torch.manual_seed(99)  # the global generator must not matter
    torch.rand(5)
    assert same(first, weights(trained()))
    assert not same(first, weights(trained(seed=4)))


def test_random_losses_repeat_too():
    for loss in (AdversarialLoss(steps=2), CertifiedLoss("cauchy:k=3")):
        changes = {"loss": loss, "beta": None}
        assert same(weights(trained(**changes)), weights(trained(**changes)))


def test_training_moves_no_global_generator():
    before = torch.get_rng_state()
    trained()
    assert torch.equal(before, torch.get_rng_state())


def test_every_image_is_seen_once_an_epoch_in_another_order():
    seen: list[Tensor] = []

    class Watching(NaturalLoss):
        def __call__(self, net, region, labels, x=None, *, generator=None) -> LossTerms:
            seen.append(x)
            return super().__call__(net, region, labels, x, generator=generator)

    train(network(), data(), settings(loss=Watching(), kappa=None, beta=None, epochs=2))
    assert [len(x) for x in seen] == [16, 16, 16, 12] * 2
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    images = data()[0]
    assert not torch.equal(first, second)
    for order in (first, second):
        assert sorted(order.tolist()) == sorted(images.tolist())


def test_schedules_move_step_by_step():
    lists: list[tuple] = []

    class Recording(CertifiedLoss):
        def __call__(self, net, region, labels, x=None, *, generator=None) -> LossTerms:
            lists.append((region.eps, self.kappa, self.beta))
            return super().__call__(net, region, labels, x, generator=generator)

    train(network(), data(), settings(loss=Recording("crown-ibp")))
    positions = [epoch + step / 4 for epoch in range(EPOCHS) for step in range(4)]
    shares = [min(max((p - 1) / 2, 0), 1) for p in positions]
    expected = [(0.05 * s, 1 - 0.5 * s, 1 - 0.5 * s) for s in shares]
    assert lists == [pytest.approx(e, abs=1e-12) for e in expected]


def test_schedules_reach_the_loss_inside_a_wrapper():
    wrapped = GradientSmoothing(CertifiedLoss("crown-ibp"))
    made = settings(loss=wrapped, sigma=LinearRamp(0.1, 0.0, begin=1.0, length=2.0))
    now = made.loss_at(2.0)
    assert (now.sigma, now.loss.kappa, now.loss.beta) == (pytest.approx(0.05), 0.75, 0.75)
    with pytest.raises(ValueError, match="sigma has a schedule, but CertifiedLoss has no sigma"):
        settings(sigma=ConstantSchedule(0.1))
    with pytest.raises(ValueError, match="beta has a schedule, but GradientSmoothing has no beta"):
        settings(loss=GradientSmoothing(AdversarialLoss()))
    assert same(
        weights(trained(loss=wrapped, sigma=ConstantSchedule(0.0))), weights(trained(loss=CertifiedLoss("crown-ibp")))
    )


def test_metrics_are_means_over_the_images():
    net, (x, labels) = network(), data()
    still = settings(lr=ConstantSchedule(0.0), epochs=1, eps=ConstantSchedule(0.01), kappa=None, beta=None, batch=7)
    (metrics,) = train(net, (x, labels), still).history
    terms = still.loss(net, ox.LinfBall(x, 0.01, (0.0, 1.0)), labels)
    assert metrics.loss == pytest.approx(terms.total.item(), rel=1e-5)
    assert metrics.natural_loss == pytest.approx(terms.natural.item(), rel=1e-5)
    assert metrics.robust_loss == pytest.approx(terms.robust.item(), rel=1e-5)
    assert metrics.natural_accuracy == pytest.approx((net(x).argmax(1) == labels).double().mean().item())
    assert metrics.robust_accuracy == pytest.approx((terms.margins > 0).all(1).double().mean().item())


def test_watch_sees_every_step():
    seen: list[TrainingProgress] = []
    train(network(), data(), settings(), watch=seen.append)
    assert [(p.epoch, p.step) for p in seen] == [(e, s) for e in range(1, EPOCHS + 1) for s in range(1, 5)]
    assert {(p.epochs, p.steps) for p in seen} == {(EPOCHS, 4)}
    assert seen[-1].eps == 0.05


def test_a_loader_gives_the_same_as_its_tensors():
    net = network()
    train(net, DataLoader(TensorDataset(*data()), batch_size=13), settings())
    assert same(weights(net), weights(trained()))


def test_a_data_set_and_a_captured_network_work_too():
    digits = ox.load_dataset("digits", split="train").subset(40)
    net = ox.models.build("fc-small", digits.input_shape, seed=0)
    captured = ox.capture(net, digits.input_shape)
    before = weights(net)
    result = train(captured, digits, settings(epochs=1))
    assert result.network is captured
    assert not same(before, weights(net))  # in place


@pytest.mark.gpu
def test_training_on_a_gpu_follows_the_cpu():
    net = network().cuda()
    train(net, data(), settings())
    for a, b in zip(weights(net), weights(trained()), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4)


# --- run folders and resuming --------------------------------------------------------------------------------------


def test_a_run_folder_holds_the_run(tmp_path):
    net = network()
    facts = {"data": "points"}
    history = train(net, data(), settings(), folder=tmp_path / "run", facts=facts).history
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["config.json", "metrics.jsonl", "net.safetensors", "state.safetensors"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["configuration"]["training"]["seed"] == 3
    assert config["configuration"]["training"]["loss"]["relaxation"] == "crown-ibp"
    assert config["configuration"]["data"] == "points"
    assert config["versions"]["torch"] == torch.__version__
    assert config["threads"] == torch.get_num_threads()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] == history[-1].loss
    x = data()[0]
    assert torch.equal(ox.load(tmp_path / "run")(x), ox.capture(net)(x))
    assert ox.networks.checkpoints.read_extra(tmp_path / "run") == {"data": "points", "epochs": EPOCHS}


def test_a_run_is_not_overwritten(tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a run already; resume it \(--resume\) or choose another folder"):
        trained(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="expected a folder for the run, got a file"):
        trained(file)


class Stop(Exception):
    pass


def stop_at(epoch: int, step: int):
    def watch(progress: TrainingProgress) -> None:
        if (progress.epoch, progress.step) == (epoch, step):
            raise Stop

    return watch


@pytest.mark.parametrize(("epoch", "step"), [(1, 2), (2, 1), (3, 4), (4, 4)])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, epoch, step):
    whole = trained(tmp_path / "whole")
    with pytest.raises(Stop):
        train(network(), data(), settings(), folder=tmp_path / "cut", watch=stop_at(epoch, step))
    net = network(seed=5)  # whatever it starts from, the folder decides
    if epoch == 1:
        net = network()  # nothing is stored before the first epoch has ended
    result = train(net, data(), settings(), folder=tmp_path / "cut", resume=True)
    assert same(weights(whole), weights(net))
    assert [m.epoch for m in result.history] == [1, 2, 3, 4]

    def timeless(folder: str) -> list[dict]:
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    assert timeless("whole") == timeless("cut")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    net = trained(tmp_path)
    stamp = (tmp_path / "state.safetensors").stat().st_mtime_ns
    other = network(seed=8)
    result = train(other, data(), settings(), folder=tmp_path, resume=True)
    assert same(weights(net), weights(other))
    assert len(result.history) == EPOCHS
    assert (tmp_path / "state.safetensors").stat().st_mtime_ns == stamp


def test_metrics_past_the_state_are_dropped(tmp_path):
    """As after a kill between the line and the state, the line perhaps cut short."""
    net = trained(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5, "sec')
    other = network()
    assert len(train(other, data(), settings(), folder=tmp_path, resume=True).history) == EPOCHS
    assert same(weights(net), weights(other))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == EPOCHS


def test_another_configuration_is_not_resumed(tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"it differs in training.epochs \(4 there, 9 here\), training.seed \(3"):
        train(network(), data(), settings(epochs=9, seed=1), folder=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"differs in digest .*, examples \(\[60, 5\] there, \[30, 5\] here\)"):
        train(network(), data(30), settings(), folder=tmp_path, resume=True)
    x, labels = data()
    with pytest.raises(ValueError, match="differs in digest"):
        train(network(), (x, labels.flip(0)), settings(), folder=tmp_path, resume=True)


def test_other_threads_or_versions_are_told(tmp_path, caplog):
    trained(tmp_path)
    train(network(), data(), settings(), folder=tmp_path, resume=True)
    assert not [record for record in caplog.records if record.name.startswith("optrelax")]
    config = json.loads((tmp_path / "config.json").read_text())
    config["threads"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    train(network(), data(), settings(), folder=tmp_path, resume=True)
    (told,) = (r.getMessage() for r in caplog.records if r.name.startswith("optrelax"))
    assert told.endswith(f"may differ: threads (99 there, {torch.get_num_threads()} here)")


def test_training_goes_on_from_a_stored_network(tmp_path):
    """Weights are taken by name; another run's optimiser and ramps are not."""
    before = weights(trained(tmp_path / "first"))
    net = network(seed=5)
    facts = runs.start_from(net, tmp_path / "first")
    assert same(weights(net), before)
    train(net, data(), settings(epochs=1), folder=tmp_path / "second", facts=facts)
    stored = json.loads((tmp_path / "second" / "config.json").read_text())["configuration"]["start"]
    assert stored["network"] == str(tmp_path / "first")
    # The same call goes on; one that begins at other weights is another run.
    again = runs.start_from(network(), tmp_path / "first")
    train(network(), data(), settings(epochs=1), folder=tmp_path / "second", facts=again, resume=True)
    ox.save(network(seed=9), tmp_path / "other.safetensors")
    other = runs.start_from(network(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"it differs in start.digest"):
        train(network(), data(), settings(epochs=1), folder=tmp_path / "second", facts=other, resume=True)


def test_a_network_that_does_not_fit_is_no_start(tmp_path):
    trained(tmp_path / "run")
    net = ox.models.fc(5, 8, 3)
    before = weights(net)
    with pytest.raises(
        ValueError, match=r"run does not fit .*3\.weight \(\[8, 8\] there, \[3, 8\] here\), .*missing here"
    ):
        runs.start_from(net, tmp_path / "run")
    assert same(weights(net), before)
    with pytest.raises(FileNotFoundError, match="no such file"):
        runs.start_from(net, tmp_path / "nowhere")


def test_another_network_is_not_resumed(tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"state.safetensors: expected the state of this run"):
        train(ox.models.fc(5, 9, 8, 3), data(), settings(), folder=tmp_path, resume=True)


def test_a_corrupt_state_is_named(tmp_path):
    trained(tmp_path)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"state.safetensors: expected a complete safetensors file"):
        train(network(), data(), settings(), folder=tmp_path, resume=True)


def test_a_full_disk_leaves_the_last_state_valid(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole")
    real = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "state" in path.name and (tmp_path / "cut" / "metrics.jsonl").read_text().count("\n") == 3:
            real(path, content[:100])
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        trained(tmp_path / "cut")
    monkeypatch.setattr(Path, "write_bytes", real)
    net = network()
    train(net, data(), settings(), folder=tmp_path / "cut", resume=True)
    assert same(weights(whole), weights(net))


# --- what stops a run ----------------------------------------------------------------------------------------------


class Breaking(CertifiedLoss):
    """NaN in the given part of the third batch of the second epoch."""

    part = "loss"

    def __call__(self, net, region, labels, x=None, *, generator=None) -> LossTerms:
        terms = super().__call__(net, region, labels, x, generator=generator)
        Breaking.calls += 1
        if Breaking.calls != 7:
            return terms
        if self.part == "loss":
            robust = terms.robust * math.nan
            return LossTerms(terms.total + robust, terms.natural, robust, terms.penalty, terms.logits, terms.margins)
        weight = net.module[3].weight
        broken = terms.total + (weight.sum() * 0).sqrt()  # value 0, derivative inf * 0
        return LossTerms(broken, terms.natural, terms.robust, terms.penalty, terms.logits, terms.margins)


class BreakingGradient(Breaking):
    part = "gradient"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Breaking, "the loss is nan (its part: robust)"),
        (BreakingGradient, "the gradient of 3.weight is not finite"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(tmp_path, kind, message):
    Breaking.calls = 0
    net = network()
    changes = {"loss": kind("deepz"), "eps": ConstantSchedule(0.01), "kappa": None, "beta": None}
    with pytest.raises(TrainingError) as caught:
        train(net, data(), settings(**changes), folder=tmp_path)
    assert str(caught.value).startswith(
        f"train: {message} at epoch 2, batch 3 of 4 (relaxation deepz, eps 0.01); the batch is in {tmp_path}"
    )
    assert (caught.value.epoch, caught.value.step) == (2, 3)
    # The kept batch and weights give the loss of that step again.
    kept = load_file(tmp_path / "failed-batch.safetensors")
    assert kept["images"].shape == (16, 5)
    assert torch.equal(kept["images"], data()[0][kept["index"]])
    assert torch.equal(kept["labels"], data()[1][kept["index"]])
    with safe_open(tmp_path / "failed-batch.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["optrelax-failure"])
    assert (facts["epoch"], facts["step"], facts["eps"], facts["loss"]["relaxation"]) == (2, 3, 0.01, "deepz")
    assert all(torch.isfinite(p).all() for p in net.parameters())  # the step was not taken
    assert same([p.detach() for p in ox.load(tmp_path / "failed-net.safetensors").module.parameters()], weights(net))


class Raising(CertifiedLoss):
    """Raises at the second batch, on the way forward or back."""

    calls = 0
    back = False

    def __call__(self, net, region, labels, x=None, *, generator=None) -> LossTerms:
        terms = super().__call__(net, region, labels, x, generator=generator)
        type(self).calls += 1
        if self.calls != 2:
            return terms
        if not self.back:
            raise ArithmeticError("the solver gave up")
        total = terms.total.clone()
        total.register_hook(self._raise)
        return LossTerms(total, terms.natural, terms.robust, terms.penalty, terms.logits, terms.margins)

    def _raise(self, gradient: Tensor) -> None:
        raise ArithmeticError("the solver gave up")


class RaisingBack(Raising):
    back = True


@pytest.mark.parametrize("kind", [Raising, RaisingBack])
def test_a_loss_that_raises_stops_the_run_and_keeps_the_batch(tmp_path, kind):
    kind.calls = 0
    net = network()
    changes = {"loss": kind("crown"), "eps": ConstantSchedule(0.01), "kappa": None, "beta": None}
    with pytest.raises(TrainingError) as caught:
        train(net, data(), settings(**changes), folder=tmp_path)
    assert str(caught.value) == (
        "train: the loss raised ArithmeticError: the solver gave up at epoch 1, batch 2 of 4 (relaxation crown, eps "
        f"0.01); the batch is in {tmp_path / 'failed-batch.safetensors'}"
    )
    assert isinstance(caught.value.__cause__, ArithmeticError)
    kept = load_file(tmp_path / "failed-batch.safetensors")
    assert torch.equal(kept["images"], data()[0][kept["index"]])
    assert same([p.detach() for p in ox.load(tmp_path / "failed-net.safetensors").module.parameters()], weights(net))


def test_a_loss_that_raises_tells_the_other_processes(tmp_path, monkeypatch):
    """They wait for the sum of this step's gradients, and would wait for ever."""
    told = []
    monkeypatch.setattr(processes.Processes, "current", classmethod(lambda cls: cls(0, 2)))
    stubs = {"agree": lambda self, tensors: None, "wait": lambda self: None}
    stubs["add_up"] = lambda self, tensors: told.append(tensors[-1].tolist())
    for name, stub in stubs.items():
        monkeypatch.setattr(processes.Processes, name, stub)
    Raising.calls = 0
    plain = {"loss": Raising("box"), "kappa": None, "beta": None, "eps": ConstantSchedule(0.01)}
    with pytest.raises(TrainingError, match=r"the solver gave up at epoch 1, batch 2 of 4 .* the batch is in"):
        train(network(), data(), settings(pieces=2, **plain), folder=tmp_path)
    assert told == [[0.0, 0.0], [0.0, 1.0]]


def test_a_network_that_cannot_be_bounded_is_no_fault_of_a_batch(tmp_path):
    net = nn.Sequential(nn.Linear(5, 4), nn.Hardshrink(), nn.Linear(4, 3))
    with pytest.raises(ox.UnsupportedOpError):
        train(net, data(), settings(), folder=tmp_path)
    assert not (tmp_path / "failed-batch.safetensors").exists()


def test_without_a_folder_the_message_says_so():
    Breaking.calls = 6
    with pytest.raises(TrainingError, match="pass a folder to keep the batch"):
        train(network(), data(), settings(loss=Breaking("box"), kappa=None, beta=None, eps=ConstantSchedule(0.01)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: settings(epochs=0), ValueError, "epochs must be at least 1, got 0"),
        (lambda: settings(batch=0), ValueError, "batch must be at least 1"),
        (lambda: settings(seed=-1), ValueError, "seed must be >= 0"),
        (lambda: settings(loss=NaturalLoss()), ValueError, "beta has a schedule, but NaturalLoss has no beta"),
        (lambda: settings(epoch=3), TypeError, "epoch"),
        (lambda: train(network(), data(), settings(), resume=True), ValueError, "resume needs the folder"),
        (lambda: train(network(), (data()[0], data()[1][:5]), settings()), ValueError, r"labels must be \[60\]"),
        (lambda: train(nn.Sequential(nn.ReLU()), data(), settings()), ValueError, "no trainable parameters"),
        (lambda: train(network(), (2 * data()[0], data()[1]), settings()), ValueError, "outside clip"),
        (
            lambda: train(nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)), data(), settings()),
            ox.UnsupportedOpError,
            "training mode",
        ),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- pieces and processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [2, 3, 16])
def test_pieces_add_up_to_the_batch(pieces):
    """The last batch has 12 images, fewer than pieces in one case."""
    whole, cut = network().double(), network().double()
    x, labels = data()
    one, many = (settings(pieces=p, loss=CertifiedLoss("crown-ibp", l1=1e-3)) for p in (1, pieces))
    first = train(whole, (x.double(), labels), one).history
    second = train(cut, (x.double(), labels), many).history
    for a, b in zip(weights(whole), weights(cut), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert second[-1].loss == pytest.approx(first[-1].loss, rel=1e-9)
    assert second[-1].robust_accuracy == first[-1].robust_accuracy


PROCESS = """
import sys, torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_training import data, network, settings, train
dist.init_process_group("gloo", rank=int(sys.argv[1]), world_size=2, init_method="file://" + sys.argv[2] + "/meet")
net = network()
if sys.argv[1] == "1":  # the first process's weights count
    torch.nn.init.zeros_(net[1].weight)
history = train(net, data(32), settings(epochs=1, pieces=2), folder=sys.argv[2] + "/run").history
save_file(net.state_dict(), f"{sys.argv[2]}/{sys.argv[1]}.safetensors")
print(history[0].loss, history[0].natural_accuracy)
dist.barrier()  # gloo aborts a process whose partner is gone before it has ended its threads
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_take_the_same_two_steps_as_one(tmp_path, one_thread):
    """Each works on one piece of every batch: the sum of two gradients is the same in either order, bit for bit."""
    one = network()
    (metrics,) = train(one, data(32), settings(epochs=1, pieces=2)).history
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "GLOO_SOCKET_IFNAME": "lo"}
    environment["OMP_NUM_THREADS"] = "1"
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROCESS, str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    printed = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    for rank in (0, 1):
        other = load_file(tmp_path / f"{rank}.safetensors")
        assert all(torch.equal(value, other[name]) for name, value in one.state_dict().items())
        loss, accuracy = map(float, printed[rank].split())
        assert (loss, accuracy) == (pytest.approx(metrics.loss, rel=1e-12), metrics.natural_accuracy)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(monkeypatch):
    monkeypatch.setattr(processes.Processes, "current", classmethod(lambda cls: cls(0, 2)))
    with pytest.raises(ValueError, match="pieces must be a multiple of the 2 processes, which share them, got 3"):
        train(network(), data(), settings(pieces=3))


def test_a_fault_of_another_process_stops_this_one_too(tmp_path, monkeypatch):
    """Its gradient may be finite here; the batch is stored where it broke."""

    def told(self, tensors) -> None:
        tensors[-1].fill_(1.0)  # the flag

    monkeypatch.setattr(processes.Processes, "current", classmethod(lambda cls: cls(0, 2)))
    for name, stub in (("add_up", told), ("agree", lambda self, tensors: None), ("wait", lambda self: None)):
        monkeypatch.setattr(processes.Processes, name, stub)
    with pytest.raises(
        TrainingError,
        match="the loss of another process raised, or it or its gradient is not finite at epoch 1, batch 1",
    ):
        train(network(), data(), settings(pieces=2), folder=tmp_path)
    assert not (tmp_path / "failed-batch.safetensors").exists()


# --- interruptions -------------------------------------------------------------------------------------------------


def test_what_a_killed_process_left_half_written_is_swept(tmp_path):
    net = trained(tmp_path)
    left = [tmp_path / name for name in (".state-ab12.safetensors", ".net-x.safetensors", ".metrics-q.jsonl")]
    for file in left:
        file.write_bytes(b"half")
    train(network(), data(), settings(), folder=tmp_path, resume=True)
    assert not any(file.exists() for file in left)
    assert same(weights(net), [p.detach() for p in ox.load(tmp_path).module.parameters()])


@pytest.mark.parametrize("epoch", [2, EPOCHS])
def test_a_disk_that_fills_up_between_state_and_network_leaves_no_old_network(tmp_path, monkeypatch, epoch):
    whole = trained()
    real = ox.networks.checkpoints.save

    def full(network, path, *, extra=None, **rest):
        if extra["epochs"] == epoch:
            raise OSError(28, "No space left on device")
        real(network, path, extra=extra, **rest)

    monkeypatch.setattr(ox.networks.checkpoints, "save", full)
    with pytest.raises(OSError, match="No space left"):
        trained(tmp_path)
    monkeypatch.setattr(ox.networks.checkpoints, "save", real)
    net = network()
    train(net, data(), settings(), folder=tmp_path, resume=True)
    assert same(weights(whole), weights(net))
    assert same(weights(whole), [p.detach() for p in ox.load(tmp_path).module.parameters()])
    assert ox.networks.checkpoints.read_extra(tmp_path)["epochs"] == EPOCHS


def test_a_disk_that_fills_up_in_a_line_of_metrics_is_forgiven(tmp_path, monkeypatch):
    whole = trained()
    real = runs.RunFolder.append

    def full(folder, metrics):
        if metrics["epoch"] == 3:
            with (folder.path / "metrics.jsonl").open("a") as file:
                file.write('{"epoch": 3, "seco')
            raise OSError(28, "No space left on device")
        real(folder, metrics)

    monkeypatch.setattr(runs.RunFolder, "append", full)
    with pytest.raises(OSError, match="No space left"):
        trained(tmp_path)
    monkeypatch.setattr(runs.RunFolder, "append", real)
    net = network()
    assert len(train(net, data(), settings(), folder=tmp_path, resume=True).history) == EPOCHS
    assert same(weights(whole), weights(net))


# --- where it broke ------------------------------------------------------------------------------------------------


def broken(net: nn.Module, loss: object, at: float = 0.05) -> str:
    plain = {"loss": loss, "kappa": None, "beta": None, "eps": ConstantSchedule(at)}
    with pytest.raises(TrainingError) as caught:
        train(net, data(), settings(**plain))
    return str(caught.value)


def test_the_first_parameter_layer_or_bound_that_broke_is_named():
    net = network()
    with torch.no_grad():
        net[3].bias[2] = math.nan
    assert "the loss is nan (its part: natural, robust), first in parameter 3.bias at epoch 1, batch 1 of 4" in broken(
        net, CertifiedLoss("box", kappa=0.5)
    )
    net = network()
    with torch.no_grad():
        net[3].weight.fill_(3e38)
        net[1].weight.fill_(1.0)
    assert "first in the value of layer 3 at" in broken(net, NaturalLoss())


@pytest.mark.parametrize(
    "relaxation", ["box", "hbox", "crown-ibp", "fast-lin", "deepz", "crown", "triangle", "alpha-crown", "layerwise"]
)
def test_bounds_that_break_where_values_do_not_are_named(relaxation):
    """Every neuron of the first layer is dead at the images, and wide awake within their regions."""
    net = network()
    with torch.no_grad():
        net[1].weight.fill_(1e20)
        net[1].bias.fill_(-4.5e20)
        net[3].weight.fill_(1e25)
    message = broken(net, CertifiedLoss(relaxation, kappa=0.5), at=0.5)
    assert f"first in the bounds before layer 4 by {relaxation} at epoch 1, batch 1 of 4" in message


SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_ID": "20", "SLURM_STEP_ID": "1"}


def joined(monkeypatch, environment: dict[str, str], **rest) -> tuple:
    """How `launched` would meet: (keywords of init_process_group) in this environment."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_", "WORLD", "RANK", "LOCAL_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    met = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **how: met.append((backend, how)))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with processes.launched(torch.device("cpu")):
        return tuple(met)


def test_srun_says_where_to_meet(monkeypatch):
    task = SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    where = {"init_method": "tcp://127.0.0.1:12161", "rank": 1, "world_size": 2}
    assert joined(monkeypatch, task) == (("gloo", where),)
    nodes = task | {"SLURM_STEP_NUM_NODES": "2", "MASTER_PORT": "777"}
    lists = {"node[07,09-12],big1": "node07", "a-1,b[2-3]": "a-1", "r[0-1]n[3,5]": "r0n3", "gpu4": "gpu4"}
    for given, first in lists.items():
        ((_, how),) = joined(monkeypatch, nodes | {"SLURM_STEP_NODELIST": given})
        assert how["init_method"] == f"tcp://{first}:777"
    ((_, how),) = joined(monkeypatch, nodes | {"MASTER_ADDR": "10.0.0.5"})
    assert how["init_method"] == "tcp://10.0.0.5:777"
    # torchrun below srun: its word counts.
    assert joined(monkeypatch, task | {"RANK": "3", "WORLD_SIZE": "4"}) == (("gloo", {}),)
    # A batch script without srun, a step of one task, and torchrun with one process.
    for alone in (
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        task | {"SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": "1"},
    ):
        assert joined(monkeypatch, alone) == ()
    with pytest.raises(
        RuntimeError, match=r"srun announces 2 tasks but not SLURM_PROCID and SLURM_LOCALID; .*torchrun"
    ):
        joined(monkeypatch, SRUN)
    with pytest.raises(RuntimeError, match="no SLURM_STEP_NODELIST; set MASTER_ADDR"):
        joined(monkeypatch, {k: v for k, v in task.items() if k != "SLURM_STEP_NUM_NODES"})


TASK = """
import pathlib
import torch
from optrelax.training.processes import launched
with launched(torch.device("cpu")) as processes:
    import torch._dynamo  # as a capture does: its imports may keep the group
    values = torch.tensor([processes.rank + 1.0, 1.0])
    processes.add_up([values])
threads = [name.read_text() for name in pathlib.Path("/proc/self/task").glob("*/comm")]
print(processes.rank, processes.count, values.tolist(), sum("gloo" in name for name in threads))
"""


@pytest.mark.slow
def test_tasks_of_srun_find_each_other():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    environment |= SRUN | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TASK],
            env=environment | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    printed = [process.communicate(timeout=120)[0].strip() for process in started]
    assert printed == ["0 2 [3.0, 2.0] 0", "1 2 [3.0, 2.0] 0"]  # no thread of the group's is left


@pytest.mark.slow
def test_the_command_joins_the_processes_that_torchrun_starts(tmp_path):
    script = tmp_path / "command.py"
    script.write_text("from optrelax.cli import main\nmain()\n")
    recipe = ["train", "digits-fc-small-box", "--budget", "smoke", "--subset", "40", "--pieces", "2", "--out"]
    started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    for name, how in (("two", started), ("one", [str(script)])):
        arguments = [sys.executable, "-W", "ignore", *how, *recipe, str(tmp_path / name)]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("means over the last epoch") == 1  # one process speaks
    one, two = (load_file(tmp_path / name / "net.safetensors") for name in ("one", "two"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    metrics = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("one", "two")]
    assert metrics[0]["natural_accuracy"] == metrics[1]["natural_accuracy"]
