"""The relaxation step by Triton's kernels and by PyTorch's operations, and the kernels compiled for a device.

As a program: everything without a GPU. Triton's interpreter must be chosen before Triton is imported, and compiling for
a device that is not there wants a driver that pretends, so both have a process of their own, which prints JSON.
"""

import json
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import optrelax as ox
from optrelax.domains.lines import Lines
from optrelax.kernels import band_step, native, relax_step, triton_steps

# batch, k, shape, whether the batch shares its rows: tails of every tile, several tiles, sums in parts, nothing at all
SIZES = [
    (1, 1, (1,), False),
    (3, 5, (2, 4), False),
    (3, 5, (2, 4), True),
    (2, 9, (150,), False),
    (2, 9, (150,), True),
    (1, 30, (16,), False),
    (0, 3, (2,), False),
    (2, 0, (3,), True),
    (2, 3, (0,), False),
]
MANY = (14, 3, (2,), True)  # examples whose shared rows' gradient is summed in parts
STEPS = ["two slopes", "parallel", "least", "band", "range"]
WANTED = ["all", "rows", "lines"]


@dataclass(frozen=True)
class Case:
    """One step at one size; which gradients are wanted."""

    step: str
    dtype: torch.dtype
    batch: int
    k: int
    shape: tuple[int, ...]
    shared: bool
    wanted: str = "all"

    @property
    def name(self) -> str:
        rows = "shared" if self.shared else "own"
        return f"{self.step} {self.dtype} {self.batch} {self.k} {self.shape} {rows} rows, {self.wanted}"

    def data(self, device: str, strided: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Rows and lines or box, zeros among the rows, and gradients of the results."""
        g = torch.Generator().manual_seed(0)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=g, dtype=self.dtype).to(device)

        rows = 1 if self.shared else self.batch
        a = draw(rows, *self.shape, self.k).movedim(-1, 1) if strided else draw(rows, self.k, *self.shape)
        a[:, ::2][..., ::3] = 0.0
        count = {"two slopes": 4, "parallel": 3, "least": 2, "band": 3, "range": 2}[self.step]
        lines = [draw(self.batch, *self.shape) for _ in range(count)]
        ends = [draw(self.batch, self.k) for _ in range(2 if self.step in ("band", "range") else 1)]
        coefficients = [] if self.step in ("least", "range") else [draw(self.batch, self.k, *self.shape)]
        return [a, *lines], [*coefficients, *ends]

    def run(self, given: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Results, then the gradients that are wanted."""
        leaves = [t.clone(memory_format=torch.preserve_format).detach() for t in given]
        wanted = {"all": leaves, "rows": leaves[:1], "lines": leaves[1:]}[self.wanted]
        for leaf in wanted:
            leaf.requires_grad_()
        found = _outputs(self.step, *leaves)
        return [t.detach() for t in (*found, *torch.autograd.grad(found, wanted, grads))]


def _outputs(step: str, a: Tensor, *lines: Tensor) -> tuple[Tensor, ...]:
    if step == "least":
        return (relax_step.least_over_box(a, *lines),)
    if step == "range":
        return band_step.range_over_box(a, *lines)
    if step == "two slopes":
        return relax_step.relax_step(a, Lines(*lines))
    slope, lower, upper = lines
    one = Lines(slope, lower, slope, upper)
    assert one.parallel
    return relax_step.relax_step(a, one) if step == "parallel" else band_step.band_step(a, one)


CASES = {
    case.name: case
    for case in [
        *(Case(step, dtype, *size) for step in STEPS for dtype in (torch.float32, torch.float64) for size in SIZES),
        *(Case(step, torch.float64, *MANY) for step in ("two slopes", "band")),
        *(
            Case(step, torch.float64, 3, 5, (2, 4), shared, wanted)
            for step in ("two slopes", "least", "band")
            for shared in (False, True)
            for wanted in WANTED[1:]
        ),
    ]
}


@contextmanager
def by(kernels: native.Kernels | None) -> Iterator[None]:
    """Within it these kernels make every step; None: PyTorch's operations."""
    before = relax_step.passes
    relax_step.passes = band_step.passes = lambda compiled, *tensors: kernels
    try:
        yield
    finally:
        relax_step.passes = band_step.passes = before


def compare(case: Case, kernels: native.Kernels, device: str) -> None:
    """Kernels and PyTorch's operations; AssertionError where they differ."""
    for strided in (False, True) if case.wanted == "all" and case.batch == 3 else (False,):
        given, grads = case.data(device, strided)
        with by(kernels):
            found = case.run(given, grads)
        with by(None):
            expected = case.run(given, grads)
        for one, other in zip(found, expected, strict=True):
            assert one.device == other.device
            tolerance = 1e-11 if case.dtype == torch.float64 else 1e-4
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def shows_nan(kernels: native.Kernels, device: str) -> None:
    """A coefficient that is no number makes no bound."""
    for step in STEPS:
        case = Case(step, torch.float32, 2, 3, (5,), False)
        given, _ = case.data(device)
        given[0][1, 2, 3] = torch.nan
        with by(kernels):
            found = _outputs(step, *given)
        for one in found:
            bad = one.isnan() if one.dim() == 2 else one.isnan().any(2)
            assert bad.nonzero().tolist() == [[1, 2]]


def interpreted() -> dict[str, str | bool]:
    """Every case by the interpreter: its name, and what went wrong."""
    relax_step.kernels = band_step.kernels = lambda: native.Build(None, "tested without")
    net = ox.models.fc(4, 5, 3)
    ox.lower_bounds(net, ox.LinfBall(torch.rand(2, 4), 0.1), torch.eye(3), "crown").sum().backward()
    told: dict[str, str | bool] = {"imported by bounds on a CPU": "optrelax.kernels.triton_kernels" in sys.modules}
    from optrelax.kernels import triton_kernels

    triton_kernels._LEAST_STEPS = 2  # sums in parts, without the sizes that want them
    kernels = triton_steps.TritonBuild(triton_kernels, "interpreted", device="cpu")
    works = {name: partial(compare, case, kernels, "cpu") for name, case in CASES.items()}
    for name, work in (works | {"nan": partial(shows_nan, kernels, "cpu")}).items():
        try:
            work()
            told[name] = ""
        except Exception:  # noqa: BLE001 - told to the process that asked, case by case
            told[name] = traceback.format_exc(limit=-3)
    return told


class PretendedDriver:
    """A device to compile for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 80, 32)


def compiled() -> dict[str, object]:
    """Compile what steps of many sizes launch: variants after the first sizes and after all, and what PTX holds."""
    import triton

    from optrelax.kernels import triton_kernels

    triton.runtime.driver.set_active(PretendedDriver())
    made = {}

    def compile_only(function: triton.runtime.JITFunction, programs: int, *arguments: Tensor | int | None) -> None:
        kernel = function.warmup(*arguments, grid=(programs,))
        made[kernel.hash] = kernel

    triton_kernels.run = compile_only
    kernels = triton_steps.TritonBuild(triton_kernels, "compiled", device="cpu")
    functions = [
        f for k in (triton_kernels._ROWS, triton_kernels._COLUMNS, triton_kernels._SHARED) for f in vars(k).values()
    ]

    def steps(batch: int, k: int) -> int:
        for step in STEPS:
            for dtype, n, wanted in (
                (torch.float32, 48, "all"),
                (torch.float32, 48, "rows"),
                (torch.float32, 48, "lines"),
                (torch.float64, 7, "all"),
            ):
                for shared in (False, True) if dtype == torch.float32 or step in ("two slopes", "band") else ():
                    case = Case(step, dtype, batch, k, (n,), shared, wanted)
                    with by(kernels):
                        case.run(*case.data("cpu"))
        return sum(len(f.device_caches[0][0]) for f in functions)

    first = steps(16, 5)
    later = [steps(*sizes) for sizes in ((7, 5), (64, 5), (16, 1), (16, 160), (3, 700), (2, 16))]
    text = "".join(kernel.asm["ptx"] for kernel in made.values())
    return {
        "first": first,
        "later": later,
        "machine code": all(kernel.asm["cubin"] for kernel in made.values()),
        "flushes": ".ftz" in text,
        "atomics": re.search(r"\b(atom|red)\.", text) is not None,
        "wide reads": "ld.global.v4.b32" in text,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"interpreted": interpreted, "compiled": compiled}[sys.argv[1]]()))
