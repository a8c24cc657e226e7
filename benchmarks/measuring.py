"""Measuring: interleaved times, ratios round by round, and the peak memory of a fresh process."""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
Task = Callable[[], object]

LEAST = 0.2
"""Seconds that a measurement takes at least."""
_PROBE_SECONDS = 600  # a probe that takes longer hangs
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""For glibc: freed memory goes back at once, so that what is resident is what is in use."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds of every task in every round, the rounds in order."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Median seconds of a task."""
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> float:
        """(greatest - least) / median: how noisy the machine was."""
        times = self.seconds[name]
        return (max(times) - min(times)) / statistics.median(times)

    def ratio(self, name: str, reference: str) -> float:
        """Median over the rounds of the ratio of two tasks: both saw the same drift of the machine's speed."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return statistics.median(a / b for a, b in pairs)


def interleaved(
    tasks: Mapping[str, Task],
    *,
    runs: int,
    device: str = "cpu",
    least: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Time every task once a round, in turn: A B C A B C.

    Each is run beforehand, which is not counted. A task shorter than `least` seconds (LEAST) is repeated within a round
    until it takes as long, and counts with its mean.
    """
    if runs < 1:
        raise ValueError(f"interleaved: runs must be >= 1, got {runs}")
    repeats = {name: _repeats(task, device, LEAST if least is None else least, clock) for name, task in tasks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    gc.freeze()  # what was there before is not looked through again and again
    try:
        for _ in range(runs):
            for name, task in tasks.items():
                gc.collect()
                seconds[name].append(_time(task, repeats[name], device, clock))
    finally:
        gc.unfreeze()
    return Samples({name: tuple(times) for name, times in seconds.items()})


def _repeats(task: Task, device: str, least: float, clock: Callable[[], float]) -> int:
    once = _time(task, 1, device, clock)
    if once < least:  # the first call may have compiled or loaded something
        once = _time(task, 1, device, clock)
    return max(1, math.ceil(least / max(once, 1e-6)))


def _time(task: Task, repeats: int, device: str, clock: Callable[[], float]) -> float:
    wait(device)
    begin = clock()
    for _ in range(repeats):
        task()
    wait(device)
    return (clock() - begin) / repeats


def wait(device: str) -> None:
    """Let everything that was started on the device end."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


# --- memory -------------------------------------------------------------------------------------------------------


def peak_bytes(build: Callable[..., Task], *, threads: int, device: str = "cpu", **task: Any) -> int | None:
    """Most memory that one call of build(device=device, **task)() takes beyond what was there before, in bytes.

    build: a function of a module of this package, called in a fresh process; the task's arguments are JSON-ready.
    None where the machine's free memory does not suffice.  Raises RuntimeError where the process fails otherwise.
    """
    arguments = {"threads": threads, "device": device, "task": task}
    command = [sys.executable, "-m", "benchmarks.measuring", build.__module__, build.__name__, json.dumps(arguments)]
    how: dict[str, Any] = {"cwd": ROOT, "env": os.environ | _GIVE_BACK, "timeout": _PROBE_SECONDS}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    if done.returncode == 0:
        return int(json.loads(done.stdout.splitlines()[-1])["bytes"])
    if any(sign in done.stderr for sign in ("can't allocate memory", "MemoryError", "OutOfMemoryError")):
        return None
    raise RuntimeError(f"{build.__module__}.{build.__name__} with {task} failed:\n{done.stderr}")


def _probe(module: str, name: str, arguments: Mapping[str, Any]) -> int:
    """The child's side of `peak_bytes`."""
    device = arguments["device"]
    torch.set_num_threads(arguments["threads"])
    step = getattr(importlib.import_module(module), name)(device=device, **arguments["task"])
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    _limit_memory()
    before = _reset_high_water()
    step()
    return max(0, _high_water() - before)


def _status(field: str) -> int | None:
    """A line of this process's memory figures, in bytes; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _high_water() -> int:
    """Most memory resident so far.

    getrusage alone will not do where /proc exists: on Linux a child's figure starts at its parent's.
    """
    found = _status("VmHWM")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_high_water() -> int:
    """Start counting anew where the system allows it; returns what counts as there before."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _high_water()
    return _status("VmRSS") or _high_water()


def _limit_memory() -> None:
    """Fail with an error where memory runs out, before the system ends a process that may be another's."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    size = _status("VmSize")
    if free is not None and size is not None:
        resource.setrlimit(resource.RLIMIT_AS, (size + free, resource.getrlimit(resource.RLIMIT_AS)[1]))


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    found = _probe(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
    print(json.dumps({"bytes": found}))
