"""The cascade's verdicts are those of the layerwise LP itself, and the barrier table resumes."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn

import optrelax as ox
from optrelax.certification.attacks import PGD
from optrelax.cli import main
from optrelax.data.datasets import load_dataset
from optrelax.layers import InteriorPoint, Layerwise
from optrelax.output.json_lines import JsonLines
from optrelax.papers import barrier
from optrelax.papers.layerwise_verdicts import Cascade, Stage
from optrelax.regions import InputBox

# Hardly an attack: what it would decide is left to the LPs.
WEAK = PGD(restarts=1, steps=0, targets=0)


def trained(*widths: int, activation: type[nn.Module] = nn.ReLU, steps: int = 60) -> nn.Sequential:
    """A network that knows the digits a little, so that every stage has work."""
    data = load_dataset("digits", split="train")
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in zip((64, *widths), (*widths, 10), strict=True):
        layers += [nn.Linear(a, b), activation()]
    net = nn.Sequential(*layers[:-1])
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(data.images.flatten(1)), data.labels).backward()
        optimiser.step()
    return net.double()


def questions(count: int, eps: float) -> tuple[torch.Tensor, InputBox, torch.Tensor]:
    data = load_dataset("digits").subset(count)
    x = data.images.flatten(1).double()
    ball = ox.LinfBall(x, eps, clip=(0.0, 1.0))
    return x, InputBox(ball.lower, ball.upper), ox.margins(data.labels, 10).double()


@pytest.mark.parametrize(
    ("widths", "activation", "eps"),
    [((24, 24), nn.ReLU, 0.04), ((16, 16, 16), nn.ReLU, 0.05), ((20, 20), nn.LeakyReLU, 0.06)],
)
def test_verdicts_are_those_of_the_exact_layerwise_lp(
    widths: tuple[int, ...], activation: type[nn.Module], eps: float
) -> None:
    net = trained(*widths, activation=activation)
    x, region, rows = questions(40, eps)
    stages = Cascade(ox.capture(net, (64,)), WEAK).decide(x, region, rows)
    with torch.no_grad():
        exact = Layerwise(solver=InteriorPoint(tol=1e-8)).solve(net, region, rows).lower.amin(1)
    clear = exact.abs() > 1e-6
    assert clear.sum() >= 35
    certified = torch.tensor([Stage(int(s)).certified for s in stages])
    assert torch.equal(certified[clear], exact[clear] > 0)
    assert (stages != Stage.UNDECIDED)[clear].all()
    assert 0 < int((exact[clear] > 0).sum()) < int(clear.sum())


def test_later_stages_decide_what_earlier_ones_leave() -> None:
    net = trained(32, 32, 32, steps=100)
    x, region, rows = questions(150, 0.06)
    found = Counter(Stage(int(s)) for s in Cascade(ox.capture(net, (64,)), WEAK).decide(x, region, rows))
    assert found[Stage.LP_ALL_REFUTED] > 0
    assert found[Stage.LP_LAST] + found[Stage.LP_ALL] > 0


def test_max_pooling_is_composed_of_relus() -> None:
    net = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 10)).double()
    cascade = Cascade(ox.capture(net, (1, 8, 8)))
    assert cascade.network.activations
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(cascade.network(x), net(x))


@pytest.fixture
def weights(tmp_path, data_dir):
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in {row.network for row in barrier.ROWS}:
        (folder / f"{name}.npz").write_bytes((data_dir / "barrier" / f"{name}.npz").read_bytes())
    return folder


@pytest.mark.data
def test_barrier_row_agrees_with_the_layerwise_layer_and_resumes(weights, data_dir, tmp_path) -> None:
    row = barrier.ROWS[3]
    journal = tmp_path / "barrier.jsonl"
    batches = barrier.run_barrier(weights, data_dir, rows=(row,), subset=12, batch_size=6, journal=journal)
    data = load_dataset("mnist", data_dir)
    index = torch.tensor([i for b in batches for i in b.images])
    assert index.tolist() == [math.floor(9999 * i / 11) for i in range(12)]
    x = data.images[index].flatten(1).double()
    net = ox.capture(barrier.read_npz(weights / f"{row.network}.npz"), (784,))
    ball = ox.LinfBall(x, row.eps, clip=(0.0, 1.0))
    with torch.no_grad():
        exact = Layerwise(solver=InteriorPoint(tol=1e-8)).solve(net, ball, ox.margins(data.labels[index], 10)).lower
    certified = [Stage(s).certified for b in batches for s in b.stages]
    assert certified == (exact.amin(1) > 0).tolist()
    # Cut in the middle of the last line, as a kill would: the first batch is kept, the second is done again.
    text = journal.read_text()
    journal.write_text(text[: text.rindex("{") + 20])
    seen = []
    again = barrier.run_barrier(
        weights, data_dir, rows=(row,), subset=12, batch_size=6, journal=journal, progress=lambda b, *_: seen.append(b)
    )
    assert len(seen) == 1
    assert [(b.images, b.stages) for b in again] == [(b.images, b.stages) for b in batches]
    frame = barrier.barrier_frame(again, (row,))
    assert frame["LP-ALL"][0] == pytest.approx(100 * (1 - sum(certified) / 12))


@pytest.mark.data
def test_a_journal_of_other_weights_is_refused(weights, data_dir, tmp_path) -> None:
    journal = tmp_path / "barrier.jsonl"
    header = {"format": "optrelax barrier journal 2", "weights": {"nor-mlp-b": "no"}}
    JsonLines(journal, header, "no journal").close()

    def run() -> None:
        barrier.run_barrier(weights, data_dir, rows=(barrier.ROWS[3],), subset=2, journal=journal)

    with pytest.raises(ValueError, match="other weights"):
        run()
    journal.write_text('{"format": "another"}\n')
    with pytest.raises(ValueError, match="no journal"):
        run()
    journal.unlink()
    run()
    text = journal.read_text()
    stage = text.index("stages") + len('stages": [')
    journal.write_text(f"{text[:stage]}{(int(text[stage]) + 1) % 5}{text[stage + 1 :]}")
    with pytest.raises(ValueError, match="line 2 is damaged"):
        run()
    journal.write_text(text)
    held = f"from optrelax.output.json_lines import lock_of; lock = lock_of({str(journal)!r})"
    code = f"{held}; print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        with pytest.raises(ValueError, match="in use by"):
            run()
        other.communicate(b"\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "/nowhere"], "is no folder"),
        (["--weights", ".", "--row", "nor-mlp-b@0.2"], "did you mean 'nor-mlp-b@0.02'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["paper", "barrier", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
