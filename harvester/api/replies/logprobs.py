"""Read log-probabilities, in the form of chat answers and in that of the older completions. Pure.

An element that can't be read keeps its place with a null log-probability: the positions are those of the
generated tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harvester.api.types import Alternative, TokenLogprob

# Members of a `logprobs` object with one element for each generated token.
PER_TOKEN_MEMBERS = ("content", "refusal", "tokens", "token_logprobs", "top_logprobs", "text_offset")


def read_logprobs(value: Any) -> tuple[TokenLogprob, ...]:
    """Return the generated tokens with their log-probabilities, in order; empty where there are none."""
    if isinstance(value, list):
        return tuple(_token(item) for item in value)
    if not isinstance(value, Mapping):
        return ()
    for name in ("content", "refusal"):
        if isinstance(value.get(name), list) and value[name]:
            return tuple(_token(item) for item in value[name])
    return _legacy(value)


def joined_lists(chunks: Sequence[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    """Return the lists of the chunks of a stream, each joined by its member."""
    lists: dict[str, list[Any]] = {}
    for chunk in chunks:
        for name, values in chunk.items():
            lists.setdefault(name, []).extend(values)
    return lists


def lists_of_text(
    chunks: Sequence[Mapping[str, list[Any]]], texts: Sequence[str]
) -> dict[str, list[Any]] | None:
    """Return the lists whose tokens join to one of these texts, None where none do.

    That may be all chunks, the last one alone, all but the last, which repeats the others, or every second.
    """
    wanted = {text.encode("utf-8", "replace") for text in texts}
    for chosen in (chunks, chunks[-1:], chunks[:-1], chunks[::2]):
        lists = joined_lists(chosen)
        if lists and _text_of_tokens(lists) in wanted:
            return lists
    return None


def _text_of_tokens(value: Any) -> bytes:
    """Return the text of the generated tokens in UTF-8: of their bytes where they are given."""
    return b"".join(
        token.token.encode("utf-8", "replace") if token.data is None else token.data
        for token in read_logprobs(value)
    )


def _token(item: Any) -> TokenLogprob:
    if not isinstance(item, Mapping):
        return TokenLogprob(item if isinstance(item, str) else "", None, None)
    chosen = _alternative(item)
    return TokenLogprob(chosen.token, chosen.data, chosen.logprob, _top(item.get("top_logprobs")))


def _top(value: Any) -> tuple[Alternative, ...]:
    """The alternatives at one position: a list of objects, or an object of token and log-probability."""
    if isinstance(value, Mapping):
        return tuple(
            Alternative(token, None, number)
            for token, logprob in value.items()
            if (number := _number(logprob)) is not None
        )
    if not isinstance(value, list):
        return ()
    return tuple(
        _alternative(item)
        for item in value
        if isinstance(item, Mapping)
        and isinstance(item.get("token"), str)
        and _number(item.get("logprob")) is not None
    )


def _alternative(item: Mapping[str, Any]) -> Alternative:
    token, data = item.get("token"), item.get("bytes")
    try:
        utf8 = bytes(data) if isinstance(data, list) else None
    except (TypeError, ValueError):
        utf8 = None
    return Alternative(token if isinstance(token, str) else "", utf8, _number(item.get("logprob")))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _legacy(value: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    """The form of the older completions: parallel lists of tokens, log-probabilities and alternatives."""
    tokens = _list(value.get("tokens"))
    numbers, tops = _list(value.get("token_logprobs")), _list(value.get("top_logprobs"))
    return tuple(
        TokenLogprob(
            token if isinstance(token, str) else "",
            None,
            _number(numbers[at]) if at < len(numbers) else None,
            _top(tops[at]) if at < len(tops) else (),
        )
        for at, token in enumerate(tokens)
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
