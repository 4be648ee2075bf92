"""Join the processes of one training (torch.distributed), and sum tensors over them.

The packs of a step are distributed in turn: rank r of n learns packs r, r + n, ... Every rank holds the same
adapter and the same optimiser. Gradients and loss are summed once a step; then the ranks agree whether to
stop.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from trainer.errors import ProcessLost

# How long a rank waits for another outside the steps: while the first one hashes a base or writes an adapter.
# NCCL's own limit of 10 minutes is too short for that; a process that ended is noticed at once all the same.
HOST_TIMEOUT = timedelta(days=1)

# How long a process waits for the others to join. Before it joins, each reads the corpus.
JOIN_TIMEOUT = timedelta(minutes=30)

# Elements of one all-reduce. Gradients are summed in pieces: the copy takes 64 MiB, not a whole adapter.
MAX_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class World:
    """Rank of this process among `size` processes. A single process needs no process group.

    Attributes:
        local_size: processes on this machine.
        host_group: Gloo group for decisions, which never wait for a device; None for the default group.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
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

    def share_json(self, value: Any, *, source: int = 0) -> Any:
        """Return the value of the rank `source` on every rank; it must be one that JSON can hold."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.rank == source else b""
        length = torch.tensor(len(text), dtype=torch.int64)
        distributed.broadcast(length, source, group=self.host_group)
        data = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == source:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        distributed.broadcast(data, source, group=self.host_group)
        return json.loads(bytes(data.tolist()))

    def share_tensors(
        self, tensors: Mapping[str, torch.Tensor], *, source: int = 0
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of the rank `source` on every rank, in host memory; the others may pass none."""
        if self.size == 1:
            return dict(tensors)
        kinds = {
            name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
            for name, tensor in tensors.items()
        }
        shared = {}
        for name, (shape, dtype) in self.share_json(kinds, source=source).items():
            flat = torch.empty(shape, dtype=getattr(torch, dtype)).reshape(-1)
            if self.rank == source:
                flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            distributed.broadcast(flat, source, group=self.host_group)
            shared[name] = flat.reshape(shape)
        return shared

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
    phrases = (
        *("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe"),
        *("Connection timed out", "No route to host", "Network is unreachable"),
    )
    kinds = (distributed.DistNetworkError, distributed.DistBackendError, distributed.DistStoreError)
    is_network_error = isinstance(error, kinds)
    return is_network_error or (isinstance(error, RuntimeError) and any(p in str(error) for p in phrases))


@contextmanager
def lost_connections_named(when: str) -> Iterator[None]:
    """Raise ProcessLost where the block loses the connection to another process.

    Args:
        when: end of the sentence "another process of this training ended ...".
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise ProcessLost(
            f"another process of this training ended {when}; nothing is lost",
            remedy="its own message says why; the same command tries again",
        ) from None


@contextmanager
def join_world() -> Iterator[World]:
    """Join the process group that RANK, WORLD_SIZE, ... describe; without them, yield a world of one.

    Tensors are summed by NCCL on CUDA and by Gloo on the CPU, decisions always by Gloo.

    Raises:
        ProcessLost: the others did not join in time, or ended meanwhile.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    try:
        host_group = _join()
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        place = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        raise ProcessLost(
            f"the {size} processes of a training did not come together: {str(error).splitlines()[0][:300]}",
            place=place,
            remedy="the same command tries again; each machine must reach this address",
        ) from None
    try:
        yield World(
            distributed.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", str(size))), host_group
        )
    finally:
        distributed.destroy_process_group()


def _join() -> Any:
    """Join the process group; return the Gloo group for decisions, None for the default one."""
    joined, rank, size = next(distributed.rendezvous("env://", timeout=JOIN_TIMEOUT))  # type: ignore[attr-defined]
    store = distributed.PrefixStore("trainer", joined)  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=HOST_TIMEOUT)
        return None
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl", store=store, rank=rank, world_size=size)
    return distributed.new_group(backend="gloo", timeout=HOST_TIMEOUT)
