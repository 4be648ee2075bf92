"""Say what a body spells, by the standard library alone: nothing of the harvester is imported here.

The Greek letters of a body are its answer, the Cyrillic ones its reasoning (`texts`). They are collected from
strings below members that are known to hold parts of an answer, in the order of the document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from . import texts
from .bodies import ENDS

# Members below which an answer may be found.
_FOLLOWED = frozenset(
    {
        *("choices", "message", "delta", "content", "text", "value", "parts", "candidates", "output"),
        *("data", "result", "response", "body", "Response", "generated_text", "output_text", "completion"),
        *("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "reasoning_text", "summary"),
        *("reasoning_details", "thinking_blocks", "reasoning_summary"),
    }
)
# Of these, those that mean nothing at the top of a document.
_ONLY_INSIDE = frozenset({"value", "parts", "delta", "summary"})
_FINISH = (
    "finish_reason",
    "finishReason",
    "done_reason",
    "stop_reason",
    "stopReason",
    "native_finish_reason",
    "status",
)
_TAGGED = re.compile(r"<(think|thinking)>.*?</\1>|\[THINK\].*?\[/THINK\]", re.DOTALL)
_LINE_OF_OBJECT = re.compile(r"(?:\A|[\r\n])\s*(?=\{)")
_OBJECT = re.compile(r"\s*(?=\{)")
_LINE = re.compile(rb"\r\n|\n|\r")


@dataclass(slots=True)
class Spelled:
    """What a body spells.

    Attributes:
        is_readable: it is JSON, or events with JSON in them.
        texts: all strings in which an answer may be.
    """

    is_readable: bool = True
    greek: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    cyrillic: list[str] = field(default_factory=list)
    ends: int = 0

    def add(self, document: Any) -> None:
        """Collect what a document holds."""
        for text in _texts(document, 0):
            self.texts.append(text)
            self.greek.append(texts.greek(text))
            self.cyrillic.append(texts.cyrillic(text))
        self.ends += sum(1 for word in _finish_words(document, 0) if _is_end(word))

    @property
    def greek_outside_tags(self) -> str:
        """The Greek letters outside of the blocks that `bodies` puts around reasoning.

        A mutation that moves a tag makes reasoning of letters that were written as the answer.
        """
        return texts.greek(_TAGGED.sub("", "".join(self.texts)))


def spelled(raw: bytes, *, is_stream: bool) -> Spelled:
    """Return what a body spells.

    Args:
        is_stream: it was made as events; a body that does not begin like one is read as JSON all the same.
    """
    found = Spelled()
    raw = raw.rstrip(b"\0 \t\r\n")  # some servers fill a body up
    head = raw.removeprefix(b"\xef\xbb\xbf").lstrip()
    looks_like_events = head.startswith((b"data:", b"event:", b"id:", b"retry:", b":"))
    documents = [document for document in _events(raw) if document is not None] if looks_like_events else []
    if documents:
        for document in documents:
            found.add(document)
        return found
    document = _loaded(raw)
    if document is not None:
        found.add(document)
        return found
    lines = list(_json_lines(raw))
    is_one = len(lines) == 1 and raw.endswith(b"[DONE]")  # a body to which a gateway adds the end of a stream
    found.is_readable = bool(lines) and (is_stream or looks_like_events or is_one)
    for line in lines:
        found.add(line)
    return found


def _json_lines(raw: bytes) -> Iterator[Any]:
    """Yield the JSON objects that begin a line or follow another one directly.

    One may go on over line ends, which JSON takes as space.
    """
    text = raw.decode("utf-8-sig", "replace")
    decoder = json.JSONDecoder(parse_int=lambda digits: digits[:1])
    at = 0
    while begin := _OBJECT.match(text, at) or _LINE_OF_OBJECT.search(text, at):
        try:
            document, at = decoder.raw_decode(text, begin.end())
        except (ValueError, RecursionError):
            at = begin.end() + 1
        else:
            yield document


def _events(raw: bytes) -> Iterator[Any]:
    """Yield the document of each event up to `[DONE]`, None for one that is no JSON. By the HTML standard.

    Where each line of an event is JSON by itself, each is an event: some servers leave blank lines out.
    """
    data: list[bytes] = []
    for line in [*_LINE.split(raw.removeprefix(b"\xef\xbb\xbf")), b""]:
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                data.append(value.removeprefix(b" "))
            continue
        if data:
            whole = len(data) > 1 and all(_is_json(line) for line in data)
            for event in data if whole else [b"\n".join(data)]:
                if event.strip() == b"[DONE]":
                    return
                yield _loaded(event)
        data = []


def _is_json(line: bytes) -> bool:
    if line.strip() == b"[DONE]":
        return True
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _loaded(raw: bytes) -> Any:
    """Return a JSON object or list; None for anything else."""
    try:
        value = json.loads(raw.decode("utf-8-sig", "replace"), parse_int=lambda digits: digits[:1])
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _texts(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and depth < 40:
        for item in value:
            yield from _texts(item, depth + 1)
    elif isinstance(value, dict) and depth < 40:
        for name, member in value.items():
            is_words = name == "message" and not depth and isinstance(member, str)  # as in {"message": "ok"}
            if name in _FOLLOWED and (depth or name not in _ONLY_INSIDE) and not is_words:
                yield from _texts(member, depth + 1)


def _finish_words(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, list) and depth < 40:
        for item in value:
            yield from _finish_words(item, depth + 1)
    elif isinstance(value, dict) and depth < 40:
        for name, member in value.items():
            if name in _FINISH and isinstance(member, str):
                yield member
            elif name in _FINISH and isinstance(member, dict):
                yield from (inner for inner in member.values() if isinstance(inner, str))
            else:
                yield from _finish_words(member, depth + 1)


def _is_end(word: str) -> bool:
    """Whether a finish reason, or a part of one with details as in "stop: end of turn", is an end."""
    plain = [_plain(part) for part in (word, *word.split(":"))]
    return any(part in _END_WORDS or part.removeprefix("finishreason") in _END_WORDS for part in plain)


def _plain(word: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", word.lower())


_END_WORDS = {_plain(word) for word in (*ENDS, "stopped", "done", "eos", "end", "finish", "complete")}
