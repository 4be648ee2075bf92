"""Draw rows of the rule tasks from three pools that share no content: gold, harvest and test.

    python data/skill_rows.py FOLDER      # writes harvest.jsonl and test.jsonl

The small neural teacher (`make_neural_teacher`) learns from the gold pool, a student from the teacher's
answers to the harvest pool, and both are scored on the test pool. The pool of a content is a function of its
key (`contents.content_key`), so equal contents are in one pool whatever their phrasing, and every run agrees.
Gold and harvest rows are asked in the phrasings of `skill_phrasings.WIDE`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import string
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from harvester_data.skill_phrasings import WIDE

from harvester.mock_teacher.tasks.contents import Slots, content_key, draw
from harvester.mock_teacher.tasks.phrasings import DOUBLE, PHRASINGS, pattern_of
from harvester.mock_teacher.tasks.rules import SOLVERS

SEED: Final = 20_260_601
GOLD: Final = "gold"
HARVEST: Final = "harvest"
TEST: Final = "test"
# Cumulative shares of the contents. Two-digit numbers have only 4,095 sums, so the harvest and test pools are
# as small as their rows allow: about 330 sums for 240 rows of the test.
POOLS: Final = ((TEST, 0.08), (HARVEST, 0.33), (GOLD, 1.0))

# Rows of each task in `gold_rows`, out of 100: more of what takes more examples. The held-out task has none.
GOLD_WEIGHTS: Final[Mapping[str, int]] = {
    "sum": 21,
    "reverse": 11,
    "sort": 16,
    "shift": 17,
    "count": 19,
    "upper": 6,
    "date": 7,
    "sql": 5,
}
# Gold rows before contents of full size prevail.
EARLY_ROWS: Final = 20_000
REPEAT: Final = ("Repeat {text}.", "Say {text}.", "Write the word {text}.", "Spell the letters of {text}.")
HARVEST_ROWS: Final = 1_000  # of each task: 8,000
TEST_ROWS: Final = 160  # of each task, in phrasings of training
TEST_ROWS_PHRASING: Final = 80  # of each task, in held-out phrasings
TEST_ROWS_TASK: Final = 80  # of the held-out task: 2,000 in all

Row = dict[str, Any]


def pool_of(key: tuple[str, ...]) -> str:
    """Return the pool of a content."""
    digest = hashlib.sha256("\0".join(key).encode()).digest()
    position = int.from_bytes(digest[:8]) / 2.0**64
    return next(name for name, end in POOLS if position < end)


def draw_row(
    rng: random.Random,
    pool: str,
    task: str,
    phrasing: str,
    content: Callable[[str, random.Random], Slots] = draw,
) -> Row:
    """Return one row of a task whose content belongs to `pool`."""
    while True:
        slots = content(task, rng)
        if pool_of(content_key(task, slots)) == pool:
            break
    prompt = phrasing.format(**slots)
    match, answer = pattern_of(phrasing).fullmatch(prompt), SOLVERS[task](slots)
    if match is None or match.groupdict() != slots or answer is None:
        raise ValueError(f"the rules do not read {prompt!r} as {phrasing!r}")
    return {"prompt": prompt, "reference": answer, "task": task, "phrasing": phrasing}


def draw_short(task: str, rng: random.Random) -> Slots:
    """Return content that takes fewer steps: strings of up to three letters, numbers of one digit."""
    slots = draw(task, rng)
    if task == "sum":
        slots[rng.choice("ab")] = str(rng.randrange(10))
        if rng.random() < 0.7:
            slots["a"], slots["b"] = slots["a"][-1], slots["b"][-1]
    elif "text" in slots:
        letters = rng.choices(string.ascii_lowercase, k=rng.randint(1, 3))
        if "letter" in slots:
            letters = [slots["letter"] if rng.random() < 0.4 else letter for letter in letters]
        slots["text"] = "".join(letters)
    return slots


def gold_rows(seed: int = SEED) -> Iterator[Row]:
    """Return endless rows with right answers, in phrasings of training; short contents prevail at first.

    Among the first rows are some that ask to repeat a string: copying is learned before what builds on it.
    """
    rng = random.Random(f"{GOLD} {seed}")
    tasks, weights = list(GOLD_WEIGHTS), list(GOLD_WEIGHTS.values())
    for number in itertools.count():
        is_early = number < EARLY_ROWS
        if is_early and rng.random() < 0.15:
            yield _repeat_row(rng)
            continue
        task = rng.choices(tasks, weights)[0]
        is_short = rng.random() < (0.8 if is_early else 0.15)
        yield draw_row(rng, GOLD, task, rng.choice(WIDE[task]), draw_short if is_short else draw)


def _repeat_row(rng: random.Random) -> Row:
    phrasing = rng.choice(REPEAT)
    row = draw_row(rng, GOLD, "upper", phrasing, draw_short)
    return {**row, "task": "repeat", "reference": row["reference"].lower()}


def harvest_rows(seed: int = SEED, each: int = HARVEST_ROWS) -> list[Row]:
    """Return `each` rows a task, with distinct prompts in phrasings of training."""
    drawn = _Draw(HARVEST, seed)
    rows = [row for task in GOLD_WEIGHTS for row in drawn.rows(task, WIDE[task], each, "train")]
    drawn.rng.shuffle(rows)
    return rows


def held_out_rows(seed: int = SEED) -> list[Row]:
    """Return the 2,000 rows of the test, with distinct prompts.

    `split` says what is held out: the content only, the phrasing too, or the whole task.
    """
    drawn = _Draw(TEST, seed)
    rows: list[Row] = []
    for task in GOLD_WEIGHTS:
        asked = PHRASINGS[task]
        rows += drawn.rows(task, asked.train, TEST_ROWS, "held_out")
        rows += drawn.rows(task, asked.held_out, TEST_ROWS_PHRASING, "held_out_phrasing")
    everything = (*PHRASINGS[DOUBLE].train, *PHRASINGS[DOUBLE].held_out)
    return rows + drawn.rows(DOUBLE, everything, TEST_ROWS_TASK, "held_out_task")


class _Draw:
    """Draw rows of one pool, no prompt twice."""

    def __init__(self, pool: str, seed: int) -> None:
        self.rng = random.Random(f"{pool} {seed}")
        self._pool = pool
        self._taken: set[str] = set()

    def rows(self, task: str, phrasings: tuple[str, ...], wanted: int, split: str) -> list[Row]:
        """Return `wanted` rows of a task, in each phrasing equally often."""
        rows: list[Row] = []
        while len(rows) < wanted:
            row = draw_row(self.rng, self._pool, task, phrasings[len(rows) % len(phrasings)])
            if row["prompt"] in self._taken:
                continue
            self._taken.add(row["prompt"])
            name = f"{self._pool}-{task}-{split.replace('_', '-')}-{len(rows):04d}"
            rows.append({"id": name, **row, "split": split, "tags": ["skills", task], "verify": "exact"})
        return rows


def main() -> None:
    """Write both files and print what they hold."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("harvest.jsonl", harvest_rows()), ("test.jsonl", held_out_rows())):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
