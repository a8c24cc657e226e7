"""Layers from CVXPY's problems and mixed-integer programs: CVXPY, SciPy's milp and finite differences as oracles."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from lp_cases import boxed
from scipy.optimize import Bounds, LinearConstraint, milp

from optrelax.layers import LinearProgram, MixedIntegerProgram, QuadraticProgram, Regularised, Status

f64 = torch.float64


def problem(quadratic: bool) -> tuple[Any, list[Any], list[Any]]:
    x, y = cp.Variable(3), cp.Variable((2, 2), nonneg=True)
    c, A, b = cp.Parameter(3), cp.Parameter((2, 3)), cp.Parameter(2)
    objective = c @ x + cp.sum(y) + (cp.sum_squares(x) + cp.sum_squares(y) if quadratic else 0)
    rows = [A @ x <= b, cp.norm1(x) <= 3, cp.sum(x) == 1, y[0, 1] >= 2]
    return cp.Problem(cp.Minimize(objective), rows), [c, A, b], [x, y]


@pytest.mark.parametrize("quadratic", [False, True])
def test_a_modelled_layer_gives_what_cvxpy_gives(quadratic: bool) -> None:
    made, parameters, variables = problem(quadratic)
    kind = QuadraticProgram if quadratic else LinearProgram
    layer = kind.from_cvxpy(made, parameters, variables)
    values = torch.randn(3, 3, dtype=f64), torch.rand(2, 3, dtype=f64), torch.ones(2, dtype=f64)
    with torch.no_grad():
        x, y = layer(*values)
    found = layer.solve(*values)
    assert x.shape == (3, 3)
    assert y.shape == (3, 2, 2)
    assert found.status.tolist() == [Status.OPTIMAL] * 3
    for i in range(3):
        for parameter, value in zip(parameters, (values[0][i], *values[1:]), strict=True):
            parameter.value = value.numpy()
        made.solve(solver="CLARABEL")
        assert found.lower[i].item() == pytest.approx(made.value, abs=1e-6)
        # A random LP has one solution.
        np.testing.assert_allclose(x[i].numpy(), variables[0].value, atol=1e-5)
        np.testing.assert_allclose(y[i].numpy(), variables[1].value, atol=1e-5)


def test_a_modelled_layers_gradients_are_those_of_finite_differences() -> None:
    made, parameters, variables = problem(True)
    layer = QuadraticProgram.from_cvxpy(made, parameters, variables)
    values = [torch.randn(1, 3, dtype=f64), torch.rand(2, 3, dtype=f64), torch.ones(2, dtype=f64)]
    leaves = [value.requires_grad_() for value in values]
    assert torch.autograd.gradcheck(lambda *p: layer(*p)[0], leaves, eps=1e-4, rtol=1e-3, atol=1e-4)
    assert torch.autograd.gradcheck(lambda *p: layer.solve(*p).lower, leaves, eps=1e-4, rtol=1e-3, atol=1e-4)


def test_what_is_no_such_program_says_what_to_use() -> None:
    x, c = cp.Variable(2), cp.Parameter(2)
    cone = cp.Problem(cp.Minimize(c @ x), [cp.norm(x) <= 1])
    with pytest.raises(ValueError, match=r"LinearProgram\.from_cvxpy: problem has cones .* use cvxpylayers"):
        LinearProgram.from_cvxpy(cone, [c], [x])
    made, parameters, variables = problem(True)
    with pytest.raises(ValueError, match=r"parameters must list every parameter of the problem, missing"):
        QuadraticProgram.from_cvxpy(made, parameters[:2], variables)
    whole = cp.Variable(2, boolean=True)
    with pytest.raises(ValueError, match=r"problem is mixed-integer; use MixedIntegerProgram\.from_cvxpy"):
        LinearProgram.from_cvxpy(cp.Problem(cp.Minimize(c @ whole)), [c], [whole])
    with pytest.raises(ValueError, match="problem must satisfy DPP"):
        LinearProgram.from_cvxpy(cp.Problem(cp.Minimize(c @ c * x[0]), [x >= 0]), [c], [x])
    with pytest.raises(ValueError, match=r"quadratic objective; use QuadraticProgram\.from_cvxpy"):
        LinearProgram.from_cvxpy(made, parameters, variables)
    with pytest.raises(ValueError, match=r"integers beside cones or a quadratic objective; use problem\.solve\(\)"):
        MixedIntegerProgram.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(whole - c))), [c], [whole])
    with pytest.raises(ValueError, match="parameters is empty"):
        LinearProgram.from_cvxpy(cp.Problem(cp.Minimize(x[0]), [x >= 0]), [], [x])


def test_what_is_no_such_call_says_what_is() -> None:
    made, parameters, variables = problem(True)
    layer = QuadraticProgram.from_cvxpy(made, parameters, variables)
    given = torch.ones(3), torch.ones(2, 3), torch.ones(2)
    with pytest.raises(
        TypeError, match=r"solver_args are another library's, got \['eps'\]; give from_cvxpy\(\.\.\., solver="
    ):
        layer(*given, solver_args={"eps": 1e-8})
    with pytest.raises(ValueError, match=r"parameter 2 is torch\.float64 on cpu, parameter 0 torch\.float32 on cpu"):
        layer(*given[:2], given[2].double())
    with pytest.raises(ValueError, match=r"leading shapes of the parameters do not broadcast: \(2,\), \(3,\), \(\)"):
        layer(given[0].expand(2, 3), given[1].expand(3, 2, 3), given[2])
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(2,\), wanted \[\*batch, 3\]"):
        layer(torch.ones(2), torch.ones(2, 3), torch.ones(2))


def test_scalars_and_empty_batches_of_a_modelled_layer() -> None:
    x, a = cp.Variable(), cp.Parameter()
    layer = QuadraticProgram.from_cvxpy(cp.Problem(cp.Minimize((x - a) ** 2), [x <= 1]), [a], [x])
    for value in (torch.tensor(0.5, dtype=f64), torch.tensor([0.5, 3.0], dtype=f64), torch.zeros(0, 2, dtype=f64)):
        (found,) = layer(value, solver_args={})
        torch.testing.assert_close(found, value.clamp(max=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("of", ["parameter", "variable"])
@pytest.mark.parametrize("attribute", ["symmetric", "PSD", "diag"])
def test_matrices_with_attributes(of: str, attribute: str) -> None:
    """The nearest matrix of trace 1; gradients of a symmetric parameter go to its upper triangle, as in cvxpylayers."""
    if (of, attribute) == ("variable", "PSD"):
        with pytest.raises(ValueError, match="problem has cones"):
            _nearest(of, attribute)
        return
    layer = _nearest(of, attribute)
    value = torch.tensor([[[2.0, 1.0], [1.0, 3.0]], [[1.0, -0.5], [-0.5, 1.0]]], dtype=f64)
    value = torch.diag_embed(value.diagonal(dim1=-2, dim2=-1)) if attribute == "diag" else value
    leaf = value.clone().requires_grad_()
    (found,) = layer(leaf)
    middle = (1 - value.diagonal(dim1=-2, dim2=-1).sum(-1)) / 2
    torch.testing.assert_close(found, value + middle[:, None, None] * torch.eye(2, dtype=f64), rtol=0, atol=1e-6)
    weight = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=f64)
    (grad,) = torch.autograd.grad((found * weight).sum(), leaf)
    off = 0.0 if attribute == "diag" else 1.5
    apart = [[-1.5, off], [off, 1.5]] if of == "variable" else [[-1.5, 2 * off], [0.0, 1.5]]
    torch.testing.assert_close(grad, torch.tensor([apart, apart], dtype=f64), rtol=0, atol=1e-5)


def _nearest(of: str, attribute: str) -> Any:
    kinds = {of: {attribute: True}}
    y, w = cp.Variable((2, 2), **kinds.get("variable", {})), cp.Parameter((2, 2), **kinds.get("parameter", {}))
    made = cp.Problem(cp.Minimize(cp.sum_squares(y - w)), [cp.trace(y) == 1])
    return QuadraticProgram.from_cvxpy(made, [w], [y])


def test_integer_programs_equal_scipys() -> None:
    data = boxed(4, 5, 6, 0, seed=3)
    assert data.A is not None
    assert data.b is not None
    mask = torch.tensor([True, True, True, True, False, False])
    upper = torch.full((6,), 3.0, dtype=f64)
    leaf = data.c.clone().requires_grad_()
    found = MixedIntegerProgram(mask)(leaf, data.A, data.b, lower=data.lower, upper=upper)
    values = []
    for i in range(4):
        rows = LinearConstraint(data.A[i].numpy(), -np.inf, data.b[i].numpy())
        best = milp(data.c[i].numpy(), integrality=mask.numpy(), bounds=Bounds(0, 3), constraints=rows)
        values.append(best.fun if best.status == 0 else np.inf)
    wanted = torch.tensor(values, dtype=f64)
    assert bool(wanted.isfinite().all())
    assert found.status.tolist() == [Status.OPTIMAL] * 4
    assert found.value is not None
    torch.testing.assert_close(found.value.detach(), wanted, rtol=1e-6, atol=1e-6)
    assert bool((found.lower <= wanted + 1e-9).all())
    held = found.primal[:, mask]
    assert torch.equal(held, held.round())
    # The value's gradient in c is the point itself.
    found.value.sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, found.primal.detach(), rtol=1e-5, atol=1e-5)


def test_integer_programs_without_a_point() -> None:
    one = torch.ones(1, 1, dtype=f64)
    # 0.25 <= x <= 0.75 holds no integer; its relaxation has points.
    layer = MixedIntegerProgram([True])
    found = layer(one[0], lower=0.25 * one[0], upper=0.75 * one[0])
    assert found.status == Status.INFEASIBLE
    assert found.value == torch.inf
    assert found.lower.item() <= 0.25
    assert layer(one[0], one, -one[0], lower=0 * one[0]).status == Status.INFEASIBLE
    assert layer(torch.zeros(0, 1, dtype=f64)).lower.shape == (0,)
    with pytest.raises(ValueError, match=r"integer has 1 entries, c has 2 variable\(s\)"):
        layer(torch.ones(2, dtype=f64))
    with pytest.raises(TypeError, match="integer must be a mask"):
        MixedIntegerProgram([1.0])


INF = float("inf")
# c, A, b, ends, optimal value by hand; x_0 is the integer.
FRACTIONAL = {
    "claimed infeasible": ([2, 1], [[1, -2], [1, -1]], [-0.5, 1], [-0.75, -INF], [0.25, 0.25], 0.25),
    "infeasible by a tie": ([0, 2], [[2, -1], [-2, 1]], [-0.5, 1], [-0.25, -1], [0.75, 1], 1.0),
    "no integer": ([-1, 0], [[0, 2], [-2, 0]], [1, 0.5], [-1.25, 0], [1.5, 0.75], -1.0),
}


@pytest.mark.parametrize(("c", "A", "b", "lower", "upper", "value"), FRACTIONAL.values(), ids=FRACTIONAL)
def test_integers_between_fractional_ends(c: Any, A: Any, b: Any, lower: Any, upper: Any, value: float) -> None:
    """HiGHS given the fractional ends calls the first two infeasible, and x_0 = 1.5 an integer in the third."""
    given = (torch.tensor(part, dtype=f64) for part in (c, A, b))
    ends = {"lower": torch.tensor(lower, dtype=f64), "upper": torch.tensor(upper, dtype=f64)}
    found = MixedIntegerProgram([True] + [False] * (len(c) - 1), workers=1)(*given, **ends)
    assert Status(int(found.status)) == Status.OPTIMAL
    assert found.value.item() == pytest.approx(value, abs=1e-8)


def test_an_integer_layers_argmin_has_the_relaxations_gradient() -> None:
    z, v = cp.Variable(4, boolean=True), cp.Parameter(4)
    made = cp.Problem(cp.Maximize(v @ z), [cp.sum(z) <= 2])
    layer = MixedIntegerProgram.from_cvxpy(made, [v], [z], primal_gradient=Regularised(1.0))
    worth = torch.tensor([[0.9, 0.1, 0.8, 0.3]], dtype=f64, requires_grad=True)
    (chosen,) = layer(worth)
    torch.testing.assert_close(chosen.detach().round(), torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=f64))
    chosen[0, 0].backward()
    assert worth.grad is not None
    assert worth.grad[0, 0] > 0
