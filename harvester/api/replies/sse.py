"""Assemble the server-sent events of a streamed answer into the body of an unstreamed one. Pure.

The pieces of every field are collected and joined once at the end, so a stream costs time in proportion to
its bytes. A stream that was cut off looks like a clean end of file: it is an answer only with a finish reason
or an end mark (`[DONE]`). Anything less is a broken connection, possibly billed. An event that can't be read
does not lose the others, but the answer is no longer exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import orjson

from harvester.api.error_fields import ERROR_MEMBERS, find_error
from harvester.api.replies.lines import split_lines
from harvester.api.replies.logprobs import PER_TOKEN_MEMBERS, joined_lists, lists_of_text
from harvester.api.shapes.envelopes import BARE_TEXT_MEMBERS, choices_of
from harvester.api.shapes.finish import finish_word
from harvester.api.shapes.parts import NESTED_MEMBERS, REASONING_MEMBERS
from harvester.api.shapes.repeats import is_beyond_chance, without_repeats
from harvester.api.shapes.snapshots import Snapshots
from harvester.errors import ConnectionBroken

_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")
DONE = b"[DONE]"
# Data of events that carry nothing: end marks of other spellings, and keep-alives.
_END_MARKS = frozenset({b"[done]", b'"[done]"', b"done"})
# Names of events that end a stream, whatever their data is.
_END_NAMES = frozenset({b"done", b"end", b"complete", b"completed", b"message_stop"})
_KEEP_ALIVES = frozenset(
    {b"", b"ping", b"keep-alive", b"keepalive", b"heartbeat", b"null", b"{}", b'"ping"', b"[ping]"}
)
# Members by which each JSON line says whether it is the last one (Ollama, Cohere).
_DONE_MEMBERS = ("done", "is_finished")
# What was used, which comes with the last line, and members of a choice that hold an answer that is no delta.
_COUNTS = ("usage", "eval_count", "done_reason")
_WHOLE_MEMBERS = frozenset({"message", "text"})
# Events of an answer that may come twice: beyond, looking for the finish reason would take seconds.
_MOST_PAIRS = 100_000
_TEXT_FIELDS = frozenset({"content", "refusal", *REASONING_MEMBERS})


class _LossyEvent(Exception):
    """An event can't be read."""


def is_stream(raw: bytes) -> bool:
    """Whether these bytes are events. No JSON text starts like one."""
    if raw[:1] == b"{":  # nearly all bodies
        return False
    return raw[:64].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(_FIELDS)


def is_end_mark(data: bytes) -> bool:
    """Whether the data of an event says that the stream is complete."""
    return data == DONE or data.strip().lower() in _END_MARKS


@dataclass(frozen=True, slots=True)
class Assembled:
    """A stream as one `chat.completion` document.

    An error in the stream becomes the document's `error`; what came before it is kept.

    Attributes:
        is_exact: whether everything outside the choices was read without loss.
        is_done: whether an end mark came.
        inexact, unfinished: indices of choices that were not read without loss, and of those that got no
            finish reason.
        stray: indices of unfinished choices other than 0 that hold text.
    """

    document: dict[str, Any]
    is_exact: bool
    is_done: bool
    inexact: frozenset[int]
    unfinished: frozenset[int]
    stray: frozenset[int]

    def as_one(self) -> tuple[dict[str, Any], bool]:
        """Return the document, and whether it is exact as the answer to a request for one choice.

        Text of another choice that never ends may then be a piece of the answer.
        """
        return self.document, self.is_exact and not self.inexact and not self.stray


def assemble(raw: bytes) -> Assembled:
    """Join the chunks of a stream.

    Raises:
        ConnectionBroken: the stream ended before its answer did.
    """
    stream = _Stream()
    in_pairs = _events_in_pairs(raw)
    for at, (name, data) in enumerate(named_events(raw)):
        if at < in_pairs and at % 2:
            continue
        if is_end_mark(data):
            stream.end()
            break
        if stream.add_event(name, data):
            break
        if name in _END_NAMES:
            stream.end()
    if in_pairs and stream.may_be_of_pairs():
        stream.is_exact = False
    return stream.document(raw)


def assemble_lines(lines: list[dict[str, Any]], raw: bytes, *, is_ended: bool) -> Assembled:
    """Join the chunks of a stream that came as JSON lines; see `assemble`.

    Args:
        raw: the body, kept by the error.
        is_ended: whether they are known to be all; else a finish reason, usage or `done` must say so.
    """
    stream = _Stream()
    if is_ended:
        stream.end()
    for chunk in lines:
        if stream.add(chunk):
            break
    return stream.document(raw)


