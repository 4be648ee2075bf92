"""Tiny configurations of the families that students come from."""

from __future__ import annotations

from typing import Any

import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}

# Routed experts and latent attention (MLA), as DeepSeek has them.
LATENT_ATTENTION: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}

# Class of the configuration, and its values. Windows and chunks are shorter than the documents of the tests.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON),
    "llama4_text": (
        "Llama4TextConfig",
        {
            **COMMON,
            **EXPERTS,
            "head_dim": 8,
            "attention_chunk_size": 16,
            "intermediate_size_mlp": 48,
            "num_hidden_layers": 4,
            "interleave_moe_layer_step": 2,
        },
    ),
    "mistral": ("MistralConfig", {**COMMON, "sliding_window": 8}),
    "ministral": (
        "MinistralConfig",
        {
            **COMMON,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "ministral3": ("Ministral3Config", {**COMMON, "head_dim": 8}),
    "mixtral": ("MixtralConfig", {**COMMON, **EXPERTS}),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen2_sliding": (
        "Qwen2Config",
        {**COMMON, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **COMMON,
            **EXPERTS,
            "shared_expert_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", {**COMMON, **EXPERTS, "head_dim": 8}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **COMMON,
            **EXPERTS,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "num_hidden_layers": 4,
        },
    ),
    "qwen3_5_text": (
        "Qwen3_5TextConfig",
        {
            **COMMON,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_hidden_layers": 4,
        },
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeTextConfig",
        {
            **COMMON,
            **EXPERTS,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "num_hidden_layers": 4,
        },
    ),
    "gemma": ("GemmaConfig", {**COMMON, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**COMMON, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            **COMMON,
            "head_dim": 8,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma3n_text": (
        "Gemma3nTextConfig",
        {
            **COMMON,
            "head_dim": 8,
            "sliding_window": 8,
            "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "intermediate_size": 48,
            "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "gemma4_text": (
        "Gemma4TextConfig",
        {
            **COMMON,
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 8,
            "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi": ("PhiConfig", {**COMMON}),
    "phi3": ("Phi3Config", {**COMMON, "sliding_window": 8}),
    "phimoe": ("PhimoeConfig", {**COMMON, **EXPERTS, "sliding_window": 8}),
    "smollm3": ("SmolLM3Config", {**COMMON, "no_rope_layers": [1, 0]}),
    "olmo2": ("Olmo2Config", COMMON),
    "olmo3": (
        "Olmo3Config",
        {**COMMON, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "olmoe": ("OlmoeConfig", {**COMMON, **EXPERTS}),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        {
            **COMMON,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_hidden_layers": 4,
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            **COMMON,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.3,
        },
    ),
    "granitemoe": ("GraniteMoeConfig", {**COMMON, **EXPERTS}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **COMMON,
            **EXPERTS,
            "shared_intermediate_size": 48,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "mamba_chunk_size": 16,
            "layer_types": ["mamba", "attention"],
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **COMMON,
            **EXPERTS,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "glm4": ("Glm4Config", {**COMMON, "head_dim": 8}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            **COMMON,
            **EXPERTS,
            "head_dim": 8,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**COMMON, **EXPERTS, **LATENT_ATTENTION},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**COMMON, **EXPERTS, **LATENT_ATTENTION},
    ),
    "minicpm3": (
        "MiniCPM3Config",
        {
            **COMMON,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    "lfm2": ("Lfm2Config", {**COMMON, "layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {**COMMON, **EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {**COMMON, "head_dim": 8}),
    "dots1": (
        "Dots1Config",
        {
            **COMMON,
            **EXPERTS,
            "head_dim": 8,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 320,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 320,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bloom": (
        "BloomConfig",
        {
            "vocab_size": 320,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "falcon": (
        "FalconConfig",
        {
            "vocab_size": 320,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "new_decoder_architecture": False,
            "alibi": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bamba": (
        "BambaConfig",
        {
            **COMMON,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "mamba_chunk_size": 16,
            "attn_layer_indices": [1],
        },
    ),
    "jamba": (
        "JambaConfig",
        {
            **COMMON,
            **EXPERTS,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**COMMON, "head_dim": 8, "lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
    ),
    "falcon_h1": (
        "FalconH1Config",
        {
            **COMMON,
            "head_dim": 8,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_ssm": 64,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "mamba_chunk_size": 16,
        },
    ),
    "mamba": (
        "MambaConfig",
        {
            "vocab_size": 320,
            "hidden_size": 32,
            "state_size": 8,
            "num_hidden_layers": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "vocab_size": 320,
            "hidden_size": 32,
            "state_size": 8,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "xglm": (
        "XGLMConfig",
        {
            "vocab_size": 320,
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "cohere2": (
        "Cohere2Config",
        {
            **COMMON,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "stablelm": ("StableLmConfig", COMMON),
    "nemotron": ("NemotronConfig", COMMON),
    "exaone4": (
        "Exaone4Config",
        {**COMMON, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "starcoder2": ("Starcoder2Config", {**COMMON, "sliding_window": 8}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": 320,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gptj": (
        "GPTJConfig",
        {
            "vocab_size": 320,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "rotary_dim": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}

# Multimodal folders: the class of the whole configuration, and the family of its text part.
MULTIMODAL: dict[str, tuple[str, str]] = {
    "gemma3_folder": ("Gemma3Config", "gemma3_text"),
    "qwen3_5_folder": ("Qwen3_5Config", "qwen3_5_text"),
}

VISION: dict[str, dict[str, Any]] = {
    "gemma3_folder": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    },
    "qwen3_5_folder": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 2,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 8,
    },
}

FAMILIES = (*CONFIGURATIONS, *MULTIMODAL)


def configuration(family: str) -> Any:
    """Return the tiny configuration of a family."""
    if family in MULTIMODAL:
        name, text = MULTIMODAL[family]
        values = CONFIGURATIONS[text][1]
        return getattr(transformers, name)(text_config=values, vision_config=VISION[family])
    name, values = CONFIGURATIONS[family]
    return getattr(transformers, name)(**values)
