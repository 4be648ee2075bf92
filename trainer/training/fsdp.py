"""Split a base that is too large for one device over all processes, with FSDP2 (`fully_shard`).

The frozen weights of each decoder layer are split. A layer is gathered for its forward and again for its
backward, and freed after each (ZeRO stage 3, Rajbhandari et al. 2020, arXiv 1910.02054). Adapter, embedding,
last norm and output layer stay whole on every process, so gradients, checkpoints and adapter files are the
same as with one process. Every process reads the whole base into host memory first; a device holds at most
one whole layer at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import device_mesh, get_world_size
from torch.distributed.fsdp import fully_shard

from trainer.errors import StudentError
from trainer.model import structure


def shard_base(student: Any, device: torch.device) -> int:
    """Split the base in place and move it to `device`. Every process must call this.

    Afterwards all processes must run the same number of forward and backward passes.

    Args:
        student: a PEFT model whose weights are in host memory.

    Returns:
        Bytes of the base that this process holds.

    Raises:
        StudentError: the student's layers can't be found.
    """
    base = structure.base_model_of(student)
    decoder, layers = _layers_of(base)
    mesh = device_mesh.init_device_mesh(device.type, (get_world_size(),))
    split = {p for layer in layers for p in layer.parameters() if not p.requires_grad}
    unsharded = {p for p in student.parameters() if p not in split}
    for parameter in unsharded:
        parameter.data = parameter.data.to(device)
    for buffers in (module._buffers for module in student.modules()):
        buffers.update({name: b.to(device) for name, b in buffers.items() if b is not None})
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=unsharded)
    fully_shard(
        decoder, mesh=mesh, ignored_params=unsharded
    )  # the root holds no weights: it orders the layers
    return sum(_local_bytes(p) for p in student.parameters() if not p.requires_grad)


def require_layers(base: Any) -> None:
    """Refuse a base that can't be split.

    Raises:
        StudentError: its layers can't be found.
    """
    _layers_of(base)


def _layers_of(base: Any) -> tuple[Any, list[Any]]:
    decoder, layers = structure.backbone(base), structure.decoder_layers(base)
    if decoder is None or not layers:
        raise StudentError(
            "the decoder layers of this student can't be found, so they can't be split over processes",
            place="train.shard",
            remedy='set [train] shard = "never" in train.toml',
        )
    return decoder, list(layers)


def _local_bytes(parameter: Any) -> int:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return int(local.numel() * local.element_size())
