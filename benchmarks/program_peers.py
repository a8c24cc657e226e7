"""Other solvers of general programs, those that are installed: each gives a step of a batch, forward and gradient."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

Step = Callable[[], Tensor]
"""Runs once; returns the optimal values that the solver found, [batch]."""
Data = Mapping[str, Tensor]
"""Arguments of `LinearProgram`, or of `QuadraticProgram` with P; leaves of autograd."""


def installed(name: str) -> bool:
    """Whether a module can be imported."""
    return find_spec(name) is not None


def cvxpylayers(data: Data, threads: int) -> Step | None:
    """Gradient of the argmin in c, A, b (and P's factor), through Clarabel and diffcp."""
    if not installed("cvxpylayers"):
        return None
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    n, m = data["A"].shape[-1], data["A"].shape[-2]
    x, c, A, b = cp.Variable(n), cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m)
    parameters, objective = [c, A, b], c @ x
    values = [data[name] for name in ("c", "A", "b")]
    if "P" in data:
        root = cp.Parameter((n, n))
        parameters, objective = [root, *parameters], objective + cp.sum_squares(root @ x) / 2
        values = [torch.linalg.cholesky(data["P"].detach()).mT.contiguous().requires_grad_(), *values]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of thousands of parameters, which slow its set-up
        layer = CvxpyLayer(cp.Problem(cp.Minimize(objective), [A @ x <= b, x >= 0, x <= 1]), parameters, [x])
    arguments = {"solve_method": "CLARABEL", "n_jobs_forward": threads, "n_jobs_backward": threads}

    def step() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (found,) = layer(*values, solver_args=arguments)
            torch.autograd.grad(found.sum(), values)
            return _objective(data, found)

    return step


def moreau(data: Data, threads: int) -> Step | None:
    """Gradient of the argmin in c, A, b and P by Moreau's batched solver; it takes the cores that it finds."""
    if not installed("moreau"):
        return None
    library, solvers = importlib.import_module("moreau"), importlib.import_module("moreau.torch")
    batch, m, n = data["A"].shape
    quadratic = "P" in data
    # Its one matrix: rows, then x <= 1, then -x <= 0.
    dense, single = torch.arange(m * n).reshape(m, n) % n, torch.arange(n).repeat(2).unsqueeze(1)
    columns = torch.cat([dense.flatten(), single.flatten()])
    offsets = torch.cat([n * torch.arange(m + 1), n * m + torch.arange(1, 2 * n + 1)])
    P_offsets = n * torch.arange(n + 1) if quadratic else torch.zeros(n + 1, dtype=torch.long)
    P_columns = torch.arange(n).repeat(n) if quadratic else torch.zeros(0, dtype=torch.long)
    settings = library.Settings(solver="ipm", device="cpu", batch_size=batch, enable_grad=True)
    cones = library.Cones(num_nonneg_cones=m + 2 * n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that gradients of an active set are one-sided
        solver = solvers.Solver(n, m + 2 * n, P_offsets, P_columns, offsets, columns, cones, settings)
    signs = torch.cat([torch.ones(n), -torch.ones(n)]).double().expand(batch, -1)
    sides = torch.cat([torch.ones(n), torch.zeros(n)]).double().expand(batch, -1)
    leaves = [data[name] for name in ("c", "A", "b", "P") if name in data]

    def step() -> Tensor:
        P = data["P"].reshape(batch, -1) if quadratic else data["c"].new_zeros(batch, 0)
        A = torch.cat([data["A"].reshape(batch, -1), signs], 1)
        solution = solver.solve(P, A, data["c"], torch.cat([data["b"], sides], 1))
        torch.autograd.grad(solution.x.sum(), leaves)
        return _objective(data, solution.x)

    return step


def qpth(data: Data, threads: int) -> Step | None:
    """Gradient of the argmin in all data by OptNet's own solver."""
    if not installed("qpth") or "P" not in data:
        return None
    function = importlib.import_module("qpth.qp").QPFunction(verbose=-1, check_Q_spd=False)
    n = data["c"].shape[-1]
    eye = torch.eye(n, dtype=torch.float64).expand(len(data["c"]), -1, -1)
    none = torch.empty(0, dtype=torch.float64)
    leaves = [data[name] for name in ("P", "c", "A", "b")]

    def step() -> Tensor:
        G = torch.cat([data["A"], -eye, eye], 1)
        h = torch.cat([data["b"], torch.zeros_like(data["c"]), torch.ones_like(data["c"])], 1)
        found = function(data["P"], data["c"], G, h, none, none)
        torch.autograd.grad(found.sum(), leaves)
        return _objective(data, found)

    return step


def proxqp(data: Data, threads: int) -> Step | None:
    """Forward alone, one dense problem after the other."""
    if not installed("proxsuite") or "P" not in data:
        return None
    solver = importlib.import_module("proxsuite").proxqp
    host = {name: value.detach().numpy() for name, value in data.items()}
    n = host["c"].shape[-1]

    def step() -> Tensor:
        points = []
        for i, c in enumerate(host["c"]):
            rows = {"C": host["A"][i], "u": host["b"][i], "l_box": host["lower"], "u_box": host["upper"]}
            found = solver.dense.solve(H=host["P"][i], g=c, eps_abs=1e-8, max_iter=10_000, **rows)
            points.append(torch.from_numpy(found.x[:n]))
        return _objective(data, torch.stack(points))

    return step


def manylp(data: Data, threads: int) -> Step | None:
    """Forward alone, of problems that differ in b only: an atlas of bases, each certified. Set-up is not counted."""
    if not installed("manylp") or not installed("numba"):
        return None
    import numpy as np
    from scipy.sparse import csc_matrix

    library = importlib.import_module("manylp")
    m = data["A"].shape[-2]
    lower, upper = data["lower"].detach().numpy(), data["upper"].detach().numpy()
    below = np.full((len(data["b"]), m), -np.inf)
    above = data["b"].detach().numpy()
    problem = library.LexLP(
        A=csc_matrix(data["A"].detach().numpy()),
        objectives=-data["c"].detach().numpy()[None],  # it maximises
        col_lb=lower,
        col_ub=upper,
        row_lb=below[0],
        row_ub=above[0],
        param_rows=np.arange(m),
    )
    solver = library.BatchLPSolver(n_workers=threads)
    group = solver.register_group(problem)
    return lambda: -torch.from_numpy(np.array(solver.solve_batch(group, below, above).objective)[:, 0])


def _objective(data: Data, x: Tensor) -> Tensor:
    x = x.detach()
    value = (data["c"].detach() * x).sum(-1)
    return value + (x * (data["P"].detach() @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) / 2 if "P" in data else value


PEERS = {"cvxpylayers": cvxpylayers, "Moreau": moreau, "qpth": qpth, "ProxQP": proxqp, "manylp": manylp}
