"""The attack of `python -m tests.attack`, for a little while."""

import math
import time

import pytest
import torch
from attack import Attack, Question, Tally, attack, draw

NETWORKS = 30


@pytest.mark.slow
def test_no_random_network_breaks_a_promise(one_thread):
    tally = attack(iter(range(NETWORKS)), Tally(), time.monotonic() + 200, report=lambda line: None)
    assert not tally.violations, "\n".join(tally.violations)
    assert tally.counts["networks"] == NETWORKS
    assert min(tally.counts[name] for name in ("bounds", "points", "LPs", "LPs by HiGHS", "gradients")) > 0


def test_a_number_draws_the_same_question_again():
    for number in range(6):
        one, two = draw(number), draw(number)
        assert all(torch.equal(a, b) for a, b in zip(one.net.parameters(), two.net.parameters(), strict=True))
        assert torch.equal(one.region.lower, two.region.lower)
        assert torch.equal(one.rows, two.rows)


def asks(q: Question) -> bool:
    """Whether a question holds bounds of ordinary numbers, in float64."""
    return q.plain and q.dtype == torch.float64 and q.rows.numel() > 0 and len(q.region.lower) > 0


@pytest.mark.parametrize("wrong", [1e-3, math.nan, math.inf])
def test_the_attack_sees_a_bound_that_is_wrong(wrong, monkeypatch):
    """By a thousandth above what a point reaches, or no number: outward and to nearest."""
    tally = Tally()
    monkeypatch.setattr("attack.ox.lower_bounds", lambda net, region, rows, *_, **__: least(region, rows) + wrong)
    asked = next(n for n in range(100) if asks(draw(n)))
    question = Attack(asked, tally)

    def least(region, rows):
        return (question.question.net(region.lower) @ rows.mT).detach()

    question.run()
    assert {"outward", "nearest"} <= {word for line in tally.violations for word in line.split()}
