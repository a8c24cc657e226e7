"""Random programs of every kind: what the layers say of them is so."""

from __future__ import annotations

from collections import Counter

import pytest
import random_programs


@pytest.mark.parametrize("faults", random_programs.KINDS, ids=lambda faults: faults.__name__)
def test_random_programs(faults: random_programs.Faults) -> None:
    """Twenty thousand by hand: `python -m tests.random_programs --count 20000`."""
    counts: Counter[str] = Counter()
    assert [fault for seed in range(6) for fault in faults(seed, counts)] == []
    assert {"OPTIMAL", "INFEASIBLE"} <= {said.split()[-1] for said in counts}


def test_points_far_out_are_no_proof() -> None:
    """Programs that fall for ever by 1e-6: at points of 1e5 and 1e10 that is less than rounding makes of P x."""
    assert [fault for seed in (4084, 4228) for fault in random_programs.quadratic_faults(seed, Counter())] == []
