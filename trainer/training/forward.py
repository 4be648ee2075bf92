"""Compute the loss of one packed row: summed cross-entropy over the supervised tokens."""

from __future__ import annotations

from typing import Any

import torch

from trainer.data.collator import Batch
from trainer.model.losses import RowLoss, cross_entropy_sum, head_loss, loss_and_gradient

# Model types whose logits are exactly `hidden @ weight.T (+ bias)`. Others scale or cap their logits, so
# their own forward has to compute them.
LINEAR_HEAD_MODELS = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})


def pack_loss(
    student: Any, batch: Batch, row_loss: RowLoss = loss_and_gradient
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the summed loss of a packed row and count its correct predictions.

    Where the output layer is a frozen linear layer it runs in chunks, on supervised positions only, so the
    full [supervised, vocabulary] logits never exist.

    Args:
        student: a causal language model of transformers, or a PEFT model around one.
        row_loss: loss of a block of logits, e.g. the compiled one from `compile_student`.

    Returns:
        loss (fp32 scalar, nats, summed over supervised tokens) and correct (int64 scalar).
    """
    base = student.get_base_model() if hasattr(student, "get_base_model") else student
    head = base.get_output_embeddings()
    if (
        type(head) is not torch.nn.Linear
        or head.weight.requires_grad
        or base.config.model_type not in LINEAR_HEAD_MODELS
    ):
        return cross_entropy_sum(supervised_logits(student, batch), batch.targets)
    output = base.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        segments=batch.segments,
    )
    hidden = output.last_hidden_state[0].index_select(0, batch.predict_at)
    return head_loss(hidden, head.weight, head.bias, batch.targets, row_loss)


def supervised_logits(student: Any, batch: Batch) -> torch.Tensor:
    """Run the student's own forward on a packed row.

    Returns:
        Logits [supervised, vocabulary], in the model's dtype.
    """
    output = student(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.predict_at,
        segments=batch.segments,
    )
    logits: torch.Tensor = output.logits[0]
    return logits
