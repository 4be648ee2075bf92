"""Plain text of the base student: facts it may bring along, and strings to copy."""

from __future__ import annotations

import datetime
import random

from harvester_data.base_document import LOWER, WORDS, Document, some

from harvester.mock_teacher.tasks.phrasings import MONTHS
from harvester.mock_teacher.tasks.sql_grammar import COUNT, NUMBER_COLUMNS, OPERATORS, selectable, to_sql


def repeated(rng: random.Random) -> Document:
    """A string again and again."""
    return Document(" ".join([some(rng, LOWER, 3, 10)] * rng.randint(2, 4)))


def recalled(rng: random.Random) -> Document:
    """Some strings, and once more in the same order."""
    return Document(" ".join([some(rng, LOWER, 1, 4) for _ in range(rng.randint(2, 5))] * 2))


def neighbours(rng: random.Random) -> Document:
    """Which letter stands before or after which in a string."""
    line = "".join(rng.sample(LOWER, rng.randint(3, 7)))
    places = [rng.randrange(1, len(line)) for _ in range(rng.randint(2, 5))]
    facts = [
        rng.choice((f"{line[at]} after {line[at - 1]}", f"{line[at - 1]} before {line[at]}")) for at in places
    ]
    return Document(f"in {line}: {' '.join(facts)} first {line[0]}, last {line[-1]}")


def alphabet(rng: random.Random) -> Document:
    """The alphabet in steps of one to five."""
    by, start = rng.randint(1, 5), rng.randrange(26)
    return Document(" ".join(LOWER[(start + by * at) % 26] for at in range(rng.randint(5, 12))))


def letter_facts(rng: random.Random) -> Document:
    """Which letter is so many places after a letter."""
    facts = [(rng.randrange(26), rng.randint(1, 5)) for _ in range(rng.randint(3, 7))]
    return Document(", ".join(f"{LOWER[at]}+{by} {LOWER[(at + by) % 26]}" for at, by in facts))


def compared(rng: random.Random) -> Document:
    """Which of two letters comes first."""
    facts = [rng.choices(LOWER, k=2) for _ in range(rng.randint(4, 8))]
    return Document(" ".join(f"{a}{'<' if a < b else '>' if a > b else '='}{b}" for a, b in facts))


def rising(rng: random.Random) -> Document:
    """Letters that go up the alphabet."""
    return Document("rising: " + " ".join("".join(sorted(some(rng, LOWER, 3, 6))) for _ in range(3)))


def capitals(rng: random.Random) -> Document:
    """Letters beside their capitals."""
    return Document(" ".join(one + one.upper() for one in some(rng, LOWER, 4, 10)))


def digit_facts(rng: random.Random) -> Document:
    """One-digit sums, with and without a carried one."""
    facts = [(rng.randrange(10), rng.randrange(10), rng.randrange(2)) for _ in range(rng.randint(3, 7))]
    return Document(" ".join(f"{a}+{b}+{c}={a + b + c}" if c else f"{a}+{b}={a + b}" for a, b, c in facts))


def numbers(rng: random.Random) -> Document:
    """Counting on."""
    start, by = rng.randrange(1000), rng.choice((1, 1, 2, 10, 100))
    return Document(" ".join(str(start + by * at) for at in range(rng.randint(3, 7))))


def months(rng: random.Random) -> Document:
    """Months and their numbers."""
    at = [rng.randrange(12) for _ in range(rng.randint(2, 5))]
    return Document(", ".join(f"{MONTHS[m]} is month {m + 1:02d}, {m + 1:02d} is {m + 1}" for m in at))


def days(rng: random.Random) -> Document:
    """Days in a row, all in one format."""
    start = datetime.date(rng.randint(1900, 2099), rng.randint(1, 12), rng.randint(1, 27))
    row = [start + datetime.timedelta(days=at) for at in range(rng.randint(2, 4))]
    if rng.random() < 0.6:
        return Document(" ".join(day.isoformat() for day in row))
    return Document(" then ".join(f"{day.day} {MONTHS[day.month - 1]} {day.year}" for day in row))


def queries(rng: random.Random) -> Document:
    """A query nobody asked for."""
    table = rng.choice(list(NUMBER_COLUMNS))
    what, field, op = (
        rng.choice(selectable(table)),
        rng.choice(NUMBER_COLUMNS[table]),
        rng.choice(list(OPERATORS)),
    )
    return Document(to_sql(what, table, field, op, str(rng.randint(10, 99))) or COUNT)


def signs(rng: random.Random) -> Document:
    """Comparisons in words and signs."""
    return Document(", ".join(f"{words} is {sign}" for words, sign in rng.sample(list(OPERATORS.items()), 3)))


def sentence(rng: random.Random) -> Document:
    """Words that occur in instructions, in no order."""
    return Document(" ".join(rng.choices(WORDS, k=rng.randint(4, 10))).capitalize() + ".")
