"""The argmin of a linear program, made differentiable by a stated regularisation.

An LP's argmin is a vertex: locally constant in c, and not unique in places. `Regularised(strength)` replaces it by

    x(c, A, b, E, d, lower, upper) = argmin c.x + strength / 2 |x|^2  over the same constraints,

the Euclidean projection of -c / strength on the polyhedron: unique, and continuous in the data. It is solved
by an interior-point method in float64, finished by a projection on its active constraints, and differentiated by them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.checks import require_range
from optrelax.layers.programs.argmin import Active, differentiable
from optrelax.layers.programs.lp_data import LPData, stack_rows, transposed_times
from optrelax.layers.programs.quadratic import project
from optrelax.layers.solutions import Status


@dataclass(frozen=True, slots=True)
class Regularised:
    """`LPSolution.primal` is the argmin of c.x + strength / 2 |x|^2, with its derivative in all the data.

    For a small enough strength x is the solution of the LP with the least norm (Mangasarian 1979) and its derivative
    in c is 0; a larger one gives a smoother map farther from the LP.  One conic solve a problem, on the CPU.

    Args:
        strength: > 0.

    Raises:
        ValueError: for a strength that is not.

    Exact: to about 1e-9 where the solution is not degenerate.  Gradient: the projection's derivative with the active
    constraints held fixed; exact where no active constraint has multiplier 0 (elsewhere one of several one-sided
    derivatives); dependent active rows are handled by the pseudo-inverse. 0 for infeasible problems, where `primal`
    stays the solver's point. `lower`, `gap` and the multipliers stay those of the LP itself.

    Example:
        >>> c = torch.tensor([-0.5, 1.0], dtype=torch.float64, requires_grad=True)
        >>> layer = LinearProgram(primal_gradient=Regularised(strength=1.0))
        >>> point = layer(c, lower=0 * c.detach(), upper=0 * c.detach() + 1).primal
        >>> point.detach().round(decimals=4) + 0.0
        tensor([0.5000, 0.0000], dtype=torch.float64)
        >>> point.sum().backward()
        >>> c.grad.round(decimals=4) + 0.0
        tensor([-1.,  0.], dtype=torch.float64)
    """

    strength: float

    def __post_init__(self) -> None:
        require_range("Regularised", "> 0", strength=self.strength)

    def primal(self, data: LPData, point: Tensor, duals: Tensor, status: Tensor) -> Tensor:
        """The argmin with its gradient; `point` where there is none."""
        if data.size[0] == 0:
            return point
        plain = data.detach().double()
        with torch.no_grad():
            found = project(plain, -plain.c / self.strength)
            solved = found.solved & (status != Status.INFEASIBLE)
            x = torch.where(solved.unsqueeze(-1), found.x, point.double())
            free = ~(found.at_lower | found.at_upper)
            G = stack_rows(plain.A, plain.E).expand(len(x), -1, -1) * found.at_rows.unsqueeze(-1)
            inverse = torch.linalg.pinv(G * free.unsqueeze(-2), rtol=1e-10)
            z = -transposed_times(inverse, (self.strength * x + plain.c) * free)
            hessian = self.strength * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        active = Active(found.at_rows, found.at_lower, found.at_upper)
        return differentiable(data, x.to(point), lambda: active, z, solved, hessian)
