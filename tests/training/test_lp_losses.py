"""Linear programs in the training loop: bounds, gradients, the fallback, dual points kept from epoch to epoch."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import optrelax as ox
from optrelax.layers import DualAscent, Envelope, FixedSlopes, Highs, Layerwise, Triangle
from optrelax.training import Training, TrainingProgress, train
from optrelax.training.interval_training import IntervalRegularised
from optrelax.training.losses import CertifiedLoss
from optrelax.training.lp_losses import DualMemory, LPLoss
from optrelax.training.meters import GapCounts
from optrelax.training.schedules import ConstantSchedule, LinearRamp, Stages
from optrelax.training.smoothing import GradientSmoothing

CLASSES = 4
INDEX = torch.tensor([7, 2, 11, 0, 5])


@pytest.fixture
def net() -> nn.Sequential:
    return ox.models.fc(6, 8, 7, CLASSES, seed=3).double()


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 3, 1, 2, 2])


@pytest.fixture
def region() -> ox.LinfBall:
    generator = torch.Generator().manual_seed(5)
    return ox.LinfBall(torch.rand(5, 6, generator=generator, dtype=torch.float64), 0.3)


def gradients(net: nn.Module, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(net.parameters()), retain_graph=True))


def close(a: list[Tensor], b: list[Tensor], **tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def ascent(iterations: int, tol: float = 1e-9) -> DualAscent:
    return DualAscent(tol=tol, max_iterations=iterations)


# --- bounds and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [Triangle, Layerwise])
def test_solved_problems_give_the_layers_value_and_gradient(net, region, labels, layer):
    made = layer(solver=DualAscent(tol=1e-5, max_iterations=100, exact=True))
    terms = LPLoss(layer=made, kappa=0.3)(net, region, labels)
    expected = CertifiedLoss(made, kappa=0.3)(net, region, labels)
    assert not terms.solved.unfinished.any()
    assert (terms.solved.gaps <= 1e-5).all()
    torch.testing.assert_close(terms.total, expected.total)
    close(gradients(net, terms.total), gradients(net, expected.total))


@pytest.mark.parametrize("iterations", [0, 3, 100])
@pytest.mark.parametrize("fallback", ["slopes", "crown"])
def test_margins_lie_between_the_closed_form_and_the_optimum(net, region, labels, iterations, fallback):
    """The optimum is HiGHS's, on the same pre-activation bounds."""
    rows = ox.margins(labels, CLASSES)
    found = LPLoss(layer=Triangle(solver=ascent(iterations)), fallback=fallback)(net, region, labels).margins
    optimum = Triangle(solver=Highs()).solve(net, region, rows).lower
    closed = ox.lower_bounds(net, region, rows, ox.Crown(preactivation=Triangle().preactivation))
    assert (found <= optimum + 1e-9).all()
    assert (found >= closed - 1e-9).all()


def test_the_crown_fallback_is_crown_to_the_gradient(net, region, labels):
    terms = LPLoss(layer=Triangle(solver=ascent(0, tol=1e-12)), fallback="crown")(net, region, labels)
    crown = ox.lower_bounds(net, region, ox.margins(labels, CLASSES), ox.Crown(preactivation=Triangle().preactivation))
    missed = terms.solved.unfinished.reshape(crown.shape)
    assert missed.any()
    torch.testing.assert_close(terms.margins[missed], crown[missed])
    close(gradients(net, terms.margins[missed].sum()), gradients(net, crown[missed].sum()))


def test_each_problem_has_the_gradient_of_its_own_rule(net, region, labels):
    """Where the target was met the envelope's, elsewhere that of the reported bound at fixed slopes."""
    made = Triangle(solver=DualAscent(tol=1e-3, max_iterations=6, check_every=1))
    terms = LPLoss(layer=made)(net, region, labels)
    missed = terms.solved.unfinished.reshape(terms.margins.shape)
    assert 0 < int(missed.sum()) < missed.numel(), "the case must have both kinds"
    rows = ox.margins(labels, CLASSES)
    for rule, mask in ((Envelope(), ~missed), (FixedSlopes(), missed)):
        other = replace(made, gradient=rule).solve(net, region, rows).lower
        torch.testing.assert_close(terms.margins[mask], other[mask])
        close(gradients(net, terms.margins[mask].sum()), gradients(net, other[mask].sum()))


def test_the_gap_is_that_of_the_solution(net, region, labels):
    made = Triangle(solver=ascent(5))
    terms = LPLoss(layer=made)(net, region, labels)
    solution = made.solve(net, region, ox.margins(labels, CLASSES))
    expected = solution.gap / solution.lower.abs().clamp_min(1)
    torch.testing.assert_close(terms.solved.gaps.reshape(expected.shape), expected.detach())


