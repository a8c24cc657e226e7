"""Compiled kernels: the results of PyTorch's operations, and a fallback that is told where there is no compiler."""

import contextlib
import ctypes
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from lp_networks import QUESTIONS, question

import optrelax as ox
from optrelax.domains.lines import Lines as AllLines
from optrelax.domains.lines import band_lines, crown_lines
from optrelax.kernels import band_step, native, relax_step, relu_lines
from optrelax.layers import DualAscent, Status, Triangle
from optrelax.layers.ascent import composed_ascent, example_matrices, layer_ascent, vector_passes
from optrelax.layers.ascent.schedule import FIRST, SECOND, Rates
from optrelax.layers.ascent.vector_passes import EagerPasses, Layer, LayerLines, NativePasses, kernels
from optrelax.layers.programs import interior
from optrelax.networks import activations

pytestmark = pytest.mark.compiler

COMPILER = shutil.which("cc")
SOURCE = Path(vector_passes.__file__).with_name("ascent.c")


def arguments(dtype: torch.dtype, count: int, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random vectors of one layer; zeros and ties among the coefficients."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    A = draw(count, width)
    A[:, ::3] = 0.0
    shares = torch.rand(3, count, width, generator=g, dtype=dtype)
    return {
        "example": torch.randint(4, (count,), generator=g),
        "lines": torch.stack([draw(4, width) for _ in range(4)]),
        "center": draw(4, width),
        "radius": draw(4, width).abs(),
        "A": A,
        "w": shares[0],
        "m": draw(width),
        "p": draw(count, width),
        "on_lower": shares[1],
        "moment": draw(count, width),
        "square": shares[2],
        "value": draw(count),
    }


def both(given: dict[str, torch.Tensor]) -> list[EagerPasses | NativePasses]:
    lines = [LayerLines(*given["lines"])]
    rest = (given["example"], lines, given["center"], given["radius"])
    return [EagerPasses(*rest), NativePasses(kernels(), *rest)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("count", "width"), [(1, 1), (5, 17), (300, 130)])
def test_compiled_passes_are_the_eager_ones(dtype, count, width):
    assert COMPILER is not None, "the development set needs a C compiler"
    assert kernels().library is not None, kernels().reason
    given = arguments(dtype, count, width)
    found = []
    for passes in both(given):
        nu, v, y, tight = (torch.full((count, width), torch.nan, dtype=dtype) for _ in range(4))
        value = torch.full((count,), torch.nan, dtype=dtype)
        passes.backward(0, given["A"], given["w"], given["m"], nu, given["value"], value)
        constant = value.clone()
        mean, best = given["p"].clone(), constant + 1e4 * (-1) ** torch.arange(count)
        better = passes.corner(nu, 0.25, v, mean, value, best)
        names = ("w", "w", "on_lower", "on_lower", "moment", "square")
        layer = Layer(*(given[name].clone() for name in names))
        layer.best.fill_(-1.0)
        average = given["p"].clone()
        rates = Rates(0.125, 1 / (1 - SECOND**2), 0.3 / (1 - FIRST**2))
        passes.forward(0, given["p"] + 1, given["m"], given["A"], layer, y, average, better, rates)
        passes.forward(0, given["p"], given["m"], given["A"], layer, y, None, ~better, rates)
        passes.primal(0, given["p"], given["m"], layer.on_lower, tight)
        state = [getattr(layer, name) for name in Layer.__slots__]
        found.append([nu, constant, v, mean, value, best, better, average, y, tight, *state])
        assert better.tolist() == [i % 2 == 1 for i in range(count)]
    for eager, compiled in zip(*found, strict=True):
        assert eager.isfinite().all()
        torch.testing.assert_close(compiled, eager, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-5)
        if dtype == torch.float64:
            torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-10)


