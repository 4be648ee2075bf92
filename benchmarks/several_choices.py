"""Compare what eight samples of a prompt are billed with and without `n`.

    python benchmarks/several_choices.py [--prompts 500] [--samples 8]

Harvests the same prompts from a mock teacher four times: one sample a request; up to eight; up to eight from
a teacher that answers four choices at most; up to eight from one that refuses more than two. The teacher's
own ledger says what was billed, and how often each prompt was answered beyond the samples asked for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from harvester.mock_teacher.running import RunningMock, start_process
from harvester.store.reader import Corpus

CASES: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("one sample a request", 1, ()),
    ("n up to 8", 8, ()),
    ("n up to 8, teacher answers 4", 8, ("--max-n", "4", "--n-above", "fewer")),
    ("n up to 8, teacher refuses more than 2", 8, ("--max-n", "2")),
)
SYSTEM = "You are a careful assistant. Read the question, work it out, and answer with the result alone. " * 4


def write_folder(folder: Path, mock: RunningMock, prompts: int, samples: int, max_n: int) -> Path:
    """Write prompts and harvest.toml; return the path of the latter."""
    rows = [{"id": f"p{n}", "prompt": f"What is {n} + {7 * n}?"} for n in range(prompts)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "harvest.toml"
    path.write_text(
        f'[teacher]\nbase_url = "{mock.base_url}"\nmodel = "mock-teacher"\nterms = "mock-teacher"\n'
        f"max_n = {max_n}\n[teacher.price]\ninput = 2.5\noutput = 10.0\n"
        f'[prompts]\nfiles = ["p.jsonl"]\nsystem = "{SYSTEM}"\n'
        f"[sampling]\nsamples = {samples}\ntemperature = 1.0\nmax_tokens = 64\n"
    )
    return path


def measure(prompts: int, samples: int, max_n: int, flags: tuple[str, ...]) -> dict[str, Any]:
    """Harvest once; return what the ledger and the store hold."""
    with tempfile.TemporaryDirectory() as name, start_process(*flags) as mock:
        folder = Path(name)
        config = write_folder(folder, mock, prompts, samples, max_n)
        begun = time.monotonic()
        run = [sys.executable, "-m", "harvester", "run", str(config)]
        subprocess.run(run, check=True, capture_output=True)
        seconds = time.monotonic() - begun
        ledger = mock.ledger()
        paid = Counter[str]()
        for entry in ledger["entries"]:
            paid[entry["prompt_sha256"]] += entry["choices"]
        rows = list(Corpus.open(folder / "store").samples(["input_tokens", "output_tokens", "cost_microusd"]))
        totals = ledger["totals"]
        return {
            "rows": len(rows),
            "requests": totals["requests"],
            "prompt_tokens": totals["prompt_tokens"],
            "completion_tokens": totals["completion_tokens"],
            "usd": sum(row.cost_microusd for row in rows) / 1e6,
            "is_sum_of_rows": sum(row.input_tokens for row in rows) == totals["prompt_tokens"]
            and sum(row.output_tokens for row in rows) == totals["completion_tokens"],
            "paid_twice": sum(max(0, count - samples) for count in paid.values()),
            "seconds": seconds,
        }


def main() -> None:
    """Measure every case and print a line each."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--prompts", type=int, default=500)
    flags.add_argument("--samples", type=int, default=8)
    given = flags.parse_args()
    for name, max_n, teacher in CASES:
        found = measure(given.prompts, given.samples, max_n, teacher)
        sys.stdout.write(
            f"{name}: {found['rows']:,} rows in {found['requests']:,} requests, "
            f"{found['prompt_tokens']:,} prompt and {found['completion_tokens']:,} completion tokens billed, "
            f"${found['usd']:.4f}; rows add up to the bill: {found['is_sum_of_rows']}; "
            f"{found['paid_twice']} answers paid twice; {found['seconds']:.1f} s\n"
        )


if __name__ == "__main__":
    main()
