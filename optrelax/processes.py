"""Data-parallel training: gradients and sums added up over the processes that `torchrun` or SLURM started.

Plain torch.distributed. The wrappers (DistributedDataParallel, and Lightning Fabric's around it) add gradients up in
hooks that a module's forward call arms; bounds read the weights themselves and never call it. Here one sum a step is
all there is to do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes", "launched"]


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

    def mine(self, pieces: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
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


@contextlib.contextmanager
def launched(device: torch.device) -> Iterator[Processes]:
    """Join the processes that `torchrun` announces in the environment; a single one without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Processes.current()
        return
    if device.type == "cuda" and device.index is None:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes.current()
    finally:
        dist.destroy_process_group()
