"""Layers from problems written in CVXPY, with the calling convention of cvxpylayers.

CVXPY canonicalises the problem once. Its data are then affine in the parameters (the rules of disciplined parametrised
programming, DPP): c, A, b and P are sparse matrices times (parameters, 1), which autograd passes through.
Source: Agrawal et al. 2019, "Differentiable convex optimization layers".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        self, program: LinearProgram, problem: Any, parameters: Sequence[Any], variables: Sequence[object]
    ) -> None:
        super().__init__()
        self.program = program
        owner, kind = self._owner, type(program).__name__
        canonical, self.bounds, renamed = _canonical(owner, problem, kind)
        if not parameters:
            raise ValueError(f"{owner}: parameters is empty; a problem without parameters needs no layer")
        self.rows = int(canonical.A.shape[0]) // (canonical.x.size + 1)
        self.columns, self.equalities = canonical.x.size, int(canonical.cone_dims.zero)
        places, found = canonical.param_id_to_col, canonical.var_id_to_col
        self.parameters_of = [_Leaf.of(p, _place(owner, places, p, renamed, "parameter")) for p in parameters]
        self.variables_of = [_Leaf.of(v, _place(owner, found, v, renamed, "variable")) for v in variables]
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

    def forward(self, *parameters: Tensor, solver_args: Mapping[str, object] | None = None) -> tuple[Tensor, ...]:
        """The variables asked for, at these parameters; `solver_args` must be empty: options are the solver's."""
        if solver_args:
            raise TypeError(
                f"{self._owner}: solver_args are another library's, got {sorted(solver_args)}; give "
                "from_cvxpy(..., solver=InteriorPoint(tol=1e-8)), or another solver with its options"
            )
        primal = self.solve(*parameters).primal
        return tuple(leaf.spread(primal) for leaf in self.variables_of)

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
        data += [None if end is None else torch.as_tensor(end, device="cpu").to(c) for end in self.bounds]
        if self.P_constant is not None:
            P = self._affine("P", vector)
            P = P.reshape(*P.shape[:-1], n, n)
            # CVXPY writes x.P x / 2, too, but may keep one triangle's rounding apart from the other's.
            data = [(P + P.mT) / 2, *data]
        solution: LPSolution = self.program(*data)
        return solution

    @property
    def _owner(self) -> str:
        return f"{type(self.program).__name__}.from_cvxpy"

    def _vector(self, parameters: Sequence[Tensor]) -> Tensor:
        """All parameters in CVXPY's order, [*batch, size]."""
        if len(parameters) != len(self.parameters_of):
            raise ValueError(
                f"{self._owner}: layer wants {len(self.parameters_of)} parameter(s), got {len(parameters)}"
            )
        for i, (value, leaf) in enumerate(zip(parameters, self.parameters_of, strict=True)):
            self._check(i, value, leaf, parameters[0])
        leading = [v.shape[: v.dim() - len(leaf.shape)] for v, leaf in zip(parameters, self.parameters_of, strict=True)]
        try:
            batch = torch.broadcast_shapes(*leading)
        except RuntimeError as error:
            listed = ", ".join(str(tuple(lead)) for lead in leading)
            raise ValueError(f"{self._owner}: leading shapes of the parameters do not broadcast: {listed}") from error
        vector = parameters[0].new_zeros(*batch, self.size)
        for value, leaf in zip(parameters, self.parameters_of, strict=True):
            part = leaf.gathered(value)
            index = torch.arange(leaf.place, leaf.place + part.shape[-1], device=part.device)
            vector = vector.index_copy(-1, index, part.expand(*batch, -1))
        return vector

    def _check(self, i: int, value: object, leaf: _Leaf, first: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{self._owner}: parameter {i} must be a tensor, got {type(value).__name__}")
        if value.shape[max(0, value.dim() - len(leaf.shape)) :] != leaf.shape:
            wanted = ", ".join(["*batch", *map(str, leaf.shape)])
            raise ValueError(f"{self._owner}: parameter {i} has shape {tuple(value.shape)}, wanted [{wanted}]")
        if value.dtype != first.dtype or value.device != first.device:
            raise ValueError(
                f"{self._owner}: parameter {i} is {value.dtype} on {value.device}, parameter 0 {first.dtype} on "
                f"{first.device}; give one dtype and device"
            )

    def _affine(self, name: str, vector: Tensor) -> Tensor:
        """constant + map x parameters; without a batch where no parameter matters, so that problems share it."""
        constant, part = getattr(self, f"{name}_constant").to(vector), getattr(self, f"{name}_map")
        if part is None:
            return constant
        flat = vector.reshape(-1, self.size)
        moved = torch.sparse.mm(part.to(vector), flat.mT).mT
        return (constant + moved).reshape(*vector.shape[:-1], len(constant))


@dataclass(frozen=True)
class _Leaf:
    """Where the entries of a parameter or a variable lie in CVXPY's vector of all."""

    place: int
    """Of the first."""
    shape: torch.Size
    entries: list[int]
    """For each entry, by rows, its place after the first; -1 where it is always 0."""

    @classmethod
    def of(cls, leaf: Any, place: int) -> _Leaf:
        """CVXPY counts down columns; it keeps the upper triangle of symmetric matrices, by rows, or the diagonal."""
        import numpy as np

        if any(leaf.attributes[name] for name in ("symmetric", "PSD", "NSD")):
            upper = np.zeros(leaf.shape, dtype=int)
            upper[np.triu_indices(leaf.shape[-1])] = np.arange(leaf.shape[-1] * (leaf.shape[-1] + 1) // 2)
            entries = np.maximum(upper, upper.T)
        elif leaf.attributes["diag"]:
            entries = np.diag(np.arange(leaf.shape[0]) + 1) - 1
        else:
            entries = np.arange(leaf.size).reshape(leaf.shape, order="F")
        return cls(place, torch.Size(leaf.shape), entries.ravel().tolist())

    def gathered(self, value: Tensor) -> Tensor:
        """A parameter [*batch, *shape] as CVXPY's vector."""
        kept = {k: i for i, k in reversed([*enumerate(self.entries)]) if k >= 0}
        order = torch.tensor([kept[k] for k in range(len(kept))], device=value.device)
        lead = value.shape[: value.dim() - len(self.shape)]
        return value.reshape(*lead, self.shape.numel())[..., order]

    def spread(self, primal: Tensor) -> Tensor:
        """A variable [*batch, *shape] out of the canonical one."""
        entries = torch.tensor(self.entries, device=primal.device)
        flat = primal[..., self.place + entries.clamp(min=0)]
        flat = torch.where(entries < 0, 0.0, flat) if min(self.entries, default=0) < 0 else flat
        return flat.reshape(primal.shape[:-1] + self.shape)


def _canonical(owner: str, problem: Any, kind: str) -> tuple[Any, tuple[object, object], dict[int, int]]:
    """(CVXPY's parametrised cone program, bounds of its variable, variables that stand for others)."""
    import cvxpy as cp

    if not problem.is_dcp(dpp=True):
        raise ValueError(
            f"{owner}: problem must satisfy DPP (problem.is_dcp(dpp=True)); see CVXPY's guide to parameters. A "
            "parameter P in quad_form(x, P) goes in by its root: sum_squares(root @ x), where P = root.T @ root"
        )
    integer = bool(problem.is_mixed_integer())
    if integer != (kind == "MixedIntegerProgram"):
        raise ValueError(
            f"{owner}: problem is {'' if integer else 'not '}mixed-integer; use "
            f"{'MixedIntegerProgram' if integer else 'LinearProgram'}.from_cvxpy"
        )
    data, chain, inverse = _data(problem, kind)
    canonical = data[cp.settings.PARAM_PROB]
    dims = canonical.cone_dims
    curved = canonical.P is not None and canonical.P.nnz and kind != "QuadraticProgram"
    if curved or dims.soc or dims.psd or dims.exp or dims.p3d:
        raise ValueError(f"{owner}: {_instead(problem, kind)}")
    ends = data.get("lower_bounds"), data.get("upper_bounds")
    if integer and len(data["bool_vars_idx"]):
        ends = _within_zero_and_one(ends, [int(i) for i in data["bool_vars_idx"]], canonical.x.size)
    return canonical, ends, _renamed(chain, inverse)


def _data(problem: Any, kind: str) -> Any:
    """CVXPY's data for a solver of this kind, its chain of reductions, and what inverts them."""
    import cvxpy as cp

    solver = cp.HIGHS if kind == "MixedIntegerProgram" else cp.CLARABEL
    try:
        return problem.get_problem_data(solver, solver_opts={"use_quad_obj": kind == "QuadraticProgram"})
    except cp.error.SolverError as error:
        raise ValueError(f"{kind}.from_cvxpy: {_instead(problem, kind)}") from error


def _instead(problem: Any, kind: str) -> str:
    if kind == "MixedIntegerProgram":
        return "problem has integers beside cones or a quadratic objective; use problem.solve()"
    if kind == "LinearProgram" and problem.is_qp():
        return "problem has a quadratic objective; use QuadraticProgram.from_cvxpy"
    return "problem has cones beyond linear constraints (norms, exponentials, matrices); use cvxpylayers"


def _within_zero_and_one(ends: tuple[object, object], index: list[int], size: int) -> tuple[object, object]:
    """The bounds with those of booleans, which CVXPY leaves to the solver."""
    import numpy as np

    low = np.full(size, -np.inf) if ends[0] is None else np.array(ends[0], dtype=float)
    high = np.full(size, np.inf) if ends[1] is None else np.array(ends[1], dtype=float)
    low[index], high[index] = np.maximum(low[index], 0), np.minimum(high[index], 1)
    return low, high


def _renamed(chain: Any, inverse: Any) -> dict[int, int]:
    """Variables and parameters with attributes, such as nonneg, that CVXPY replaced by ones without."""
    found: dict[int, int] = {}
    for reduction, data in zip(chain.reductions, inverse, strict=False):
        if type(reduction).__name__ == "CvxAttr2Constr" and data:
            found |= {old: new.id for old, new in data[0].items()}
            found |= {old: new[0] for old, new in getattr(reduction, "param_id_map", {}).items()}
    return found


def integers_of(problem: object) -> Tensor:
    """Which entries of the canonical variable are integers."""
    import cvxpy as cp

    data, _, _ = _data(problem, "MixedIntegerProgram")
    mask = torch.zeros(data[cp.settings.PARAM_PROB].x.size, dtype=torch.bool, device="cpu")
    for name in ("bool_vars_idx", "int_vars_idx"):
        mask[torch.as_tensor([int(i) for i in data[name]], dtype=torch.long, device="cpu")] = True
    return mask


def _place(owner: str, places: dict[int, int], leaf: Any, renamed: dict[int, int], kind: str) -> int:
    name = renamed.get(leaf.id, leaf.id)
    if name not in places or leaf.attributes["sparsity"]:
        raise ValueError(
            f"{owner}: {kind} {leaf.name()} is not in the canonical problem; is it in the problem, and are attributes "
            "such as sparsity written as constraints?"
        )
    return places[name]


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
