"""torch.compile where it may pay: each decoder layer, and what follows the logits.

Layers are compiled one by one and alike, so that one graph serves all of them; attention stays outside,
for its bounds differ with every pack. Off unless `[train] compile` says so: for the demo's student it was
measured to gain nothing on a CPU (0.20 s of one core a step with it and without; measure yours by
`benchmarks/trainer_vs_trl.py --compile`), and it changes last bits.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.model.losses import loss_and_gradient


def compile_student(student: Any) -> int:
    """Compile in place, lazily: the first step pays. Returns the number of layers."""
    whole = student.get_base_model()
    for layer in whole.model.layers:
        layer.compile(dynamic=True)
    whole.judge = torch.compile(loss_and_gradient, dynamic=True)
    return len(whole.model.layers)
