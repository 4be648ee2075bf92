"""Write prompts/skills-*.jsonl: the rule tasks of the mock teacher, seeded and repeatable.

    python prompts/generate.py [FOLDER]

A reference is what a row is scored against; it stays at home and is never sent to a teacher.
No content of the held-out file occurs in the training file (`contents.content_key` says what counts
as the same), all prompts are distinct, and running it again writes the same bytes.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harvester.mock_teacher.tasks.contents import content_key, draw
from harvester.mock_teacher.tasks.phrasings import DOUBLE, PHRASINGS
from harvester.mock_teacher.tasks.rules import solve

SEED = 20_260_101
HELD_OUT = 100  # rows of each task, asked as in training
HELD_OUT_PHRASING = 50  # rows of each task, asked as never before
HELD_OUT_TASK = 100
TRAIN = {  # 4,000 rows, more of what takes more examples
    "sum": 550,
    "reverse": 600,
    "sort": 650,
    "shift": 600,
    "count": 750,
    "upper": 300,
    "date": 300,
    "sql": 250,
}


def files() -> dict[str, bytes]:
    """Name -> bytes of both prompt files."""
    rng = random.Random(SEED)
    taken: set[tuple[str, ...]] = set()
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for task, wanted in TRAIN.items():
        asked = PHRASINGS[task]
        train += _rows(rng, taken, task, "train", wanted, asked.train)
        held_out += _rows(rng, taken, task, "held_out", HELD_OUT, asked.train)
        held_out += _rows(rng, taken, task, "held_out_phrasing", HELD_OUT_PHRASING, asked.held_out)
    everything = (*PHRASINGS[DOUBLE].train, *PHRASINGS[DOUBLE].held_out)
    held_out += _rows(rng, taken, DOUBLE, "held_out_task", HELD_OUT_TASK, everything)
    rng.shuffle(train)
    return {"skills-train.jsonl": _jsonl(train), "skills-held-out.jsonl": _jsonl(held_out)}


def _rows(
    rng: random.Random,
    taken: set[tuple[str, ...]],
    task: str,
    split: str,
    wanted: int,
    phrasings: tuple[str, ...],
) -> Iterator[dict[str, Any]]:
    made = 0
    while made < wanted:
        slots = draw(task, rng)
        key = content_key(task, slots)
        if key in taken:
            continue
        taken.add(key)
        phrasing = phrasings[made % len(phrasings)]
        prompt = phrasing.format(**slots)
        solved = solve(prompt)
        if solved is None or solved.phrasing != phrasing:
            raise ValueError(f"the rules do not read {prompt!r} as {phrasing!r}")
        yield {
            "id": f"skills-{task}-{split.replace('_', '-')}-{made:04d}",
            "prompt": prompt,
            "reference": solved.answer,
            "tags": ["skills", task],
            "task": task,
            "split": split,
            "phrasing": phrasing,
            "verify": "exact",
        }
        made += 1


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def main() -> None:
    """Write the files and say what they hold."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, content in files().items():
        (folder / name).write_bytes(content)
        rows = len(content.splitlines())
        print(f"{folder / name}: {rows:,} rows, {len(content):,} bytes")


if __name__ == "__main__":
    main()
