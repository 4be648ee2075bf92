"""Train on the teacher's whole distribution, which no API gives: the bound for soft targets (E7).

The teacher's weights are read from its folder and give all probabilities at each token of an answer.
Everything else is `trainer.train` with `[train] soft_targets = "auto"`: the rows, their order, the loss, the
optimiser.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np


def train(config_file: Path, teacher_folder: Path) -> None:
    """Train as `trainer train` does, with exact soft targets."""
    from trainer.config import load
    from trainer.model import model
    from trainer.training import train as training

    config = load(config_file)
    model.set_threads(config.train)
    read = training.read_inputs

    def read_with_all(*arguments: Any, **options: Any) -> Any:
        inputs = read(*arguments, **options)
        examples = tuple(_with_all(inputs.dataset.examples, teacher_folder))
        return replace(inputs, dataset=replace(inputs.dataset, examples=examples))

    training.read_inputs = read_with_all
    try:
        training.train(config)
    finally:
        training.read_inputs = read


def _with_all(examples: Any, teacher_folder: Path) -> Any:
    """Yield the examples with the probabilities of all tokens; teacher and student share a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainer.data.chat_template import SparseTargets

    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval()
    for example in examples:
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        with torch.no_grad():
            logits = teacher(input_ids=ids[:, :-1]).logits[0, example.prompt_length - 1 :]
        log_probs, order = logits.log_softmax(dim=-1).sort(dim=-1, descending=True)
        yield replace(
            example,
            soft=SparseTargets(
                np.arange(example.supervised, dtype=np.int32),
                order.numpy().astype(np.int32),
                log_probs.numpy().astype(np.float16),
            ),
        )
