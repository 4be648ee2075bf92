"""Compile a student with torch.compile: each decoder layer, and the loss of a block of logits.

Layers are compiled one by one, so that they share one graph. Attention is left out: its segment bounds
differ with every pack, and each would be compiled anew. Where activations are recomputed, the parts of each
layer are compiled instead: torch gives up a whole checkpointed layer at the break that attention makes.

`[train] compile` is off by default: for the demo's student it gained nothing on a CPU (0.20 s of one core a
step with and without it; measure yours with `benchmarks/trainer_vs_trl.py --compile`), and results differ in
the last bits.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.model import structure
from trainer.model.forward.losses import RowLoss, loss_and_gradient


def compile_student(student: Any, *, checkpointing: bool = False, backend: Any = "inductor") -> RowLoss:
    """Compile the decoder layers in place; compilation happens during the first step.

    Args:
        student: a PEFT model around a causal language model of transformers.
        checkpointing: whether activations are recomputed in the backward pass.
        backend: torch.compile's backend.

    Returns:
        The compiled `loss_and_gradient`, to be passed to `pack_loss`.
    """
    for layer in structure.decoder_layers(structure.base_model_of(student)):
        for part in layer.children() if checkpointing else (layer,):
            part.compile(dynamic=True, backend=backend)
    row_loss: RowLoss = torch.compile(loss_and_gradient, dynamic=True, backend=backend)
    return row_loss


def is_of_compiler(error: BaseException) -> bool:
    """Return whether torch's compiler raised an error, without loading the compiler."""
    return any(kind.__module__ == "torch._dynamo.exc" for kind in type(error).__mro__)
