"""Sparse matrices that a batch of programs shares, never written out: entries, scaling, products both ways."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """The entries of a matrix [m, n], row by row, each place once."""

    i: Int[Tensor, " q"]
    j: Int[Tensor, " q"]
    a: Float[Tensor, " q"]
    m: int
    n: int

    @classmethod
    def of(cls, matrix: Tensor) -> Entries:
        """Of a matrix of any layout; of a dense one those that are not 0."""
        if matrix.layout == torch.strided:
            i, j = matrix.nonzero().unbind(-1)
            return cls(i, j, matrix[i, j], *matrix.shape)
        if matrix.layout == torch.sparse_csr:
            counts = matrix.crow_indices().diff()
            i = torch.arange(len(counts), device=matrix.device).repeat_interleave(counts)
            return cls(i, matrix.col_indices().long(), matrix.values(), *matrix.shape)
        matrix = matrix.coalesce()
        i, j = matrix.indices().unbind(0)
        return cls(i, j, matrix.values(), *matrix.shape)

    def coo(self) -> Tensor:
        """As a COO matrix, coalesced."""
        index = torch.stack([self.i, self.j])
        return torch.sparse_coo_tensor(index, self.a, (self.m, self.n), is_coalesced=True, check_invariants=False)

    def of_columns(self, x: Float[Tensor, "B n"]) -> Tensor:
        """x at the entries, [B, q]."""
        return x[:, self.j]

    def of_rows(self, s: Float[Tensor, "B m"]) -> Tensor:
        """s at the entries, [B, q]."""
        return s[:, self.i]

    def sums(self, t: Float[Tensor, "B q"]) -> Float[Tensor, "B m"]:
        """Row sums of values at the entries."""
        return t.new_zeros(len(t), self.m).index_add_(1, self.i, t)

    def least(self, t: Float[Tensor, "B q"]) -> Float[Tensor, "B n"]:
        """Column minima of values at the entries, inf where there are none."""
        return t.new_full((len(t), self.n), torch.inf).scatter_reduce_(1, self.j.expand(len(t), -1), t, "amin")

    def zero_rows(self) -> Tensor:
        """Which rows hold nothing but 0, [m]."""
        held = torch.zeros(self.m, dtype=torch.bool, device=self.a.device)
        held[self.i[self.a != 0]] = True
        return ~held


def is_sparse(matrix: Tensor) -> bool:
    """Whether a matrix is COO or CSR."""
    return matrix.layout != torch.strided


def count_entries(matrix: Tensor) -> int:
    """Numbers that a matrix stores, of one problem."""
    return int(matrix._nnz()) if is_sparse(matrix) else matrix.shape[-1] * matrix.shape[-2]


def equilibrated(size: Entries, rounds: int) -> tuple[Tensor, Tensor]:
    """(row scales, column scales) of |a|: Ruiz's rounds, then Pock and Chambolle's; 1 where there are no entries."""
    a, i, j = size.a.abs(), size.i, size.j
    rows, columns = a.new_ones(size.m), a.new_ones(size.n)
    for round_ in range(rounds + 1):
        present = a * rows[i] * columns[j]
        reduce = "sum" if round_ == rounds else "amax"
        row = torch.zeros_like(rows).scatter_reduce_(0, i, present, reduce)
        column = torch.zeros_like(columns).scatter_reduce_(0, j, present, reduce)
        rows = rows / torch.where(row > 0, row, 1.0).sqrt()
        columns = columns / torch.where(column > 0, column, 1.0).sqrt()
    return rows, columns


def compressed(entries: Entries) -> tuple[Tensor, Tensor]:
    """(the matrix, its transpose), both CSR: products with CSR are many times as fast as with COO, one way only."""
    order = torch.argsort(entries.j, stable=True)
    turned = entries.j[order], entries.i[order], entries.a[order], entries.n, entries.m
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        return _csr(entries.i, entries.j, entries.a, entries.m, entries.n), _csr(*turned)


def _csr(i: Tensor, j: Tensor, a: Tensor, m: int, n: int) -> Tensor:
    counts = torch.bincount(i, minlength=m)
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return torch.sparse_csr_tensor(start, j, a, (m, n), check_invariants=False)


def outer_entries(left: Float[Tensor, "*batch m"], right: Float[Tensor, "*batch n"], like: Tensor) -> Tensor:
    """The sum over the batch of left right^T at the entries of a sparse matrix, in its layout."""
    entries = Entries.of(like)
    total = torch.zeros_like(entries.a)
    right = right.expand(*left.shape[:-1], right.shape[-1])
    for y, x in zip(left.reshape(-1, entries.m), right.reshape(-1, entries.n), strict=True):
        total.addcmul_(y[entries.i], x[entries.j])
    made = Entries(entries.i, entries.j, total, entries.m, entries.n)
    if like.layout == torch.sparse_coo:
        return made.coo()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        start, column = like.crow_indices(), like.col_indices()
        return torch.sparse_csr_tensor(start, column, total, like.shape, check_invariants=False)
