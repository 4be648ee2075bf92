"""Find the bytes of a server's tokens in the text that was sent, since token texts arrive lossily. Pure.

A token that holds part of a character arrives as U+FFFD or empty, a word of SentencePiece without its space,
one of older servers in the letters of its vocabulary. The text that was sent decides: tokens must spell it.
Tokens that can't be told apart are taken together; the log-probability of the whole is the sum.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from harvester.system.token_bytes import byte_of_character

# Most tokens that are taken together, and most bytes that each of them may hold.
MOST_LOSSY = 64
MOST_BYTES = 64
_LOST = "\ufffd"
_SENTENCEPIECE_SPACE = "\u2581"

# First token, token after the last, first byte, byte after the last.
Span = tuple[int, int, int, int]


def spell(pieces: Sequence[str], text: bytes, most_after: int = 0) -> list[Span] | None:
    """Return spans of tokens that together are exactly the text; None where the tokens don't spell it.

    Args:
        pieces: texts of the tokens, the first of which may be one that begins every text (BOS).
        most_after: most tokens that may follow the text.
    """
    # A token that fits the beginning is part of the text; an unknown one may be either.
    is_part = bool(pieces) and (_bytes_at(pieces[0], text, 0) is not None or _LOST in pieces[0])
    for start in (0, 1) if is_part else (1, 0):
        spans = _spell_from(pieces, start, text, most_after)
        if spans is not None:
            return spans
    return None


def find_end(pieces: Sequence[str], text: bytes) -> list[Span] | None:
    """Return spans of tokens that are exactly the text, at its last place among others; None: nowhere."""
    for start in range(len(pieces) - 1, -1, -1):
        if _bytes_at(pieces[start], text, 0) is None and not _is_lossy(pieces[start]):
            continue
        spans = _spell_from(pieces, start, text, len(pieces))
        if spans is not None:
            return spans
    return None


def _spell_from(pieces: Sequence[str], token: int, text: bytes, most_after: int) -> list[Span] | None:
    spans: list[Span] = []
    at = 0
    while at < len(text):
        if token >= len(pieces):
            return None
        # U+FFFD may be a character of the text or a part of one: a token with it is never read as it is.
        size = None if _is_lossy(pieces[token]) else _bytes_at(pieces[token], text, at)
        if size is not None:
            spans.append((token, token + 1, at, at + size))
            token, at = token + 1, at + size
            continue
        after = _after_lossy(pieces, token, text, at, most_after)
        if after is None:
            return None
        spans.append((token, after[0], at, after[1]))
        token, at = after
    return spans if len(pieces) - token <= most_after else None


def _after_lossy(
    pieces: Sequence[str], token: int, text: bytes, at: int, most_after: int
) -> tuple[int, int] | None:
    """Return the token and the byte at which a run of lossy tokens ends; None: it can't be told."""
    end = token
    while end < len(pieces) and end - token < MOST_LOSSY and _is_lossy(pieces[end]):
        end += 1
        last = min(len(text), at + MOST_BYTES * (end - token))
        # Each lossy token holds a byte at least. The two tokens after the run must fit.
        for place in range(at + (end - token), last + 1):
            if place == len(text):
                if len(pieces) - end <= most_after:
                    return end, place
            elif end < len(pieces) and not _is_lossy(pieces[end]):
                size = _bytes_at(pieces[end], text, place)
                if size is not None and _fits(pieces, end + 1, text, place + size):
                    return end, place
    return None


def _fits(pieces: Sequence[str], token: int, text: bytes, at: int) -> bool:
    if at == len(text):
        return True
    if token >= len(pieces):
        return False
    return _is_lossy(pieces[token]) or _bytes_at(pieces[token], text, at) is not None


def _is_lossy(piece: str) -> bool:
    return not piece or _LOST in piece


def _bytes_at(piece: str, text: bytes, at: int) -> int | None:
    """Return how many bytes of the text a token's text stands for at this place; None: it does not."""
    if not piece:
        return None
    for candidate in _candidates(piece):
        if text.startswith(candidate, at):
            return len(candidate)
    return None


@functools.lru_cache(maxsize=65_536)
def _candidates(piece: str) -> tuple[bytes, ...]:
    """Return what a token's text may stand for, the most literal reading first."""
    table = _byte_level()
    readings = [piece.encode("utf-8", "replace")]
    if _SENTENCEPIECE_SPACE in piece:
        readings.append(piece.replace(_SENTENCEPIECE_SPACE, " ").encode("utf-8", "replace"))
    if not piece.isascii() and all(letter in table for letter in piece):
        readings.append(bytes(table[letter] for letter in piece))
    if not piece.startswith((" ", _SENTENCEPIECE_SPACE)):
        readings.append(b" " + readings[0])
    return tuple(readings)


@functools.cache
def _byte_level() -> dict[str, int]:
    return byte_of_character()
