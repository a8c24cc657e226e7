"""Root cuts of mixed-integer programs: enumeration and differences of a strengthened relaxation as oracles."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from optrelax.layers import LinearProgram, MixedIntegerProgram, Regularised
from optrelax.layers.programs.arguments import batch_shape, flatten, gather
from optrelax.layers.programs.gomory import root_cuts
from optrelax.layers.programs.lp_data import LPData

f64 = torch.float64
UPPER = 2


def knapsacks(batch: int, n: int, equalities: int = 0) -> dict[str, Tensor]:
    """Two knapsack rows over 0 <= x <= 2; with an equality, sum x = 4."""
    generator = torch.Generator().manual_seed(n + equalities)
    data = {
        "c": -torch.rand(batch, n, generator=generator, dtype=f64) - 0.3,
        "A": 4 * torch.rand(batch, 2, n, generator=generator, dtype=f64) + 0.5,
        "b": torch.full((batch, 2), 6.3 + 4 * equalities, dtype=f64),
        "lower": torch.zeros(n, dtype=f64),
        "upper": torch.full((n,), float(UPPER), dtype=f64),
    }
    return data | ({"E": torch.ones(1, n, dtype=f64), "d": torch.full((1,), 4.0, dtype=f64)} if equalities else {})


def flat(data: dict[str, Tensor]) -> LPData:
    gathered = gather(**({"E": None, "d": None} | data))
    return flatten(gathered, batch_shape(gathered))


@pytest.mark.parametrize("equalities", [0, 1])
def test_every_integer_point_satisfies_the_cuts_and_the_vertex_does_not(equalities: int) -> None:
    data = knapsacks(10, 5, equalities)
    G, h = root_cuts(flat(data), torch.ones(5, dtype=torch.bool).numpy(), 3)
    vertex = LinearProgram("auto")(**data).primal
    fractional = (vertex - vertex.round()).abs().amax(-1) > 0.02
    assert int(fractional.sum()) >= 4
    assert torch.equal(h.isfinite().any(-1), fractional)
    points = torch.tensor(list(product(range(UPPER + 1), repeat=5)), dtype=f64)
    count = 0
    for i in range(10):
        inside = (points @ data["A"][i].mT <= data["b"][i]).all(-1)
        inside &= (points.sum(-1) == 4) if equalities else inside
        count += int(inside.sum())
        assert bool((points[inside] @ G[i].mT <= h[i] + 1e-9).all())
    assert count > 50
    first = (G[:, 0] * vertex).sum(-1) - h[:, 0]
    assert bool((first > 1e-6)[fractional].all())


def test_cuts_with_continuous_variables_keep_the_optimum_and_close_the_gap() -> None:
    data, mask = knapsacks(12, 6), torch.tensor([True] * 5 + [False])
    G, h = root_cuts(flat(data), mask.numpy(), 6)
    stronger = data | {"A": torch.cat([data["A"], G], 1), "b": torch.cat([data["b"], h], 1)}
    best = MixedIntegerProgram(mask)(**data).value
    torch.testing.assert_close(MixedIntegerProgram(mask)(**stronger).value, best, rtol=1e-7, atol=1e-7)
    plain, cut = (best - LinearProgram()(**part).lower for part in (data, stronger))
    assert bool((cut <= plain + 1e-7).all())
    assert float(cut.mean()) < 0.3 * float(plain.mean())


def test_the_argmins_gradient_is_that_of_the_strengthened_and_regularised_relaxation() -> None:
    data, mask = knapsacks(3, 5), torch.ones(5, dtype=torch.bool)
    rule = Regularised(0.8)
    c = data["c"].clone().requires_grad_()
    weights = torch.randn(3, 5, dtype=f64, generator=torch.Generator().manual_seed(0))
    found = MixedIntegerProgram(mask, primal_gradient=rule)(**(data | {"c": c}))
    assert torch.equal(found.primal, found.primal.round())
    (found.primal * weights).sum().backward()
    G, h = root_cuts(flat(data), mask.numpy(), 4)
    stronger = data | {"A": torch.cat([data["A"], G], 1), "b": torch.cat([data["b"], h], 1)}
    layer = LinearProgram(primal_gradient=rule)
    wanted = torch.zeros_like(data["c"])
    for i in range(5):
        step = torch.zeros(5, dtype=f64)
        step[i] = 1e-5
        ends = [layer(**(stronger | {"c": data["c"] + sign * step})).primal for sign in (1, -1)]
        wanted[:, i] = ((ends[0] - ends[1]) * weights).sum(-1) / 2e-5
    assert float(wanted.abs().max()) > 0.1
    torch.testing.assert_close(c.grad, wanted, rtol=1e-4, atol=1e-5)
    plain = data["c"].clone().requires_grad_()
    (MixedIntegerProgram(mask, primal_gradient=rule, cuts=0)(**(data | {"c": plain})).primal * weights).sum().backward()
    assert not torch.allclose(plain.grad, c.grad, atol=1e-3)
