"""Layers from problems written in CVXPY, with the calling convention of cvxpylayers.

CVXPY canonicalises the problem once. Its data are then affine in the parameters (the rules of disciplined parametrised
programming, DPP): c, A, b and P are sparse matrices times (parameters, 1), which autograd passes through.
Source: Agrawal et al. 2019, "Differentiable convex optimization layers".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optrelax.layers.solutions import LPSolution
from optrelax.uncompiled import uncompiled

if TYPE_CHECKING:
    from optrelax.layers.programs.linear_program import LinearProgram


class ModelledProgram(nn.Module):
    """`layer(*parameters) -> variables`: a CVXPY problem solved by a layer of this package.

    Parameters are tensors [*batch, *shape] in the order given, leading shapes broadcast; the result is a tuple of the
    variables asked for, [*batch, *shape], whose gradients are those of the program's `primal_gradient`.
    `solve(*parameters)` returns the program's solution: its bound, gap and status. Values are those of the minimised
    objective without its constant.
    Raises ValueError for problems that are no linear, quadratic or mixed-integer linear programs, or that break DPP.
    """

    def __init__(
        self, program: LinearProgram, problem: Any, parameters: Sequence[Any], variables: Sequence[Any]
    ) -> None:
        super().__init__()
        self.program = program
        owner = f"{type(program).__name__}.from_cvxpy"
        kind = type(program).__name__
        canonical, self.bounds, renamed = _canonical(owner, problem, kind)
        self.rows = int(canonical.A.shape[0]) // (canonical.x.size + 1)
        self.columns, self.equalities = canonical.x.size, int(canonical.cone_dims.zero)
        self.parameters_of = [(_place(owner, canonical.param_id_to_col, p, "parameter"), p.shape) for p in parameters]
        self.variables_of = [
            (_place(owner, canonical.var_id_to_col, renamed.get(v.id, v), "variable"), v.shape) for v in variables
        ]
        missing = {p.id for p in problem.parameters()} - {p.id for p in parameters}
        if missing:
            names = sorted(p.name() for p in problem.parameters() if p.id in missing)
            raise ValueError(
                f"{owner}: parameters must list every parameter of the problem, missing {', '.join(names)}"
            )
        self.size = int(canonical.total_param_size)
        maps = {"c": canonical.q, "A": canonical.A, "P": canonical.P if kind == "QuadraticProgram" else None}
        for name, matrix in maps.items():
            constant, part = _split(matrix, self.size)
            self.register_buffer(f"{name}_constant", constant, persistent=False)
            self.register_buffer(f"{name}_map", part, persistent=False)

    def forward(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """The variables asked for, at these parameters."""
        primal = self.solve(*parameters).primal
        return tuple(_unflattened(primal, place, shape) for place, shape in self.variables_of)

    @uncompiled
    def solve(self, *parameters: Tensor) -> LPSolution:
        """The whole solution: value, bound, gap, status."""
        vector = self._vector(parameters)
        n, rows, p = self.columns, self.rows, self.equalities
        c = self._affine("c", vector)[..., :n]
        table = self._affine("A", vector)
        table = table.reshape(*table.shape[:-1], n + 1, rows).mT
        A, b = -table[..., :n], table[..., n]
        data: list[Tensor | None] = [c, A[..., p:, :], b[..., p:], A[..., :p, :], b[..., :p]]
        data += [None if end is None else torch.as_tensor(end).to(c) for end in self.bounds]
        if self.P_constant is not None:
            P = self._affine("P", vector)
            P = P.reshape(*P.shape[:-1], n, n)
            # CVXPY writes x.P x / 2, too, but may keep one triangle's rounding apart from the other's.
            data = [(P + P.mT) / 2, *data]
        solution: LPSolution = self.program(*data)
        return solution

    def _vector(self, parameters: Sequence[Tensor]) -> Tensor:
        """All parameters in CVXPY's order, [*batch, size]."""
        name = f"{type(self.program).__name__}.from_cvxpy"
        if len(parameters) != len(self.parameters_of):
            raise ValueError(f"{name}: layer wants {len(self.parameters_of)} parameter(s), got {len(parameters)}")
        parts, leading = [], []
        for i, (value, (_, shape)) in enumerate(zip(parameters, self.parameters_of, strict=True)):
            if tuple(value.shape[value.dim() - len(shape) :]) != tuple(shape):
                raise ValueError(f"{name}: parameter {i} has shape {tuple(value.shape)}, wanted [*batch, *{shape}]")
            lead = value.shape[: value.dim() - len(shape)]
            # CVXPY counts down columns.
            order = [*range(len(lead)), *reversed(range(len(lead), value.dim()))]
            parts.append(value.permute(order).reshape(*lead, -1))
            leading.append(lead)
        batch = torch.broadcast_shapes(*leading)
        vector = parts[0].new_zeros(*batch, self.size)
        for part, (place, _) in zip(parts, self.parameters_of, strict=True):
            index = torch.arange(place, place + part.shape[-1], device=part.device)
            vector = vector.index_copy(-1, index, part.expand(*batch, -1))
        return vector

    def _affine(self, name: str, vector: Tensor) -> Tensor:
        """constant + map x parameters; without a batch where no parameter matters, so that problems share it."""
        constant, part = getattr(self, f"{name}_constant").to(vector), getattr(self, f"{name}_map")
        if part is None:
            return constant
        flat = vector.reshape(-1, self.size)
        moved = torch.sparse.mm(part.to(vector), flat.mT).mT
        return (constant + moved).reshape(*vector.shape[:-1], -1)


