"""Train all weights of a student (`[train] method = "full"`), and switch between it and its base afterwards.

Weights, gradients and moments are fp32, 16 bytes a parameter, so this is for small students. On CUDA products
run in bf16 by autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.errors import StudentError
from trainer.model import structure


def make_trainable(base: Any) -> Any:
    """Let all weights of a base that text passes through be trained; return it in training mode.

    Args:
        base: in fp32. Towers for images or sounds stay frozen.
    """
    base.requires_grad_(False)
    for module in (structure.text_tower(base), base.get_output_embeddings()):
        if module is not None:
            module.requires_grad_(True)
    return base.train()


class FullyTrained(torch.nn.Module):
    """Hold a student whose own weights were trained beside those of its base, as PEFT holds an adapter.

    Both are in memory: twice the weights.

    Args:
        student: the trained model of transformers.
        base: the model that it was before.

    Raises:
        StudentError: the two have other parameters or shapes.
    """

    def __init__(self, student: Any, base: Any) -> None:
        super().__init__()
        self.student = student
        before = dict(base.named_parameters())
        if {n: p.shape for n, p in student.named_parameters()} != {n: p.shape for n, p in before.items()}:
            raise StudentError(
                "the trained student has other parameters than its base",
                place="student.base",
                remedy="set [student] base to the folder that it was trained from",
            )
        self._before = {name: parameter.data for name, parameter in before.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the student."""
        return self.student(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the student."""
        return self.student.generate(*args, **kwargs)

    def get_base_model(self) -> Any:
        """Return the model of transformers."""
        return self.student

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Give the model the weights of the base during the block."""
        after = {}
        for name, parameter in self.student.named_parameters():
            after[name] = parameter.data
            parameter.data = self._before[name]
        try:
            yield
        finally:
            for name, parameter in self.student.named_parameters():
                parameter.data = after[name]
