"""Solve the rule tasks: compute the right answer to a prompt from its text, and plausible wrong answers.

There is no table of answers; `solve` parses the prompt and computes.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from harvester.mock_teacher.tasks import judging
from harvester.mock_teacher.tasks.phrasings import DOUBLE, MONTHS, read
from harvester.mock_teacher.tasks.sql_grammar import NUMBER_COLUMNS, OPERATORS, to_sql

Slots = Mapping[str, str]

JUDGE: Final = "judge"
_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Solved:
    """A prompt and its right answer. `slots` is its content, by slot name of `phrasing`."""

    task: str
    answer: str
    phrasing: str
    slots: Slots


def solve(text: str) -> Solved | None:
    """Solve a prompt; return None if it is no rule task or its content is invalid (31 June)."""
    task = read(text)
    if task is None:
        return _judged(text)
    answer = SOLVERS[task.task](task.slots)
    return None if answer is None else Solved(task.task, answer, task.phrasing, task.slots)


def _judged(text: str) -> Solved | None:
    """Solve a prompt that asks to judge an answer to a rule task."""

    def right_answer(request: str) -> str | None:
        solved = solve(request) if request != text else None
        return solved.answer if solved else None

    verdict = judging.verdict(text, right_answer)
    return None if verdict is None else Solved(JUDGE, verdict[0], "", {"opposite": verdict[1]})


def wrong_answer(solved: Solved, rng: random.Random) -> str:
    """Return a plausible wrong answer, in the right format and never equal to the right answer."""
    for _ in range(8):
        slip = _SLIPS.get(solved.task, _misspelt)(solved, rng)
        if slip != solved.answer:
            return slip
    # "aaaa" can't be misspelt by swapping: replace its first character instead.
    first = "b" if solved.answer[0] == "a" else "a"
    return first + solved.answer[1:]


def _date(slots: Slots) -> str | None:
    month = MONTHS.index(slots["month"]) + 1
    try:
        return datetime.date(int(slots["year"]), month, int(slots["day"])).isoformat()
    except ValueError:
        return None


def _shift(slots: Slots) -> str:
    by = int(slots["k"])
    return "".join(_ALPHABET[(_ALPHABET.index(letter) + by) % 26] for letter in slots["text"])


SOLVERS: Final[Mapping[str, Callable[[Slots], str | None]]] = {
    "sum": lambda slots: str(int(slots["a"]) + int(slots["b"])),
    "reverse": lambda slots: slots["text"][::-1],
    "sort": lambda slots: "".join(sorted(slots["text"])),
    "shift": _shift,
    "count": lambda slots: str(slots["text"].count(slots["letter"])),
    "upper": lambda slots: slots["text"].upper(),
    "date": _date,
    "sql": lambda slots: to_sql(slots["what"], slots["table"], slots["field"], slots["op"], slots["value"]),
    DOUBLE: lambda slots: "".join(letter * 2 for letter in slots["text"]),
}


def _miscounted(solved: Solved, rng: random.Random) -> str:
    """Add or subtract 1 at one digit: a forgotten carry, a missed letter."""
    step = 10 ** rng.randrange(len(solved.answer))
    value = int(solved.answer)
    return str(value + step if value < step or rng.random() < 0.5 else value - step)


def _misspelt(solved: Solved, rng: random.Random) -> str:
    """Swap two neighbours, change a letter, or drop one."""
    letters = list(solved.answer)
    at = rng.randrange(len(letters))
    kind = rng.randrange(3)
    if kind == 0 and at > 0:
        letters[at - 1], letters[at] = letters[at], letters[at - 1]
    elif kind == 1 and len(letters) > 1:
        del letters[at]
    else:
        other = rng.choice(_ALPHABET)
        letters[at] = other.upper() if letters[at].isupper() else other
    return "".join(letters)


def _misdated(solved: Solved, rng: random.Random) -> str:
    """Change day, month or year by one, or swap day and month."""
    year, month, day = (int(part) for part in solved.answer.split("-"))
    slips = (
        (year, month, day % 28 + 1),
        (year, month % 12 + 1, day),
        (year + 1, month, day),
        (year, day, month),
    )
    return "{:04d}-{:02d}-{:02d}".format(*rng.choice(slips))


def _misqueried(solved: Solved, rng: random.Random) -> str:
    """Change the comparison, the column, or a digit of the value."""
    slots = dict(solved.slots)
    kind = rng.randrange(3)
    if kind == 0:
        slots["op"] = rng.choice([op for op in OPERATORS if op != slots["op"]])
    elif kind == 1:
        columns = NUMBER_COLUMNS[slots["table"]]
        slots["field"] = columns[1 - columns.index(slots["field"])]
    else:
        slots["value"] = str(int(slots["value"]) + rng.choice((1, 10)))
    query = to_sql(slots["what"], slots["table"], slots["field"], slots["op"], slots["value"])
    return query or solved.answer


_SLIPS: Final[Mapping[str, Callable[[Solved, random.Random], str]]] = {
    "sum": _miscounted,
    "count": _miscounted,
    "date": _misdated,
    "sql": _misqueried,
    JUDGE: lambda solved, _: solved.slots["opposite"],
}
