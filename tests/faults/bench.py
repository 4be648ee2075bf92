"""Run a whole harvest against a teacher that misbehaves; return what operator, store and ledger show."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harvester.errors import HarvesterError
from harvester.mock_teacher.running import RunningMock
from harvester.run import job
from harvester.run.prepare import prepare
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import Totals
from harvester.system.clock import Clock, SystemClock

Watch = Callable[[Mapping[str, Any]], None]
POISON = "77 + 1"
PROMPTS = ("What is 3 + 4?", f"What is {POISON}?", "What is 5 + 6?")


class Hasty(SystemClock):
    """The machine's clock, many times as fast: a Retry-After of a second passes in 40 ms."""

    def __init__(self, speed: float = 25.0) -> None:
        self._speed = speed

    def now(self) -> float:
        """Monotonic seconds, scaled."""
        return super().now() * self._speed

    async def sleep(self, seconds: float) -> None:
        """That much of this clock's time."""
        await super().sleep(seconds / self._speed)

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        """Wait for the event, at most that much of this clock's time."""
        await super().wait(event, seconds / self._speed)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended: `output` is what the operator reads, `billed` what the teacher charged for it."""

    exit_code: int
    output: str
    store: Path
    totals: Totals
    billed: Mapping[str, int]
    fired: int
    letters: list[dict[str, Any]] = field(default_factory=list)

    @property
    def outcomes(self) -> Mapping[str, int]:
        """Answers by outcome."""
        return self.totals.outcomes


def run_harvest(
    mock: RunningMock,
    root: Path,
    faults: Sequence[Mapping[str, Any]] = (),
    *,
    prompts: Sequence[str | Mapping[str, Any]] = PROMPTS,
    teacher: Mapping[str, Any] | None = None,
    clock: Clock | None = None,
    watch: Watch = lambda _: None,
    **parts: Mapping[str, Any],
) -> Ended:
    """Write a folder, run it in this process, and gather all accounts of it."""
    mock.set_faults(faults)
    before = mock.totals()
    rows = [{"prompt": entry} if isinstance(entry, str) else dict(entry) for entry in prompts]
    (root / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tables: dict[str, Mapping[str, Any]] = {
        "teacher": {
            "base_url": mock.base_url,
            "model": "mock-teacher",
            "terms": "mock-teacher",
            "limits": {"max_concurrency": 2},
            **(teacher or {}),
        },
        "prompts": {"files": ["*.jsonl"], **parts.pop("prompt_table", {})},
        "sampling": {"max_tokens": 64, **parts.pop("sampling", {})},
        # On a busy machine an answer may take seconds, and minutes pass on a fast clock: tests of deadline or
        # patience set their own.
        "run": {"deadline_s": 60, "max_attempts": 2, "patience_s": 3600, **parts.pop("run", {})},
        **parts,
    }
    path = root / "harvest.toml"
    path.write_text("".join(toml(name, table) for name, table in tables.items()), encoding="utf-8")
    exit_code, output = run(path, clock or Hasty(), watch)
    totals = Totals()
    if (root / "store" / "journal.db").exists():
        with Journal.open(root / "store", read_only=True) as journal:
            totals = journal.totals()
    after = mock.totals() if not mock.is_stopped else before
    letters = root / "store" / "dead_letters.jsonl"
    return Ended(
        exit_code,
        output,
        root / "store",
        totals,
        {name: after[name] - before[name] for name in before},
        sum(mock.fired().values()) if not mock.is_stopped else 0,
        [json.loads(line) for line in letters.read_text().splitlines()] if letters.exists() else [],
    )


def run(path: Path, clock: Clock | None = None, watch: Watch = lambda _: None) -> tuple[int, str]:
    """What `harvester run` does: the exit code, and what it says."""
    try:
        summary = asyncio.run(job.run(prepare(path), watch, clock))
    except HarvesterError as error:
        return error.exit_code, str(error)
    return summary.exit_code, "\n".join(summary.lines())


def toml(name: str, table: Mapping[str, Any]) -> str:
    """One table, its values inline; what is None is left out."""
    settings = [f"{key} = {inline(value)}" for key, value in table.items() if value is not None]
    return "\n".join([f"[{name}]", *settings]) + "\n"


def inline(value: Any) -> str:
    """A value as TOML writes it; what is no table or list is written as JSON writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {inline(held)}" for key, held in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value)
