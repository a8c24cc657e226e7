"""Data-parallel training: gradients and sums added up over the processes that `torchrun` or srun started.

Plain torch.distributed. The wrappers (DistributedDataParallel, and Lightning Fabric's around it) add gradients up in
hooks that a module's forward call arms; bounds read the weights themselves and never call it. Here one sum a step is
all there is to do.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes", "launched"]

Piece = TypeVar("Piece")


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of one training run: how many, and which one this is."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Those of torch.distributed, one where it is not initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def mine(self, pieces: Sequence[Piece]) -> list[tuple[int, Piece]]:
        """The pieces of a batch that this process works on, with their places."""
        return [(i, piece) for i, piece in enumerate(pieces) if i % self.count == self.rank]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the processes, in place, in one message a type."""
        if self.count == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            some = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.detach().reshape(-1) for t in some])
            dist.all_reduce(flat)
            with torch.no_grad():
                for t, part in zip(some, flat.split([t.numel() for t in some]), strict=True):
                    t.copy_(part.reshape(t.shape))

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the first one's values, in place."""
        if self.count > 1:
            for t in tensors:
                dist.broadcast(t.detach(), 0)

    def wait(self) -> None:
        """Until every process has come here."""
        if self.count > 1:
            dist.barrier()


@dataclass(frozen=True, slots=True)
class _Launch:
    """What a launcher says of this process; meeting: where all of them meet, None as torchrun says it."""

    rank: int
    count: int
    local: int
    meeting: str | None = None

    @classmethod
    def announced(cls, env: Mapping[str, str]) -> _Launch:
        """That of torchrun, else that of srun, else a single process."""
        if "WORLD_SIZE" in env:
            return cls(int(env.get("RANK", "0")), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")))
        # The step's own: a batch script without srun is one process, whatever number of tasks its job may start.
        count = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
        if count == 1:
            return cls(0, 1, 0)
        if missing := [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if name not in env]:
            raise RuntimeError(
                f"launched: srun announces {count} tasks but not {' and '.join(missing)}; start the processes by "
                "torchrun"
            )
        meeting = f"tcp://{_host(env)}:{env.get('MASTER_PORT') or _port(env)}"
        return cls(int(env["SLURM_PROCID"]), count, int(env["SLURM_LOCALID"]), meeting)


def _host(env: Mapping[str, str]) -> str:
    """Where the first task runs: MASTER_ADDR, or the first node of a list such as `node[07,09-12],big1`."""
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"]
    if env.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    if not env.get("SLURM_STEP_NODELIST"):
        raise RuntimeError("launched: srun gives no SLURM_STEP_NODELIST; set MASTER_ADDR to the first task's node")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", env["SLURM_STEP_NODELIST"]).split(",")[0]


def _port(env: Mapping[str, str]) -> int:
    """One that all tasks of a step find and steps side by side do not share, below those handed out at random."""
    job, step = (int(env.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 12_000 + (8 * job + step) % 20_000


@contextlib.contextmanager
def launched(device: torch.device) -> Iterator[Processes]:
    """Join the processes that `torchrun`, or srun alone, announces in the environment; a single one without either.

    Raises RuntimeError where srun does not say which process this is or where to meet.
    """
    if dist.is_initialized():
        yield Processes.current()
        return
    launch = _Launch.announced(os.environ)
    if launch.count == 1:
        yield Processes()
        return
    if device.type == "cuda" and device.index is None:
        # srun may show each task its own device only.
        torch.cuda.set_device(launch.local % torch.cuda.device_count())
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Imported later, its functions would keep the group by their defaults, and the group's threads to the very end,
    # where they may abort the process.
    importlib.import_module("torch.distributed.nn.functional")
    if launch.meeting is None:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, init_method=launch.meeting, rank=launch.rank, world_size=launch.count)
    try:
        yield Processes.current()
        if dist.is_initialized():
            # All leave together: gloo aborts a process whose partner is gone before its own threads have ended.
            dist.barrier()
    finally:
        dist.destroy_process_group()
