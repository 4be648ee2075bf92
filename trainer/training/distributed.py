"""Which process this is among how many, and what they add up. One process needs none of it.

Packs of a step are dealt round: rank r of n learns packs r, r + n, ... Every rank holds the same adapter and
the same optimiser; gradients, loss and wishes to stop are summed in one flat buffer, once a step.
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
    """Rank among `size` processes."""

    rank: int = 0
    size: int = 1

    @property
    def is_leader(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def sum_in_place(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor (same dtype) by its sum over all ranks."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any_rank(self, claim: bool) -> bool:
        """Whether any rank claims it: what all must do alike is decided by all."""
        if self.size == 1:
            return claim
        place = torch.cuda.current_device() if distributed.get_backend() == "nccl" else "cpu"
        found = torch.tensor(float(claim), device=place)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return bool(found)

    def barrier(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def join_world() -> Iterator[World]:
    """The world torchrun made, or a world of one. Gloo on CPU, NCCL on CUDA."""
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