def test_hidden_problems_count_too(net, region, labels):
    terms = LPLoss(layer=Layerwise(solver=ascent(2)))(net, region, labels)
    before = Triangle().preactivation.preactivation_bounds(ox.capture(net), region)
    second = list(before.values())[1]
    crossing = ((second.lower < 0) & (second.upper > 0)).sum()
    assert terms.solved.gaps.numel() == 5 * (CLASSES - 1) + 2 * int(crossing)


# --- dual points between steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [Triangle, Layerwise])
def test_a_second_solve_starts_where_the_first_ended(net, region, labels, layer):
    memory = DualMemory(12)
    with torch.no_grad():
        solved = LPLoss(layer=layer(solver=ascent(60)))(net, region, labels, memory=memory, index=INDEX).margins
        loss = LPLoss(layer=layer(solver=ascent(0)))
        cold = loss(net, region, labels).margins
        order = torch.tensor([3, 0, 4, 1, 2])  # the next epoch's batches hold the examples in another order
        mixed = ox.InputBox(region.lower[order], region.upper[order])
        warm = loss(net, mixed, labels[order], memory=memory, index=INDEX[order]).margins
    assert (warm >= cold[order] - 1e-12).all()
    assert warm.sum() > cold.sum() + 1e-3
    torch.testing.assert_close(warm, solved[order], rtol=0.0, atol=2e-2)  # eight bits a weight


def test_the_memory_keeps_to_its_limit(net, region, labels):
    # 16 weights and one mark for each of 4 slots: 64 bytes an example.
    memory = DualMemory(12)
    loss = LPLoss(layer=Triangle(solver=ascent(30)), memory_bytes=400)
    loss(net, region, labels, memory=memory, index=INDEX)
    assert memory.bytes == 6 * 64 <= 400
    assert memory.capacity == 6
    with torch.no_grad():
        start = LPLoss(layer=Triangle(solver=ascent(0)), memory_bytes=400)
        cold, warm = start(net, region, labels).margins, start(net, region, labels, memory=memory, index=INDEX).margins
    beyond = INDEX >= 6
    assert torch.equal(cold[beyond], warm[beyond])
    assert (warm[~beyond] > cold[~beyond]).any()


def test_a_memory_of_another_network_starts_afresh(net, region, labels):
    memory, loss = DualMemory(12), LPLoss(layer=Triangle(solver=ascent(5)))
    loss(net, region, labels, memory=memory, index=INDEX)
    other = ox.models.fc(6, 5, CLASSES, seed=1).double()
    warm = loss(other, region, labels, memory=memory, index=INDEX)
    torch.testing.assert_close(warm.margins, loss(other, region, labels).margins)


def test_a_memory_is_stored_and_found_again(net, region, labels):
    memory, loss = DualMemory(12), LPLoss(layer=Triangle(solver=ascent(20)))
    loss(net, region, labels, memory=memory, index=INDEX)
    again = DualMemory(12)
    again.load_state_dict(memory.state_dict())
    assert again.bytes == memory.bytes
    first, second = (loss(net, region, labels, memory=m, index=INDEX).margins for m in (memory, again))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="is not of 3 examples"):
        DualMemory(3).load_state_dict(memory.state_dict())


# --- in training ---------------------------------------------------------------------------------------------------


def data(n: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(n) % 3
    return 0.25 * labels[:, None] + 0.2 + 0.1 * torch.rand(n, 5, generator=generator), labels


def network() -> nn.Sequential:
    return ox.models.fc(5, 8, 8, 3, seed=0)


def settings(layer: object = None, **changes: object) -> Training:
    made = Triangle(solver=DualAscent(tol=1e-5, max_iterations=3)) if layer is None else layer
    chosen = {
        "loss": LPLoss(layer=made),
        "epochs": 4,
        "eps": LinearRamp(0.0, 0.2, length=2.0),
        "lr": ConstantSchedule(1e-2),
        "batch": 16,
    }
    return Training(**{**chosen, **changes})


class Stop(Exception):
    pass


def stop(progress: TrainingProgress) -> None:
    if (progress.epoch, progress.step) == (3, 2):
        raise Stop


@pytest.mark.parametrize("layer", [Triangle, Layerwise])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, layer):
    training = settings(layer(solver=DualAscent(tol=1e-5, max_iterations=3)))
    whole, cut, cold = network(), network(), network()
    train(whole, data(), training, folder=tmp_path / "whole")
    with pytest.raises(Stop):
        train(network(), data(), training, folder=tmp_path / "cut", watch=stop)
    train(cut, data(), training, folder=tmp_path / "cut", resume=True)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    first, second = ([{**json.loads(line), "seconds": 0} for line in some] for some in lines)
    assert first == second
    # What was stored is what made them equal: without a memory the run takes another way.
    train(cold, data(), replace(training, loss=replace(training.loss, memory_bytes=0)))
    assert not torch.equal(whole[1].weight, cold[1].weight)
    assert any(key.startswith("memory.weights.") for key in load_file(tmp_path / "whole" / "state.safetensors"))


