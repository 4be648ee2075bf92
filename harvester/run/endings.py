"""How a run ends: why it stopped, with which exit code, and what is said to whoever started it. Pure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from harvester.api.error_body import excerpt
from harvester.errors import (
    Ending,
    HarvesterError,
    NotSent,
    Parked,
    StoppedAtLimit,
    TermsRefused,
    TooManyFailures,
)
from harvester.observe.counters import PassResult, Snapshot
from harvester.prompts.bad_lines import BAD_PROMPTS_NAME as BAD_PROMPTS


@dataclass(slots=True)
class Stop:
    """A request to end the run: the pass drains when `event` is set. The first reason counts.

    `refused` is the first refusal of the terms, also one that came after another reason.
    """

    event: asyncio.Event = field(default_factory=asyncio.Event)
    ending: Ending | None = None
    detail: str = ""
    refused: TermsRefused | None = None

    def ask(self, ending: Ending, detail: str = "") -> None:
        """Ask the pass to drain, for this reason."""
        if not self.event.is_set():
            self.ending, self.detail = ending, detail
            self.event.set()

    def refuse(self, error: TermsRefused) -> None:
        """End the run, for the terms no longer permit it."""
        self.refused = self.refused or error
        self.ask(Ending.TERMS, error.message)

    def named(self, result: PassResult) -> PassResult:
        """Return the result of an interrupted pass with the reason of the stop."""
        if result.ending != Ending.INTERRUPTED or self.ending is None:
            return result
        return PassResult(self.ending, result.counts, self.detail)


class PassEnding:
    """How one pass ends: the first reason counts; after it nothing new is sent.

    Args:
        wall: returns the time in Unix seconds, to say when to go on.

    `draining` is set by the first reason. An `error` is raised by `result` in place of the ending.
    """

    def __init__(self, wall: Callable[[], float]) -> None:
        self.ending = Ending.COMPLETE
        self.error: HarvesterError | None = None
        self.draining = asyncio.Event()
        self._detail = ""
        self._wall = wall
        self._listeners: list[Callable[[], None]] = []

    def when_draining(self, listener: Callable[[], None]) -> None:
        """Call this at the first reason to end; at once, if there has been one."""
        if self.draining.is_set():
            listener()
        self._listeners.append(listener)

    def drain(self, ending: Ending) -> None:
        """Send nothing new, for this reason unless there is an earlier one."""
        if not self.draining.is_set():
            self.ending = ending
            self.draining.set()
            for listener in self._listeners:
                listener()

    def at_row_limit(self) -> None:
        """Note that the row limit is reached. Queued requests are still sent, so this drains nothing."""
        self.ending = Ending.ROWS

    def fail(self, error: HarvesterError) -> None:
        """Drain, for the pass can't go on; the first error is the one that `result` raises."""
        if self.error is None:
            self.error = error
        self.drain(self.ending)

    def park(self, parked: Parked) -> None:
        """Drain, for the teacher asks for a longer wait than `patience_s`."""
        if not self.draining.is_set():
            self._detail = parked.message(self._wall())
        self.drain(Ending.PARKED)

    def stop_for(self, reason: NotSent | Parked | HarvesterError) -> None:
        """Drain for what one request met if it concerns all others too. NotSent is no reason of its own."""
        if isinstance(reason, Parked):
            self.park(reason)
        elif isinstance(reason, StoppedAtLimit):
            if not self.draining.is_set():
                self._detail = str(reason)
            self.drain(Ending.BUDGET)
        elif isinstance(reason, HarvesterError):
            self.fail(reason)

    def result(self, counts: Snapshot) -> PassResult:
        """Return how the pass ended with these counts.

        Raises:
            HarvesterError: the error that ended it.
        """
        if self.error is not None:
            raise self.error
        return PassResult(self.ending, counts, self._detail)


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
    counts: Snapshot
    sealed_rows: int
    store: str
    resume: str
    detail: str = ""
    warnings: tuple[str, ...] = ()
    canary_microusd: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For --json and run.json."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        before = {name: values.pop(name) for name in ("run_id", "ending", "exit_code", "rows_total")}
        return {**before, **values.pop("counts").summary(), **values}

    def lines(self) -> list[str]:
        """For people."""
        counts = self.counts
        said = [
            f"{self.ending}: {counts.requests_sent:,} requests sent, {counts.answers_stored:,} answers "
            f"stored, {counts.from_cache:,} from cache, {counts.dead:,} failed, cost "
            f"${counts.cost_microusd / 1e6:.4f}"
            + (f" and ${self.canary_microusd / 1e6:.4f} for canaries" if self.canary_microusd else ""),
            f"answers lie in {self.store}/shards ({self.sealed_rows:,} sealed now)",
        ]
        if self.detail:
            said.insert(1, f"why: {self.detail}")
        if counts.possibly_billed:
            said.append(f"{counts.possibly_billed:,} attempts were possibly billed without an answer to hold")
        if counts.dead:
            said.append(f"failed rows and reasons: {self.store}/dead_letters.jsonl")
        said.extend(f"note: {warning}" for warning in self.warnings)
        if self.exit_code not in {0, TooManyFailures.exit_code}:
            said.append(f"resume with: {self.resume}")
        return said


def warnings_of(snapshot: Snapshot, bad_lines: int = 0) -> tuple[str, ...]:
    """What nobody may overlook, though the run went on. `bad_lines` of prompt files were passed over."""
    said = [f"{bad_lines:,} lines of prompt files were passed over: {BAD_PROMPTS}"] if bad_lines else []
    if len(snapshot.served_models) > 1:
        named = ", ".join(f"{excerpt(voice)} ({count:,})" for voice, count in snapshot.served_models.items())
        said.append(f"more than one teacher answered: {named}; each row names its own in response_model")
    if snapshot.usage_corrected:
        said.append(
            f"the teacher reported fewer tokens than {snapshot.usage_corrected:,} of its answers hold: "
            "they were charged by our own count (usage_source = corrected)"
        )
    if snapshot.repeated_ids:
        said.append(
            f"{snapshot.repeated_ids:,} answers carry the id of an earlier one: all are kept, "
            "but a gateway may mix replies up"
        )
    return tuple(said)
