"""What a solver returned, before anything is made of it: shapes are looked at, and claims of no optimum are proved."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from optrelax.layers.programs.claims import believed
from optrelax.layers.programs.lp_data import Answer, LPData, ProgramSolver
from optrelax.layers.solutions import Status


def admitted(solver: ProgramSolver, data: LPData, answer: Answer) -> Answer:
    """The answer with statuses that there are; INFEASIBLE and UNBOUNDED need rays, else NUMERICAL takes their place.

    `inequality` and `equality` hold a Farkas ray where INFEASIBLE is claimed, `primal` a ray of descent where UNBOUNDED
    is.  Raises ValueError for parts of other shapes than the batch's.
    """
    size, n, m, p = data.size
    wanted: dict[str, tuple[int, ...]] = {
        "primal": (size, n),
        "inequality": (size, m),
        "equality": (size, p),
        "status": (size,),
        "iterations": (size,),
    }
    for part, shape in wanted.items():
        got = tuple(getattr(answer, part).shape)
        if got != shape:
            raise ValueError(f"{type(solver).__name__}: {part} of {size} problem(s): wanted shape {shape}, got {got}")
    codes, proved = answer.status, answer.proved
    least, most = codes.aminmax()
    if int(least) >= 0 and int(most) <= Status.TIME_LIMIT and codes.dtype == torch.int8:
        return answer if proved is None else replace(answer, proved=None)
    status = torch.where((codes >= 0) & (codes <= max(Status)), codes, int(Status.NUMERICAL)).to(torch.int8)
    claimed = (status == Status.INFEASIBLE) | (status == Status.UNBOUNDED)
    index = (claimed if proved is None else claimed & ~proved).nonzero().squeeze(-1)
    if len(index):
        status[index] = _proved(data.detach().select(index), answer, status, index)
    return replace(answer, status=status, proved=None)


def _proved(some: LPData, answer: Answer, status: Tensor, index: Tensor) -> Tensor:
    """Statuses of these problems by the rays in the answer; what else has to be solved is HiGHS's."""
    from optrelax.layers.programs.highs import Highs

    rays = (answer.primal, answer.inequality.clamp(min=0), answer.equality)
    primal, y, v = (part.detach()[index].double().nan_to_num(0.0, 0.0, 0.0).cpu() for part in rays)
    host = some.map(lambda tensor: tensor.double().cpu())
    return believed(Highs(), host, primal, y, v, status[index].cpu()).to(status.device)
