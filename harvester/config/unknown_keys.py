"""Unknown keys of a configuration: why one is refused on purpose, or which known one is nearest. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import get_args

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

_SURE = 0.8
"""A key of another table must be so alike: a wrong guess far away helps nobody."""


def suggestion(root: type[BaseModel], loc: Sequence[int | str]) -> str:
    """A remedy for the unknown key at the end of `loc`, the path to it from the root of the configuration."""
    if loc[-1] in _UNWANTED:
        return _UNWANTED[str(loc[-1])]
    key, table = str(loc[-1]), ".".join(str(part) for part in loc[:-1])
    places = _places(root)
    here = [name for path, name in places if path == table]
    elsewhere: dict[str, str] = {}
    for path, name in places:
        elsewhere.setdefault(name, f"{path}.{name}" if path else name)
    if key in elsewhere:
        return f"did you mean {elsewhere[key]!r}?"
    if near := difflib.get_close_matches(key, here, n=1):
        return f"did you mean {near[0]!r}?"
    if near := difflib.get_close_matches(key, elsewhere, n=1, cutoff=_SURE):
        return f"did you mean {elsewhere[near[0]]!r}?"
    return f"known here: {', '.join(here)}" if here else ""


def _places(model: type[BaseModel], table: str = "") -> list[tuple[str, str]]:
    """Every key there is, as (table, key), the outer tables first."""
    found = [(table, name) for name in model.model_fields]
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += _places(kind, f"{table}.{name}" if table else name)
    return found
