"""Parse the body of a chat completion into a Completion. Pure.

Tolerant where teachers differ (usage, finish reasons, reasoning fields, content parts), strict about one
thing: a 200 without a completion is an error, never an empty answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from harvester.api.error_body import error_inside, excerpt
from harvester.api.response_format import matches
from harvester.api.sse import assemble, is_stream
from harvester.api.types import Alternative, Completion, Outcome, TokenLogprob, Usage
from harvester.errors import BrokenAnswer, TeacherError
from harvester.system.failpoints import reach

MAX_PLAUSIBLE_TOKENS = 1_000_000_000
BYTES_PER_TOKEN = 4
_FINISHED = frozenset({"stop", "eos", "end_turn", "stop_sequence", "tool_calls", "function_call"})
_BROKEN_FINISH = frozenset({"error", "network_error", "abort"})


def estimate_tokens(text_bytes: int) -> int:
    """Estimate the tokens of a text from its UTF-8 bytes: one per four bytes, rounded up."""
    return -(-text_bytes // BYTES_PER_TOKEN)


def parse(
    raw: bytes, input_tokens: int = 0, response_format: Any = None, *, logprobs: bool = True
) -> Completion:
    """Parse one response body.

    Args:
        raw: body as received, without content encoding; JSON, or the events of a stream.
        input_tokens: estimate to fall back on when the teacher reports no usable `usage`.
        response_format: what the request asked for; an answer of another form gets the outcome `invalid`.
        logprobs: whether to parse log-probabilities too, which takes six times as long where there are any.

    Raises:
        BrokenAnswer: it contains no completion; the error has the bytes in `raw`.
        TeacherError: the body contains an error instead.
    """
    try:
        reach("completion.parse")
        parsed = _parse(raw, input_tokens, logprobs)
    except (TeacherError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 - the answer was paid for: a bug of ours must not lose it
        usage = Usage(input_tokens, estimate_tokens(len(raw)), source="estimated")
        return Completion(None, Outcome.UNKNOWN, "", usage)
    if response_format and parsed.outcome is Outcome.OK and not matches(parsed.text or "", response_format):
        return replace(parsed, outcome=Outcome.INVALID)
    return parsed


def _parse(raw: bytes, input_tokens: int, logprobs: bool) -> Completion:
    document, exact = (assemble(raw), True) if is_stream(raw) else _load(raw)
    choices = document.get("choices")
    if not isinstance(choices, list) or not choices:
        error = error_inside(document, raw)
        if error is not None:
            raise error
        raise _broken("status 200 without choices", raw, billed="usage" in document)
    # One choice is asked for; if more come, or in another order, ours is the one with index 0.
    choice = next((item for item in choices if isinstance(item, dict) and item.get("index") == 0), choices[0])
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise _broken("status 200 whose choice has no message", raw, billed=True)
    finish_reason = str(choice.get("finish_reason") or "")
    if finish_reason in _BROKEN_FINISH:
        raise _broken(f"the teacher ended its answer with {excerpt(finish_reason)!r}", raw, billed=True)
    text = _text(message.get("content"))
    refusal = _text(message.get("refusal"))
    tools = message.get("tool_calls") or message.get("function_call")
    reasoning = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    return Completion(
        text=text,
        outcome=_outcome(finish_reason, text, refusal, tools) if exact else Outcome.UNKNOWN,
        finish_reason=finish_reason,
        usage=_usage(document.get("usage"), input_tokens, text, reasoning),
        reasoning=reasoning,
        refusal=refusal,
        tool_calls_json=orjson.dumps(tools).decode() if tools else None,
        model=_string(document.get("model")),
        system_fingerprint=_string(document.get("system_fingerprint")),
        response_id=_string(document.get("id")),
        provider=_string(document.get("provider")),
        logprobs=_logprobs(choice.get("logprobs")) if logprobs else (),
    )


def _load(raw: bytes) -> tuple[dict[str, Any], bool]:
    """The document, and whether it was read without loss; see `_load_tolerantly`."""
    exact = True
    try:
        document = orjson.loads(raw.removeprefix(b"\xef\xbb\xbf"))
    except (orjson.JSONDecodeError, RecursionError):
        document, exact = _load_tolerantly(raw), False
    if not isinstance(document, dict):
        raise _broken("status 200 whose body is not a JSON object", raw, billed=False)
    return document, exact


def _load_tolerantly(raw: bytes) -> Any:
    """Read JSON with NaN, lone surrogates or invalid UTF-8, replacing what can't be kept: it was paid for."""
    try:
        document = json.loads(raw.decode("utf-8-sig", "replace"), parse_int=_integer)
        return json.loads(json.dumps(document, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecursionError) and raw.lstrip()[:1] == b"{":
            raise  # an object nested too deep: it was paid for, so `parse` stores it as `unknown`
        start = excerpt(raw[:400].decode("utf-8", "replace"))
        is_page = raw.lstrip()[:1] == b"<"  # HTML from a proxy in between
        raise _broken(
            f"status 200 whose body is not JSON: {start}",
            raw,
            billed=not is_page,
            error_code="html" if is_page else "",
        ) from None


def _integer(digits: str) -> int | float:
    """An integer; infinity for 400 digits or more, which Python refuses to convert from about 4,300 on."""
    return int(digits) if len(digits) < 400 else math.inf


def _broken(message: str, raw: bytes, *, billed: bool, error_code: str = "") -> BrokenAnswer:
    return BrokenAnswer(message, status=200, error_code=error_code, raw=raw, maybe_billed=billed)


def _outcome(finish_reason: str, text: str | None, refusal: str | None, tools: Any) -> Outcome:
    if finish_reason == "length":
        return Outcome.TRUNCATED
    if finish_reason == "content_filter":
        return Outcome.FILTERED
    if refusal:
        return Outcome.REFUSED
    if tools:
        return Outcome.TOOL_CALL
    if not text:
        return Outcome.EMPTY
    return Outcome.OK if finish_reason in _FINISHED else Outcome.UNKNOWN


def _text(value: Any) -> str | None:
    """Text of a content field; the text parts joined where it is a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = [part.get("text") for part in value if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str)) or None
    return None


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _usage(usage: Any, input_estimate: int, text: str | None, reasoning: str | None) -> Usage:
    """Reported counts where they are plausible, else an estimate that says so."""
    fields = usage if isinstance(usage, dict) else {}
    input_tokens, output_tokens = _count(fields.get("prompt_tokens")), _count(fields.get("completion_tokens"))
    if input_tokens is None or output_tokens is None:
        written = len((text or "").encode("utf-8", "replace")) + len(
            (reasoning or "").encode("utf-8", "replace")
        )
        return Usage(
            input_tokens=input_estimate if input_tokens is None else input_tokens,
            output_tokens=estimate_tokens(written) if output_tokens is None else output_tokens,
            source="estimated",
        )
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_tokens=_detail(fields, "prompt_tokens_details", "cached_tokens"),
        reasoning_tokens=_detail(fields, "completion_tokens_details", "reasoning_tokens"),
    )


def _count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_PLAUSIBLE_TOKENS:
        return None
    return value


def _detail(fields: Mapping[str, Any], group: str, name: str) -> int:
    details = fields.get(group)
    return (_count(details.get(name)) or 0) if isinstance(details, dict) else 0


def _logprobs(value: Any) -> tuple[TokenLogprob, ...]:
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, list):
        return ()
    return tuple(
        TokenLogprob(
            token=token.token,
            data=token.data,
            logprob=token.logprob,
            top=tuple(_alternative(entry) for entry in item.get("top_logprobs") or () if _is_token(entry)),
        )
        for item in content
        if _is_token(item)
        for token in (_alternative(item),)
    )


def _is_token(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("token"), str)
        and isinstance(item.get("logprob"), int | float)
    )


def _alternative(item: Mapping[str, Any]) -> Alternative:
    data = item.get("bytes")
    try:
        utf8 = bytes(data) if isinstance(data, list) else None
    except (TypeError, ValueError):
        utf8 = None
    return Alternative(token=item["token"], data=utf8, logprob=float(item["logprob"]))
