"""Join the processes of one training (torch.distributed), and sum tensors over them.

The packs of a step are distributed in turn: rank r of n learns packs r, r + n, ... Every rank holds the same
adapter and the same optimiser. Gradients, loss and stop requests are summed in one flat buffer, once a step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True, slots=True)
class World:
    """Rank of this process among `size` processes. A single process needs no process group."""

    rank: int = 0
    size: int = 1

    @property
    def is_leader(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def sum_in_place(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all ranks. All must have one dtype and device."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any_rank(self, condition: bool) -> bool:
        """Return whether the condition holds on any rank, so that all ranks decide alike."""
        if self.size == 1:
            return condition
        device = torch.cuda.current_device() if distributed.get_backend() == "nccl" else "cpu"
        highest = torch.tensor(float(condition), device=device)
        distributed.all_reduce(highest, distributed.ReduceOp.MAX)
        return bool(highest)

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def join_world() -> Iterator[World]:
    """Join the process group that torchrun describes in the environment; without one, a world of one.

    The backend is NCCL on CUDA, Gloo on the CPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield World(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
