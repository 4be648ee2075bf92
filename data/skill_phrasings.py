"""Widen the phrasings of the rule tasks: many templates of training for each, none of them a held-out one.

A pattern holds alternatives in parentheses, and stands for every combination of them. A model that has read
five templates learns five positions; one that has read these finds the content in a new sentence as well.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Final

from harvester.mock_teacher.tasks.phrasings import PHRASINGS

_PATTERNS: Final[Mapping[str, tuple[str, ...]]] = {
    "sum": (
        "What is {a} (+|plus) {b}?",
        "How much is {a} (+|plus|and) {b}?",
        "(Compute|Calculate|Work out|Find|Give|Tell me) {a} (+|plus) {b}.",
        "(Add|Add up|Sum|Sum up) {a} and {b}.",
        "Add {b} to {a}.",
        "Add {a} + {b}.",
        "(Give|Find|Compute|Work out|Tell me) the (sum|total) of {a} and {b}.",
        "What is the total of {a} and {b}?",
        "What is the sum of {a} + {b}?",
        "What do {a} and {b} (add up to|make|sum to)?",
    ),
    "reverse": (
        "(Reverse|Turn round|Flip) (|the string |the word |the text ){text}.",
        "(Write|Spell|Give|Say|Print) (|the word ){text} (backwards|in reverse|from back to front).",
        "(Write|Spell|Give|Say|Print) the string {text} (backwards|in reverse|from back to front).",
        "What is {text} (in reverse|backwards|from back to front)?",
        "(Give|Write|Put|List|Spell) the letters of {text} (in reverse order|backwards|in reverse).",
        "(Turn round|Flip) the letters of {text}.",
        "Reverse (all|the order of the) letters of {text}.",
    ),
    "sort": (
        "(Sort|Order|Arrange) (|the letters of |the letters in ){text} alphabetically.",
        "(Sort|Order|Arrange) (the word|all letters of) {text} alphabetically.",
        "(Sort|Order|Arrange|Put) (|the letters of |the letters in |the word ){text} in alphabetical order.",
        "(Order|Arrange|Put|Write|Give|List) the letters of {text} in (alphabetical|sorted) order.",
        "Sort (|the word |the letters of |the letters in |the text ){text}.",
        "What is {text} (with its letters sorted|in alphabetical order|sorted)?",
        "Sort the string {text} (alphabetically|from a to z|by letter).",
    ),
    "shift": (
        "(Shift|Caesar shift|Move|Rotate) (|the string |the word ){text} by {k}(| places| letters| steps).",
        "(Shift|Move|Caesar shift) (|the string |the letters of ){text} forward by {k}(| letters| steps).",
        "(Shift|Move|Rotate) (each|every) letter of {text} (by|forward by) {k}(| places| steps).",
        "Move (the letters of|all letters of|the word) {text} forward by {k} places.",
        "Shift all letters of {text} by {k}.",
    ),
    "count": (
        "How many times does {letter} (occur|appear) in {text}?",
        "How many times is {letter} in {text}?",
        "How often (is {letter}|does {letter} appear|do we see {letter}) in {text}?",
        "How many {letter} (are|occur) in {text}?",
        "Count (the letter {letter}|every {letter}) in {text}.",
        "Count how many (times {letter} is|{letter} are) in {text}.",
        "Count how often {letter} (occurs|appears) in {text}.",
        "(Give|Find|Tell me|Count) the number of {letter} in {text}.",
        "(Say|Tell me) how (many {letter} are|often {letter} is) in {text}.",
    ),
    "upper": (
        "(Write|Put|Give|Say|Print|Spell) {text} in (upper case|capitals|large letters).",
        "(Put|Give|Say|Print|Spell) {text} in capital letters.",
        "(Write|Spell) the (word|string) {text} in (upper case|capitals|capital letters).",
        "(Convert|Change|Turn) {text} (to|into) (capitals|capital letters).",
        "(Change|Turn) {text} to upper case.",
        "Convert the (word|string|letters of) {text} to upper case.",
        "Make {text} (upper case|all capitals).",
        "What is {text} in (upper case|capitals|capital letters)?",
        "Capitalise (|each letter of |every letter of ){text}.",
    ),
    "date": (
        "(Write|Give|Put|Show) (|the date ){day} {month} {year} (as YYYY-MM-DD|in ISO format).",
        "(Give|Put|Show) (|the date ){month} {day}, {year} (as YYYY-MM-DD|in ISO format).",
        "(Write|Give|Put) the date {day} {month} {year} in the form YYYY-MM-DD.",
        "(Write|Give|Put) the date {month} {day}, {year} in the form YYYY-MM-DD.",
        "(Convert|Change|Turn) {day} {month} {year} (to|into) (ISO format|YYYY-MM-DD).",
        "(Convert|Reformat|Change|Turn) {month} {day}, {year} (to|into) (ISO format|YYYY-MM-DD).",
        "Reformat (|the date ){day} {month} {year} as YYYY-MM-DD.",
        "Reformat {month} {day}, {year} as YYYY-MM-DD.",
        "What is {day} {month} {year} (in ISO format|as YYYY-MM-DD)?",
        "What is {month} {day}, {year} (in ISO format|as YYYY-MM-DD)?",
    ),
    "sql": (
        "Write SQL (for|to get|that finds) the {what} of (|all ){table} with {field} {op} {value}.",
        "Write SQL (for|to get|that gives) the {what} of {table} (where|whose) {field} is {op} {value}.",
        "SQL query: (|the ){what} of (|all ){table} (where|whose) {field} is {op} {value}.",
        "SQL query: (|the ){what} of (|all ){table} with {field} {op} {value}.",
        "Which SQL (gives|finds) the {what} of (|all ){table} (whose {field} is|with {field}) {op} {value}?",
        "Turn into SQL: (|show |find )(|the ){what} of (|all ){table} with {field} {op} {value}.",
        "Translate to SQL: (show|find) the {what} of (|all ){table} where {field} is {op} {value}.",
        "Translate to SQL: (show|find) the {what} of (|all ){table} with {field} {op} {value}.",
        "Translate to SQL: {what} of {table} (where|whose) {field} is {op} {value}.",
    ),
}
_ALTERNATIVES: Final = re.compile(r"\(([^)]*)\)")


def _expanded(pattern: str) -> list[str]:
    """Return every template that a pattern stands for."""
    parts = _ALTERNATIVES.split(pattern)  # fixed text and alternatives, in turn
    choices = [part.split("|") if at % 2 else [part] for at, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _wide(task: str) -> tuple[str, ...]:
    templates = [template for pattern in _PATTERNS[task] for template in _expanded(pattern)]
    held_out = PHRASINGS[task].held_out
    known = dict.fromkeys((*PHRASINGS[task].train, *templates))
    return tuple(template for template in known if template not in held_out)


# Templates of training for each task: those of `PHRASINGS` and many more.
WIDE: Final[Mapping[str, tuple[str, ...]]] = {task: _wide(task) for task in _PATTERNS}