def test_metrics_count_what_was_not_finished():
    seen: list[TrainingProgress] = []
    history = train(network(), data(), settings(epochs=2), watch=seen.append).history
    assert 0 < history[1].unfinished <= 1
    assert 0 <= history[1].median_gap < 1
    assert (seen[-1].unfinished, seen[-1].median_gap) == (history[1].unfinished, history[1].median_gap)
    easy = settings(Triangle(solver=DualAscent(tol=1e3)), epochs=1)
    assert train(network(), data(), easy).history[0].unfinished == 0
    closed = train(network(), data(), settings(loss=CertifiedLoss("box"), epochs=1)).history[0]
    assert (closed.unfinished, closed.median_gap) == (None, None)


def test_the_median_gap_is_right_to_its_class():
    gaps = torch.logspace(-7, -1, 1001, dtype=torch.float64)[torch.randperm(1001)]
    counts = GapCounts()
    for part in gaps.split(100):
        counts.add(part)
    assert counts.median == pytest.approx(float(gaps.median()), rel=0.12)
    assert GapCounts().median is None
    for value, expected in ((0.0, 0.0), (math.inf, math.inf), (1e-12, 0.0)):
        counts = GapCounts()
        counts.add(torch.tensor([value]))
        assert counts.median == expected


def test_relaxations_take_turns():
    stages = Stages((CertifiedLoss("box"), CertifiedLoss("crown-ibp"), settings().loss), (0.0, 1.0, 2.0))
    history = train(network(), data(), settings(loss=stages, kappa=LinearRamp(1.0, 0.0, length=1.0))).history
    assert [line.unfinished is None for line in history] == [True, True, False, False]
    # Until the stage changes, nothing knows of later ones.
    first = train(
        network(), data(), settings(loss=CertifiedLoss("box"), epochs=1, kappa=LinearRamp(1.0, 0.0, length=1.0))
    )
    assert replace(first.history[0], seconds=0) == replace(history[0], seconds=0)


def wrapped(loss: object) -> object:
    return GradientSmoothing(IntervalRegularised(loss, eps=0.2), sigma=0.01)


@pytest.mark.parametrize(
    "stages",
    [
        Stages((CertifiedLoss("box"), LPLoss(layer=Triangle(solver=ascent(3, 1e-5)))), (0.0, 1.0)),
        # The memory outlives a stage that has no use for it, inside wrappers too.
        Stages(
            (wrapped(LPLoss(layer=Triangle(solver=ascent(3, 1e-5)))), wrapped(CertifiedLoss("box")), LPLoss()),
            (0.0, 1.0, 3.0),
        ),
    ],
)
def test_a_run_of_stages_resumes_too(tmp_path, stages):
    training = settings(loss=stages)
    whole, cut = network(), network()
    train(whole, data(), training)
    with pytest.raises(Stop):
        train(network(), data(), training, folder=tmp_path, watch=stop)
    train(cut, data(), training, folder=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def unchecked(made: object, **changes: object) -> None:
    """Check fields again after a change: a user has no type checker in between."""
    for name, value in changes.items():
        object.__setattr__(made, name, value)
    made.__post_init__()


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LPLoss(layer="crown"), "layer must be an LP layer, 'triangle' or 'layerwise', got 'crown'"),
        (lambda: LPLoss(layer=Triangle(preactivation={})), "must be a relaxation; numbers fit one batch"),
        (lambda: unchecked(LPLoss(), fallback="box"), "fallback must be 'slopes' or 'crown', got 'box'"),
        (lambda: LPLoss(memory_bytes=-1), "memory_bytes must be >= 0"),
        (lambda: LPLoss(kappa=2.0), "LPLoss: kappa must lie in"),
        (lambda: DualMemory(0), "examples must be at least 1"),
        (lambda: Stages((1, 2), (0.0,)), "one begin a value, got 2 values and 1 begins"),
        (lambda: Stages((1, 2), (0.0, 0.0)), "begins must ascend from epoch 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_memory_and_index_go_together(net, region, labels):
    with pytest.raises(ValueError, match="memory and index go together"):
        LPLoss()(net, region, labels, memory=DualMemory(5))


def test_any_solver_can_be_trained_with(tmp_path: Path):
    """HiGHS has no warm start of its own here: its duals are kept, and every problem ends OPTIMAL."""
    history = train(network(), data(8), settings(Triangle(solver=Highs()), epochs=1, eps=ConstantSchedule(0.1))).history
    assert history[0].unfinished == 0
