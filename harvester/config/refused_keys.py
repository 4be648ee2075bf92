"""List the keys that harvest.toml refuses on purpose, each with the reason or the key to use instead."""

from __future__ import annotations

# Keys that other tools know and that this one refuses by design: the error gives the reason, not a spelling.
REFUSED_KEYS = {
    **dict.fromkeys(
        ("api_keys", "api_key_envs", "keys", "key_pool"), "one credential per teacher: no key pools"
    ),
    **dict.fromkeys(
        ("proxy", "proxies", "proxy_list"), "no proxy rotation; [run] trust_env uses the machine's proxy"
    ),
    **dict.fromkeys(("user_agent", "headers", "default_headers"), "the client says who it is: no disguise"),
    **dict.fromkeys(("api_key", "key", "token"), "never the key itself: name its variable in api_key_env"),
    **dict.fromkeys(
        ("force", "ignore_terms", "skip_terms", "accept_terms"), "the terms gate has no override"
    ),
}

# Fields of a request body that servers know and `[sampling]` does not, though some are spelled like its keys.
_REQUEST_FIELDS = (
    *("max_completion_tokens", "top_k", "min_p", "top_a", "typical_p", "repetition_penalty", "logit_bias"),
    *("user", "metadata", "store", "service_tier", "verbosity", "modalities", "prediction", "reasoning"),
    *("thinking", "thinking_budget", "enable_thinking", "include_reasoning", "chat_template_kwargs"),
    *("provider", "tool_choice", "parallel_tool_calls", "functions", "function_call", "guided_json"),
    *("guided_regex", "guided_choice", "stop_token_ids", "ignore_eos", "min_tokens", "random_seed"),
    *("safe_prompt", "safety_identifier", "prompt_cache_key", "web_search_options", "num_ctx", "options"),
)
REFUSED_KEYS |= {
    f"sampling.{name}": f"a field of the request body that is sent as it is: [sampling.extra] {name} = ..."
    for name in _REQUEST_FIELDS
}
# Added to the suggestion for any other unknown key of this table.
REFUSED_KEYS["sampling.*"] = "other fields of the request body go into [sampling.extra], as they are"

# Request fields that `[sampling] extra` must not carry, because plan and budget could not see their effect.
KEYS_WITH_OWN_PLACE = {
    "n": "set samples; [teacher] max_n says how many of them one request may ask for",
    **dict.fromkeys(("stream", "stream_options"), "set [sampling] stream"),
    **dict.fromkeys(("logprobs", "top_logprobs"), "set [sampling] top_logprobs"),
}
