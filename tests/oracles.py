"""Outside oracles for networks of affine ops and ReLU: LP and MILP by HiGHS (through SciPy), and exact fractions."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import torch
from scipy.optimize import Bounds as Limits
from scipy.optimize import LinearConstraint, linprog, milp
from torch import Tensor

import optrelax as ox
from optrelax.activations import Activation
from optrelax.ops import Affine


class Encoding:
    """One example's region as a mixed-integer program: the input, then value and switch of every crossing ReLU.

    before: pre-activation bounds of each activation for this example, flat.  With the switches relaxed to [0, 1] the
    rows y <= u d, y <= z - l (1 - d) are the triangle, so the same encoding serves as the LP.
    """

    def __init__(self, network: ox.Network, lower: Tensor, upper: Tensor, before: Mapping[str, ox.Bounds]) -> None:
        self.low, self.high = list(lower.flatten().numpy()), list(upper.flatten().numpy())
        self.integer = [0] * len(self.low)
        self.rows: list[tuple[dict[int, float], float]] = []  # coefficients . v <= number
        n = len(self.low)
        self.exprs = {network.input: (np.eye(n), np.zeros(n))}  # value = matrix v + constant
        for node in network:
            if isinstance(node.op, Affine):
                self.exprs[node.name] = self._affine(node.op, [self.exprs[name] for name in node.inputs])
            else:
                bounds = before[node.name]
                ends = bounds.lower.flatten().numpy(), bounds.upper.flatten().numpy()
                self.exprs[node.name] = self._relu(*self.exprs[node.inputs[0]], *ends)
        self.output = self.exprs[network.output]

    def _affine(self, op: Affine, parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """The op pushed over the columns of its inputs; its constant from the image of 0."""
        size = len(self.low)
        columns = []
        for (matrix, constant), shape in zip(parts, op.input_shapes, strict=True):
            wide = np.zeros((matrix.shape[0], size + 1))
            wide[:, : matrix.shape[1]], wide[:, -1] = matrix, constant
            columns.append(torch.from_numpy(wide.T.copy()).reshape(-1, *shape))
        zeros = [torch.zeros(1, *shape, dtype=torch.float64) for shape in op.input_shapes]
        with torch.no_grad():
            bias = op.apply(*zeros)
            image = (op.apply(*columns) - bias).flatten(1).numpy().T
        return image[:, :-1], image[:, -1] + bias.flatten().numpy()

    def _relu(
        self, matrix: np.ndarray, constant: np.ndarray, l: np.ndarray, u: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        crossing = (l < 0) & (u > 0)
        first, size = len(self.low), len(self.low) + 2 * int(crossing.sum())
        out, shift = np.zeros((len(l), size)), np.zeros(len(l))
        for i in range(len(l)):
            if l[i] >= 0:
                out[i, : matrix.shape[1]], shift[i] = matrix[i], constant[i]
        for k, i in enumerate(np.flatnonzero(crossing)):
            y, d = first + 2 * k, first + 2 * k + 1
            self.low += [0.0, 0.0]
            self.high += [u[i], 1.0]
            self.integer += [0, 1]
            out[i, y] = 1.0
            z = {j: float(c) for j, c in enumerate(matrix[i]) if c}
            self.rows.append(({**z, y: -1.0}, -constant[i]))  # y >= z
            self.rows.append(({y: 1.0, d: -float(u[i])}, 0.0))  # y <= u d
            self.rows.append(({**{j: -c for j, c in z.items()}, y: 1.0, d: -float(l[i])}, constant[i] - l[i]))
        return out, shift

    def minimum(self, row: Tensor, integer: bool) -> tuple[float, Tensor]:
        """Least value of a row [outputs] of the output, and the input where it is attained."""
        size = len(self.low)
        c = np.zeros(size)
        c[: self.output[0].shape[1]] = row.numpy() @ self.output[0]
        offset = float(row.numpy() @ self.output[1])
        matrix, number = np.zeros((len(self.rows), size)), np.zeros(len(self.rows))
        for i, (coefficients, right) in enumerate(self.rows):
            matrix[i, list(coefficients)], number[i] = list(coefficients.values()), right
        if integer:
            limits = [LinearConstraint(matrix, -np.inf, number)] if self.rows else []
            found = milp(
                c,
                constraints=limits,
                bounds=Limits(self.low, self.high),
                integrality=self.integer,
                options={"mip_rel_gap": 0.0},
            )
        else:
            rows = (matrix, number) if self.rows else (None, None)
            found = linprog(c, *rows, bounds=list(zip(self.low, self.high, strict=True)), method="highs")
        assert found.status == 0, found.message
        return float(found.fun) + offset, torch.from_numpy(found.x)


def minimum(
    network: ox.Network,
    region: ox.InputBox,
    rows: Tensor,
    before: Mapping[str, ox.Bounds],
    *,
    integer: bool,
) -> Tensor:
    """Least value of each row [k, outputs] over each example of the region, float64: [batch, k]."""
    n = region.lower[0].numel()
    found = torch.empty(len(region.lower), len(rows), dtype=torch.float64)
    for b in range(len(region.lower)):
        bounds = {name: ox.Bounds(p.lower[b].double(), p.upper[b].double()) for name, p in before.items()}
        program = Encoding(network, region.lower[b].double(), region.upper[b].double(), bounds)
        for k, row in enumerate(rows.double()):
            found[b, k], v = program.minimum(row, integer)
            if integer:  # the optimum is attained: replay it through the module
                x = v[:n].reshape(1, *network.input_shape).clamp(region.lower[b], region.upper[b])
                with torch.no_grad():
                    value = float(network.module(x).flatten() @ row)
                assert value <= found[b, k] + 1e-6 * max(1.0, abs(value)), "the encoding is not the network"
    return found


# --- fractions ----------------------------------------------------------------------------------------------------


def fractions(x: Tensor) -> list[Fraction]:
    """A tensor's numbers without rounding, flat."""
    return [Fraction(float(v)) for v in x.detach().double().flatten()]


