"""Count the floating-point operations (FLOP) of LoRA training; one multiply-add is 2 FLOP.

Per token and LoRA layer of shape (out, in) and rank r: 2 in out forward and the same for the gradient of the
input; the frozen weight gets no gradient. The adapter takes 2 r (in + out) forward and twice that backward.
Query, key and value of the first layer have no input gradient, because the embedding is frozen. Attention
over a document of S tokens has two products of S x S x head size, forward once and backward twice: 12 S^2
per channel, half of that when causal. The output layer runs on supervised rows only: 4 V H a row. The counts
agree with `torch.utils.flop_counter` (a test compares them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trainer.data.chat_template import Example


def flop_counter(student: Any, *, causal: bool = True) -> Callable[[Sequence[Example]], float]:
    """Return a function that counts the FLOP of forward and backward of a pack.

    Args:
        student: a PEFT model.
        causal: False counts the full square of attention, as torch's own counter does.
    """
    base = student.get_base_model()
    per_token = _linear_flop_per_token(base)
    config, head = base.config, base.get_output_embeddings()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    channels = int(config.num_attention_heads) * int(head_size) * int(config.num_hidden_layers)
    per_token_pair = 12 * channels * (0.5 if causal else 1.0)
    per_row = 4.0 * int(head.weight.numel())

    def count(pack: Sequence[Example]) -> float:
        lengths = [len(example.ids) - 1 for example in pack]
        supervised = sum(example.supervised for example in pack)
        return sum(n * per_token + n * n * per_token_pair for n in lengths) + supervised * per_row

    return count


def _linear_flop_per_token(base: Any) -> float:
    total = 0.0
    for index, layer in enumerate(base.model.layers):
        for name, module in layer.named_modules():
            if not hasattr(module, "in_features"):
                continue
            if name.rpartition(".")[2] in {"default", "base_layer"}:
                continue  # counted with the layer they belong to
            in_features, out_features = module.in_features, module.out_features
            rank = module.r.get("default", 0) if hasattr(module, "lora_A") else 0
            no_input_gradient = index == 0 and name.rpartition(".")[2] in {"q_proj", "k_proj", "v_proj"}
            total += 4 * in_features * out_features + 6 * rank * (in_features + out_features)
            if no_input_gradient:
                total -= 2 * in_features * out_features + 2 * rank * in_features
    return total
