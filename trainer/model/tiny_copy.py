"""Build a tiny random model with the architecture of a base: the same classes, layer kinds and switches.

It shows how the architecture computes a row without reading the base's weights. Widths, depths, numbers of
experts and vocabulary are cut; windows and chunks of attention become shorter than the test's documents.
"""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from trainer.model.structure import is_token_id

# Layers that are kept at least; more where the kinds of layers need it, up to the second number.
LAYERS, MAX_LAYERS = 2, 8

# Tokens of the windows and chunks of attention in the copy.
WINDOW = 8

VOCABULARY = 128

# Weights are drawn wide, so that a token far away changes the logits by far more than rounding does.
WEIGHT_FACTOR = 4.0

HEADS, KEY_VALUE_HEADS, HEAD_SIZE, WIDTH = 4, 2, 16, 64

# Names of sizes in transformers' configurations, and the value in the copy. A name that a configuration
# doesn't have is left out; a size that is None or 0 there (switched off) stays so.
_SIZES: dict[str, int] = {
    "hidden_size": WIDTH,
    "hidden_size_global": WIDTH,
    "d_model": WIDTH,
    "n_embd": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "lru_width": WIDTH,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "shared_intermediate_size": 96,
    "shared_expert_intermediate_size": 48,
    "moe_intermediate_size": 48,
    "expert_intermediate_size": 48,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "num_heads": 8,
    "n_inner": 96,
    "num_attention_heads": HEADS,
    "n_head": HEADS,
    "n_heads": HEADS,
    "kv_n_heads": KEY_VALUE_HEADS,
    "d_head": HEAD_SIZE,
    "d_inner": 96,
    "attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_attention_heads": HEADS,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "embedding_dim": WIDTH,
    "n_mamba_heads": 8,
    "mamba_headdim": 16,
    "head_dim": HEAD_SIZE,
    "global_head_dim": 2 * HEAD_SIZE,
    "kv_channels": HEAD_SIZE,
    "query_pre_attn_scalar": HEAD_SIZE,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_seq_len": 256,
    "max_source_positions": 256,
    "max_target_positions": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "num_expert_group": 1,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 32,
    "mamba_head_dim": 32,
    "mamba_d_ssm": 128,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "ssm_state_size": 8,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "state_size": 8,
    "n_groups": 1,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "rotary_dim": HEAD_SIZE // 2,
}

# Names of counts that are cut but never raised: some classes take one expert a token only.
_COUNT = re.compile(r"expert|topk|moe_k|top_k")

_VOCABULARIES = (
    "vocab_size",
    "decoder_vocab_size",
    "vocab_size_per_layer_input",
    "encoder_hash_byte_group_vocab",
)

# Tokens that attention looks back at most, or chunks that it stays in.
_WINDOWS = dict.fromkeys(
    ("sliding_window", "sliding_window_size", "attention_window_size", "window_size", "attention_chunk_size"),
    WINDOW,
)

_DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "num_blocks",
    "decoder_layers",
    "encoder_layers",
)

# Numbers of layers that are laid out otherwise than the rest; the copy's depth is below them in large models.
_LEADING = {
    "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0,
    "max_window_layers": 1,
    "num_layers_per_stack": 1,
}


