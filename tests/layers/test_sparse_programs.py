"""Sparse matrices shared by a batch: the dense layer's numbers, without ever being written out."""

from __future__ import annotations

import pytest
import torch

from optrelax.layers import PDHG, Highs, LinearProgram, LPSolution, Status

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
Data = dict[str, torch.Tensor]


def transports(batch: int, places: int, several: int) -> Data:
    """Every source reaches `several` sinks; sides below what balances; half of the flows without an upper bound."""
    generator = torch.Generator().manual_seed(0)
    flows = places * several
    source = torch.arange(places).repeat_interleave(several)
    sink = torch.randint(places, (flows,), generator=generator)
    ones, column = torch.ones(flows, dtype=torch.float64), torch.arange(flows)
    E = torch.sparse_coo_tensor(torch.stack([source, column]), ones, (places, flows), check_invariants=True)
    A = torch.sparse_coo_tensor(torch.stack([sink, column]), ones + 0.5, (places, flows), check_invariants=True)
    flow = torch.rand(batch, flows, generator=generator, dtype=torch.float64)
    c = torch.rand(batch, flows, generator=generator, dtype=torch.float64)
    b = torch.zeros(batch, places, dtype=torch.float64).index_add_(1, sink, 1.5 * flow) + 0.1
    d = torch.zeros(batch, places, dtype=torch.float64).index_add_(1, source, flow)
    upper = torch.where(column % 2 == 0, torch.inf, 3.0).double()
    return {"c": c, "A": A, "b": b, "E": E, "d": d, "lower": torch.zeros(flows, dtype=torch.float64), "upper": upper}


def solved(solver: object, data: Data) -> tuple[LPSolution, tuple[torch.Tensor, ...]]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in data.items()}
    found = LinearProgram(solver)(**leaves)
    finite = found.lower.nan_to_num(neginf=0.0)
    return found, torch.autograd.grad(finite.sum(), list(leaves.values()))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("solver", [PDHG(tol=1e-7), Highs(workers=1), "auto"], ids=["pdhg", "highs", "auto"])
def test_values_and_gradients_are_the_dense_ones(solver: object, layout: torch.layout) -> None:
    data = transports(3, 4, 3)
    packed = data | {name: data[name].to_sparse(layout=layout) for name in ("A", "E")}
    dense = data | {name: data[name].to_dense() for name in ("A", "E")}
    found, grads = solved(solver, packed)
    wanted, truth = solved(Highs(workers=1), dense)
    assert found.status.tolist() == [Status.OPTIMAL] * 3
    torch.testing.assert_close(found.lower, wanted.lower, rtol=1e-6, atol=1e-6)
    for name, grad, exact in zip(data, grads, truth, strict=True):
        if name in ("A", "E"):
            assert grad.layout == layout
            held = dense[name] != 0
            assert bool((grad.to_dense()[~held] == 0).all())
            exact = exact * held
        torch.testing.assert_close(grad.to_dense(), exact, rtol=1e-4, atol=1e-4)


def test_a_gradient_reaches_the_values_that_a_matrix_is_made_of() -> None:
    """Where a place is named twice, both numbers get it; against central differences."""
    place = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    numbers = torch.tensor([1.0, 0.5, 2.0, 0.7], dtype=torch.float64, requires_grad=True)
    one = torch.ones(2, dtype=torch.float64)

    def value(entries: torch.Tensor) -> torch.Tensor:
        A = torch.sparse_coo_tensor(place, entries, (2, 2), check_invariants=True)
        c = torch.stack([-one, -2 * one])
        lower: torch.Tensor = LinearProgram(Highs(workers=1))(c, A, one, lower=0 * one, upper=5 * one).lower
        return lower.sum()

    value(numbers).backward()
    step = 1e-6 * torch.eye(4, dtype=torch.float64)
    slopes = [(value(numbers.detach() + e) - value(numbers.detach() - e)) / 2e-6 for e in step]
    torch.testing.assert_close(numbers.grad, torch.stack(slopes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [PDHG(tol=1e-2, max_iterations=20), Highs(time_limit=0.1)], ids=["pdhg", "highs"])
def test_nothing_is_written_out(solver: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either matrix would take 400 MB; what would write it out is an error."""
    data = transports(1, 5_000, 2)

    def refuse(self: torch.Tensor, *_: object) -> torch.Tensor:
        raise AssertionError(f"written out: {tuple(self.shape)}")

    monkeypatch.setattr(torch.Tensor, "to_dense", refuse)
    found, grads = solved(solver, data)
    assert bool(found.primal.isfinite().all())
    assert grads[1]._nnz() == data["A"].coalesce()._nnz()


def test_rows_of_zeros_and_values_that_are_no_numbers() -> None:
    one = torch.ones(2, dtype=torch.float64)
    A = torch.sparse_coo_tensor([[0], [1]], one[:1], (2, 2), check_invariants=True)
    for side, status in ((1.0, Status.OPTIMAL), (-1.0, Status.INFEASIBLE)):
        b = torch.tensor([1.0, side], dtype=torch.float64)
        assert LinearProgram(PDHG())(-one, A, b, lower=-one, upper=one).status.tolist() == status
    with pytest.raises(ValueError, match="A holds NaN"):
        LinearProgram(PDHG())(-one, A * torch.nan, one)
