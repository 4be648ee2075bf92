"""Turn the body of a 200 into one Completion, or into one error that quotes the teacher. Pure.

What is paid and readable is kept; what can't be understood never has the outcome `ok`; an error anywhere in
the body is found before the answer is; a 200 without a completion is an error, never an empty answer. The
shapes that are recognised are listed in `shapes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson

from harvester.api.error_body import error_inside, excerpt
from harvester.api.replies.framing import read_documents, unframed, unwrapped
from harvester.api.replies.logprobs import read_logprobs
from harvester.api.replies.sse import DONE, Assembled, assemble, assemble_lines, is_piece, is_stream
from harvester.api.replies.usage import SHARE, estimate_tokens, read_share, read_usage, usage_members
from harvester.api.response_format import matches
from harvester.api.shapes.envelopes import choices_of
from harvester.api.shapes.finish import Finish, finish_of, finish_word
from harvester.api.shapes.parts import NESTED_MEMBERS, REASONING_MEMBERS, read_content, read_reasoning
from harvester.api.shapes.thoughts import split_thoughts
from harvester.api.shapes.turn_marks import without_marks
from harvester.api.types import Completion, Outcome, Usage
from harvester.errors import BrokenAnswer, TeacherError
from harvester.system.failpoints import reach

__all__ = ["count_elements", "estimate_tokens", "is_complete", "load", "load_choices", "parse"]

# A body with more list elements and members is not parsed: 30 MiB of empty lists would take 1.3 GB.
# Answers of 16,000 tokens with 20 alternatives each have 2.7 million.
MAX_ELEMENTS = 4_000_000
# Fields of a request that offer tools.
TOOL_MEMBERS = ("tools", "functions")
# Smaller bodies can't have as many.
UNCOUNTED_BYTES = 1 << 20


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


def flag_unasked_tool_call(parsed: Completion, body: Mapping[str, Any]) -> Completion:
    """Give a tool call the outcome `invalid` if the request offered no tools: it is no answer to the prompt.

    Args:
        body: the request's body.
    """
    is_asked = any(body.get(name) for name in TOOL_MEMBERS)
    if parsed.outcome is Outcome.TOOL_CALL and not is_asked:
        return replace(parsed, outcome=Outcome.INVALID)
    return parsed


def is_complete(raw: bytes, choices: int = 1) -> bool:
    """Whether a body whose transfer had no proper end is complete all the same.

    JSON is complete with its last bracket, a stream with `[DONE]` or the finish reasons of all choices.

    Args:
        choices: how many a stream must have finished; 1 also takes one that was read up to its usage.
    """
    try:
        loaded = load_choices(raw)
    except (TeacherError, RecursionError, OverflowError):
        return False
    if choices == 1 or not is_stream(raw) or loaded.is_done:
        return True
    return len(loaded.document.get("choices", ())) - len(loaded.unfinished) >= choices


def has_choices(raw: bytes) -> bool:
    """Whether a body holds an answer, in whatever shape."""
    try:
        document = load_choices(raw).document
    except (TeacherError, RecursionError, OverflowError):
        return False
    return bool(choices_of(document)[0])


def count_elements(raw: bytes) -> int:
    """Count what may become a list, an object, a member or an element, without parsing: an upper bound."""
    return raw.count(b",") + raw.count(b"[") + raw.count(b"{")


def load(raw: bytes) -> tuple[dict[str, Any], bool]:
    """Return the document of a body, and whether it was read without loss.

    Raises: see `load_choices`.
    """
    return load_choices(raw).as_one()


def load_choices(raw: bytes) -> Assembled:
    """Return the document of a body, and which of its choices were read without loss.

    Raises:
        ConnectionBroken: a stream that ended before its answer did.
        BrokenAnswer: no JSON object; the message quotes the first words.
        RecursionError: nested too deep.
        OverflowError: more elements than an answer can have.
    """
    if len(raw) > UNCOUNTED_BYTES and count_elements(raw) > MAX_ELEMENTS:
        raise OverflowError("more elements than an answer can have")
    text = unframed(raw)
    if is_stream(text):
        return assemble(raw)
    exact = True
    try:
        document = orjson.loads(text)
    except (orjson.JSONDecodeError, RecursionError):
        documents, exact, rest = _load_tolerantly(text, raw)
        is_cut = rest.startswith("{") and _goes_on(documents[-1])
        if (len(documents) > 1 or is_cut) and all(isinstance(each, dict) for each in documents):
            is_ended = not is_cut and (text.rstrip().endswith(DONE) or not any(map(is_piece, documents)))
            assembled = assemble_lines(documents, raw, is_ended=is_ended)
            return replace(assembled, is_exact=assembled.is_exact and exact)
        document = documents[0]
    else:
        if is_piece(document):  # the only line that came of several
            return assemble_lines([document], raw, is_ended=False)
    if isinstance(document, list) and len(document) == 1:
        document = document[0]
    document = unwrapped(document)
    if not isinstance(document, dict):
        raise _broken(f"status 200 whose body is not a JSON object: {_start_of(raw)}", raw, billed=False)
    whole: frozenset[int] = frozenset()
    return Assembled(document, exact, True, inexact=whole, unfinished=whole, stray=whole)


def _goes_on(document: Any) -> bool:
    """Whether a document holds a piece of an answer that has not ended."""
    choices = choices_of(document)[0] if isinstance(document, dict) else None
    return bool(choices) and not any(finish_word(item) for item in choices or () if isinstance(item, Mapping))


def _load_tolerantly(text: bytes, raw: bytes) -> tuple[list[Any], bool, str]:
    """Read JSON with NaN, lone surrogates, invalid UTF-8, or more behind it: it was paid for.

    Returns its documents (some servers stream several, one a line), whether nothing had to be replaced, and
    what follows them.
    """
    try:
        documents, exact, rest = read_documents(text.decode("utf-8", "replace"))
        return documents, exact and _is_utf8(text), rest
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecursionError) and text.lstrip()[:1] == b"{":
            raise  # an object nested too deep: it was paid for, so `parse` stores it as `unknown`
        is_page = raw.lstrip()[:1] == b"<"  # HTML from a proxy in between
        raise _broken(
            f"status 200 whose body is not JSON: {_start_of(raw)}",
            raw,
            billed=not is_page,
            error_code="html" if is_page else "",
        ) from None


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _start_of(raw: bytes) -> str:
    return excerpt(raw[:400].decode("utf-8", "replace"))


def _broken(message: str, raw: bytes, *, billed: bool, error_code: str = "") -> BrokenAnswer:
    return BrokenAnswer(message, status=200, error_code=error_code, raw=raw, maybe_billed=billed)


@dataclass(frozen=True, slots=True)
class _Message:
    """What the message of a choice holds. `is_clear`: everything in it was understood."""

    text: str | None
    reasoning: str | None
    refusal: str | None
    tools: Any
    is_clear: bool

    def written(self) -> str:
        """Everything that was received besides reasoning, as one text."""
        return "".join((self.text or "", self.refusal or "", self.tools_json() or ""))

    def tools_json(self) -> str | None:
        """The tool calls as JSON, None for none."""
        if not self.tools:
            return None
        try:
            return orjson.dumps(self.tools).decode()
        except (TypeError, ValueError):  # an integer beyond 64 bits
            return json.dumps(self.tools)


def _parse(raw: bytes, input_tokens: int, logprobs: bool) -> Completion:
    document, exact = load(raw)
    choices, holder = choices_of(document)
    choice, is_chosen = _chosen(choices or [])
    finish_reason = finish_word(choice)
    finish = finish_of(finish_reason)
    message = _message_of(choice)
    fields, share = usage_members(holder, document, choice), document.get(SHARE)
    if isinstance(share, Mapping):
        usage, exact = read_share(fields, share), exact and share.get("exact") is not False
    else:
        usage = read_usage(fields, input_tokens, message.written(), message.reasoning or "")
    is_paid = bool(message.text or message.tools or message.reasoning)
    is_finished = finish is Finish.END and bool(message.text)
    is_whole = _raise_error(document, raw, is_paid=is_paid, is_finished=is_finished)
    if not choice or (not is_paid and "message" not in choice and not finish_reason and not message.refusal):
        kind = "without choices" if not choices else "whose choice has no message"
        raise _broken(f"status 200 {kind}: {_start_of(raw)}", raw, billed=bool(choices or fields))
    if finish is Finish.BROKEN:
        words = f"the teacher ended its answer with {excerpt(finish_reason)!r}"
        raise _broken(f"{words}: {_start_of(raw)}", raw, billed=True)
    return Completion(
        text=message.text,
        outcome=_outcome(finish, message, is_clear=exact and is_whole and is_chosen),
        finish_reason=finish_reason,
        usage=usage,
        reasoning=message.reasoning,
        refusal=message.refusal,
        tool_calls_json=message.tools_json(),
        model=_string("model", holder, document),
        system_fingerprint=_string("system_fingerprint", holder, document),
        response_id=_string("id", holder, document),
        provider=_string("provider", holder, document),
        logprobs=read_logprobs(choice.get("logprobs")) if logprobs else (),
    )


def _raise_error(document: Mapping[str, Any], raw: bytes, *, is_paid: bool, is_finished: bool) -> bool:
    """Raise the error in a body; return True where there is none.

    An error of unknown meaning next to a finished answer may be a warning: the answer is kept (False).

    Raises:
        TeacherError: the error.
    """
    error = error_inside(document, raw, is_stream=is_stream(raw))
    if error is None:
        return True
    if is_finished and isinstance(error, BrokenAnswer):
        return False
    if is_paid:
        error.note_possibly_billed()
    raise error


def _chosen(choices: list[Any]) -> tuple[Mapping[str, Any], bool]:
    """The choice with index 0, and whether it is clear which one that is.

    One was asked for, and some servers send more. Servers that omit zeros send it without an index.
    """
    if choices and isinstance(choices[0], str):
        return {"text": choices[0]}, len(choices) == 1
    given = [item for item in choices if isinstance(item, Mapping)]
    zero = [item for item in given if _is_zero(item.get("index"))]
    if zero:
        return zero[0], len(zero) == 1
    without = [item for item in given if item.get("index") is None]
    if without:
        others = sum(type(item.get("index")) is int for item in given)
        return without[0], others == len(choices) - 1
    return (given[0], len(choices) == 1) if given else ({}, True)


def _is_zero(number: Any) -> bool:
    return type(number) is int and number == 0


def _message_of(choice: Mapping[str, Any]) -> _Message:
    message = _fields_of_message(choice)
    content = read_content(message.get("content", message.get("text")))
    text = "".join(content.text) if content.text else None
    holders = [choice[name] for name in ("message", "delta", "text", "content") if choice.get(name)]
    is_nested = len(holders) > 1 and any(_text_in(other) != _text_in(holders[0]) for other in holders)
    is_nested = is_nested or any(message.get(name) for name in NESTED_MEMBERS)
    is_nested = is_nested or message.get("text") not in (
        None,
        "",
        message.get("content", message.get("text")),
    )
    is_clear = content.understood and not is_nested
    thoughts = [_reasoning_of(message, choice)]
    if content.reasoning:
        thoughts.append(("".join(content.reasoning), True))
    if text:
        text, inline, no_tag_left = split_thoughts(text)
        text, is_one_turn = without_marks(text)
        thoughts.append((inline, no_tag_left and is_one_turn))
    refusal = read_content(message.get("refusal") or None)  # false, {}
    tools = _given(message.get("tool_calls")) or _given(message.get("function_call"))
    tools = tools or list(content.tools) or None
    refused = "".join((*refusal.text, *refusal.refusal, *content.refusal))
    is_clear = is_clear and refusal.understood and all(clear for _, clear in thoughts) and _are_tools(tools)
    return _Message(
        text=text,
        reasoning="\n\n".join(thought for thought, _ in thoughts if thought) or None,
        refusal=refused if refused.strip() else None,
        tools=tools,
        is_clear=is_clear,
    )


def texts_of(choice: Mapping[str, Any]) -> tuple[str, str]:
    """Return everything that a choice holds: text with refusal and tool calls, and reasoning."""
    message = _message_of(choice)
    return message.written(), message.reasoning or ""


def _given(calls: Any) -> Any:
    """Tool calls without those that hold nothing: some servers send one in every message."""
    if isinstance(calls, Mapping):
        return calls if _holds_something(calls) else None
    if isinstance(calls, list):
        return [call for call in calls if not isinstance(call, Mapping) or _holds_something(call)]
    return calls


def _holds_something(call: Mapping[str, Any]) -> bool:
    """Whether a tool call has an id, a name or arguments, directly or in `function`."""
    function = call.get("function")
    if isinstance(function, Mapping):
        call = {**call, **function, "function": None}
    return any(value for name, value in call.items() if name not in ("index", "type"))


def _text_in(holder: Any) -> Any:
    return holder.get("content") if isinstance(holder, Mapping) else holder


def _fields_of_message(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message of a choice; a text or a list in its place is its content."""
    for name in ("message", "delta"):
        value = choice.get(name)
        if value is not None:
            return value if isinstance(value, Mapping) else {"content": value}
    return {name: choice[name] for name in ("content", "text") if name in choice}


