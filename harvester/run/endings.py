"""Decide how a run ends: the reason, the exit code, and the lines printed for the operator. Pure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from harvester.api.error_body import excerpt
from harvester.errors import (
    COMPLETE_ENDINGS,
    BrokenAnswer,
    Ending,
    HarvesterError,
    NotSent,
    Parked,
    StoppedAtLimit,
    TermsRefused,
    TooManyFailures,
)
from harvester.observe.counters import (
    Counters,
    PassResult,
    Snapshot,
    are_texts_repeated,
    judged_text,
    several_text,
    unusable,
    unusable_share,
)
from harvester.prompts.bad_lines import BAD_PROMPTS_NAME as BAD_PROMPTS
from harvester.prompts.screen import SKIPPED_PROMPTS_NAME as SKIPPED_PROMPTS
from harvester.system.command_line.shell_words import shell_line
from harvester.system.counted import counted

# During a pass, a share of unusable answers ends it only from this many answers on.
FEWEST_ANSWERS = 20


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


def exit_code(
    result: PassResult, signal_number: int, max_failed: int, max_unusable: float | None = None
) -> int:
    """The documented code of an ending without an error.

    Args:
        max_unusable: share of the answers that may be unusable; None for any.
    """
    if result.ending in {Ending.INTERRUPTED, Ending.ABORTED}:
        return 128 + signal_number
    is_complete = result.ending in COMPLETE_ENDINGS
    if is_complete and result.counts.dead > max_failed:
        return TooManyFailures.exit_code
    if is_complete and too_many_unusable(result.counts, max_unusable):
        return TooManyFailures.exit_code
    return result.ending.exit_code


def too_many_unusable(counts: Counters, max_unusable: float | None, *, fewest: int = 1) -> str:
    """Return why the share of unusable answers is too large; "" if it is not.

    Attempts that may have been paid and brought no answer count as unusable answers.

    Args:
        max_unusable: the largest share, None for any.
        fewest: below this number of answers a share says nothing.
    """
    if max_unusable is None:
        return ""
    answers = counts.answers_stored + counts.from_cache + counts.possibly_billed
    by_outcome = dict(counts.unusable())
    if counts.possibly_billed:
        by_outcome["possibly paid without an answer"] = counts.possibly_billed
    bad = sum(by_outcome.values())
    if answers < fewest or bad <= max_unusable * answers:
        return ""
    return (
        f"{bad:,} of {answers:,} answers are not usable ({_counted(by_outcome)}), more than "
        f"[run] max_unusable = {max_unusable:g} allows"
    )


def _counted(by_outcome: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in by_outcome.items())


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended. `skipped` counts prompts that were not asked, by reason.

    `held` answers are stored. With `is_on_hold`, a run sends nothing before `harvester resume`.
    """

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
    held: int | None = None
    held_outcomes: Mapping[str, int] = field(default_factory=dict)
    is_on_hold: bool = False
    skipped: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For --json and run.json."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        before = {name: values.pop(name) for name in ("run_id", "ending", "exit_code", "rows_total")}
        return {**before, **values.pop("counts").summary(), **values}

    def lines(self) -> list[str]:
        """For people."""
        counts = self.counts
        lines = [
            f"{self.ending}: {counted(counts.requests_sent, 'request')} sent, "
            f"{counted(counts.answers_stored, 'answer')} stored, {counts.from_cache:,} already stored, "
            f"{counts.dead:,} failed, cost ${counts.cost_microusd / 1e6:.4f}"
            + (f" and ${self.canary_microusd / 1e6:.4f} for canaries" if self.canary_microusd else ""),
            f"answers lie in {self.store}/shards ({self.sealed_rows:,} sealed now)",
        ]
        if self.detail:
            lines.insert(1, f"why: {self.detail}")
        lines += [text for text in (several_text(counts.as_dict()), judged_text(counts.as_dict())) if text]
        lines += self._unusable_lines()
        if counts.possibly_billed:
            lines.append(
                f"{counts.possibly_billed:,} attempts may have been billed but brought no answer "
                f"(`harvester verify` lists them)"
            )
        if broken := counts.errors.get(BrokenAnswer.code, 0):
            lines.append(
                f"{broken:,} replies with status 200 held no completion. They were probably paid, so few of "
                "their rows are asked again in a run (one for every 20 rows)"
            )
        if counts.dead:
            lines.append(
                f"failed rows and reasons: {self.store}/dead_letters.jsonl; "
                f"`{self.resume} --retry-dead` asks for them again"
            )
        lines.extend(f"note: {warning}" for warning in self.warnings)
        if self.exit_code not in {0, TooManyFailures.exit_code}:
            lines.append(f"resume with: {self.steps_to_resume(self.resume)}")
        return lines

    def steps_to_resume(self, command: str) -> str:
        """Return what goes on with this harvest in a shell: `command`, once no pause is held."""
        return f"{shell_line('harvester', 'resume', self.store)} && {command}" if self.is_on_hold else command

    def _unusable_lines(self) -> list[str]:
        """Say how many answers are not usable: of this run, or where it read no rows, of the store."""
        by_outcome = self.counts.unusable()
        answers = self.counts.answers_stored + self.counts.from_cache
        text = f"{sum(by_outcome.values()):,} of {answers:,} rows of this run ({_counted(by_outcome)})"
        if not by_outcome:
            if self.counts.cached_outcomes:
                return []
            by_outcome = unusable(self.held_outcomes)
            share, split = unusable_share(self.held_outcomes, self.held)
            if not share:
                return []
            text = f"{share} answers in the store" + (f" ({split})" if split else "")
        again = f"`{self.resume} --retry {','.join(by_outcome)}` asks for them again"
        return [f"not usable: {text}; {again}"]


def warnings_of(snapshot: Snapshot, bad_lines: int = 0, skipped: str = "") -> tuple[str, ...]:
    """Return warnings for the operator.

    Args:
        bad_lines: number of lines of prompt files passed over.
        skipped: how many prompts were not asked, and why.
    """
    lines = [f"{bad_lines:,} lines of prompt files were passed over: {BAD_PROMPTS}"] if bad_lines else []
    if skipped:
        lines.append(f"{skipped}: {SKIPPED_PROMPTS}")
    if len(snapshot.served_models) > 1:
        named = ", ".join(f"{excerpt(model)} ({count:,})" for model, count in snapshot.served_models.items())
        lines.append(
            f"answers name more than one model or build: {named}; each row names its own in response_model"
        )
    if snapshot.usage_corrected:
        lines.append(
            f"the teacher reported fewer tokens than {snapshot.usage_corrected:,} of its answers hold: "
            "they were charged by our own count (usage_source = corrected)"
        )
    if are_texts_repeated(snapshot.repeated_texts, snapshot.answers_stored):
        lines.append(
            f"{snapshot.repeated_texts:,} of {snapshot.answers_stored:,} answers have the text of one to "
            "another prompt: read some; a gateway may send a message of its own in place of answers"
        )
    if snapshot.repeated_ids:
        lines.append(
            f"{snapshot.repeated_ids:,} answers carry the id of an earlier one: all are kept, "
            "but a gateway may mix replies up"
        )
    return tuple(lines)
