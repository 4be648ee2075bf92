"""Split text into tokens, whose concatenation is exactly the text.

A token is up to six letters or three digits, with at most one leading space, or any other single character.
`usage`, `logprobs`, truncation at `max_tokens` and stream chunks all use these tokens, so they always agree.
"""

from __future__ import annotations

import re

_PIECE = re.compile(r" ?[A-Za-z]{1,6}| ?[0-9]{1,3}|.", re.DOTALL)

# Tokens charged for the role and the frame of each message, as chat models do.
TOKENS_PER_MESSAGE = 4


def split(text: str) -> list[str]:
    """Split a text into tokens; `"".join(split(text)) == text` for every text."""
    return _PIECE.findall(text)


def count(text: str) -> int:
    """Return the number of tokens of a text."""
    return len(_PIECE.findall(text))
