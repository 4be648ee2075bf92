"""List the actions of fault scripts: name, stage, whether the reply is billed, options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Stage(StrEnum):
    """The point at which an action changes a reply."""

    REFUSE = "refuse"  # instead of generating
    ANSWER = "answer"  # on the completion object, before it becomes bytes
    BODY = "body"  # on the body's bytes and headers
    STREAM = "stream"  # on the events of a stream; never matches a request without `stream`
    WIRE = "wire"  # on the socket


@dataclass(frozen=True, slots=True)
class Action:
    """One kind of fault. `billed`: charged in the ledger unless the rule says otherwise."""

    stage: Stage
    billed: bool
    options: frozenset[str]


def _stage(stage: Stage, billed: bool, table: dict[str, str]) -> dict[str, Action]:
    return {name: Action(stage, billed, frozenset(options.split())) for name, options in table.items()}


ACTIONS: dict[str, Action] = {
    **_stage(
        Stage.REFUSE,
        False,
        {
            "status": "status code kind message body headers content_type retry_after",
            "redirect": "status location",
            "html": "status",  # a captive portal
            "error_200": "code kind message",
        },
    ),
    **_stage(
        Stage.ANSWER,
        True,
        {
            "delay": "",  # `delay_s` is an option of every action
            "patch": "value",  # RFC 7396 merge patch of the completion; null removes
            # Each of those with `at` changes only the choice at that place of several; without it, all.
            "choice": "value at",  # the same for each choice
            "message": "value at",  # the same for each message
            "content": "value at",
            "null_content": "at",
            "empty_content": "at",
            "refusal": "value at",
            "reasoning": "value at",
            "tool_call": "function arguments at",
            "length": "at",
            "content_filter": "at",
            "finish_reason": "value at",
            "usage": "value",
            "no_usage": "",
            "id": "value",
            "no_id": "",
            "model": "value",
            "fingerprint": "value",
            "empty_choices": "",
            "null_choices": "",
            "no_choices": "",
            "extra_choice": "",
            "reversed_choices": "",
            "shuffled_choices": "",
            "fewer_choices": "count",  # only so many; the others are not billed
            "repeated_choice": "",  # the last choice has the index of the first
            "wrong_index": "",
            "parts": "reasoning",  # content as a list of parts, in a stream a list in each delta
            "think": "value form",  # reasoning between tags; form "opening" or "closing": only that tag
            "blank_content": "value",
            "no_message": "value",  # a choice without message; the value is its finish reason
            "error_beside": "place code message",  # an error next to choices, in a choice or in its message
            "base_resp": "code message",  # MiniMax' envelope for errors, without choices
            "envelope": "value",  # the whole completion inside a member of this name
            "null_logprobs": "",
            "legacy_logprobs": "",
        },
    ),
    **_stage(
        Stage.BODY,
        True,
        {
            "junk_json": "",
            "truncated_json": "share",
            "invalid_utf8": "",
            "bom": "",
            "nan": "",
            "duplicate_keys": "",
            "deep_json": "depth",
            "big_integer": "digits",
            "lone_surrogate": "",
            "nul": "",
            "empty_body": "",
            "body": "value content_type",
            "content_type": "value",
            "headers": "value",
            "answer_status": "status",  # the answer under another status, such as 201
            "around": "prefix suffix",  # texts around the body
            "gzip_bomb": "decoded_bytes",
            "long_header": "bytes",
        },
    ),
    **_stage(
        Stage.STREAM,
        True,
        {
            "no_done": "",  # everything but `[DONE]`
            "stream_cut": "events",  # clean end after this many events
            "stream_error": "events code message",
            "stream_comments": "",
            "stream_junk": "events",
            "stream_no_finish": "",  # `[DONE]`, but no finish reason
            "stream_no_blank_lines": "",  # a line end between events, where two belong
            "stream_so_far": "",  # each delta holds all text so far
            "stream_twice": "",  # each event two times
            "stream_split_emoji": "",  # half a character at the end of one event, half in the next
        },
    ),
    **_stage(
        Stage.WIRE,
        True,
        {
            "silence": "",  # until the caller leaves; billed: it may have generated
            "reset": "",
            "fin": "",
            "reset_body": "share",
            "cut_body": "share",
            "chunk_cut": "share",
            "chunk_no_end": "",  # the whole body, but not the last chunk
            "length_no_end": "",  # the whole body, under a length that is too large
            "open_end": "",  # the whole body in a chunk, then nothing, and no end
            "stall_body": "share",
            "fin_headers": "",
            "garbage_status": "value",
            "drip": "bytes interval_s",
            "endless_headers": "bytes",
            "huge_body": "bytes",
            "close_idle": "",  # whole reply, then the kept-alive connection is closed unannounced
        },
    ),
}

# Actions after which the caller can't hold the complete answer: the ledger marks the charge as `cut`.
LOST = frozenset(
    {"silence", "reset", "fin", "reset_body", "cut_body", "chunk_cut", "stall_body", "fin_headers"}
    | {"garbage_status", "endless_headers", "huge_body", "truncated_json", "empty_body"}
    | {"stream_cut", "stream_error"}
)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


_COUNT = (_is_count, "a whole number from 1 up")
_OPTION_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "status": (lambda value: _is_count(value) and 200 <= value <= 599, "a status from 200 to 599"),
    "share": (lambda value: _is_number(value) and value <= 1, "a number from 0 to 1"),
    "place": (lambda value: value in ("top", "choice", "message"), "top, choice or message"),
    "form": (lambda value: value in ("whole", "opening", "closing"), "whole, opening or closing"),
    "interval_s": (_is_number, "a number of seconds"),
    "headers": (lambda value: isinstance(value, dict), "an object"),
    "at": (lambda value: value == 0 or _is_count(value), "a whole number from 0 up"),
    **dict.fromkeys(("bytes", "events", "depth", "digits", "decoded_bytes", "count"), _COUNT),
}
_NEED_OBJECT = frozenset({"patch", "choice", "message", "headers"})
_NEED_VALUE = _NEED_OBJECT | {"content", "body"}


def option_fault(action: str, options: Mapping[str, Any]) -> str | None:
    """Return what is wrong with an action's options, None if they are right. Used when a script is read."""
    for name, value in options.items():
        check = _OPTION_CHECKS.get(name)
        if check is not None and not check[0](value):
            return f"{name} must be {check[1]}"
    if action in _NEED_VALUE and "value" not in options:
        return f"{action} needs a value"
    if action in _NEED_OBJECT and not isinstance(options["value"], dict):
        return f"{action} needs an object as its value"
    return None
