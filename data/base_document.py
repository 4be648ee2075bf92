"""What the base student's text is made of: documents, and the symbols and words in them."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

LOWER: Final = string.ascii_lowercase
UPPER: Final = string.ascii_uppercase
DIGITS: Final = string.digits
WORDS: Final = (
    *(
        "the",
        "cat",
        "sat",
        "on",
        "mat",
        "we",
        "she",
        "he",
        "they",
        "read",
        "walk",
        "see",
        "old",
        "new",
        "day",
    ),
    *("night", "house", "write", "add", "give", "what", "is", "are", "in", "of", "to", "make", "by", "each"),
    *("letter", "letters", "order", "string", "sum", "case", "how", "many", "times", "date", "form", "and"),
    *("all", "up", "every", "count", "sort", "shift"),
)
NAMES: Final = ("say", "small", "mirror", "rank", "tally", "hop", "both", "short", "long", "pick", "rising")


@dataclass(frozen=True, slots=True)
class Document:
    """A piece of text. With a `reply` it is a chat turn, and only the reply is learned in full."""

    text: str
    reply: str | None = None


Maker = Callable[[random.Random], Document]


def some(rng: random.Random, symbols: str, low: int, high: int) -> str:
    """A string of `low` to `high` symbols."""
    return "".join(rng.choices(symbols, k=rng.randint(low, high)))
