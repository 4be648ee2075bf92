"""Texts whose letters say where they belong, so that an oracle can follow them through any mutation.

Answers are written in Greek letters, reasoning in Cyrillic ones, everything else (ids, unknown fields, other
choices) in Georgian ones. What must be stored of a mutated body is then the sequence of its Greek letters,
however they were cut into pieces.
"""

from __future__ import annotations

import re
from random import Random

GREEK = "αβγδεζηθικλμνξοπρστυφχψω"
CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюя"
GEORGIAN = "აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ"
_NOT_GREEK = re.compile(f"[^{GREEK}]+")
_NOT_CYRILLIC = re.compile(f"[^{CYRILLIC}]+")
# What stands between the letters: what JSON, SSE and templates find hard.
_BETWEEN = (
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", '"', "\\", "/", "'", "{}", "[1]", "\u2028", "\x7f", "\u0000"),
    *(
        "😀",
        "👩‍👩‍👧",
        "é",
        "e\u0301",
        "\ufeff",
        "data: ",
        "\ndata: x\n\n",
        "<b>",
        "&amp;",
        "```\n",
        "`x`",
        "`",
        "%41",
        "$$",
    ),
    *("<", ">", "think", "</s>", "[DONE]", "null", "0", "-1.5e3", ",", ":", "event: y"),
)


def letters(random: Random, alphabet: str, most: int = 30) -> str:
    """Return a text with at least one letter of an alphabet, and hard characters between them."""
    pieces = []
    for _ in range(random.randint(1, 4)):
        pieces.append("".join(random.choices(alphabet, k=random.randint(1, most // 3))))
        if random.random() < 0.5:
            pieces.append(random.choice(_BETWEEN))
    return "".join(pieces)


def answer(random: Random) -> str:
    """Return the text of an answer.

    It begins with a letter, as white space at the start may be dropped, and ends with no mark of a turn.
    """
    return letters(random, GREEK).removesuffix("</s>")


def reasoning(random: Random) -> str:
    """Return a text of reasoning."""
    return letters(random, CYRILLIC)


def decoy(random: Random) -> str:
    """Return a text that is no part of the answer."""
    return "".join(random.choices(GEORGIAN, k=random.randint(1, 12)))


def greek(text: str) -> str:
    """Return the Greek letters of a text."""
    return _NOT_GREEK.sub("", text)


def cyrillic(text: str) -> str:
    """Return the Cyrillic letters of a text."""
    return _NOT_CYRILLIC.sub("", text)
