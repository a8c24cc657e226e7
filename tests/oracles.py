"""Outside oracles for networks of affine ops and ReLU: LP and MILP by HiGHS (through SciPy), and exact fractions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import torch
from scipy.optimize import Bounds as Limits
from scipy.optimize import LinearConstraint, linprog, milp
from torch import Tensor, nn

import optrelax as ox
from optrelax.networks.activations import PiecewiseLinear
from optrelax.networks.models import Normalize, Residual
from optrelax.networks.ops import Affine


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


def greatest(
    network: ox.Network, region: ox.InputBox, rows: Tensor, offsets: Tensor, before: Mapping[str, ox.Bounds]
) -> Tensor:
    """Least value of the greatest of rows [k, outputs] plus offsets, in the triangle LP: [batch]."""
    found = []
    for b in range(len(region.lower)):
        bounds = {name: ox.Bounds(p.lower[b].double(), p.upper[b].double()) for name, p in before.items()}
        program = Encoding(network, region.lower[b].double(), region.upper[b].double(), bounds)
        size, (matrix, constant) = len(program.low), program.output
        above = np.zeros((len(rows), size + 1))
        above[:, : matrix.shape[1]], above[:, -1] = rows.numpy() @ matrix, -1.0
        inside = np.zeros((len(program.rows), size + 1))
        for i, (coefficients, _) in enumerate(program.rows):
            inside[i, list(coefficients)] = list(coefficients.values())
        limits = np.concatenate([-(rows.numpy() @ constant + offsets.numpy()), [right for _, right in program.rows]])
        ends = [*zip(program.low, program.high, strict=True), (None, None)]
        answer = linprog(np.eye(size + 1)[-1], np.concatenate([above, inside]), limits, bounds=ends, method="highs")
        assert answer.status == 0, answer.message
        found.append(float(answer.fun))
    return torch.tensor(found, dtype=torch.float64)


# --- fractions ----------------------------------------------------------------------------------------------------


def fractions(x: Tensor) -> np.ndarray:
    """A tensor's numbers without rounding, as an array of fractions."""
    flat = [Fraction(float(v)) for v in x.detach().double().flatten()]
    return np.array(flat, dtype=object).reshape(x.shape)


class Rational(nn.Module):
    """A module of a test's own that knows what it is in rational arithmetic."""

    def rational(self, x: np.ndarray) -> np.ndarray:
        """[*input_shape] of fractions -> [*shape]."""
        raise NotImplementedError


class Affinity(Rational):
    """x / divisor * factor + shift, Python numbers."""

    def __init__(self, divisor: float, factor: float, shift: float) -> None:
        super().__init__()
        self.divisor, self.factor, self.shift = divisor, factor, shift

    def forward(self, x: Tensor) -> Tensor:
        return x / self.divisor * self.factor + self.shift

    def rational(self, x: np.ndarray) -> np.ndarray:
        return x / Fraction(self.divisor) * Fraction(self.factor) + Fraction(self.shift)


def exact(net: nn.Module, x: np.ndarray) -> np.ndarray:
    """What a module makes of one example [*input_shape] in rational arithmetic, its Python numbers as they are."""
    match net:
        case nn.Sequential():
            for layer in net:
                x = exact(layer, x)
            return x
        case Rational():
            return net.rational(x)
        case Residual():
            return exact(net.body, x) + exact(net.shortcut, x)
        case Normalize():
            return (x - fractions(net.mean)) / fractions(net.std)
        case nn.Linear():
            return fractions(net.weight) @ x + fractions(net.bias)
        case nn.Conv2d():
            return _exact_conv(net, x)
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            mean, variance, weight, bias = map(fractions, (net.running_mean, net.running_var, net.weight, net.bias))
            scale = np.array([w / _root(v + Fraction(net.eps)) for w, v in zip(weight, variance, strict=True)])
            view = (-1, *[1] * (x.ndim - 1))
            return (x - mean.reshape(view)) * scale.reshape(view) + bias.reshape(view)
        case nn.AvgPool2d(kernel_size=k, stride=s):
            return _windows(x, (k, k), (s, s)).mean((-2, -1))
        case nn.MaxPool2d(kernel_size=k, stride=s):
            return _windows(x, (k, k), (s, s)).max((-2, -1))
        case nn.Flatten():
            return x.reshape(-1)
        case nn.Identity():
            return x
        case nn.ReLU():
            return np.vectorize(lambda v: max(v, Fraction(0)), otypes=[object])(x)
        case nn.LeakyReLU():
            slope = Fraction(net.negative_slope)
            return np.vectorize(lambda v: v if v >= 0 else slope * v, otypes=[object])(x)
        case nn.Hardtanh(min_val=low, max_val=high):
            return np.vectorize(lambda v: min(max(v, Fraction(low)), Fraction(high)), otypes=[object])(x)
    raise NotImplementedError(type(net).__name__)


def _root(x: Fraction) -> Fraction:
    """The square root to 60 digits."""
    digits = 10**120
    return Fraction(math.isqrt(x.numerator * digits // x.denominator), 10**60)


def _windows(x: np.ndarray, kernel: tuple[int, int], stride: tuple[int, int]) -> np.ndarray:
    """[c, h, w] -> [c, h', w', kh, kw]."""
    picked = np.lib.stride_tricks.sliding_window_view(x, kernel, (1, 2))
    return picked[:, :: stride[0], :: stride[1]]


def _exact_conv(net: nn.Conv2d, x: np.ndarray) -> np.ndarray:
    assert net.groups == 1
    assert net.dilation == (1, 1)
    (ph, pw), (kh, kw) = net.padding, net.kernel_size
    padded = np.full((x.shape[0], x.shape[1] + 2 * ph, x.shape[2] + 2 * pw), Fraction(0), dtype=object)
    padded[:, ph : ph + x.shape[1], pw : pw + x.shape[2]] = x
    windows = _windows(padded, (kh, kw), net.stride)
    weight = fractions(net.weight)
    return np.array(
        [(windows * w[:, None, None]).sum((0, 3, 4)) + b for w, b in zip(weight, fractions(net.bias), strict=True)]
    )


def exact_activation(op: PiecewiseLinear, x: Fraction) -> Fraction:
    """A piecewise-linear function with its Python numbers taken as they are."""
    piece = sum(x >= Fraction(kink) for kink in op.kinks)
    return Fraction(op.slopes[piece]) * x + Fraction(op.intercepts[piece])
