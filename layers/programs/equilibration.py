"""Scales of rows and columns that make a matrix's entries alike: Ruiz 2001, then Pock & Chambolle 2011."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from optrelax.layers.programs.sparse_matrices import Entries, compressed, equilibrated, is_sparse

_RUIZ_ROUNDS = 10


def equilibration(K: Tensor) -> tuple[Tensor, Tensor]:
    """(row scales, column scales) of |K|, [..., rows] and [..., n]; rows and columns of zeros keep scale 1."""
    if is_sparse(K):
        return equilibrated(Entries.of(K), _RUIZ_ROUNDS)
    size = K.abs()
    rows, columns = size.new_ones(size.shape[:-1]), size.new_ones(size.shape[:-2] + size.shape[-1:])
    for round_ in range(_RUIZ_ROUNDS + 1):
        present = size * rows.unsqueeze(-1) * columns.unsqueeze(-2)
        last = round_ == _RUIZ_ROUNDS
        row = present.sum(-1) if last else present.amax(-1)
        column = present.sum(-2) if last else present.amax(-2)
        rows = rows / torch.where(row > 0, row, 1.0).sqrt()
        columns = columns / torch.where(column > 0, column, 1.0).sqrt()
    return rows, columns


def scaled_matrix(K: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor | None]:
    """(K with rows and columns scaled, the transpose of a sparse one)."""
    if not is_sparse(K):
        return K * rows.unsqueeze(-1) * columns.unsqueeze(-2), None
    at = Entries.of(K)
    return compressed(replace(at, a=at.a * rows[at.i] * columns[at.j]))
