"""Build request bodies that let a server score a given text. There are four forms of them. Pure.

A server supports some of the forms, or none:

`prompt_logprobs`: vLLM's field of `/v1/completions`; `echo`: the older form of the same route, which SGLang
and vLLM serve; `generate`: SGLang's own route beside `/v1`; `chat`: vLLM's field of `/v1/chat/completions`,
with the answer as the last turn. llama.cpp's server returns log-probabilities of generated tokens only
(ggml-org/llama.cpp#27174 and #15189, both open in August 2026), so none of them works there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from harvester.api.types import Message, Prompt

Way = Literal["prompt_logprobs", "echo", "generate", "chat"]
WAYS: tuple[Way, ...] = get_args(Way)
# Ways that score a text as it is. The other one scores the last turn of a chat, in the server's own template.
TEXT_WAYS: frozenset[Way] = frozenset({"prompt_logprobs", "echo", "generate"})
PATHS: Mapping[Way, str] = {
    "prompt_logprobs": "/completions",
    "echo": "/completions",
    "generate": "/generate",
    "chat": "/chat/completions",
}
# One token is generated: some servers refuse to generate none.
GENERATED_TOKENS = 1
# Servers list the token of the text only beside one likeliest token at least; that one alone is not kept.
LEAST_LISTED = 1
# Fields of a prompt's line: the text for `TEXT_WAYS`, and whether the last turn of a chat is left open.
TEXT_FIELD, OPEN_FIELD = "text", "open"

PROBE_TEXT = "The quick brown fox jumps over the lazy dog."


def url_of(base_url: str, path: str) -> str:
    """Return the address of a route; SGLang's own lies beside `/v1`, not below it."""
    return f"{base_url.removesuffix('/v1') if path == PATHS['generate'] else base_url}{path}"


def probe_line(way: Way) -> dict[str, Any]:
    """Return the prompt line of the probe, which proves that the server offers this way."""
    line: dict[str, Any] = {"id": f"score-probe-{way}"}
    if way in TEXT_WAYS:
        return line | {"prompt": PROBE_TEXT}
    turns = [{"role": "user", "content": "Say something."}, {"role": "assistant", "content": PROBE_TEXT}]
    return line | {"messages": turns}


def offered_by_prompt(prompt: Prompt) -> tuple[Way, ...]:
    """Return the ways in which a prompt can be scored, in the order in which they are tried."""
    ways: tuple[Way, ...] = ("prompt_logprobs", "echo", "generate") if text_of(prompt) else ()
    return (*ways, "chat") if _ends_with_answer(prompt.messages) else ways


def text_of(prompt: Prompt) -> str | None:
    """Return the text that `TEXT_WAYS` score: the line's `text`, or its `prompt`; None where it has none."""
    text = prompt.metadata.get(TEXT_FIELD)
    if isinstance(text, str) and text:
        return text
    if text is None and len(prompt.messages) == 1 and prompt.messages[0]["role"] == "user":
        content = prompt.messages[0]["content"]
        return content if isinstance(content, str) and content else None
    return None


def _ends_with_answer(messages: tuple[Message, ...]) -> bool:
    last = messages[-1]
    return len(messages) > 1 and last["role"] == "assistant" and bool(last.get("content"))


def body_of(
    way: Way, model: str, prompt: Prompt, extra: Mapping[str, Any], listed: int | None = None
) -> dict[str, Any]:
    """Return the body of a scoring request.

    Args:
        listed: likeliest tokens asked for at each token of the text; None: only that of the text is kept.

    Raises:
        ValueError: the prompt can't be scored in this way.
    """
    if way not in offered_by_prompt(prompt):
        needed = (
            f"a text: {TEXT_FIELD!r}, or 'prompt'" if way in TEXT_WAYS else "a last turn of the assistant"
        )
        raise ValueError(f"a line that is scored by {way!r} needs {needed}")
    shared = {"model": model, "max_tokens": GENERATED_TOKENS, **extra}
    least = listed or LEAST_LISTED
    if way == "chat":
        is_open = prompt.metadata.get(OPEN_FIELD) is True
        return shared | {
            "messages": list(prompt.messages),
            "prompt_logprobs": least,
            "add_generation_prompt": False,
            "continue_final_message": is_open,
        }
    text = text_of(prompt)
    if way == "prompt_logprobs":
        # The text comes out of a chat template, which has written what begins a text.
        return shared | {"prompt": text, "prompt_logprobs": least, "add_special_tokens": False}
    if way == "echo":
        return shared | {"prompt": text, "echo": True, "logprobs": least}
    sampling = {"max_new_tokens": GENERATED_TOKENS, "temperature": 0}
    return {"model": model, **extra} | {
        "text": text,
        "sampling_params": sampling,
        "return_logprob": True,
        "logprob_start_len": 0,
        "return_text_in_logprobs": True,
        **({} if listed is None else {"top_logprobs_num": listed}),
    }


def listed_of(body: Mapping[str, Any]) -> int:
    """Return how many likeliest tokens a stored scoring request asks to keep at each token; 0: none."""
    values = [body.get(name) for name in ("prompt_logprobs", "logprobs", "top_logprobs_num")]
    return max((value for value in values if isinstance(value, int) and value > LEAST_LISTED), default=0)


def way_named(via: str, prompt: Prompt) -> Way:
    """Return the way of a configuration; for "auto", which no probe has settled yet, the first that fits."""
    if via in WAYS:
        return via
    return next(iter(offered_by_prompt(prompt)), WAYS[0])


def way_of(body: Mapping[str, Any]) -> Way | None:
    """Return the way of a stored request's body; None for a request for an answer."""
    if "text" in body and "return_logprob" in body:
        return "generate"
    if isinstance(body.get("prompt"), str):
        return "echo" if body.get("echo") is True else "prompt_logprobs"
    if "prompt_logprobs" in body and body.get("add_generation_prompt") is False:
        return "chat"
    return None


def endpoint_in_key(name: str, body: Mapping[str, Any]) -> str:
    """Return what stands for the endpoint in the key of a stored request; for a scored text with its route.

    Args:
        name: address or identity of the teacher.
    """
    way = way_of(body)
    return name if way is None else f"{name}{PATHS[way]}"


def scored_text_of(body: Mapping[str, Any]) -> str:
    """Return the text that a scoring request asks about: a whole text, or the last turn of a chat."""
    if "messages" in body:
        return str(body["messages"][-1].get("content") or "")
    return str(body.get("prompt") or body.get("text") or "")
