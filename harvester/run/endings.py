"""How a run ends: why it stopped, with which exit code, and what is said to whoever started it. Pure."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, field
from typing import Any

from harvester.api.error_body import excerpt
from harvester.errors import StoppedAtLimit, TooManyFailures
from harvester.observe.counters import COMPLETE, INTERRUPTED, PassResult, Snapshot
from harvester.prompts.bad_lines import BAD_PROMPTS_NAME as BAD_PROMPTS

ABORTED = "aborted"
STOPPED = "stopped"
HOURS = "hours"
DEADLINE = "deadline"


@dataclass(slots=True)
class Stop:
    """Asked to end: the pass drains on `event`. The first reason counts."""

    event: asyncio.Event = field(default_factory=asyncio.Event)
    ending: str = ""
    detail: str = ""

    def ask(self, ending: str, detail: str = "") -> None:
        """End, for this reason: INTERRUPTED (a signal), STOPPED, HOURS or DEADLINE."""
        if not self.event.is_set():
            self.ending, self.detail = ending, detail
            self.event.set()

    def named(self, result: PassResult) -> PassResult:
        """The pass's result, by the reason why it was interrupted."""
        if result.ending != INTERRUPTED or not self.ending:
            return result
        return PassResult(self.ending, result.counts, self.detail)


def exit_code(result: PassResult, signal_number: int, max_failed: int) -> int:
    """The documented code of an ending without an error."""
    if result.ending in {INTERRUPTED, ABORTED}:
        return 128 + signal_number
    if result.ending != COMPLETE:
        return StoppedAtLimit.exit_code
    return TooManyFailures.exit_code if result.counts.dead > max_failed else 0


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended."""

    run_id: str
    ending: str
    exit_code: int
    rows_total: int
    requests_sent: int
    answers_stored: int
    from_cache: int
    duplicates: int
    dead: int
    possibly_billed: int
    cost_microusd: int
    sealed_rows: int
    store: str
    resume: str
    detail: str = ""
    warnings: tuple[str, ...] = ()
    canary_microusd: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For --json and run.json."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        said = [
            f"{self.ending}: {self.requests_sent:,} requests sent, {self.answers_stored:,} answers stored, "
            f"{self.from_cache:,} from cache, {self.dead:,} failed, cost ${self.cost_microusd / 1e6:.4f}"
            + (f" and ${self.canary_microusd / 1e6:.4f} for canaries" if self.canary_microusd else ""),
            f"answers lie in {self.store}/shards ({self.sealed_rows:,} sealed now)",
        ]
        if self.detail:
            said.insert(1, f"why: {self.detail}")
        if self.possibly_billed:
            said.append(f"{self.possibly_billed:,} attempts were possibly billed without an answer to hold")
        if self.dead:
            said.append(f"failed rows and reasons: {self.store}/dead_letters.jsonl")
        said.extend(f"note: {warning}" for warning in self.warnings)
        if self.exit_code not in {0, TooManyFailures.exit_code}:
            said.append(f"resume with: {self.resume}")
        return said


def warnings_of(snapshot: Snapshot, bad_lines: int = 0) -> tuple[str, ...]:
    """What nobody may overlook, though the run went on. `bad_lines` of prompt files were passed over."""
    said = [f"{bad_lines:,} lines of prompt files were passed over: {BAD_PROMPTS}"] if bad_lines else []
    if len(snapshot.voices) > 1:
        named = ", ".join(f"{excerpt(voice)} ({count:,})" for voice, count in snapshot.voices.items())
        said.append(f"more than one teacher answered: {named}; each row names its own in response_model")
    if snapshot.repeated_ids:
        said.append(
            f"{snapshot.repeated_ids:,} answers carry the id of an earlier one: all are kept, "
            "but a gateway may mix replies up"
        )
    return tuple(said)


def counts_of(snapshot: Snapshot) -> dict[str, int]:
    """The counters a Summary names."""
    names = (
        "requests_sent",
        "answers_stored",
        "from_cache",
        "duplicates",
        "dead",
        "possibly_billed",
        "cost_microusd",
    )
    return {name: getattr(snapshot, name) for name in names}
