"""Arithmetic of LoRA training, exactly: what a FLOP counter would see, times what is really needed.

Per token and LoRA layer of shape (out, in) and rank r: 2 in out forward and the same for dX, never dW of the
frozen weight; the adapter 2 r (in + out) forward and twice that backward. The first layer's query, key and
value get no dX: the embedding is frozen. Causal attention over a document of S tokens: S^2 per head and
value twice forward, four times backward, half of the full square. The output layer runs on supervised rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trainer.data.chat_template import Example


def flop_counter(student: Any, *, causal: bool = True) -> Callable[[Sequence[Example]], float]:
    """A function from the examples of a pack to the FLOP of its forward and backward pass.

    Args:
        student: a PEFT model. causal: False counts attention's full square, as FLOP counters do.
    """
    whole = student.get_base_model()
    per_token = _linear(whole)
    config, head = whole.config, whole.get_output_embeddings()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = int(config.num_attention_heads) * int(width) * int(config.num_hidden_layers)
    square = 12 * heads * (0.5 if causal else 1.0)
    per_row = 4.0 * int(head.weight.numel())

    def count(pack: Sequence[Example]) -> float:
        lengths = [len(example.ids) - 1 for example in pack]
        supervised = sum(example.supervised for example in pack)
        return sum(n * per_token + n * n * square for n in lengths) + supervised * per_row

    return count


def _linear(whole: Any) -> float:
    total, first = 0.0, True
    for layer in whole.model.layers:
        for name, module in layer.named_modules():
            if not hasattr(module, "in_features"):
                continue
            if name.rpartition(".")[2] in {"default", "base_layer"}:
                continue  # counted with the layer they belong to
            inner, outer = module.in_features, module.out_features
            rank = module.r.get("default", 0) if hasattr(module, "lora_A") else 0
            blind = first and name.rpartition(".")[2] in {"q_proj", "k_proj", "v_proj"}
            total += 4 * inner * outer + 6 * rank * (inner + outer)
            total -= (2 * inner * outer + 2 * rank * inner) if blind else 0
        first = False
    return total
