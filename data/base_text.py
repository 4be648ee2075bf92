"""The text the tiny base student is pre-trained on: seeded, endless, and free of answers to the rule tasks.

It holds what a student may bring along: facts (alphabet, capitals, digits, months), and skills that are kin
to the tasks, on other symbols and under other names: capital letters and digits are mirrored, ranked, tallied
and moved on, decimals are added, dates are written with slashes. No document asks for a rule task, and none
shows lower-case letters reversed, sorted, shifted or counted, or two whole numbers of two digits added.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from harvester_data.base_document import DIGITS, LOWER, UPPER, WORDS, Document, Maker, some

from harvester.mock_teacher.tasks.phrasings import MONTHS
from harvester.mock_teacher.tasks.sql_grammar import NUMBER_COLUMNS, OPERATORS, selectable


def stream(seed: int, phases: tuple[tuple[int, Mapping[Maker, float]], ...]) -> Iterator[Document]:
    """Documents for ever; a phase is how many documents it lasts and the weights of its kinds."""
    rng = random.Random(seed)
    for number, (length, kinds) in enumerate(phases):
        makers, weights = list(kinds), list(kinds.values())
        last, made = number == len(phases) - 1, 0
        while last or made < length:
            yield rng.choices(makers, weights)[0](rng)
            made += 1


def _symbols(rng: random.Random) -> str:
    return rng.choice((UPPER, UPPER, DIGITS))


def _ask(rng: random.Random, core: str, reply: str) -> Document:
    """A chat turn whose content sits among words that mean nothing here."""
    before, after = (" ".join(rng.choices(WORDS, k=rng.choice((0, 0, 0, 1, 2)))) for _ in range(2))
    return Document(
        " ".join(part for part in (before, core, after) if part) + rng.choice((".", "?", "")), reply
    )


# Skills on other symbols, under other names.


def say(rng: random.Random) -> Document:
    """Copy letters, capitals or digits."""
    said = some(rng, rng.choice((LOWER, LOWER, UPPER, DIGITS)), 3, 9)
    return Document(f"say {said}", said)


def say_among(rng: random.Random) -> Document:
    """Copy a string or some words out of a longer turn."""
    said = " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
    if rng.random() < 0.75:
        said = some(rng, rng.choice((LOWER, LOWER, DIGITS)), 3, 7)
    return _ask(rng, f"say {said}", said)


def mirror(rng: random.Random) -> Document:
    """Capitals or digits from the other end."""
    line = some(rng, _symbols(rng), 3, 6)
    return _ask(rng, f"mirror {line}", line[::-1])


def rank(rng: random.Random) -> Document:
    """Capitals or digits by rank."""
    line = some(rng, _symbols(rng), 2, 5)
    return _ask(rng, f"rank {line}", "".join(sorted(line)))


def tally(rng: random.Random) -> Document:
    """How many of a capital or digit there are."""
    symbols = _symbols(rng)
    one, wanted = rng.choice(symbols), rng.randint(0, 3)
    others = rng.choices(symbols.replace(one, ""), k=rng.randint(max(wanted, 3), 6) - wanted)
    line = [one] * wanted + others
    rng.shuffle(line)
    return _ask(rng, f"tally {one} of {''.join(line)}", str(wanted))


def hop(rng: random.Random) -> Document:
    """Capitals or digits, each moved on."""
    symbols, by = _symbols(rng), rng.randint(1, 5)
    line = some(rng, symbols, 1, 4)
    moved = "".join(symbols[(symbols.index(one) + by) % len(symbols)] for one in line)
    return _ask(rng, f"hop {line} on {by}", moved)


def small(rng: random.Random) -> Document:
    """Capitals made small."""
    line = some(rng, UPPER, 3, 7)
    return _ask(rng, f"small {line}", line.lower())


def both(rng: random.Random) -> Document:
    """Decimals with one place, a number and a digit, or round numbers, added."""
    kind = rng.random()
    if kind < 0.3:
        a, b = rng.randrange(10, 1000), rng.randrange(10)
        parts, total = [str(a), str(b)], str(a + b)
    elif kind < 0.4:
        zeros = rng.choice(("00", "000"))
        a, b = rng.randrange(1, 10), rng.randrange(1, 10)
        parts, total = [f"{a}{zeros}", f"{b}{zeros}"], f"{a + b}{zeros}"
    else:
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        parts, total = [f"{a / 10:.1f}", f"{b / 10:.1f}"], f"{(a + b) / 10:.1f}"
    rng.shuffle(parts)
    return _ask(rng, rng.choice(("both {} {}", "{} + {}")).format(*parts), total)


def short(rng: random.Random) -> Document:
    """A date with slashes, or back."""
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1900, 2099)
    long = rng.choice((f"{day} {MONTHS[month]} {year}", f"{MONTHS[month]} {day}, {year}"))
    if rng.random() < 0.6:
        return _ask(rng, f"short {long}", f"{day:02d}/{month + 1:02d}/{year}")
    return _ask(rng, f"long {day:02d}/{month + 1:02d}/{year}", long)


def pick(rng: random.Random) -> Document:
    """A filter in a made-up notation."""
    table = rng.choice(list(NUMBER_COLUMNS))
    what, field, value = rng.choice(selectable(table)), rng.choice(NUMBER_COLUMNS[table]), rng.randint(10, 99)
    op = rng.choice(list(OPERATORS))
    return _ask(
        rng, f"pick {what} {table} {field} {op} {value}", f"{table} {what} {field} {OPERATORS[op]} {value}"
    )
