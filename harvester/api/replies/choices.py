"""Split the answer to a request for several choices (`n`) into one body for each of them. Pure.

Each choice becomes the row of one sample, with a body of its own: everything beside the choices as received,
that one choice, and its share of the token counts. `completion.parse` reads such a body like any other, so
one choice that was filtered or broken is the matter of its row alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from harvester.api.replies.completion import load_choices, parse, texts_of
from harvester.api.replies.usage import (
    SHARE,
    USAGE_MEMBERS,
    estimate_tokens,
    read_usage,
    share_members,
    split_usage,
    usage_members,
)
from harvester.api.shapes.envelopes import choices_of
from harvester.api.types import USAGE_ESTIMATED, Completion, Outcome, Usage
from harvester.errors import BrokenAnswer, TeacherError

# Members whose elements may stand for the choices of a body.
_CHOICE_MEMBERS = frozenset({"choices", "candidates", "output", "message"})


@dataclass(frozen=True, slots=True)
class ChoiceAnswer:
    """One choice: the body of its row, and what it says."""

    raw: bytes
    completion: Completion


@dataclass(frozen=True, slots=True)
class Choices:
    """The answer to one request for several choices.

    Attributes:
        answers: by index of the choice, at most as many as were asked for; None for one that holds no answer.
        usage: of the whole request. The counts of the answers add up to it.
        surplus: choices that are not among `answers`: beyond those asked for, or with an index that came
            before. They are paid for like the others.
    """

    answers: tuple[ChoiceAnswer | None, ...]
    usage: Usage
    surplus: int = 0


@dataclass(frozen=True, slots=True)
class _GivenChoice:
    """A choice as received, with all that it holds."""

    given: Any
    written: str
    reasoning: str
    is_exact: bool
    is_whole: bool

    @property
    def weights(self) -> tuple[int, int]:
        """Bytes of text and reasoning together, and of reasoning alone."""
        thought = len(self.reasoning.encode("utf-8", "replace"))
        return len(self.written.encode("utf-8", "replace")) + thought, thought


def split(raw: bytes, asked: int, input_tokens: int = 0, response_format: Any = None) -> Choices:
    """Split a body by choices.

    Args:
        raw: as received; JSON, or the events of a stream.
        asked: how many choices were asked for.
        input_tokens, response_format: as in `completion.parse`.

    What can't be split, by a bug of ours or because it is nested too deep, is one choice that is kept as
    `unknown`: it was paid for.

    Raises:
        TeacherError: no choice holds an answer.
    """
    try:
        return _split(raw, asked, input_tokens, response_format)
    except (TeacherError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 - see above
        usage = Usage(input_tokens, estimate_tokens(len(raw)), source=USAGE_ESTIMATED)
        return Choices((ChoiceAnswer(raw, Completion(None, Outcome.UNKNOWN, "", usage)),), usage)


def _split(raw: bytes, asked: int, input_tokens: int, response_format: Any) -> Choices:
    loaded = load_choices(raw)
    listed, holder = choices_of(loaded.document)
    choices = [
        _GivenChoice(
            item,
            *texts_of(item if isinstance(item, Mapping) else {"text": item}),
            is_exact=loaded.is_exact and index not in loaded.inexact,
            is_whole=loaded.is_done or index not in loaded.unfinished,
        )
        for index, item in _by_index(listed or [])
    ]
    if not choices:
        parse(raw, input_tokens, response_format, logprobs=False)
        raise BrokenAnswer("status 200 without choices", status=200, raw=raw, maybe_billed=True)
    reported = usage_members(holder, loaded.document)
    usage = read_usage(
        reported,
        input_tokens,
        "".join(choice.written for choice in choices),
        "".join(choice.reasoning for choice in choices),
    )
    head = _head(loaded.document, holder)
    bill = {name: reported[name] for name in reported if name not in _CHOICE_MEMBERS}
    share = {"asked": asked, "choices": len(listed or []), "source": usage.source, "usage": bill}
    answers = _rows(choices[:asked], head, share, usage, response_format)
    return Choices(tuple(answers), usage, surplus=len(listed or []) - min(asked, len(choices)))


def _by_index(listed: Sequence[Any]) -> list[tuple[int, Any]]:
    """The choices by their index, each index once; those without one by their place."""
    indexed: dict[int, Any] = {}
    for place, item in enumerate(listed):
        number = item.get("index") if isinstance(item, Mapping) else None
        indexed.setdefault(number if type(number) is int else place, item)
    return sorted(indexed.items())


def _head(document: Mapping[str, Any], holder: Mapping[str, Any]) -> dict[str, Any]:
    """Everything beside the choices and the token counts; out of its envelope, where there is one."""
    outer = {} if holder is document else {k: v for k, v in document.items() if isinstance(v, str | int)}
    left_out = {*_CHOICE_MEMBERS, *USAGE_MEMBERS}
    return {name: value for name, value in {**outer, **holder}.items() if name not in left_out}


def _rows(
    choices: Sequence[_GivenChoice],
    head: Mapping[str, Any],
    share: Mapping[str, Any],
    usage: Usage,
    response_format: Any,
) -> list[ChoiceAnswer | None]:
    """The bodies of the choices. The counts are split over those that hold an answer.

    Raises:
        TeacherError: none of them does; the first one's error.
    """
    errors: list[TeacherError] = []
    kept: list[int] = []
    for at, choice in enumerate(choices):
        try:
            if not choice.is_whole:
                raise BrokenAnswer("the stream ended before this choice", status=200, maybe_billed=True)
            parse(_body(choice, head, share, usage), 0, None, logprobs=False)
            kept.append(at)
        except TeacherError as error:
            errors.append(error)
    if not kept:
        raise errors[0]
    sizes, thoughts = zip(*(choices[at].weights for at in kept), strict=True)
    parts = split_usage(usage, sizes, thoughts if any(thoughts) else sizes)
    answers: list[ChoiceAnswer | None] = [None] * len(choices)
    for at, part in zip(kept, parts, strict=True):
        body = _body(choices[at], head, share, part)
        answers[at] = ChoiceAnswer(body, parse(body, 0, response_format, logprobs=False))
    return answers


def _body(choice: _GivenChoice, head: Mapping[str, Any], share: Mapping[str, Any], usage: Usage) -> bytes:
    document = {
        **head,
        "choices": [choice.given],
        "usage": share_members(usage),
        SHARE: {**share, "exact": choice.is_exact},
    }
    try:
        return orjson.dumps(document)
    except (TypeError, ValueError):  # an integer beyond 64 bits
        return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