def exact_affine(op: Affine, *xs: list[Fraction]) -> list[Fraction]:
    """Image of an affine op whose coefficients are floats (linear, conv, sums), in rational arithmetic."""
    total: list[Fraction] | None = None
    zeros = [torch.zeros(1, *shape, dtype=torch.float64) for shape in op.input_shapes]
    with torch.no_grad():
        bias = fractions(op.apply(*zeros))
        for i, (x, shape) in enumerate(zip(xs, op.input_shapes, strict=True)):
            eye = torch.eye(len(x), dtype=torch.float64).reshape(-1, *shape)
            given = [zeros[j].expand(len(x), *s) for j, s in enumerate(op.input_shapes)]
            given[i] = eye
            columns = op.linear(*given).flatten(1)  # a product with 1 and sums with 0: no rounding
            part = [Fraction(0)] * columns.shape[1]
            for value, column in zip(x, columns, strict=True):
                if value:
                    part = [p + value * Fraction(float(c)) if c else p for p, c in zip(part, column, strict=True)]
            total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
    assert total is not None
    return [a + b for a, b in zip(total, bias, strict=True)]


def exact_values(network: ox.Network, x: Tensor) -> dict[str, list[Fraction]]:
    """Every node's value at one input, in rational arithmetic."""
    values = {network.input: fractions(x)}
    for node in network:
        inputs = [values[name] for name in node.inputs]
        if isinstance(node.op, Affine):
            values[node.name] = exact_affine(node.op, *inputs)
        else:
            assert isinstance(node.op, Activation)
            values[node.name] = [exact_activation(node.op, v) for v in inputs[0]]
    return values


def exact_activation(op: Activation, x: Fraction) -> Fraction:
    """A piecewise-linear function with its Python numbers taken as they are."""
    piece = sum(x >= Fraction(kink) for kink in op.kinks)
    return Fraction(op.slopes[piece]) * x + Fraction(op.intercepts[piece])
