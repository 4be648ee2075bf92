"""Read the log-probabilities of a given text from the reply to a scoring request. Pure.

A reply is `scored` only if its tokens spell the text that was sent and every one but the first has a
log-probability. Anything else that was paid for is `unscored`: a server that ignores the fields, answers
without the text, or with another length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harvester.api.error_body import error_inside
from harvester.api.replies import completion
from harvester.api.replies.usage import read_usage, usage_members
from harvester.api.scoring.request_forms import GENERATED_TOKENS, Way, listed_of, scored_text_of, way_of
from harvester.api.scoring.spelling import Span, find_end, spell
from harvester.api.shapes.envelopes import choices_of
from harvester.api.types import USAGE_ESTIMATED, Alternative, Completion, Outcome, TokenLogprob, Usage
from harvester.errors import TeacherError

# A log-probability above 0 by more than rounding is none.
MOST_LOGPROB = 1e-3

# Text and log-probability of a token, as the server sent them.
_Pair = tuple[str, float | None]


@dataclass(frozen=True, slots=True)
class _Listed:
    """One token of the text as the server sent it, and the likeliest tokens at its position."""

    text: str
    logprob: float | None
    top: tuple[_Pair, ...] = ()


def parse_scored(raw: bytes, body: Mapping[str, Any], input_tokens: int = 0) -> Completion:
    """Return the tokens of the text that a scoring request asked about, as a completion.

    `text` is the text asked about, and `logprobs` spell it. For a chat they go on behind it, with what the
    template adds. `data` is None for a token whose bytes are unknown. Where the request asked for several
    of the likeliest tokens, they are kept for each token that arrived as exactly its bytes.

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
    tokens = _tokens(way, document, text.encode("utf-8", "replace"), listed_of(body))
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


def _tokens(way: Way, document: Mapping[str, Any], text: bytes, most: int) -> tuple[TokenLogprob, ...] | None:
    listed = _listed(way, document, most)
    if listed is None or not text:
        return None
    pieces = [entry.text for entry in listed]
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
        values = [entry.logprob for entry in listed[first:end]]
        if first == 0:  # nothing comes before it
            values[0] = values[0] if _is_logprob(values[0]) else 0.0
        if not all(map(_is_logprob, values)):
            return None
        piece = "".join(entry.text for entry in listed[first:end])
        data = text[start:stop] if start >= 0 else _own_bytes(piece)
        logprob = min(0.0, math.fsum(value for value in values if value is not None))
        # Where a token's text is not exactly its bytes, those of the others are not known either.
        is_exact = end - first == 1 and data is not None and piece.encode("utf-8", "replace") == data
        top = listed[first].top if is_exact else ()
        alternatives = tuple(Alternative(other, _own_bytes(other), value) for other, value in top)
        tokens.append(TokenLogprob(piece, data, None if first == 0 and end == 1 else logprob, alternatives))
    return tuple(tokens)


def _own_bytes(piece: str) -> bytes | None:
    return None if not piece or "\ufffd" in piece else piece.encode("utf-8", "replace")


def _is_logprob(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value <= MOST_LOGPROB


def _listed(way: Way, document: Mapping[str, Any], most: int) -> list[_Listed] | None:
    """Return the tokens of the prompt in the order of the text; None where the reply has none.

    Args:
        most: likeliest tokens that are kept at each of them; 0: none.
    """
    if way == "generate":
        about = document.get("meta_info")
        if not isinstance(about, Mapping):
            return None
        return _triples(about.get("input_token_logprobs"), about.get("input_top_logprobs") if most else None)
    choices, _ = choices_of(dict(document))
    choice = choices[0] if choices and isinstance(choices[0], Mapping) else {}
    if way == "echo":
        return _lists(choice.get("logprobs"), keeps=most > 0)
    return _by_id(choice.get("prompt_logprobs") or document.get("prompt_logprobs"), keeps=most > 0)


def _by_id(rows: Any, *, keeps: bool) -> list[_Listed] | None:
    """Read vLLM's form: an object for each token, by token id; the token of the text is the first member."""
    if not isinstance(rows, list) or not rows:
        return None
    listed: list[_Listed] = []
    for row in rows:
        entries = list(row.values()) if isinstance(row, Mapping) else []
        pairs = [_entry(entry) for entry in entries if isinstance(entry, Mapping)]
        if not entries or not isinstance(entries[0], Mapping):
            listed.append(_Listed("", None))
            continue
        listed.append(_Listed(*pairs[0], _known(pairs) if keeps else ()))
    return listed


def _entry(entry: Mapping[str, Any]) -> _Pair:
    text = entry.get("decoded_token")
    return text if isinstance(text, str) else "", _number(entry.get("logprob"))


def _known(pairs: Iterable[_Pair]) -> tuple[_Pair, ...]:
    """Return the pairs that have a log-probability."""
    return tuple((text, value) for text, value in pairs if _is_logprob(value))


def _lists(value: Any, *, keeps: bool) -> list[_Listed] | None:
    """Read the parallel lists of the older completions."""
    if not isinstance(value, Mapping):
        return None
    texts, numbers = value.get("tokens"), value.get("token_logprobs")
    if not isinstance(texts, list) or not isinstance(numbers, list) or len(texts) != len(numbers):
        return None
    others = value.get("top_logprobs") if keeps else None
    tops = others if isinstance(others, list) and len(others) == len(texts) else [None] * len(texts)
    return [
        _Listed(
            text if isinstance(text, str) else "",
            _number(number),
            _known((other, _number(each)) for other, each in top.items()) if isinstance(top, Mapping) else (),
        )
        for text, number, top in zip(texts, numbers, tops, strict=True)
    ]


def _triples(rows: Any, others: Any) -> list[_Listed] | None:
    """Read SGLang's form: log-probability, token id and text of each token, and lists of the likeliest."""
    if not isinstance(rows, list) or not all(_is_triple(row) for row in rows):
        return None
    tops = others if isinstance(others, list) and len(others) == len(rows) else [None] * len(rows)
    return [
        _Listed(
            *_pair(row),
            _known(_pair(each) for each in top if _is_triple(each)) if isinstance(top, list) else (),
        )
        for row, top in zip(rows, tops, strict=True)
    ]


def _is_triple(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 3


def _pair(row: list[Any]) -> _Pair:
    return row[2] if isinstance(row[2], str) else "", _number(row[0])


def _number(value: Any) -> float | None:
    return None if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