def _reasoning_of(*holders: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The first reasoning field with text, and whether those read were understood."""
    understood = True
    for holder in holders:
        for name in REASONING_MEMBERS:
            if name in holder:
                text, is_clear = read_reasoning(holder[name])
                if text:
                    return text, is_clear
                understood = understood and is_clear
    return None, understood


def _are_tools(tools: Any) -> bool:
    calls = tools if isinstance(tools, list) else [] if tools is None else [tools]
    return all(isinstance(call, Mapping) for call in calls)


def _outcome(finish: Finish | None, message: _Message, *, is_clear: bool) -> Outcome:
    if finish is Finish.CUT:
        return Outcome.TRUNCATED
    if finish is Finish.FILTER:
        return Outcome.FILTERED
    if message.refusal or finish is Finish.REFUSAL:
        return Outcome.REFUSED
    if not (is_clear and message.is_clear):
        return Outcome.UNKNOWN
    if message.tools:
        return Outcome.TOOL_CALL
    if not (message.text or "").strip():
        return Outcome.EMPTY
    return Outcome.OK if finish is Finish.END else Outcome.UNKNOWN


def _string(name: str, *holders: Mapping[str, Any]) -> str:
    return next((value for holder in holders if isinstance(value := holder.get(name), str) and value), "")