def is_piece(document: Any) -> bool:
    """Whether a JSON line is a piece of a stream that goes on after it: it says so, or holds a delta."""
    if not isinstance(document, Mapping) or any(document.get(name) for name in _COUNTS):
        return False
    if any(document.get(name) is False for name in _DONE_MEMBERS):
        return True
    choices = choices_of(document)[0] or ()
    given = [choice for choice in choices if isinstance(choice, Mapping)]
    deltas = [choice for choice in given if choice.get("delta") and not (choice.keys() & _WHOLE_MEMBERS)]
    return bool(deltas) and not any(map(finish_word, given))


def named_events(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and data of each event; the name is "" for most. Comments and ids are skipped."""
    lines: list[bytes] = []
    name = b""
    for line in split_lines(raw.removeprefix(b"\xef\xbb\xbf")):
        if line.startswith(b"data:"):
            lines.append(line[5:].removeprefix(b" "))
        elif line.startswith(b"event:"):
            name = line[6:].strip()
        elif not line:
            yield from _events(name, lines)
            lines, name = [], b""
    yield from _events(name, lines)


def _events_in_pairs(raw: bytes) -> int:
    """How many events come in equal pairs, up to the last with a finish reason; 0 unless all of them do.

    Some gateways send every event twice. What follows may come once: usage, or the end mark.
    """
    events, found = named_events(raw), 0
    for count, (first, second) in enumerate(islice(zip(events, events, strict=False), _MOST_PAIRS)):
        if first != second:
            is_rest = found and not (_choices_in(first[1]) or _choices_in(second[1]))
            return found if is_rest else 0
        choices = _choices_in(first[1])
        if any(isinstance(choice, Mapping) and finish_word(choice) for choice in choices):
            found = 2 * (count + 1)
        elif choices and found:
            return 0
    return found


def _choices_in(data: bytes) -> list[Any]:
    """The choices of an event; none where it is no JSON."""
    try:
        chunk = orjson.loads(data)
    except (orjson.JSONDecodeError, RecursionError):
        return []
    return (choices_of(chunk)[0] or []) if isinstance(chunk, dict) else []


def _events(name: bytes, lines: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """One event of these data lines; several where each line is whole: some servers leave blank lines out."""
    if len(lines) > 1 and all(_is_whole(line) for line in lines):
        for line in lines:
            yield name, line
    elif lines or name in _END_NAMES:
        yield name, b"\n".join(lines)


def _is_whole(line: bytes) -> bool:
    text = line.strip()
    return (text[:1] == b"{" and text[-1:] == b"}") or is_end_mark(text) or text.lower() in _KEEP_ALIVES


class _Stream:
    """The chunks of one stream, joined by choice.

    Attributes:
        is_done: whether an end mark came.
        is_exact: whether everything so far was read without loss.
    """

    def __init__(self) -> None:
        self.is_done = False
        self.is_exact = True
        self._needs_mending = False
        self._head: dict[str, Any] = {}
        self._choices: dict[int, _Choice] = {}

    def end(self) -> None:
        """Note that the stream is complete."""
        self.is_done = True

    def may_be_of_pairs(self) -> bool:
        """Whether chance may explain that the pieces of a text came in pairs."""
        return any(choice.text and not is_beyond_chance(choice.text) for choice in self._choices.values())

    def add_event(self, name: bytes, data: bytes) -> bool:
        """Add one event; returns whether it was an error, after which nothing else is read."""
        if data.strip().lower() in _KEEP_ALIVES:
            return False
        try:
            chunk = self._loaded(data)
        except _LossyEvent:
            if name == b"error":
                self._head["error"] = data[:2000].decode("utf-8", "replace")
                return True
            self.is_exact = self.is_exact and self._is_finished()  # a cut tail loses nothing of the text
            return False
        if name == b"error" and find_error(chunk) is None:
            chunk = {"error": chunk}
        return self.add(chunk)

    def _loaded(self, data: bytes) -> dict[str, Any]:
        try:
            chunk = orjson.loads(data)
        except (orjson.JSONDecodeError, RecursionError):
            try:
                chunk = json.loads(
                    data.decode("utf-8", "surrogateescape"),
                    parse_int=integer_of,
                    parse_constant=self._constant,
                )
            except (ValueError, RecursionError):
                raise _LossyEvent from None
            self._needs_mending = True
        if isinstance(chunk, list) and len(chunk) == 1:
            chunk = chunk[0]
        if isinstance(chunk, dict):
            return chunk
        if isinstance(chunk, list) and chunk:
            self.is_exact = False  # whole, unlike a cut tail, and not understood
        raise _LossyEvent

    def _is_finished(self) -> bool:
        return any(choice.finish for choice in self._choices.values())

    def _constant(self, _: str) -> float:
        self.is_exact = False
        return math.nan

    def add(self, chunk: dict[str, Any]) -> bool:
        """Add one chunk; returns whether it holds an error, after which nothing else is read."""
        self.is_done = self.is_done or _is_last(chunk)
        choices, holder = choices_of(chunk)
        if not choices and chunk.get("delta") is not None:
            choices = [chunk]  # a chunk that is a choice itself
        for part in choices or ():
            self._add_part(part)
        if not choices and _may_hold_text(chunk):
            self.is_exact = False
        for source in (chunk, holder) if holder is not chunk else (chunk,):
            for name, value in source.items():
                if name not in ("choices", "message") and (value is not None or name not in self._head):
                    self._head[name] = value
        if not any(chunk.get(name) for name in ERROR_MEMBERS) and choices and "base_resp" not in chunk:
            return self._has_error_in_choice(choices)
        if find_error(chunk) is None:
            return False
        if find_error({**self._head, "choices": [{}]}) is None:  # the chunk is an error itself
            self._head["error"] = chunk
        return True

    def _has_error_in_choice(self, choices: list[Any]) -> bool:
        for part in choices:
            holders = [part, part.get("delta"), part.get("message")] if isinstance(part, dict) else []
            for holder in holders:
                if isinstance(holder, Mapping) and holder.get("error"):
                    self._head["error"] = holder["error"]
                    return find_error({"error": holder["error"]}) is not None
        return False

    def _add_part(self, part: Any) -> None:
        if not isinstance(part, dict):
            self.is_exact = self.is_exact and part is None
            return
        index = part.get("index")
        number = index if type(index) is int else 0
        choice = self._choices.get(number)
        if choice is None:
            choice = self._choices[number] = _Choice(number)
        choice.add(part)

    def document(self, raw: bytes) -> Assembled:
        """The document of all chunks.

        Raises:
            ConnectionBroken: neither a finish reason nor an end mark came.
        """
        document, is_exact = dict(self._head), self.is_exact
        joined = [choice.joined() for choice in self._choices.values()]
        if joined:
            document["choices"] = joined
        is_finished = any(choice["finish_reason"] for choice in joined) or find_error(document) is not None
        if not (is_finished or self.is_done or (document.get("usage") and joined)):
            raise ConnectionBroken(
                "the stream ended before its answer did (neither a finish reason nor [DONE])",
                status=200,
                raw=raw,
                maybe_billed=True,
            )
        if self._needs_mending:
            document, mended = mend(document)
            is_exact = is_exact and mended
        return Assembled(
            document,
            is_exact,
            self.is_done,
            inexact=frozenset(index for index, choice in self._choices.items() if not choice.is_exact),
            unfinished=frozenset(index for index, choice in self._choices.items() if not choice.finish),
            stray=frozenset(index for index, choice in self._choices.items() if not choice.is_whole),
        )


class _Choice:
    """The pieces of one choice.

    Attributes:
        finish: its finish word, "" before it came.
        is_exact: whether every piece was understood.
    """

    def __init__(self, index: int) -> None:
        self.is_exact = True
        self._index = index
        self.finish = ""
        self._ends = 0
        self._pieces: dict[str, list[Any]] = {}
        self._rest: dict[str, Any] = {}
        self._calls: list[_ToolCall] = []
        self._call_at: dict[Any, _ToolCall] = {}
        self._function: _ToolCall | None = None
        self._logprobs: list[dict[str, list[Any]]] = []
        self._is_cut = False
        self._snapshots = Snapshots()
        self._reasoning_members: set[str] = set()
        self._has_deltas = False
        self._usage: Any = None

    def add(self, part: dict[str, Any]) -> None:
        """Add a chunk of this choice."""
        word = finish_word(part)
        self.finish = word or self.finish
        self._ends += bool(word)
        self._usage = part.get("usage") or self._usage  # Moonshot's place for the counts
        delta = part.get("delta")
        if isinstance(delta, str):
            delta = {"content": delta}
        if isinstance(delta, dict):
            self._has_deltas = self._has_deltas or bool(_TEXT_FIELDS & delta.keys())
            self._add_delta(delta)
        elif delta is not None:
            self.is_exact = False
        if any(part.get(name) for name in NESTED_MEMBERS if name not in ("message", "delta")):
            self.is_exact = False
        self._note_reasoning(part)
        for name in ("text", "content", *REASONING_MEMBERS):
            if part.get(name) is not None:
                self._has_deltas = True
                field = name if name in REASONING_MEMBERS else "content"
                self._pieces.setdefault(field, []).append(part[name])
        message = part.get("message")
        if message is not None:
            self._snapshots.add(message, self._pieces)
        self._add_logprobs(part.get("logprobs"))

    def _note_reasoning(self, piece: Mapping[str, Any]) -> None:
        """Note which members of a piece hold reasoning as text.

        Servers that send it in two members do so in the same piece. Text that moves from one member to
        another is not understood: only one of them is read.
        """
        members = {name for name in REASONING_MEMBERS if piece.get(name) and isinstance(piece[name], str)}
        if members and self._reasoning_members and not members & self._reasoning_members:
            self.is_exact = False
        self._reasoning_members = members or self._reasoning_members

    def _add_delta(self, delta: dict[str, Any]) -> None:
        self._note_reasoning(delta)
        for name, value in delta.items():
            if name in _TEXT_FIELDS:
                pieces = self._pieces.setdefault(name, [])
                if value is not None:
                    pieces.append(value)
            elif name == "tool_calls" and value is not None:
                self._add_tool_calls(value)
            elif name == "text" and value is not None:
                self._pieces.setdefault("content", []).append(value)
            elif name in NESTED_MEMBERS and value:
                self.is_exact = False
            elif name == "function_call" and isinstance(value, dict):
                if self._function is None:
                    self._function = _ToolCall({})
                self._function.add_function(value)
            elif value is not None or name not in self._rest:
                self._rest[name] = value

    def _add_tool_calls(self, parts: Any) -> None:
        """Join tool calls by index, else by id; a piece without either belongs to the last call."""
        for part in parts if isinstance(parts, list) else [parts]:
            if not isinstance(part, dict):
                self.is_exact = False
                continue
            index, identity = part.get("index"), part.get("id")
            key = index if isinstance(index, int) else identity if isinstance(identity, str) else None
            call = self._call_at.get(key) if key is not None else self._calls[-1] if self._calls else None
            if call is not None and key is None and _name_of(part):
                call = None  # a name starts a new call
            if call is None:
                call = _ToolCall({**part, "index": index if isinstance(index, int) else len(self._calls)})
                self._calls.append(call)
                if key is not None:
                    self._call_at[key] = call
            else:
                call.add(part)

    def _add_logprobs(self, logprobs: Any) -> None:
        if isinstance(logprobs, list):
            logprobs = {"content": logprobs}
        given = logprobs if isinstance(logprobs, dict) else {}
        lists = {name: value for name, value in given.items() if name in PER_TOKEN_MEMBERS}
        if lists := {name: value for name, value in lists.items() if value and isinstance(value, list)}:
            self._logprobs.append(lists)

    @property
    def text(self) -> str:
        """The answer's text as it came; "" where it isn't plain text."""
        return "".join(piece for piece in self._pieces.get("content", ()) if isinstance(piece, str))

    @property
    def is_whole(self) -> bool:
        """Whether it ended, or is the one that was asked for, or holds no text."""
        return bool(self._index == 0 or self.finish or not any(map(any, self._pieces.values())))

    def joined(self) -> dict[str, Any]:
        """The choice of an unstreamed body."""
        message = {name: self._join(name, pieces) for name, pieces in self._pieces.items()}
        message = {**self._rest, **message}
        if self._calls:
            message["tool_calls"] = [call.joined() for call in self._calls]
        if self._function is not None:
            message["function_call"] = self._function.joined()["function"]
        if self._snapshots.messages and not self._has_deltas:
            message = {**message, **self._from_snapshots()}
        elif not self._snapshots.repeat(self._pieces, _TEXT_FIELDS):
            self.is_exact = False
        return {
            "index": self._index,
            "message": message,
            "finish_reason": self.finish or None,
            "logprobs": self._logprobs_of(message),
            **({"usage": self._usage} if self._usage else {}),
        }

    def _logprobs_of(self, message: Mapping[str, Any]) -> dict[str, list[Any]] | None:
        """The log-probabilities of all chunks, None for none.

        Where repeated text was taken out, they may repeat as it did: only those of the text that is left are
        returned, and none where it is not clear which they are.
        """
        if not self._is_cut:
            return joined_lists(self._logprobs) or None
        text = message.get("content") or ""
        thoughts = next((message[name] for name in REASONING_MEMBERS if message.get(name)), "")
        texts = [text, thoughts + text] if isinstance(text, str) and isinstance(thoughts, str) else []
        return lists_of_text(self._logprobs, texts)

    def _join(self, name: str, pieces: list[Any]) -> Any:
        """The value of a field that came in pieces: a text, or a list of parts where some are no text."""
        if all(isinstance(piece, str) for piece in pieces):
            kept, is_clear = without_repeats(pieces, ends=self._ends)
            self.is_exact = self.is_exact and is_clear
            self._is_cut = self._is_cut or kept != [piece for piece in pieces if piece]
            return "".join(kept) if pieces else None
        parts: list[Any] = []
        for piece in pieces:
            parts.extend(piece if isinstance(piece, list) else [piece])
        return parts

    def _from_snapshots(self) -> dict[str, Any]:
        """The message of a stream that sends messages in place of deltas: each whole so far, or pieces."""
        messages = [
            {"content": message} if isinstance(message, str) else message
            for message in self._snapshots.messages
        ]
        if not all(isinstance(message, dict) for message in messages):
            self.is_exact = False
            return {}
        texts = [message.get("content") for message in messages]
        contents = [text for text in texts if isinstance(text, str)]
        if len(contents) > 1 and all(later.startswith(text) for text, later in pairwise(contents)):
            self._is_cut = True
            return {**messages[-1], "content": contents[-1]}
        pieces = _Choice(self._index)
        for message in messages:
            pieces.add({"delta": message})
        self.is_exact = self.is_exact and pieces.is_exact
        self._is_cut = self._is_cut or pieces._is_cut
        joined: dict[str, Any] = pieces.joined()["message"]
        return joined


class _ToolCall:
    """One tool call: its name comes whole, its arguments in pieces."""

    def __init__(self, part: dict[str, Any]) -> None:
        self._call = {name: value for name, value in part.items() if name != "function"}
        self._function: dict[str, Any] = {}
        self._arguments: list[str] = []
        self.add_function(part.get("function"))

    def add(self, part: dict[str, Any]) -> None:
        """Add a further piece of this call."""
        for name, value in part.items():
            if name not in ("function", "index") and value not in (None, ""):
                self._call[name] = value
        self.add_function(part.get("function"))

    def add_function(self, function: Any) -> None:
        """Add name and arguments."""
        for name, value in (function if isinstance(function, dict) else {}).items():
            if name == "arguments" and isinstance(value, str):
                self._arguments.append(value)
            elif value is not None and (value != "" or name not in self._function):
                self._function[name] = value

    def joined(self) -> dict[str, Any]:
        """The call of an unstreamed body."""
        function = dict(self._function)
        if self._arguments:
            function["arguments"] = "".join(self._arguments)
        return {**self._call, "function": function} if function else dict(self._call)


def _is_last(chunk: Mapping[str, Any]) -> bool:
    return any(chunk.get(name) is True for name in _DONE_MEMBERS)


def _may_hold_text(chunk: Mapping[str, Any]) -> bool:
    """Whether a chunk without a choice that is understood may hold a piece of the answer."""
    return isinstance(chunk.get("message"), list) or any(
        chunk.get(name) for name in ("choices", *BARE_TEXT_MEMBERS)
    )


def _name_of(part: Mapping[str, Any]) -> Any:
    function = part.get("function")
    return function.get("name") if isinstance(function, Mapping) else None


def mend(document: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Put characters together that were split over events; what is left of half ones becomes `?`.

    Half characters are lone surrogates (from escapes, or from bytes that are no UTF-8 alone). Returns the
    document and whether nothing was replaced.
    """
    text = json.dumps(document, ensure_ascii=False)
    is_exact = True
    try:
        text = text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        try:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeError:
            text, is_exact = text.encode("utf-8", "replace").decode("utf-8"), False
    loaded: dict[str, Any] = json.loads(text)
    return loaded, is_exact


def integer_of(digits: str) -> int | float:
    """Return an integer; infinity for 400 digits or more, since Python refuses to convert 4,300."""
    return int(digits) if len(digits) < 400 else math.inf
