"""Read the log-probabilities of a given text from the reply to a scoring request. Pure.

A reply is `scored` only if its tokens spell the text that was sent and every one but the first has a
log-probability. Anything else that was paid for is `unscored`: a server that ignores the fields, answers
without the text, or with another length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from harvester.api import completion
from harvester.api.error_body import error_inside
from harvester.api.scoring.spelling import Span, find_end, spell
from harvester.api.scoring.ways import GENERATED_TOKENS, Way, scored_text_of, way_of
from harvester.api.shapes.envelopes import choices_of
from harvester.api.types import USAGE_ESTIMATED, Completion, Outcome, TokenLogprob, Usage
from harvester.api.usage import read_usage, usage_members
from harvester.errors import TeacherError

# A log-probability above 0 by more than rounding is none.
MOST_LOGPROB = 1e-3

# Text and log-probability of a token, as the server sent them.
_Listed = tuple[str, float | None]


def parse_scored(raw: bytes, body: Mapping[str, Any], input_tokens: int = 0) -> Completion:
    """Return the tokens of the text that a scoring request asked about, as a completion.

    `text` is the text asked about, and `logprobs` spell it. For a chat they go on behind it, with what the
    template adds. `data` is None for a token whose bytes are unknown.

    Args:
        body: of the request.
        input_tokens: estimate to fall back on when the server reports no usable counts.

    Raises:
        TeacherError: the body holds an error, or is no reply.
    """
    way, text = way_of(body), scored_text_of(body)
    assert way is not None
    document, _ = completion.load(raw)
    error = error_inside(document, raw, is_stream=False)
    if error is not None:
        raise error
    tokens = _tokens(way, document, text.encode("utf-8", "replace"))
    return Completion(
        text=text,
        outcome=Outcome.UNSCORED if tokens is None else Outcome.SCORED,
        finish_reason="",
        usage=_usage(document, input_tokens),
        model=str(document.get("model") or ""),
        system_fingerprint=str(document.get("system_fingerprint") or ""),
        response_id=str(document.get("id") or ""),
        logprobs=tokens or (),
    )


def parse_or_unscored(raw: bytes, body: Mapping[str, Any], input_tokens: int) -> Completion:
    """Do the same for a stored body; one that can't be read is `unscored`."""
    try:
        return parse_scored(raw, body, input_tokens)
    except TeacherError:
        return unread(body, input_tokens)


def unread(body: Mapping[str, Any], input_tokens: int) -> Completion:
    """Return the completion of a body that can't be read within the limits."""
    usage = Usage(input_tokens, GENERATED_TOKENS, source=USAGE_ESTIMATED)
    return Completion(scored_text_of(body), Outcome.UNSCORED, "", usage)


def _usage(document: Mapping[str, Any], input_tokens: int) -> Usage:
    about = document.get("meta_info")
    if isinstance(about, Mapping):
        return read_usage(about, input_tokens, "")
    _, holder = choices_of(dict(document))
    return read_usage(usage_members(holder, document), input_tokens, "")


def _tokens(way: Way, document: Mapping[str, Any], text: bytes) -> tuple[TokenLogprob, ...] | None:
    listed = _listed(way, document)
    if listed is None or not text:
        return None
    pieces = [piece for piece, _ in listed]
    if way == "chat":
        spans = find_end(pieces, text)
        if spans is None:
            return None
        rest = [(at, at + 1, -1, -1) for at in range(spans[-1][1], len(pieces))]
        return _merged(listed, [*spans, *rest], text)
    spans = spell(pieces, text, GENERATED_TOKENS if way == "echo" else 0)
    return None if spans is None else _merged(listed, spans, text)


def _merged(listed: Sequence[_Listed], spans: Sequence[Span], text: bytes) -> tuple[TokenLogprob, ...] | None:
    """Return one token for each span; None if one but the first of all has no log-probability."""
    tokens = []
    for first, end, start, stop in spans:
        values = [value for _, value in listed[first:end]]
        if first == 0:  # nothing comes before it
            values[0] = values[0] if _is_logprob(values[0]) else 0.0
        if not all(map(_is_logprob, values)):
            return None
        piece = "".join(piece for piece, _ in listed[first:end])
        data = text[start:stop] if start >= 0 else _own_bytes(piece)
        logprob = min(0.0, math.fsum(value for value in values if value is not None))
        tokens.append(TokenLogprob(piece, data, None if first == 0 and end == 1 else logprob))
    return tuple(tokens)


def _own_bytes(piece: str) -> bytes | None:
    return None if not piece or "\ufffd" in piece else piece.encode("utf-8", "replace")


def _is_logprob(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value <= MOST_LOGPROB


def _listed(way: Way, document: Mapping[str, Any]) -> list[_Listed] | None:
    """Return the tokens of the prompt in the order of the text; None where the reply has none."""
    if way == "generate":
        about = document.get("meta_info")
        rows = about.get("input_token_logprobs") if isinstance(about, Mapping) else None
        return _triples(rows)
    choices, _ = choices_of(dict(document))
    choice = choices[0] if choices and isinstance(choices[0], Mapping) else {}
    if way == "echo":
        return _lists(choice.get("logprobs"))
    return _by_id(choice.get("prompt_logprobs") or document.get("prompt_logprobs"))


def _by_id(rows: Any) -> list[_Listed] | None:
    """Read vLLM's form: an object for each token, by token id; the token of the text is the first member."""
    if not isinstance(rows, list) or not rows:
        return None
    listed: list[_Listed] = []
    for row in rows:
        entry = next(iter(row.values()), None) if isinstance(row, Mapping) else None
        if not isinstance(entry, Mapping):
            listed.append(("", None))
            continue
        text = entry.get("decoded_token")
        listed.append((text if isinstance(text, str) else "", _number(entry.get("logprob"))))
    return listed


def _lists(value: Any) -> list[_Listed] | None:
    """Read the parallel lists of the older completions."""
    if not isinstance(value, Mapping):
        return None
    texts, numbers = value.get("tokens"), value.get("token_logprobs")
    if not isinstance(texts, list) or not isinstance(numbers, list) or len(texts) != len(numbers):
        return None
    return [
        (text if isinstance(text, str) else "", _number(number))
        for text, number in zip(texts, numbers, strict=True)
    ]


def _triples(rows: Any) -> list[_Listed] | None:
    """Read SGLang's form: log-probability, token id and text of each token."""
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 3 for row in rows):
        return None
    return [(row[2] if isinstance(row[2], str) else "", _number(row[0])) for row in rows]


def _number(value: Any) -> float | None:
    return None if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