def _canonical(owner: str, problem: Any, kind: str) -> tuple[Any, tuple[Any, Any], dict[int, Any]]:
    """(CVXPY's parametrised cone program, bounds of its variable, variables that stand for others)."""
    import cvxpy as cp

    if not problem.is_dcp(dpp=True):
        raise ValueError(
            f"{owner}: problem must satisfy DPP (problem.is_dcp(dpp=True)); see CVXPY's guide to parameters"
        )
    integer = bool(problem.is_mixed_integer())
    if integer != (kind == "MixedIntegerProgram"):
        raise ValueError(
            f"{owner}: problem is {'' if integer else 'not '}mixed-integer; use "
            f"{'MixedIntegerProgram' if integer else 'LinearProgram'}.from_cvxpy"
        )
    quadratic = kind == "QuadraticProgram"
    options = {"use_quad_obj": quadratic}
    data, chain, inverse = problem.get_problem_data(cp.HIGHS if integer else cp.CLARABEL, solver_opts=options)
    canonical = data[cp.settings.PARAM_PROB]
    dims = canonical.cone_dims
    if dims.soc or dims.psd or dims.exp or dims.p3d:
        raise ValueError(
            f"{owner}: problem has cones beyond linear constraints (norms, exponentials, matrices); use cvxpylayers"
        )
    if canonical.P is not None and canonical.P.nnz and not quadratic:
        raise ValueError(f"{owner}: problem has a quadratic objective; use QuadraticProgram.from_cvxpy")
    ends = data.get("lower_bounds"), data.get("upper_bounds")
    if integer and len(data["bool_vars_idx"]):
        ends = _within_zero_and_one(ends, [int(i) for i in data["bool_vars_idx"]], canonical.x.size)
    return canonical, ends, _renamed(chain, inverse)


def _within_zero_and_one(ends: tuple[Any, Any], index: list[int], size: int) -> tuple[Any, Any]:
    """The bounds with those of booleans, which CVXPY leaves to the solver."""
    import numpy as np

    low = np.full(size, -np.inf) if ends[0] is None else np.array(ends[0], dtype=float)
    high = np.full(size, np.inf) if ends[1] is None else np.array(ends[1], dtype=float)
    low[index], high[index] = np.maximum(low[index], 0), np.minimum(high[index], 1)
    return low, high


def _renamed(chain: Any, inverse: Any) -> dict[int, Any]:
    """Variables with attributes, such as nonneg, that CVXPY replaced by ones without, of equal shape."""
    found = {}
    for reduction, data in zip(chain.reductions, inverse, strict=False):
        if type(reduction).__name__ == "CvxAttr2Constr" and data:
            new, old = data[0], data[1]
            found = {id_: new[id_] for id_ in new if id_ in old and new[id_].shape == old[id_].shape}
    return found


def integers_of(problem: Any) -> Tensor:
    """Which entries of the canonical variable are integers."""
    import cvxpy as cp

    data, _, _ = problem.get_problem_data(cp.HIGHS)
    mask = torch.zeros(data[cp.settings.PARAM_PROB].x.size, dtype=torch.bool)
    for name in ("bool_vars_idx", "int_vars_idx"):
        mask[torch.as_tensor([int(i) for i in data[name]], dtype=torch.long)] = True
    return mask


def _place(owner: str, places: dict[int, int], leaf: Any, kind: str) -> int:
    if leaf.id not in places:
        raise ValueError(
            f"{owner}: {kind} {leaf.name()} is not in the canonical problem; is it in the problem, and are attributes "
            "such as symmetric or diag written as constraints?"
        )
    return places[leaf.id]


def _split(matrix: Any, size: int) -> tuple[Tensor | None, Tensor | None]:
    """(the constant column, the sparse columns of the parameters; None where they are all zero)."""
    if matrix is None:
        return None, None
    import numpy as np

    matrix = matrix.tocsc()
    constant = torch.from_numpy(np.asarray(matrix[:, size].todense(), dtype=np.float64).ravel())
    part = matrix[:, :size].tocoo()
    part.eliminate_zeros()
    if part.nnz == 0:
        return constant, None
    index = torch.from_numpy(np.stack([part.row, part.col]).astype(np.int64))
    values = torch.from_numpy(np.asarray(part.data, dtype=np.float64))
    return constant, torch.sparse_coo_tensor(index, values, part.shape, check_invariants=False).coalesce()


def _unflattened(primal: Tensor, place: int, shape: tuple[int, ...]) -> Tensor:
    """One variable out of the canonical one; CVXPY counts down columns."""
    count = torch.Size(shape).numel()
    flat = primal[..., place : place + count].reshape(*primal.shape[:-1], *reversed(shape))
    lead = primal.dim() - 1
    return flat.permute(*range(lead), *reversed(range(lead, flat.dim())))
