"""Run real harvests that are killed on the way, and make the folder that they work in."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_MEMORY = Path("/dev/shm")


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: a kill needs no disk, for the kernel keeps what was written."""
    place = _MEMORY if _MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        yield Path(name)


class KilledRuns:
    """KilledRuns of one real harvest, to be killed."""

    def __init__(self, config: Path, quiet_s: float = 0.02) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.harvester.harvest_forks", str(config), str(quiet_s)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> KilledRuns:
        return self

    def run(self, seconds: float, failpoint: str = "-") -> tuple[int, int]:
        """Run for `seconds` at most; return exit status (-9: killed) and the answers counted as stored."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seconds} {failpoint}\n")
        self._process.stdin.flush()
        status, stored = self._process.stdout.readline().split()
        return int(status), int(stored)

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def write_config(folder: Path, base_url: str, prompts: int) -> Path:
    """A harvest of so many prompts, `p0` and on, into small shards."""
    rows = [{"id": f"p{n}", "prompt": f"What is {n} + {7 * n}?"} for n in range(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = folder / "harvest.toml"
    config.write_text(
        f'[teacher]\nbase_url = "{base_url}"\nmodel = "mock-teacher"\nterms = "mock-teacher"\n'
        "[teacher.limits]\nmax_concurrency = 128\n[sampling]\nmax_tokens = 64\n"
        '[prompts]\nfiles = ["prompts.jsonl"]\n[store]\npath = "store"\nshard_mib = 0.2\nmin_free_mib = 1\n'
    )
    return config
