"""Measure the search for near duplicates: rows a second, memory and disk.

    python benchmarks/near_duplicates.py [--rows 1000000] [--words 60]

The texts are random words of a vocabulary of 50,000; one in ten is an earlier text with one word replaced.
Memory is read from /proc: anonymous pages, and pages of the mapped files, which the system can drop.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator

from tests.peak_memory import peak_kib, status_kib

VOCABULARY = 50_000


def texts(rows: int, words: int) -> Iterator[tuple[str, int | None]]:
    """Yield the texts; of a copy also the number of the text that it copies."""
    rng = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(2, 10))) for _ in range(VOCABULARY)]

    def original(number: int) -> list[str]:
        return random.Random(number).choices(vocabulary, k=words)

    for number in range(rows):
        if number % 10 != 9:
            yield " ".join(original(number)), None
            continue
        copied = rng.randrange(number)
        copied -= copied % 10 == 9
        text = original(copied)
        text[rng.randrange(words)] = rng.choice(vocabulary)
        yield " ".join(text), copied


def main() -> None:
    """Print a line at every tenth of the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=60)
    arguments = parser.parse_args()
    from harvester.quality.similarity.duplicates import Duplicates

    duplicates = Duplicates("near")
    spent, right, missed, wrong, characters = 0.0, 0, 0, 0, 0
    print(
        f"{'rows':>10} {'us/row':>8} {'MiB anon':>9} {'MiB file':>9} {'peak':>7} {'missed':>7} {'wrong':>6}"
    )
    for number, (text, copied) in enumerate(texts(arguments.rows, arguments.words), start=1):
        begun = time.process_time()
        match = duplicates.find(text, str(number - 1))
        spent += time.process_time() - begun
        characters += len(text)
        if copied is None:
            wrong += match is not None
        elif match is None:
            missed += 1
        else:
            right += match.label == str(copied)
        if number % max(1, arguments.rows // 10) == 0:
            memory = [status_kib(name) >> 10 for name in ("RssAnon", "RssFile")]
            memory[1] += status_kib("RssShmem") >> 10
            print(
                f"{number:>10,} {spent / number * 1e6:>8.1f} {memory[0]:>9,} {memory[1]:>9,} "
                f"{peak_kib() >> 10:>7,} {missed:>7,} {wrong:>6,}"
            )
            sys.stdout.flush()
    print(f"{right:,} copies found with their original; {characters / arguments.rows:.0f} characters a row")


if __name__ == "__main__":
    main()
