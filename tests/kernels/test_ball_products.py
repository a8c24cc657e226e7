"""Intervals as compiled passes: balls through matrices, ReLUs and chains of both, against the rules."""

import pytest
import torch

import optrelax as ox
from optrelax.domains import interval_chains
from optrelax.enclosures import from_above, from_below
from optrelax.kernels import ball_products, native

pytestmark = pytest.mark.compiler


def matrix(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """Weight [outputs, inputs], not contiguous and with zeros, and its bias."""
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(inputs, outputs, generator=g, dtype=dtype).mT
    weight[0, ::2] = 0.0
    return [weight, torch.randn(outputs, generator=g, dtype=dtype)] if bias else [weight]


def through_relu(center, radius):
    """What the rules do: an end that overflowed bounds nothing, and has no gradient."""
    low, high = from_below(center - radius).relu(), from_above(center + radius)
    high = high.masked_fill(high == torch.inf, torch.inf).relu()
    return (low + high) / 2, (high - low) / 2


def balls(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ones, with l = u, |l| = |u|, l = 0, u = 0."""
    g = torch.Generator().manual_seed(0)
    center, radius = torch.randn(*shape, generator=g, dtype=dtype), torch.rand(*shape, generator=g, dtype=dtype)
    radius[0], center[1], radius[2] = 0.0, 0.0, center[2].abs()
    return center, radius


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("used", [(0, 1), (1,)])
def test_compiled_relu_of_a_ball_is_the_rule(dtype, used):
    assert interval_chains.kernels().library is not None, interval_chains.kernels().reason
    center, radius = balls(300, 4, 20, dtype=dtype)
    center[3, 3, 0] = torch.nan
    center[3, 3, 1:3] = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    radius[3, 3, 3] = torch.inf
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(center.shape, generator=g, dtype=dtype) for _ in used]
    found = []
    for function in (interval_chains.Rectify.apply, through_relu):
        leaves = [t.clone().requires_grad_() for t in (center, radius)]
        outputs = function(*leaves)
        chosen = [outputs[i] for i in used]
        found.append([*chosen, *torch.autograd.grad(chosen, leaves, grads)])
    for compiled, eager in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("n", "inputs", "outputs"),
    # Around a tile (6 or 3 rows, 8 to 32 columns), a vector, a panel's depth (512 or 128), and nothing at all.
    [
        (0, 5, 4),
        (1, 1, 1),
        (1, 40, 33),
        (5, 16, 17),
        (6, 32, 32),
        (7, 31, 65),
        (50, 30, 40),
        (129, 70, 9),
        (13, 1100, 530),
    ],
)
def test_compiled_linear_map_of_a_ball_is_the_rule(dtype, bias, n, inputs, outputs, threads):
    assert ball_products.kernels().library is not None, ball_products.kernels().reason
    (center, radius), (weight, *extra) = balls(n + 3, inputs, dtype=dtype), matrix(inputs, outputs, bias, dtype)
    center, radius = center[:n], radius[:n]
    grads = [g[:n, :outputs] for g in balls(n + 3, outputs + 20, dtype=dtype)]  # not contiguous

    def rule(c, r, w, b=None):
        return torch.nn.functional.linear(c, w, b), r @ w.abs().mT

    found, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for function in (lambda c, r, w, b=None: ball_products.LinearBall.apply(c, r, w, b), rule):
            leaves = [t.clone().requires_grad_() for t in (center, radius, weight, *extra)]
            outputs = function(*leaves)
            found.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        scale = other.abs().max().item() if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 1e-13))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [(), (0, 1), (2,), (4, 5, 6)])
def test_compiled_chain_of_linear_maps_is_the_rules(dtype, bias, frozen):
    center, radius = balls(50, 30, dtype=dtype)
    given = [matrix(a, b, bias, dtype) for a, b in ((30, 40), (40, 2000), (2000, 3))]
    weights, biases = [w for w, *_ in given], [b for _, *rest in given for b in rest]
    grads = [g[:, :3] for g in balls(50, 60, dtype=dtype)]
    found = []
    for function in (interval_chains.LinearChain.apply, interval_chains.eager_chain):
        leaves = [t.clone() for t in (center, radius, *weights, *biases)]
        wanted = [leaf.requires_grad_() for i, leaf in enumerate(leaves) if i not in frozen]
        outputs = function(3, *leaves, *([] if bias else [None] * 3))
        found.append([*outputs, *torch.autograd.grad(outputs, wanted, grads)])
    for one, other in zip(*found, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 1e-12))


@pytest.mark.parametrize(
    ("relaxation", "products"),
    # Intervals of the first layer; of the three before an activation, once; of all before the last, for its rows.
    [("crown", 1), ("crown-ibp", 3), ("box", 3)],
)
def test_no_interval_is_computed_that_nobody_reads(relaxation, products, monkeypatch):
    names, call = [], native.Build.call

    def counted(self, name, *given):
        names.append(name)
        call(self, name, *given)

    monkeypatch.setattr(native.Build, "call", counted)
    region = ox.LinfBall(torch.rand(2, 5), 0.1)
    ox.lower_bounds(ox.models.fc(5, 6, 7, 8, 3), region, torch.eye(3), relaxation)
    assert names.count("pair") == products
