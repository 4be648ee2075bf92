"""Count the floating-point operations (FLOP) of a training; one multiply-add is 2 FLOP.

Per token and LoRA layer of shape (out, in) and rank r: 2 in out forward and the same for the gradient of the
input; a frozen weight gets no gradient, a trained one takes as much again. The adapter takes 2 r (in + out)
forward and twice that backward. Query, key and value of the first layer have no input gradient, because the
embedding is frozen. Attention over a document of S tokens has two products, S x S x query size and S x S x
value size, forward once and backward twice: 6 S^2 per channel of each, half of that when causal. A frozen
expert of a mixture is used by top-k of E tokens. The output layer runs on supervised rows only: 4 V H a row.
The counts agree with `torch.utils.flop_counter` (a test compares them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trainer.data.chat_template import Example
from trainer.model import structure

# Layers that take query, key and value from the frozen embedding, by the names that families give them.
_FIRST_PROJECTIONS = frozenset(
    {"q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "q_a_proj", "kv_a_proj_with_mqa"}
)


def flop_counter(student: Any, *, causal: bool = True) -> Callable[[Sequence[Example]], float] | None:
    """Return a function that counts the FLOP of forward and backward of a pack.

    Args:
        student: a PEFT model.
        causal: False counts the full square of attention, as torch's own counter does.

    Returns:
        None where the count is unknown: the student has layers whose arithmetic is not counted here, such as
        recurrences, or other parts than expected. The count is only reported, so a student without one trains
        all the same.
    """
    try:
        return _flop_counter(student, causal=causal)
    except Exception:  # noqa: BLE001 - no shape of a model may end a training over a figure for the log
        return None


def _flop_counter(student: Any, *, causal: bool) -> Callable[[Sequence[Example]], float] | None:
    base = structure.base_model_of(student)
    layers, head = structure.decoder_layers(base), base.get_output_embeddings()
    channels = [_attention_channels(base, layer) for layer in layers]
    if not layers or head is None or any(each is None for each in channels):
        return None
    per_token = sum(_linear_flop(layer, is_first=index == 0) for index, layer in enumerate(layers))
    per_token += sum(_expert_flop(base, layer) for layer in layers)
    per_token_pair = 6 * sum(each for each in channels if each) * (0.5 if causal else 1.0)
    per_row = (6.0 if head.weight.requires_grad else 4.0) * int(head.weight.numel())

    def count(pack: Sequence[Example]) -> float:
        lengths = [len(example.ids) - 1 for example in pack]
        supervised = sum(example.supervised for example in pack)
        return sum(n * per_token + n * n * per_token_pair for n in lengths) + supervised * per_row

    return count


def _attention_channels(base: Any, layer: Any) -> int | None:
    """Return heads * (size of a query + size of a value) of a layer's attention, None if unknown."""
    heads = int(getattr(structure.text_config(base), "num_attention_heads", 0) or 0)
    if any(isinstance(module, torch.nn.Conv1d) for module in layer.modules()):
        return None  # a recurrent or convolutional mixer
    for module in layer.modules():
        if "attention" not in type(module).__name__.lower():
            continue
        value = getattr(module, "v_head_dim", None)
        both = (getattr(module, name, None) for name in ("qk_head_dim", "head_dim", "head_size"))
        query = next((size for size in both if size), None)
        if query:
            return heads * (int(query) + int(value or query))
    return None


def _linear_flop(layer: Any, *, is_first: bool) -> float:
    """Return the FLOP per token of a layer's linear modules and their adapters."""
    total = 0.0
    for name, module in layer.named_modules():
        if not hasattr(module, "in_features"):
            continue
        if name.rpartition(".")[2] in {"default", "base_layer"}:
            continue  # counted with the layer they belong to
        in_features, out_features = module.in_features, module.out_features
        rank = module.r.get("default", 0) if hasattr(module, "lora_A") else 0
        is_trained = module.weight.requires_grad
        no_input_gradient = is_first and not is_trained and name.rpartition(".")[2] in _FIRST_PROJECTIONS
        factor = 6 if is_trained else 4
        total += factor * in_features * out_features + 6 * rank * (in_features + out_features)
        if no_input_gradient:
            total -= 2 * in_features * out_features + 2 * rank * in_features
    return total


def _expert_flop(base: Any, layer: Any) -> float:
    """Return the FLOP per token of experts, whose weights are stacked as [experts, rows, columns]."""
    active = int(getattr(structure.text_config(base), "num_experts_per_tok", 0) or 0)
    return float(
        sum(
            (6 if p.requires_grad else 4) * p.numel() / p.shape[0] * active
            for p in layer.parameters()
            if p.ndim == 3
        )
    )
