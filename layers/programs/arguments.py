"""The tensors that a program layer is called with: checked, missing ones filled in, broadcast and flattened."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optrelax.layers.programs.lp_data import LPData, all_finite
from optrelax.layers.programs.sparse_matrices import Entries, is_sparse

NAMES = ("c", "A", "b", "E", "d", "lower", "upper")
NO_LIMIT = 1e20
_DIMS = {"c": 1, "A": 2, "b": 1, "E": 2, "d": 1, "lower": 1, "upper": 1, "P": 2}


def gather(
    c: Tensor,
    A: Tensor | None,
    b: Tensor | None,
    E: Tensor | None,
    d: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    P: Tensor | None = None,
    owner: str = "LinearProgram",
    sparse: bool = False,
) -> dict[str, Tensor]:
    """The tensors, missing ones filled in (no rows, infinite bounds), checked one by one and together.

    Sparse matrices are written out, unless `sparse` says that they need not.

    TypeError: not a tensor, or not float32 or float64.  ValueError: shapes that do not fit, mixed dtypes or devices,
    NaN, infinite entries outside the bounds and b, only one of A and b (or E and d).  RuntimeError: inside torch.func.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{owner}: vmap and the other transforms of torch.func are not supported; leading dimensions are a batch, "
            "and backward() or torch.autograd.grad differentiates"
        )
    sparse = sparse and all(M is None or M.dim() == 2 for M in (A, E))
    A, E = (_laid_out(name, matrix, owner, sparse) for name, matrix in (("A", A), ("E", E)))
    given = dict(zip(NAMES, (c, A, b, E, d, lower, upper), strict=True))
    if P is not None:
        given["P"] = _laid_out("P", P, owner, False)
    for matrix, vector in (("A", "b"), ("E", "d")):
        if (given[matrix] is None) != (given[vector] is None):
            raise ValueError(f"{owner}: give both {matrix} and {vector} or neither")
    _check_kinds(given, owner)
    data = {name: _default(name, c) if value is None else value for name, value in given.items()}
    _check_shapes(data, owner)
    _check_values({name: value for name, value in data.items() if given[name] is not None}, owner)
    return data


def _default(name: str, c: Tensor) -> Tensor:
    """No rows, infinite bounds."""
    n = c.shape[-1]
    if name in ("lower", "upper"):
        return c.new_full((n,), -torch.inf if name == "lower" else torch.inf)
    return c.new_zeros((0, n)[: _DIMS[name]])


def _laid_out(name: str, matrix: Tensor | None, owner: str, sparse: bool) -> Tensor | None:
    """A sparse matrix as it is, or written out; its gradient is sparse again."""
    if not isinstance(matrix, Tensor) or matrix.layout == torch.strided:
        return matrix
    if matrix.layout not in (torch.sparse_coo, torch.sparse_csr):
        raise TypeError(f"{owner}: {name} must be dense, COO or CSR, got {matrix.layout}")
    return matrix if sparse else matrix.to_dense()


def _check_kinds(given: dict[str, Tensor | None], owner: str) -> None:
    c = given["c"]
    for name, value in given.items():
        if value is None and name != "c":
            continue
        if not isinstance(value, Tensor):
            how = f"use torch.as_tensor({name})"
            raise TypeError(f"{owner}: {name} must be a tensor, got {type(value).__name__}; {how}")
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{owner}: {name} must be float32 or float64, got {value.dtype}")
        assert c is not None
        if value.dtype != c.dtype:
            raise ValueError(f"{owner}: {name} is {value.dtype}, c is {c.dtype}; give one dtype")
        if value.device != c.device:
            raise ValueError(f"{owner}: {name} is on {value.device}, c on {c.device}; give one device")
        if value.dim() < _DIMS[name]:
            raise ValueError(
                f"{owner}: {name} needs at least {_DIMS[name]} dimension(s), got shape {tuple(value.shape)}"
            )


def _check_shapes(data: dict[str, Tensor], owner: str) -> None:
    n, m, p = data["c"].shape[-1], data["A"].shape[-2], data["E"].shape[-2]
    if n == 0:
        raise ValueError(f"{owner}: c has no variables (its last dimension is 0)")
    wanted = {"c": (n,), "A": (m, n), "b": (m,), "E": (p, n), "d": (p,), "lower": (n,), "upper": (n,), "P": (n, n)}
    for name, value in data.items():
        tail, shape = wanted[name], tuple(value.shape)
        if shape[-len(tail) :] != tail:
            listed = ", ".join(str(size) for size in tail)
            raise ValueError(
                f"{owner}: {name} has shape {shape}, wanted [*batch, {listed}] to fit c with {n} variable(s), "
                f"A with {m} and E with {p} row(s)"
            )


def _check_values(data: dict[str, Tensor], owner: str) -> None:
    for name, value in data.items():
        entries = value.detach()
        entries = Entries.of(entries).a if is_sparse(entries) else entries
        if all_finite(entries):
            continue
        if bool(entries.isnan().any()):
            where = entries.isnan().nonzero()[0].tolist()
            raise ValueError(f"{owner}: {name} holds NaN (first at {where})")
        if name in ("lower", "upper"):
            wrong = entries == (torch.inf if name == "lower" else -torch.inf)
            allowed = "-inf" if name == "lower" else "inf"
            wanted = f"must be finite or {allowed}"
        elif name == "b":
            wrong, wanted = entries == -torch.inf, "must be finite, or inf for no limit"
        else:
            wrong, wanted = entries.isinf(), "must be finite"
        if bool(wrong.any()):
            first = wrong.nonzero()[0].tolist()
            raise ValueError(f"{owner}: {name} {wanted}, got {entries[wrong][0].item()} at {first}")


def batch_shape(data: dict[str, Tensor], owner: str = "LinearProgram") -> torch.Size:
    """The common leading shape; ValueError where the leading shapes do not broadcast."""
    leading = {name: value.shape[: value.dim() - _DIMS[name]] for name, value in data.items()}
    shapes = {shape for shape in leading.values() if shape}
    if len(shapes) < 2:
        return shapes.pop() if shapes else torch.Size()
    try:
        return torch.broadcast_shapes(*leading.values())
    except RuntimeError as error:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in leading.items() if shape)
        raise ValueError(f"{owner}: leading shapes do not broadcast: {listed}") from error


def flatten(data: dict[str, Tensor], batch: torch.Size) -> LPData:
    """Broadcast to the batch and flatten it, keeping matrices that the whole batch shares as one [m, n].

    A side that other solvers, too, take for infinite becomes so: beside it, rounding alone would decide.
    """
    far = data["b"] >= NO_LIMIT
    if bool(far.any()):
        data = data | {"b": torch.where(far, torch.inf, data["b"])}

    def flat(name: str) -> Tensor:
        value, dims = data[name], _DIMS[name]
        if is_sparse(value):
            return Entries.of(value.detach()).coo()
        tail = value.shape[value.dim() - dims :]
        if dims == 2 and value.dim() > 2 and value.shape[:-2].numel() == 1:
            value = value.reshape(tail)
        if (dims == 2 and value.dim() == 2) or (len(batch) == 1 and value.shape == batch + tail):
            return value
        return value.expand(batch + tail).reshape(batch.numel(), *tail)

    parts: list[Any] = [*(flat(name) for name in NAMES), flat("P") if "P" in data else None]
    return LPData(*parts)
