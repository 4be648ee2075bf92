"""A base too large for one device: each decoder layer's frozen weights are dealt to all processes (FSDP2).

A layer is gathered for its own forward and again for its backward, and let go after each. Adapter, embedding,
last norm and output layer stay whole everywhere, so gradients, checkpoints and adapter files are those of one
process. Every process reads the whole base into host memory first; no more than one layer of it is whole on a
device at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import device_mesh, get_world_size
from torch.distributed.fsdp import fully_shard


def shard_base(student: Any, device: torch.device) -> int:
    """Split in place and move to `device`; returns the bytes of the base that this process keeps.

    Every process of the world calls it; afterwards all must walk forward and backward equally often.
    """
    inner = student.get_base_model().model
    mesh = device_mesh.init_device_mesh(device.type, (get_world_size(),))
    split = {p for layer in inner.layers for p in layer.parameters() if not p.requires_grad}
    whole = {p for p in student.parameters() if p not in split}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for buffers in (module._buffers for module in student.modules()):
        buffers.update({name: b.to(device) for name, b in buffers.items() if b is not None})
    for layer in inner.layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(inner, mesh=mesh, ignored_params=whole)  # the root owns nothing: it orders the layers
    return sum(_local_bytes(p) for p in student.parameters() if not p.requires_grad)


def _local_bytes(parameter: Any) -> int:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return int(local.numel() * local.element_size())
