"""Unknown keys of a configuration: why one is refused on purpose, or which known one is nearest. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel

# Keys that other tools know and this one refuses on purpose: the error says why instead of guessing a typo.
_UNWANTED = {
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

# What `sampling.extra` must not carry: it would change what is asked behind the back of plan and budget.
PLACED = {
    "n": "set samples; each is a request, a key and a row of its own",
    **dict.fromkeys(("stream", "stream_options"), "set [sampling] stream"),
    **dict.fromkeys(("logprobs", "top_logprobs"), "set [sampling] top_logprobs"),
}


def suggestion(root: type[BaseModel], loc: Sequence[int | str]) -> str:
    """A remedy for the unknown key at the end of `loc`, the path to it from the root of the configuration."""
    if loc[-1] in _UNWANTED:
        return _UNWANTED[str(loc[-1])]
    model: Any = root
    for part in loc[:-1]:
        found = model.model_fields.get(str(part)) if hasattr(model, "model_fields") else None
        if found is None:
            return ""
        kinds = [found.annotation, *get_args(found.annotation)]
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if model is None:
            return ""
    known = list(model.model_fields)
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