def test_what_a_kernel_would_misread_is_refused_and_leaves_it_as_it_was():
    given = arguments(torch.float64, 5, 17)
    example, lines, on_lower = given["example"], given["lines"], given["on_lower"]
    y = torch.empty_like(given["p"])
    fitting = [5, 17, len(lines[0]), example, given["p"], given["m"], *lines, on_lower, y]
    found = native.Build(kernels().library, "with nothing remembered", kernels().signatures)
    for place, wrong, said in (
        (0, 6, "example wants 6 entries"),
        (1, 17.0, "argument 2: TypeError"),
        (2, 99, "flat wants 1683 entries"),
        (3, example.int(), "example wants torch.int64"),
        (4, given["p"].mT, "wants contiguous"),
        (4, given["p"].float(), "wants contiguous torch.float64"),
        (5, given["m"][1:].contiguous(), "m wants 17 entries"),
        (10, None, "on_lower must be given"),
    ):
        with pytest.raises((RuntimeError, ctypes.ArgumentError), match=said):
            found.call("primal", torch.float64, *fitting[:place], wrong, *fitting[place + 1 :])
    with pytest.raises(RuntimeError, match=r"primal: takes R, n, E, example, .*; got 11 arguments"):
        found.call("primal", torch.float64, *fitting[:-1])
    found.call("primal", torch.float64, *fitting)
    wanted = torch.empty_like(y)
    both(given)[0].primal(0, given["p"], given["m"], on_lower, wanted)
    torch.testing.assert_close(y, wanted)


def test_a_struct_goes_by_names():
    with pytest.raises(RuntimeError, match=r"ascend: .*'R'.* missing or not asked for"):
        example_matrices.kernels().call("ascend", torch.float64, E=1)


@pytest.mark.parametrize("status", [s for s in Status if s != Status.TIME_LIMIT], ids=str)
def test_codes_of_the_interior_point_kernel_are_those_of_statuses(status):
    assert interior.kernels().constant(status.name) == status


def test_threads_do_not_change_a_pass():
    given = arguments(torch.float64, 400, 100)
    passes = both(given)[1]
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            nu, value = torch.empty(400, 100, dtype=torch.float64), torch.empty(400, dtype=torch.float64)
            passes.backward(0, given["A"], given["w"], given["m"], nu, given["value"], value)
            found.append((nu, value))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", [name for name in QUESTIONS if not any(odd in name for odd in ("bent", "relu6"))])
