"""The contract table: cells that run as they say, or are refused as they say."""

import pytest
from contract_table import ACTIVATIONS, BALLS, RELAXATIONS, USES, Cell, pairs

from optrelax.networks.activations import elementary
from optrelax.regions import norms

CELLS = list(pairs())


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_cell_runs_or_is_refused_in_one_sentence(cell):
    cell.check()


def test_every_pair_that_is_promised_is_there():
    for seen, wanted in (
        ({(c.relaxation, c.ball) for c in CELLS}, len(RELAXATIONS) * len(BALLS)),
        ({(c.relaxation, c.use) for c in CELLS}, len(RELAXATIONS) * len(USES)),
        ({(c.ball, c.use) for c in CELLS}, len(BALLS) * len(USES)),
        ({c.activation for c in CELLS}, len(ACTIVATIONS)),
    ):
        assert len(seen) == wanted


def test_what_is_registered_is_in_the_table():
    assert {name for name in elementary.names() if name != "power"} <= set(ACTIVATIONS)
    assert all(any(norm in ball for ball in BALLS) for norm in norms())


def test_bounds_that_an_lp_does_not_imply_are_taken_over_balls_without_rows():
    """HiGHS, which would close the gap, takes none of these: the bound of the ascent holds without it."""
    assert Cell("given", "sin", "clipped l2 ball", "outward").check() is None
