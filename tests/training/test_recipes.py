"""Recipes: the paper's table, budgets, and that every method trains."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import optrelax as ox
from optrelax.cli import main
from optrelax.layers import Layerwise, Triangle
from optrelax.training import train
from optrelax.training.interval_training import IntervalRegularised
from optrelax.training.losses import CertifiedLoss, NaturalLoss
from optrelax.training.lp_losses import LPLoss
from optrelax.training.recipe_budgets import core_seconds, milliseconds
from optrelax.training.recipes import BUDGETS, Recipe, names, recipe
from optrelax.training.robust_losses import ExpressiveLoss, FusedLoss, SmallBoxLoss
from optrelax.training.smoothing import GradientSmoothing


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def inner(loss):
    """The loss inside regularisers and smoothing."""
    return inner(loss.loss) if hasattr(loss, "loss") else loss


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_recipe_gives_settings_that_fit_its_row(budget):
    for row in [recipe(name, budget) for name in names()]:
        training = row.training(seed=4)
        assert training.seed == 4
        last = float(training.epochs)
        if row.method == "natural":
            assert isinstance(training.loss, NaturalLoss)
            continue
        assert training.eps(row.warmup) == 0.0
        assert training.eps(last) == row.eps
        assert inner(training.loss_at(row.warmup)).kappa == row.natural_start
        assert inner(training.loss_at(last)).kappa == row.kappa
        assert training.lr(0.0) == row.lr
        assert training.lr(last) == pytest.approx(row.lr * row.lr_factor ** len(row.milestones))


def test_fewer_epochs_keep_the_shares():
    short = recipe("mnist-fc-small-box", epochs=10)
    assert (short.epochs, short.warmup, short.mixing, short.milestones) == (10, 0.5, 5.0, (6.5, 9.5))
    assert recipe("mnist-fc-small-box", epochs=10, mixing=2.0).mixing == 2.0
    assert recipe("mnist-fc-small-box", eps=0.2, kappa=0.5).training().loss_at(100.0).kappa == 0.5


def test_recipes_start_from_the_seed_alone():
    digits = ox.load_dataset("digits", split="train")
    first, again, other = (recipe("digits-fc-small-box").network(digits, seed) for seed in (1, 1, 2))
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(other))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipe("mnist-fc-small-bocks"), "did you mean 'mnist-fc-small-box'"),
        (lambda: recipe("mnist-fc-small-box", epoch=3), "no setting 'epoch'; did you mean 'epochs'"),
        (lambda: recipe("mnist-fc-small-box", ramp="sudden"), "ramp must be one of linear, smooth"),
        (lambda: recipe("mnist-fc-small-box", mixing=100.0), "before eps is reached"),
        (lambda: recipe("mnist-fc-small-natural", relaxation="box"), "goes with method 'certified' or 'fused'"),
        (lambda: recipe("mnist-fc-small-box", relaxation="bx").training(), "did you mean 'box'"),
    ],
)
def test_bad_recipes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_recipe_reproduces_its_run():
    """The same short recipe twice gives the same network, as one hash of all its weights."""
    digits = ox.load_dataset("digits", split="train").subset(100)
    row = Recipe(
        name="short",
        data="digits",
        model="fc-small",
        method="certified",
        relaxation="crown",
        eps=0.05,
        epochs=2,
        mixing=1.0,
    )
    hashes = set()
    for _ in range(2):
        net = row.network(digits, seed=1)
        train(net, digits, row.training(seed=1))
        hashes.add(hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights(net))).hexdigest())
    assert len(hashes) == 1


# The paper's appendix: warm-up, mixing, kappa's and beta's end, L1; batch 100 but where it says 50.
TABLE = {
    "fc-box": (10, 100, 0, 1, 5e-6, 100),
    "conv-box": (0, 50, 0.5, 1, 5e-6, 100),
    "fc-hbox": (0, 50, 0.5, 1, 5e-5, 100),
    "conv-hbox": (0, 50, 0.5, 1, 5e-5, 100),
    "fc-crown-ibp-r": (0, 50, 0.5, 1, 5e-6, 100),
    "conv-crown-ibp-r": (10, 50, 0.5, 1, 5e-6, 100),
    "fc-crown-ibp": (10, 100, 0, 0, 0, 100),
    "conv-crown-ibp": (10, 50, 0, 0, 5e-6, 100),
    "fc-deepz": (0, 50, 0, 1, 5e-6, 100),
    "conv-deepz": (0, 50, 0, 1, 5e-5, 50),
    "fc-crown": (10, 100, 0, 1, 0, 100),
    "conv-crown": (10, 100, 0, 1, 0, 50),
}


@pytest.mark.parametrize("data", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("row", TABLE)
def test_the_papers_rows(data, row):
    r = recipe(f"{data}-{row}")
    assert (r.warmup, r.mixing, r.kappa, r.beta, r.l1, r.batch) == TABLE[row]
    assert (r.source, r.eps, r.epochs, r.data, r.model) == ("paper", 0.3, 200, data, row.split("-")[0])
    lr = r.training().lr
    if row == "fc-deepz":
        assert not r.elision
        assert [lr(e) for e in (0, 69.9, 70, 90, 199)] == pytest.approx([1e-3, 1e-3, 5e-4, 2.5e-4, 1e-3 / 2**7])
    else:
        assert [lr(e) for e in (0, 129.9, 130, 190)] == pytest.approx([5e-4, 5e-4, 5e-5, 5e-6])


# Radius of training and of certificates, epochs, warm-up, mixing, milestones, L1, batch, augmentation.
FIELD = {
    "mnist-{}-0.1": (0.2, 0.1, 70, 0, 20, (50, 60), 0, 256, None),
    "mnist-{}-0.3": (0.4, 0.3, 70, 0, 20, (50, 60), 0, 256, None),
    "cifar10-{}-2": (2 / 255, None, 160, 1, 80, (120, 140), 1e-6, 128, "crop-flip"),
    "cifar10-{}-8": (8 / 255, None, 240, 1, 120, (200, 220), 0, 128, "crop-flip"),
}


@pytest.mark.parametrize("name", FIELD)
@pytest.mark.parametrize("model", ["cnn7", "cnn7-w16", "cnn5", "resnet-2b"])
def test_the_fields_rows(name, model):
    r = recipe(name.format(f"{model}-box"))
    found = r.eps, r.certified_eps, r.epochs, r.warmup, r.mixing, r.milestones, r.l1, r.batch, r.augment
    assert found == FIELD[name]
    assert (r.model, r.relaxation, r.source, r.initial, r.regularise) == (model, "box", "field", "interval", 0.5)
    training = r.training()
    assert (training.optimizer, training.lr(0.0), training.clip_norm, training.weight_decay) == ("adam", 5e-4, 10, 0)
    assert training.lr(r.epochs) == pytest.approx(5e-4 * 0.2**2)
    assert inner(training.loss_at(0.0)).kappa == 0  # the bound alone, from the first step on


def test_a_network_of_the_field_trains_by_its_recipe():
    digits = ox.load_dataset("digits", split="train").subset(40)
    row = replace(
        recipe("mnist-cnn7-w16-box-0.1", "smoke"), data="digits", model="cnn7-w1", augment="flip", average=0.9
    )
    net = row.network(digits, seed=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = train(net, digits, row.training(seed=1))
    assert all(value.isfinite().all() for value in net.state_dict().values())
    assert any(not torch.equal(value, before[name]) for name, value in net.state_dict().items() if "running" in name)
    assert result.history[-1].eps == 0.2


def test_all_other_rows_say_whose_they_are():
    assert {recipe(name).source for name in names()} == {"paper", "field", "ours"}
    assert {name for name in names() if recipe(name).source == "paper"} == {
        f"{data}-{row}" for data in ("mnist", "fashion-mnist") for row in TABLE
    }
    assert {recipe(name).data for name in names()} == {"digits", "mnist", "fashion-mnist", "cifar10", "svhn"}


def test_methods_are_the_losses_they_name():
    def loss(method: str):
        return recipe(f"mnist-fc-small-{method}").loss()

    assert isinstance(loss("triangle"), LPLoss)
    assert isinstance(loss("triangle").layer, Triangle)
    assert (loss("triangle").layer.solver.max_iterations, loss("triangle").layer.solver.tol) == (16, 1e-3)
    assert isinstance(loss("layerwise").layer, Layerwise)
    assert isinstance(loss("crown-ibp-fused"), FusedLoss)
    assert isinstance(loss("sabr"), SmallBoxLoss)
    assert isinstance(loss("exp-ibp"), ExpressiveLoss)
    assert [loss(f"{form}-ibp").form for form in ("mtl", "cc", "exp")] == ["mtl", "cc", "exp"]
    assert isinstance(loss("box-shi"), IntervalRegularised)
    assert isinstance(loss("crown-rgs"), GradientSmoothing)
    staged = recipe("mnist-fc-small-box-to-triangle", epochs=20).loss()
    assert [staged(e) for e in (0.0, 5.4)] == [CertifiedLoss("box", l1=5e-6)] * 2
    assert staged(5.6) == CertifiedLoss("crown-ibp", l1=5e-6)
    assert isinstance(staged(11.0), LPLoss)
    assert recipe("mnist-fc-small-box-to-triangle", relaxation="crown").loss() == CertifiedLoss("crown", l1=5e-6)


def test_budgets_cut_epochs_and_images():
    full, cpu, smoke = (recipe("mnist-fc-crown", budget) for budget in BUDGETS)
    assert (full.epochs, full.subset) == (200, None)
    # 1,440 core seconds at 31 ms: 46,451 images.
    assert (cpu.epochs, cpu.subset) == (7, 6000)
    assert (cpu.warmup, cpu.mixing) == (pytest.approx(0.35), pytest.approx(3.5))
    # 12 core seconds: 387 images.
    assert (smoke.epochs, smoke.subset) == (3, 129)
    assert recipe("mnist-fc-box", "cpu").subset is None
    assert recipe("mnist-fc-box", "cpu", epochs=7, subset=9).epochs == 7
    assert recipe("digits-fc-small-crown", "cpu").epochs == 30
    with pytest.raises(ValueError, match="budget must be one of full, cpu, smoke, got 'tiny'"):
        recipe("mnist-fc-box", "tiny")


def test_small_networks_see_all_images_within_the_cpu_budget():
    for method in ("box", "hbox", "crown-ibp", "deepz", "crown", "triangle", "box-to-triangle"):
        row = recipe(f"mnist-fc-small-{method}", "cpu")
        assert row.subset is None
        assert row.epochs >= 6
    assert recipe("mnist-fc-small-layerwise", "cpu").subset == 6000


@pytest.mark.parametrize("budget", ["cpu", "smoke"])
def test_no_row_exceeds_its_budget(budget):
    """By the measured costs, on one of the two cores: a fifth of the time is left for a slower or a busy one."""
    limit = {"cpu": 0.82 * 30 * 60, "smoke": 0.82 * 60}[budget]
    seconds = {name: core_seconds(recipe(name, budget)) for name in names()}
    assert max(seconds.values()) <= limit, max(seconds, key=seconds.__getitem__)


def test_what_stages_and_mixes_cost():
    """Stages by their shares of the epochs, a mix of two relaxations both, smoothing every sample."""
    each = {name: milliseconds(recipe(f"mnist-fc-small-{name}")) for name in ("box", "crown-ibp", "crown", "triangle")}
    staged = milliseconds(recipe("mnist-fc-small-box-to-triangle"))
    assert staged == pytest.approx(0.275 * each["box"] + 0.275 * each["crown-ibp"] + 0.45 * each["triangle"])
    assert milliseconds(recipe("mnist-fc-small-crown-ibp-fused")) == pytest.approx(each["crown-ibp"] + each["box"])
    assert milliseconds(recipe("mnist-fc-small-crown-rgs", samples=5)) == pytest.approx(5 * each["crown"])
    assert milliseconds(recipe("mnist-fc-small-crown", relaxation="crown-1-tria")) == each["crown"]
    row = recipe("mnist-fc-small-crown", subset=1000, epochs=20)
    assert core_seconds(row) - core_seconds(row.override(epochs=10)) == pytest.approx(10 * each["crown"])


@pytest.mark.parametrize("name", [name for name in names() if name.startswith("digits")])
def test_every_method_trains(name):
    row = recipe(name, "smoke", epochs=2, subset=40, mixing=1.0, warmup=0.0, batch=20)
    if row.stages:
        row = row.override(stages=tuple((stage, 0.5 * i) for i, (stage, _) in enumerate(row.stages)))
    digits = ox.load_dataset("digits", split="train").subset(40)
    net = row.network(digits, seed=1)
    before = weights(net)
    history = train(net, digits, row.training(seed=1)).history
    assert len(history) == 2
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
    assert (history[-1].unfinished is not None) == (row.relaxation in ("triangle", "layerwise"))


def test_the_list_can_be_cut(capsys):
    def listed(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            main(["train", *words, "--list", "--json"])
        return caught.value.code, capsys.readouterr().out

    code, out = listed("svhn-conv-")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == [name for name in names() if "svhn-conv-" in name]
    assert listed("imagenet")[0] == 2
    code, out = listed("mnist-conv-hbox", "--budget", "smoke")
    cut = recipe("mnist-conv-hbox", "smoke")
    row = next(row for row in json.loads(out) if row["name"] == cut.name)
    assert (row["epochs"], row["subset"], row["core seconds"]) == (3, 600, core_seconds(cut))


def test_the_command_goes_on_from_another_run(tmp_path, capsys):
    def call(*words: str) -> int:
        small = ["--epochs", "1", "--subset", "30", "--warmup", "0", "--mixing", "0", "--lr", "0"]
        with pytest.raises(SystemExit) as caught:
            main(["train", *words, *small])
        return caught.value.code

    first, second = tmp_path / "first", tmp_path / "second"
    assert call("digits-fc-small-box", "--seed", "1", "--out", str(first)) == 0
    init = ["--init", str(first)]
    assert call("digits-fc-small-crown-ibp", "--seed", "2", "--out", str(second), *init) == 0
    assert same(weights(ox.load(first).module), weights(ox.load(second).module))
    capsys.readouterr()
    assert call("digits-conv-box", "--out", str(tmp_path / "third"), *init) == 2
    assert "first does not fit the one to be trained" in " ".join(capsys.readouterr().err.split())
