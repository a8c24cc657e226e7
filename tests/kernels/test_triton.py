"""Triton's kernels: what PyTorch's operations give, by its interpreter; machine code for a device that is not here."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_cases import CASES, STEPS, Case, by, compare, shows_nan

import optrelax as ox
from optrelax.domains.lines import Lines
from optrelax.kernels import band_step, native, relax_step, triton_steps

# Not "where Triton can be imported": on these machines the development set holds it, and its absence is a failure.
# For others there is no such package: nothing could install it.
published = pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64"), reason="Triton is published for Linux on x86-64"
)


def elsewhere(folder: Path, mode: str, **environment: str) -> dict:
    """What triton_cases.py prints in a process of its own."""
    program = str(Path(__file__).parents[1] / "triton_cases.py")
    environment |= {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", program, mode], env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return elsewhere(tmp_path_factory.mktemp("triton"), "interpreted", TRITON_INTERPRET="1")


@published
@pytest.mark.parametrize("name", [*CASES, "nan"])
def test_interpreted_kernels_are_the_eager_operations(name, interpreted):
    assert interpreted[name] == ""


@published
def test_one_code_for_every_batch_and_number_of_rows(tmp_path):
    """Compiled to machine code without a device: what another batch needs is there already."""
    found = elsewhere(tmp_path, "compiled")
    assert found["first"] > 0
    assert found["later"] == [found["first"]] * len(found["later"])
    assert found["machine code"]
    assert found["wide reads"]
    # Flushed denormals are outside of what rounding="outward" allows for; an atomic sum has no order.
    assert not found["flushes"]
    assert not found["atomics"]


class Recorded:
    """Kernels that note what is called."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def supports(self, *tensors: torch.Tensor) -> bool:
        return True

    def call(self, name: str, dtype: torch.dtype, *arguments: torch.Tensor | int | float | None) -> None:
        self.names.append(name)


def test_tensors_on_a_device_take_the_kernels_there(monkeypatch):
    """Tensors that pretend: no engine runs their backward pass, so it is called as the engine would."""
    recorded = Recorded()
    monkeypatch.setattr(triton_steps, "kernels", lambda: recorded)
    with FakeTensorMode():
        s, t, l, u = (torch.empty(4, 3, device="cuda") for _ in range(4))
        rows, pulled, end = (torch.empty(*sizes, device="cuda") for sizes in ((1, 2, 3), (4, 2, 3), (4, 2)))
        relax_step.relax_step(rows, Lines(s, l, t, u))
        relax_step.least_over_box(rows, l, u)
        band_step.band_step(rows, Lines(s, l, s, u))
        band_step.range_over_box(rows, l, u)
        assert recorded.names == ["pull", "least", "band", "band"]

        def back(step: Any, saved: tuple[torch.Tensor, ...], *grads: torch.Tensor) -> list[str]:
            recorded.names.clear()
            context = SimpleNamespace(saved_tensors=saved, needs_input_grad=(True,) * len(saved), parallel=False)
            step.backward(context, *grads)
            return list(recorded.names)

        gradients = [
            (relax_step._RelaxStep, (rows, s, l, t, u), (pulled, end), ["push", "shared"]),
            (relax_step._LeastOverBox, (pulled, l, u), (end,), ["least_back"]),
            (band_step._Band, (rows, s, l, u), (pulled, end, end), ["band_back", "band_shared"]),
        ]
        for step, saved, grads, names in gradients:
            with torch.no_grad():
                assert back(step, saved, *grads) == names
    assert triton_steps.passes(native.Build(None, "tested without"), torch.empty(2)) is None


def test_why_there_are_none_is_told(monkeypatch):
    fresh = triton_steps.kernels.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fresh().reason == "no CUDA device"
    assert not fresh().supports(torch.empty(2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6 + device, 0))
    assert fresh().reason == "Triton wants devices of compute capability 7.0 or later"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert fresh().library is None
    assert fresh().reason.startswith("Triton: import of triton")
    monkeypatch.setenv("OPTRELAX_NATIVE", "0")
    assert fresh().reason == "turned off by OPTRELAX_NATIVE=0"


def test_what_a_kernel_would_misread_is_refused():
    kernels = triton_steps.TritonBuild(triton_steps, "its functions are not reached", device="cpu")
    half, strided = torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4, 4).mT
    for wrong in (half, strided, torch.zeros(4, 4, device="meta")):
        with pytest.raises(RuntimeError, match=r"least: wants contiguous torch\.float32 on the CPU.*outside of it"):
            kernels.call("least", torch.float32, 4, 4, wrong)


@published
def test_bounds_on_a_cpu_import_no_triton(interpreted):
    assert interpreted["imported by bounds on a CPU"] is False


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS)
def test_kernels_on_a_device_are_the_eager_operations(step):
    kernels = triton_steps.kernels()
    assert kernels.library is not None, kernels.reason
    large = Case(step, torch.float32, 20, 100, (1000,), False), Case(step, torch.float64, 50, 30, (784,), True)
    for case in (*CASES.values(), *large):
        if case.step == step:
            compare(case, kernels, "cuda")


@pytest.mark.gpu
def test_no_number_on_a_device_is_no_bound():
    shows_nan(triton_steps.kernels(), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("relaxation", ["crown", "deepz", "fast-lin", "crown-ibp"])
@pytest.mark.parametrize(("rounding", "dtype"), [("nearest", torch.float32), ("outward", torch.float64)])
def test_bounds_on_a_device_are_those_of_its_operations_and_repeat(relaxation, rounding, dtype):
    """With the whole gradient; the same bits twice."""
    x = torch.rand(20, 28 * 28, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    net, rows = ox.models.fc(28 * 28, 100, 90, 10, seed=0).to("cuda", dtype), torch.eye(10).to("cuda", dtype)

    def found() -> list[torch.Tensor]:
        low = ox.lower_bounds(net, ox.LinfBall(x, 0.01), rows, relaxation, rounding=rounding)
        return [low.detach(), *torch.autograd.grad(low.sum(), list(net.parameters()))]

    first, again = found(), found()
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    with by(None):
        expected = found()
    for one, other in zip(first, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
