"""How the mock teacher counts tokens: pieces whose concatenation is the text exactly.

A piece is up to six letters or three digits, each with at most one leading space, or any other
single character. The same pieces make `usage`, `logprobs`, truncation at `max_tokens` and the
chunks of a stream, so the four never disagree.
"""

from __future__ import annotations

import re

_PIECE = re.compile(r" ?[A-Za-z]{1,6}| ?[0-9]{1,3}|.", re.DOTALL)

TOKENS_PER_MESSAGE = 4
"""Charged for each message's role and frame, as chat models do."""


def split(text: str) -> list[str]:
    """Cut a text into tokens; `"".join(split(text)) == text` for every text."""
    return _PIECE.findall(text)


def count(text: str) -> int:
    """Number of tokens of a text."""
    return len(_PIECE.findall(text))
