"""How a run ends: why it stopped, with which exit code, and what is said to whoever started it. Pure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from harvester.api.error_body import excerpt
from harvester.errors import Ending, HarvesterError, NotSent, Parked, StoppedAtLimit, TooManyFailures
from harvester.observe.counters import PassResult, Snapshot
from harvester.prompts.bad_lines import BAD_PROMPTS_NAME as BAD_PROMPTS


@dataclass(slots=True)
class Stop:
    """Asked to end: the pass drains on `event`. The first reason counts."""

    event: asyncio.Event = field(default_factory=asyncio.Event)
    ending: Ending | None = None
    detail: str = ""

    def ask(self, ending: Ending, detail: str = "") -> None:
        """Ask the pass to drain, for this reason."""
        if not self.event.is_set():
            self.ending, self.detail = ending, detail
            self.event.set()

    def named(self, result: PassResult) -> PassResult:
        """The pass's result, by the reason why it was interrupted."""
        if result.ending != Ending.INTERRUPTED or self.ending is None:
            return result
        return PassResult(self.ending, result.counts, self.detail)


class Closing:
    """The end of one pass, from the first reason on.

    Args:
        wall: Unix seconds now, for when to go on.
        shut: closes the teacher's doors.

    `draining` is set by the first reason. `ending` and `detail` become the PassResult's; `error` is raised
    instead.
    """

    def __init__(self, wall: Callable[[], float], shut: Callable[[], None]) -> None:
        self.ending = Ending.COMPLETE
        self.detail = ""
        self.error: HarvesterError | None = None
        self.draining = asyncio.Event()
        self._wall = wall
        self._shut = shut

    def drain(self, ending: Ending) -> None:
        """Send nothing new, for this reason unless there is one."""
        if not self.draining.is_set():
            self.ending = ending
            self.draining.set()
            self._shut()

    def fail(self, error: HarvesterError) -> None:
        """The pass can't go on."""
        if self.error is None:
            self.error = error
        self.drain(self.ending)

    def park(self, parked: Parked) -> None:
        """The teacher wants longer than our patience."""
        if not self.draining.is_set():
            self.detail = parked.message(self._wall())
        self.drain(Ending.PARKED)

    def stop_for(self, stopped: NotSent | Parked | HarvesterError) -> None:
        """What a request met that concerns all others too; NotSent is no reason of its own."""
        if isinstance(stopped, Parked):
            self.park(stopped)
        elif isinstance(stopped, StoppedAtLimit):
            self.drain(Ending.BUDGET)
        elif isinstance(stopped, HarvesterError):
            self.fail(stopped)


def exit_code(result: PassResult, signal_number: int, max_failed: int) -> int:
    """The documented code of an ending without an error."""
    if result.ending in {Ending.INTERRUPTED, Ending.ABORTED}:
        return 128 + signal_number
    if result.ending == Ending.COMPLETE and result.counts.dead > max_failed:
        return TooManyFailures.exit_code
    return result.ending.exit_code


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended."""

    run_id: str
    ending: Ending
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
