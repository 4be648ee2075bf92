"""Define the phrasings of the rule tasks as templates with slots, and parse prompts back.

Each task has phrasings for training and phrasings that are held out. `DOUBLE` is held out whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from harvester.mock_teacher.tasks.sql_grammar import COUNT, NUMBER_COLUMNS, OPERATORS, TEXT_COLUMNS

MONTHS: Final = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
DOUBLE: Final = "double"


@dataclass(frozen=True, slots=True)
class Phrasings:
    """The templates of one task; `{slot}` marks the place of content."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


PHRASINGS: Final[Mapping[str, Phrasings]] = {
    "sum": Phrasings(
        train=(
            "What is {a} + {b}?",
            "Add {a} and {b}.",
            "Compute {a} + {b}.",
            "Give the sum of {a} and {b}.",
            "What do {a} and {b} add up to?",
        ),
        held_out=("What is the sum of {a} and {b}?", "Add up {a} + {b}."),
    ),
    "reverse": Phrasings(
        train=(
            "Reverse the string {text}.",
            "Write {text} backwards.",
            "Spell {text} from back to front.",
            "What is {text} in reverse?",
            "Give the letters of {text} in reverse order.",
        ),
        held_out=("Spell {text} backwards.", "Reverse the letters of {text}."),
    ),
    "sort": Phrasings(
        train=(
            "Sort the letters of {text}.",
            "Put the letters of {text} in alphabetical order.",
            "Sort {text} alphabetically.",
            "Write the letters of {text} in sorted order.",
            "What is {text} with its letters sorted?",
        ),
        held_out=("Write the letters of {text} in alphabetical order.", "Sort the string {text}."),
    ),
    "shift": Phrasings(
        train=(
            "Shift {text} by {k}.",
            "Move each letter of {text} forward by {k}.",
            "Caesar shift {text} by {k}.",
            "Shift every letter of {text} by {k} places.",
            "Shift the string {text} forward by {k}.",
        ),
        held_out=("Move {text} forward by {k} places.", "Shift each letter of {text} by {k}."),
    ),
    "count": Phrasings(
        train=(
            "How many times does {letter} occur in {text}?",
            "Count the letter {letter} in {text}.",
            "How often is {letter} in {text}?",
            "Count how many {letter} are in {text}.",
            "Give the number of {letter} in {text}.",
        ),
        held_out=("How often does {letter} occur in {text}?", "Count how often {letter} is in {text}."),
    ),
    "upper": Phrasings(
        train=(
            "Write {text} in upper case.",
            "Make {text} upper case.",
            "Convert {text} to capital letters.",
            "Give {text} in capitals.",
            "What is {text} in upper case?",
        ),
        held_out=("Convert {text} to upper case.", "Write {text} in capital letters."),
    ),
    "date": Phrasings(
        train=(
            "Write the date {day} {month} {year} as YYYY-MM-DD.",
            "Convert {day} {month} {year} to ISO format.",
            "Reformat {month} {day}, {year} as YYYY-MM-DD.",
            "What is {month} {day}, {year} in ISO format?",
            "Give the date {day} {month} {year} in the form YYYY-MM-DD.",
        ),
        held_out=(
            "Reformat {day} {month} {year} to ISO format.",
            "Write the date {month} {day}, {year} as YYYY-MM-DD.",
        ),
    ),
    "sql": Phrasings(
        train=(
            "Write SQL for the {what} of {table} with {field} {op} {value}.",
            "SQL query: {what} of {table} where {field} is {op} {value}.",
            "Which SQL gives the {what} of {table} whose {field} is {op} {value}?",
            "Turn into SQL: {what} of all {table} with {field} {op} {value}.",
            "Translate to SQL: show the {what} of {table} where {field} is {op} {value}.",
        ),
        held_out=(
            "Write SQL that gives the {what} of all {table} whose {field} is {op} {value}.",
            "Translate to SQL: {what} of {table} with {field} {op} {value}.",
        ),
    ),
    DOUBLE: Phrasings(
        train=(
            "Double every letter of {text}.",
            "Write each letter of {text} twice.",
            "Repeat every letter of {text} once.",
            "Spell {text} with every letter doubled.",
        ),
        held_out=("Double the letters of {text}.", "Give {text} with each letter twice."),
    ),
}

_LETTERS = "[a-z]{1,64}"
_NUMBER = "[0-9]{1,9}"
_TABLES = "|".join(TEXT_COLUMNS)
_FIELDS = "|".join(sorted({name for names in NUMBER_COLUMNS.values() for name in names}))
_WHATS = "|".join(
    sorted({name for names in TEXT_COLUMNS.values() for name in names} | {COUNT, *_FIELDS.split("|")})
)
_SLOTS: Final[Mapping[str, str]] = {
    "a": _NUMBER,
    "b": _NUMBER,
    "text": _LETTERS,
    "letter": "[a-z]",
    "k": "[1-5]",
    "day": "[1-9]|[12][0-9]|3[01]",
    "month": "|".join(MONTHS),
    "year": "[1-9][0-9]{3}",
    "what": _WHATS,
    "table": _TABLES,
    "field": _FIELDS,
    "op": "|".join(OPERATORS),
    "value": _NUMBER,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A parsed prompt: task, template, and the content of its slots."""

    task: str
    phrasing: str
    slots: Mapping[str, str]


def read(text: str) -> Asked | None:
    """Parse a prompt; return None if no phrasing matches the whole text."""
    text = text.strip()
    for task, phrasing, pattern in _patterns():
        if match := pattern.fullmatch(text):
            return Asked(task, phrasing, match.groupdict())
    return None


@cache
def _patterns() -> tuple[tuple[str, str, re.Pattern[str]], ...]:
    return tuple(
        (task, phrasing, pattern_of(phrasing))
        for task, phrasings in PHRASINGS.items()
        for phrasing in (*phrasings.train, *phrasings.held_out)
    )


@cache
def pattern_of(phrasing: str) -> re.Pattern[str]:
    """Return the regular expression of a template's prompts, with a group for each slot."""
    parts = re.split(r"\{(\w+)\}", phrasing)  # fixed text and slot names, in turn
    return re.compile(
        "".join(f"(?P<{part}>{_SLOTS[part]})" if at % 2 else re.escape(part) for at, part in enumerate(parts))
    )
