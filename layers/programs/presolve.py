"""What is settled before a solver is called: contradictory bounds, and rows of zeros that cannot hold."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from optrelax.layers.programs.lp_data import LPData, zero_rows
from optrelax.layers.programs.sparse_matrices import is_sparse


def contradictions(data: LPData) -> tuple[Bool[Tensor, " B"], LPData] | None:
    """(problems that contradict themselves, the data without that, for a solver); None where there are none."""
    crossed = data.lower > data.upper
    false_b, false_d = _false_rows(data.A, data.b, below=True), _false_rows(data.E, data.d, below=False)
    if false_b is None and false_d is None and not bool(crossed.any()):
        return None
    settled, changed = crossed.any(-1), {}
    for name, false in (("b", false_b), ("d", false_d)):
        if false is not None:
            settled = settled | false.any(-1)
            changed[name] = torch.where(false, 0.0, getattr(data, name))
    middle = torch.where(crossed, data.lower / 2 + data.upper / 2, 0.0).detach()
    lower, upper = (torch.where(crossed, middle, end) for end in (data.lower, data.upper))
    return settled, replace(data, lower=lower, upper=upper, **changed)


def _false_rows(matrix: Tensor, sides: Tensor, *, below: bool) -> Tensor | None:
    """Rows 0 x <= side < 0 (`below`), or 0 x = side != 0; None where there are none."""
    if not sides.numel():
        return None
    wrong = sides < 0 if below else sides != 0
    if not is_sparse(matrix) and not bool((wrong & (matrix[..., 0] == 0)).any()):
        return None  # most rows show by their first entry that they are none of zeros
    false = zero_rows(matrix) & wrong
    return false if bool(false.any()) else None