def test_solves_agree_layer_by_layer_with_and_without_kernels_and_by_sweeps(name, monkeypatch):
    q, ran = question(name), []
    layer = Triangle(solver=DualAscent(max_iterations=40, tol=1e-7))
    monkeypatch.setattr(composed_ascent, "plan", lambda *given: None)
    run = layer_ascent.LayerAscent.run
    monkeypatch.setattr(layer_ascent.LayerAscent, "run", lambda self: ran.append(type(self.given.maps)) or run(self))
    compiled = layer.solve(q.network, q.region, q.rows)
    by_ops = any(kind in name for kind in ("conv", "residual"))
    assert [kind.__name__ for kind in ran] == ["NetworkMaps" if by_ops else "MatrixMaps"]
    monkeypatch.setattr(vector_passes, "kernels", lambda: native.Build(None, "tested without"))
    eager = layer.solve(q.network, q.region, q.rows)
    torch.testing.assert_close(compiled.lower, eager.lower, rtol=0, atol=1e-5)
    monkeypatch.setattr("optrelax.layers.ascent.dual_ascent.layers_of", lambda problems: None)
    by_sweeps = layer.solve(q.network, q.region, q.rows)
    torch.testing.assert_close(compiled.lower, by_sweeps.lower, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("batch", "k", "shape", "shared"),
    [(1, 1, (1,), False), (3, 5, (2, 4), True), (40, 30, (50,), False), (40, 30, (50,), True)],
)
@pytest.mark.parametrize("parallel", [False, True], ids=["two slopes", "parallel"])
def test_compiled_relaxation_step_is_the_eager_one(dtype, batch, k, shape, shared, parallel, monkeypatch):
    assert relax_step.kernels().library is not None, relax_step.kernels().reason
    g = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=g, dtype=dtype)

    a, parts = draw(1 if shared else batch, k, *shape), [draw(batch, *shape) for _ in range(4)]
    a[:, ::2].flatten()[::3] = 0.0
    if parallel:
        parts[2] = parts[0]
    grads = draw(batch, k, *shape), draw(batch, k)
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(relax_step, "kernels", lambda: native.Build(None, "tested without"))
        leaves = [t.clone().requires_grad_() for t in (a, *parts)]
        given = [*leaves[1:]]
        if parallel:
            given[2] = given[0]
        outputs = relax_step.relax_step(leaves[0], AllLines(*given))
        wanted = [leaf for leaf in leaves if not (parallel and leaf is leaves[3])]
        found.append([*outputs, *torch.autograd.grad(outputs, wanted, grads)])
    for compiled, eager in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-4)
        if dtype == torch.float64:
            torch.testing.assert_close(compiled, eager, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_compiled_least_value_over_a_box_is_the_eager_one(dtype, shared, monkeypatch):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(1 if shared else 40, 30, 5, 10, generator=g, dtype=dtype)
    a[:, :, 0, ::2] = 0.0
    lower = torch.randn(40, 5, 10, generator=g, dtype=dtype)
    upper = lower + torch.rand(40, 5, 10, generator=g, dtype=dtype)
    grad = torch.randn(40, 30, generator=g, dtype=dtype)
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(relax_step, "kernels", lambda: native.Build(None, "tested without"))
        leaves = [t.clone().requires_grad_() for t in (a, lower, upper)]
        value = relax_step.least_over_box(*leaves)
        found.append([value, *torch.autograd.grad(value, leaves, grad)])
    for compiled, eager in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=1e-4)
        if dtype == torch.float64:
            torch.testing.assert_close(compiled, eager, rtol=1e-11, atol=1e-11)
    corners = torch.where(a > 0, lower[:, None], upper[:, None])
    torch.testing.assert_close(found[0][0], (a * corners).flatten(2).sum(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("batch", "k", "shared"), [(1, 1, False), (3, 5, True), (40, 30, False), (40, 30, True)])
@pytest.mark.parametrize("step", ["band_step", "range_over_box"])
def test_compiled_step_between_parallel_lines_is_the_eager_one(dtype, batch, k, shared, step, monkeypatch):
    assert band_step.kernels().library is not None, band_step.kernels().reason
    g = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=g, dtype=dtype)

    a, slope, lower = draw(1 if shared else batch, k, 5, 10), draw(batch, 5, 10), draw(batch, 5, 10)
    upper = lower + torch.rand(batch, 5, 10, generator=g, dtype=dtype)
    a[:, ::2].flatten()[::3] = 0.0
    ends, coefficients = [draw(batch, k), draw(batch, k)], draw(batch, k, 5, 10)
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(band_step, "kernels", lambda: native.Build(None, "tested without"))
        leaves = [
            t.clone().requires_grad_()
            for t in ((a, lower, upper) if step == "range_over_box" else (a, slope, lower, upper))
        ]
        if step == "range_over_box":
            outputs, grads = band_step.range_over_box(*leaves), ends
        else:
            rows, s, l, u = leaves
            outputs, grads = band_step.band_step(rows, AllLines(s, l, s, u)), [coefficients, *ends]
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for compiled, eager in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=1e-4)
        if dtype == torch.float64:
            torch.testing.assert_close(compiled, eager, rtol=1e-11, atol=1e-11)
    low, high = found[0][-2 - len(leaves) : -len(leaves)]
    least = (a * torch.where(a > 0, lower[:, None], upper[:, None])).flatten(2).sum(2)
    greatest = (a * torch.where(a > 0, upper[:, None], lower[:, None])).flatten(2).sum(2)
    torch.testing.assert_close(low, least, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(high, greatest, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("step", ["band_step", "range_over_box"])
def test_second_derivatives_between_parallel_lines(shared, step):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(1 if shared else 3, 4, 5, generator=g, dtype=torch.float64)
    slope, lower = (torch.randn(3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    leaves = [t.requires_grad_() for t in (a, slope, lower, lower.detach() + 1)]
    if step == "band_step":
        assert torch.autograd.gradgradcheck(
            lambda a, s, l, u: band_step.band_step(a, AllLines(s, l, s, u)), leaves, atol=1e-6
        )
    else:
        assert torch.autograd.gradgradcheck(band_step.range_over_box, [leaves[0], *leaves[2:]], atol=1e-6)


def test_kept_buffers_outlive_inference_mode():
    """In a thread of its own, whose first buffer is made there."""

    def steps() -> float:
        net, x = ox.models.fc(7, 5, 3), torch.full((2, 7), 0.5)
        with torch.inference_mode():
            before = ox.lower_bounds(net, ox.LinfBall(x, 0.1), torch.eye(3), "box").sum().item()
        ox.lower_bounds(net, ox.LinfBall(x, 0.1), torch.eye(3), "box").sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        return before

    with ThreadPoolExecutor(1) as pool:
        assert math.isfinite(pool.submit(steps).result())


class Tied(torch.nn.Module):
    """One matrix twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = torch.nn.Linear(5, 5), torch.nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.inner(torch.relu(self.inner(x)))))


def test_a_gradient_to_be_differentiated_again_is_the_same_gradient():
    torch.manual_seed(0)
    net, x = Tied().double(), torch.rand(4, 5, dtype=torch.float64)
    low = ox.lower_bounds(net, ox.LinfBall(x, 0.1), ox.margins(torch.tensor([0, 1, 2, 0]), 3), "box").sum()
    once = torch.autograd.grad(low, list(net.parameters()), retain_graph=True)
    again = torch.autograd.grad(low, list(net.parameters()), create_graph=True)
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["box", "crown"])
def test_a_backward_pass_under_autocast_is_refused_or_the_same(name):
    """Half precision in buffers that a kernel takes for float32 would be read and written past their end."""
    net = ox.models.fc(40, 70, 70, 5)
    low = ox.lower_bounds(net, ox.LinfBall(torch.rand(6, 40), 0.1), torch.eye(5), name).sum()
    low.backward(retain_graph=True)
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    context = pytest.raises(RuntimeError, match="outside of") if name == "crown" else contextlib.nullcontext()
    with torch.autocast("cpu", dtype=torch.bfloat16), context:
        low.backward()
    if name == "box":  # whose rows alone go through products of PyTorch, behind the last ReLU
        for p, grad in zip(list(net.parameters())[:-2], grads, strict=False):
            torch.testing.assert_close(p.grad, grad, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("name", ["box", "crown"])
def test_another_default_device_changes_nothing(name):
    net = ox.models.build("conv", seed=0)
    chain, spec = ox.models.fc(5, 6, 7, 3), torch.eye(3)
    images, vectors = ox.LinfBall(torch.full((2, 1, 28, 28), 0.5), 0.1), ox.LinfBall(torch.full((2, 5), 0.5), 0.1)

    def found() -> list[torch.Tensor]:
        return [
            ox.lower_bounds(net, images, torch.eye(10, device="cpu"), name),
            ox.lower_bounds(chain, vectors, spec, name),
        ]

    expected = found()
    torch.set_default_device("meta")
    try:
        with ThreadPoolExecutor(1) as pool:  # whose buffers are made now
            other = pool.submit(found).result()
        here = found()
    finally:
        torch.set_default_device(None)
    for one, two, three in zip(expected, other, here, strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, three)


@pytest.mark.parametrize("name", ["fast-lin", "deepz", "crown", "crown-0", "crown-soft"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_width_that_overflows_gives_no_bound_beyond_what_is_reached(name, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(relu_lines, "kernels", lambda: native.Build(None, "tested without"))
    net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 1))
    with torch.no_grad():
        for p, value in zip(net.parameters(), (2e38, 0.0, -1.0, 0.0), strict=True):
            p.fill_(value)
    low = ox.lower_bounds(net, ox.InputBox(-torch.ones(1, 1), torch.ones(1, 1)), torch.ones(1, 1), name)
    assert not low.item() > -1.9999e38


def test_second_derivatives_of_lines_of_narrow_neurons_are_finite():
    for width in (1e-29, 1e-40, 1e-45):
        l, u = torch.tensor([-width], requires_grad=True), torch.tensor([width], requires_grad=True)
        lines = crown_lines(activations.relu(), l, u)
        first = torch.autograd.grad((lines.upper_slope + 2 * lines.upper_intercept).sum(), (l, u), create_graph=True)
        for second in torch.autograd.grad(sum(first), (l, u), allow_unused=True):
            assert second is None or second.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("below", [0, 1, "adaptive", "chord"])
def test_compiled_lines_of_a_relu_are_those_of_its_hull(dtype, below, monkeypatch):
    assert relu_lines.kernels().library is not None, relu_lines.kernels().reason
    g = torch.Generator().manual_seed(0)
    center, radius = torch.randn(300, 70, generator=g, dtype=dtype), torch.rand(300, 70, generator=g, dtype=dtype)
    radius[0], center[1], radius[2] = 0.0, 0.0, center[2].abs()
    l, u = center - radius, center + radius
    l[3], u[4] = 0.0, 0.0
    u[4], l[3] = u[4].clamp_min(l[4]), l[3].clamp_max(u[3])
    if below != "chord":  # whose band has two greatest values there
        l[5], u[5] = -1e-30, 1e-30  # too narrow for a slope's gradient in float32
    l[6, 0] = torch.nan
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(l.shape, generator=g, dtype=dtype) for _ in range(2)]
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(relu_lines, "kernels", lambda: native.Build(None, "tested without"))
        leaves = [t.clone().requires_grad_() for t in (l, u)]
        lines = named(activations.relu(), *leaves, below)
        assert lines.parallel == (below == "chord")
        outputs = (lines.upper_slope, lines.upper_intercept)
        gradient = torch.autograd.grad(outputs, leaves, grads)
        found.append([lines.lower_slope, lines.lower_intercept, *outputs, *gradient])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(
            one,
            other,
            equal_nan=True,
            rtol=2e-5 if dtype == torch.float32 else 1e-11,
            atol=1e-6 if dtype == torch.float32 else 1e-14,
        )


def named(activation, l, u, below) -> AllLines:
    if below == "chord":
        return band_lines(activation, l, u)
    return crown_lines(activation, l, u, lower=below)


def build_elsewhere(**environment: str) -> dict[str, object]:
    """What a process of its own says of the kernels."""
    code = (
        "import json, time; from pathlib import Path; from optrelax.kernels import native; "
        f"b = native.build(Path({str(SOURCE)!r})); "
        "print(json.dumps({'built': b.library is not None, 'reason': b.reason}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def built_anew() -> native.Build:
    """What a process says of a kernel that it has not asked for yet."""
    return native.build.__wrapped__(SOURCE)


def test_compiled_once_a_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTRELAX_CACHE", str(tmp_path))
    assert built_anew().library is not None
    files = list(tmp_path.iterdir())
    assert [path.suffix for path in files] == [".so"]
    before = files[0].stat().st_mtime_ns
    assert build_elsewhere()["built"]
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [before]


def test_without_a_compiler_the_reason_is_told(tmp_path, monkeypatch):
    cache = {"OPTRELAX_CACHE": str(tmp_path)}
    monkeypatch.setenv("OPTRELAX_CACHE", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setenv("OPTRELAX_NATIVE", "0")
        assert built_anew() == native.Build(None, "turned off by OPTRELAX_NATIVE=0")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert built_anew().reason == "no C compiler found (set CC)"
    code = (
        "import torch, optrelax as ox; from optrelax.layers import Triangle; net = ox.models.fc(4, 5, 3); "
        "r = ox.LinfBall(torch.rand(2, 4), 0.1); "
        "[ox.lower_bounds(net, r, torch.eye(3), n) for n in ('box', 'crown', 'triangle')]"
    )
    environment = os.environ | cache | {"CC": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("no C compiler found (set CC); PyTorch's operations do the same") == 1  # of all kernels
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'cannot do that' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert built_anew() == native.Build(None, "ascent.c could not be compiled: cannot do that")
    assert not list(tmp_path.glob("*.so"))


def test_a_kernel_is_made_anew_where_a_file_that_it_includes_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTRELAX_CACHE", str(tmp_path))
    source, part = tmp_path / "whole.c", tmp_path / "part.c"
    source.write_text('#include <stdint.h>\n#include "part.c"\nconst int64_t constant_HELD = PART;\n')
    for value in (3, 4):
        part.write_text(f"#define PART {value}\n")
        native.build.cache_clear()
        assert native.build(source).constant("HELD") == value
