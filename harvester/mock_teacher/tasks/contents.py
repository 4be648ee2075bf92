"""Draw content for the rule tasks from a seeded generator, and compute the key of equal contents."""

from __future__ import annotations

import calendar
import random
import string
from collections.abc import Callable, Mapping
from typing import Final

from harvester.mock_teacher.tasks.phrasings import DOUBLE, MONTHS
from harvester.mock_teacher.tasks.sql_grammar import NUMBER_COLUMNS, OPERATORS, selectable

Slots = dict[str, str]


def draw(task: str, rng: random.Random) -> Slots:
    """Return content for one prompt of a task, by slot name."""
    return _DRAWS[task](rng)


def content_key(task: str, slots: Mapping[str, str]) -> tuple[str, ...]:
    """Return a key that is equal for prompts with the same content in different phrasings.

    Stricter than equality on purpose: `a + b` is `b + a`, a string is every anagram of itself under any
    shift and any counted letter, and strings are shared by all the string tasks.
    """
    if "text" in slots:
        return ("letters", "".join(sorted(slots["text"])))
    if task == "sum":
        return (task, *sorted((slots["a"], slots["b"])))
    return (task, *(slots[name] for name in sorted(slots)))


def _sum(rng: random.Random) -> Slots:
    """Draw two two-digit numbers; their sum has two or three digits."""
    return {name: str(rng.randrange(10, 100)) for name in "ab"}


def _letters(rng: random.Random, *lengths: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.choice(lengths)))


def _text(rng: random.Random) -> Slots:
    return {"text": _letters(rng, 4, 5)}


def _lopsided(rng: random.Random) -> Slots:
    """Draw no palindrome, which a mere echo would answer."""
    while True:
        text = _letters(rng, 4, 5)
        if text != text[::-1]:
            return {"text": text}


def _unsorted(rng: random.Random) -> Slots:
    """Draw no sorted list, which a mere echo would answer."""
    while True:
        text = _letters(rng, 3, 4)
        if list(text) != sorted(text):
            return {"text": text}


def _shift(rng: random.Random) -> Slots:
    return {"text": _letters(rng, 3, 4), "k": str(rng.randint(1, 5))}


def _count(rng: random.Random) -> Slots:
    """Draw a word with 0 to 3 of the letter, each equally likely."""
    letter = rng.choice(string.ascii_lowercase)
    others = string.ascii_lowercase.replace(letter, "")
    wanted = rng.randint(0, 3)
    letters = [letter] * wanted + rng.choices(others, k=rng.randint(4, 6) - wanted)
    rng.shuffle(letters)
    return {"letter": letter, "text": "".join(letters)}


def _date(rng: random.Random) -> Slots:
    year, month = rng.randint(1900, 2099), rng.randint(1, 12)
    day = rng.randint(1, calendar.monthrange(year, month)[1])
    return {"day": str(day), "month": MONTHS[month - 1], "year": str(year)}


def _sql(rng: random.Random) -> Slots:
    table = rng.choice(list(NUMBER_COLUMNS))
    return {
        "what": rng.choice(selectable(table)),
        "table": table,
        "field": rng.choice(NUMBER_COLUMNS[table]),
        "op": rng.choice(list(OPERATORS)),
        "value": str(rng.randint(10, 99)),
    }


_DRAWS: Final[Mapping[str, Callable[[random.Random], Slots]]] = {
    "sum": _sum,
    "reverse": _lopsided,
    "sort": _unsorted,
    "shift": _shift,
    "count": _count,
    "upper": _text,
    "date": _date,
    "sql": _sql,
    DOUBLE: _text,
}
