"""Join the processes of one training (torch.distributed), and sum tensors over them.

The packs of a step are distributed in turn: rank r of n learns packs r, r + n, ... Every rank holds the same
adapter and the same optimiser. Gradients and loss are summed once a step; then the ranks agree whether to
stop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

# How long a rank waits for another outside the steps: while the first one hashes a base or writes an adapter.
# NCCL's own limit of 10 minutes is too short for that; a process that ended is noticed at once all the same.
HOST_TIMEOUT = timedelta(days=1)

# Elements of one all-reduce. Gradients are summed in pieces: the copy takes 64 MiB, not a whole adapter.
MAX_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class World:
    """Rank of this process among `size` processes. A single process needs no process group.

    Attributes:
        host_group: Gloo group for decisions, which never wait for a device; None for the default group.
    """

    rank: int = 0
    size: int = 1
    host_group: Any = None

    @property
    def is_leader(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def sum_in_place(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all ranks. All must have one dtype and device."""
        if self.size == 1:
            return
        for group in _grouped(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            distributed.all_reduce(flat)
            for tensor, part in zip(group, torch.split(flat, [t.numel() for t in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def highest(self, value: int) -> int:
        """Return the largest value of all ranks. Waits for the other processes, not for a device."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self.host_group)
        return int(tensor)

    def any_rank(self, condition: bool) -> bool:
        """Return whether the condition holds on any rank, so that all ranks decide alike."""
        return bool(self.highest(int(condition)))

    def barrier(self) -> None:
        """Wait until every rank has called this, for at most `HOST_TIMEOUT`."""
        self.highest(0)


def _grouped(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Cut a list of tensors into lists of at most `MAX_ELEMENTS` elements; a larger tensor stays alone."""
    group: list[torch.Tensor] = []
    for tensor in tensors:
        if group and sum(t.numel() for t in group) + tensor.numel() > MAX_ELEMENTS:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another process of the group has ended. Gloo raises a plain RuntimeError."""
    phrases = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
    is_network_error = isinstance(error, (distributed.DistNetworkError, distributed.DistBackendError))
    return is_network_error or (isinstance(error, RuntimeError) and any(p in str(error) for p in phrases))


@contextmanager
def join_world() -> Iterator[World]:
    """Join the process group that RANK, WORLD_SIZE, ... describe; without them, yield a world of one.

    Tensors are summed by NCCL on CUDA and by Gloo on the CPU, decisions always by Gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl")
        host_group = distributed.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    else:
        distributed.init_process_group("gloo", timeout=HOST_TIMEOUT)
        host_group = None
    try:
        yield World(distributed.get_rank(), size, host_group)
    finally:
        distributed.destroy_process_group()