def tiny_copy(config: Any, *, seed: int = 0, vocabulary: int = VOCABULARY) -> Any:
    """Build a tiny random model of the same architecture on the CPU, in fp32, in evaluation mode.

    Args:
        config: configuration of a causal language model; it is not changed. Of a multimodal model only the
            text part is shrunk.
        vocabulary: token ids of the copy.

    Raises:
        Exception: the class can't be built with small sizes; every class raises its own kinds.
    """
    try:
        model = _build(config, shrink(config, vocabulary), seed)
    except Exception:  # noqa: BLE001 - see above; some classes need more layers, or an int for each token id
        model = _build(config, shrink(config, vocabulary, careful=True), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(WEIGHT_FACTOR)
    return model.eval()


def _build(config: Any, small: Any, seed: int) -> Any:
    """Build the causal class of `config` with the small text configuration."""
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if type(small) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # a text part without a name of its own
                text_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
                return text_class._from_config(small, dtype=torch.float32)
            return AutoModelForCausalLM.from_config(small, dtype=torch.float32, trust_remote_code=False)
    finally:
        torch.random.set_rng_state(state)


def shrink(config: Any, vocabulary: int = VOCABULARY, *, careful: bool = False) -> Any:
    """Return the text configuration with small sizes.

    Args:
        careful: keep `MAX_LAYERS` layers, and an int wherever a token id is one.
    """
    text = config.get_text_config(decoder=True)
    # The decoder of an encoder-decoder has the same class, with its values under other names. A class around
    # a text configuration alone, such as a draft model, differs from the text part.
    is_text = type(text) is type(config) or set(config.sub_configs) == {"text_config"}
    small = copy.deepcopy(config if is_text else text)
    values = small.to_dict()
    return type(small).from_dict({**values, **_changes(values, vocabulary, careful=careful)})


def _changes(values: dict[str, Any], vocabulary: int, *, careful: bool) -> dict[str, Any]:
    """Return the entries of a configuration that are changed, those of configurations within it too."""
    depth = MAX_LAYERS if careful else _depth(values)
    changes = {
        **_small_sizes(values, vocabulary),
        **_small_lists(values, depth, vocabulary, keep_ids=careful),
    }
    if isinstance(values.get("rope_parameters"), dict):
        changes["rope_parameters"] = _plain_rope(values["rope_parameters"])
    for name, value in values.items():
        if name.endswith("_config") and name != "per_layer_config" and isinstance(value, dict):
            changes[name] = {**value, **_changes(value, vocabulary, careful=careful)}
    return changes


def _small_sizes(values: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Return the sizes that are changed. Equal numbers of heads and key-value heads stay equal."""
    sizes = {**_SIZES, **dict.fromkeys(_VOCABULARIES, vocabulary), **_WINDOWS}
    changes: dict[str, Any] = {
        name: min(size, values[name]) if name in _WINDOWS or _COUNT.search(name) else size
        for name, size in sizes.items()
        if type(values.get(name)) is int and values[name] > 0
    }
    heads, key_value = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if isinstance(key_value, int) and key_value > 0:
        is_grouped = key_value != heads
        changes["num_key_value_heads"] = min(KEY_VALUE_HEADS, key_value) if is_grouped else HEADS
    if wide := values.get("attention_hidden_size"):  # a multiple of the model's width
        changes["attention_hidden_size"] = WIDTH * int(wide) // int(values["hidden_size"])
        if values.get("attention_head_dim"):
            changes["attention_head_dim"] = changes["attention_hidden_size"] // HEADS
    if values.get("qk_rope_head_dim") and values.get("head_dim") == values["qk_rope_head_dim"]:
        changes["head_dim"] = _SIZES["qk_rope_head_dim"]
    return changes


def _small_lists(values: dict[str, Any], depth: int, vocabulary: int, *, keep_ids: bool) -> dict[str, Any]:
    """Return the depth, what is listed by layer, and token ids that the small vocabulary has.

    Args:
        keep_ids: replace a token id outside the vocabulary by its last one; otherwise by None.
    """
    layers = next((values[name] for name in _DEPTHS if isinstance(values.get(name), int)), depth)
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and len(value) == layers:
            changes[name] = value[:depth]
        elif name == "per_layer_config" and isinstance(value, dict):
            changes[name] = {
                layer: {**each, **_small_sizes(each, vocabulary)}
                for layer, each in value.items()
                if int(layer) < depth
            }
        elif name in _DEPTHS and isinstance(value, int):
            changes[name] = depth
        elif name in _LEADING and isinstance(value, int):
            changes[name] = min(value, _LEADING[name])
        elif is_token_id(name):
            changes[name] = _known_ids(value, vocabulary)
            if type(value) is int and (keep_ids or name in ("cls_token_id", "sep_token_id")):
                changes[name] = min(value, vocabulary - 1)  # some classes take no None
    return changes


def _known_ids(value: Any, vocabulary: int) -> Any:
    """Return token ids that are in the small vocabulary, None without any."""
    if isinstance(value, list):
        return [each for each in value if each < vocabulary] or None
    return value if isinstance(value, int) and value < vocabulary else None


def _depth(values: dict[str, Any]) -> int:
    """Return how many leading layers hold every kind of layer, within `LAYERS` and `MAX_LAYERS`."""
    layers = next((int(values[name]) for name in _DEPTHS if isinstance(values.get(name), int)), LAYERS)
    if per_stack := values.get("num_layers_per_stack"):  # stacks that are run several times
        return min(MAX_LAYERS, layers // int(per_stack))
    kinds = [v for v in values.values() if isinstance(v, list) and len(v) == layers]
    depth = LAYERS
    for each in kinds:
        firsts = [each.index(kind) for kind in {str(k): k for k in each}.values()]
        depth = max(depth, max(firsts, default=0) + 1)
    periods = [
        v for n, v in values.items() if n.endswith(("_period", "_interval", "_step")) and type(v) is int
    ]
    depth = max([depth, *(p for p in periods if p <= MAX_LAYERS)])
    return min(layers, depth, MAX_LAYERS)


def _plain_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return rotary parameters without tables that are as long as the original head."""
    if any(isinstance(value, dict) for value in parameters.values()):
        return {n: _plain_rope(v) if isinstance(v, dict) else v for n, v in parameters.items()}
    kept = {name: value for name, value in parameters.items() if not isinstance(value, list)}
    return kept if len(kept) == len(parameters) else {**kept, "rope_type": "default"}
