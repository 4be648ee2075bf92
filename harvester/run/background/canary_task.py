"""Ask the canary prompts on schedule during a pass, and keep their answers in a store of their own.

Canaries count against the same limits and the same budget as every row. Their answers are for evaluation:
they lie in `canary/` inside the store, and never become rows of the corpus.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harvester.api.request_builder import requests
from harvester.api.types import Request
from harvester.config.config import HarvestConfig
from harvester.errors import (
    ConfigError,
    Ending,
    HarvesterError,
    NotSent,
    Parked,
    RequestFailed,
    StoreError,
    TeacherRefused,
    UsageError,
)
from harvester.observe import canary
from harvester.observe.canary import CanaryReply, KnownReplies
from harvester.prompts import reader
from harvester.run.background.canary_store import Asker, CanaryStore
from harvester.run.in_flight import answer_record
from harvester.store.journal.writer import AsyncWriter
from harvester.system.clock import Clock
from harvester.teacher.teacher import Teacher

MOST_PROMPTS = 50
AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class CanaryContext:
    """What a canary task needs of its run. `on_change` gets what a round found changed, `on_error` a miss."""

    config: HarvestConfig
    root: Path
    store: Path
    canaries: CanaryStore
    on_change: Callable[[str], Awaitable[None]]
    on_error: Callable[[Exception], None]


def check(config: HarvestConfig, root: Path) -> int:
    """Read all canary prompts; return how many there are.

    Raises:
        ConfigError: more than fifty. PromptError: the first that can't be used.
    """
    if config.canary.prompts is None:
        return 0
    count = sum(1 for _ in reader.read((config.canary.prompts,), root))
    if count > MOST_PROMPTS:
        raise _too_many(count)
    return count


def _too_many(count: int) -> ConfigError:
    return ConfigError(
        f"{count} canaries, at most {MOST_PROMPTS}: each is paid for in every round",
        place="canary.prompts",
        remedy="a few that cover what you ask for are enough",
    )


class CanaryTask:
    """Watches one teacher during a pass. `news` is `canary` in status.json, updated in place."""

    def __init__(self, context: CanaryContext, clock: Clock) -> None:
        self.news: dict[str, Any] = {}
        self._context = context
        self._clock = clock
        self._asking = asyncio.Lock()
        self._spent = context.canaries.spent

    async def watch(self, teacher: Teacher) -> None:
        """Ask a round now and one every `every_s` seconds, until cancelled or the pass drains."""
        canaries = self._context.canaries
        try:
            async with canaries.asker(teacher.endpoints) as asker:
                try:
                    await self._watch(asker)
                except NotSent:
                    canaries.ending = Ending.COMPLETE
        except HarvesterError as error:
            self._stop(error)

    async def _watch(self, asker: Asker) -> None:
        known, number = await asyncio.to_thread(canary.load_known, self._context.store)
        self.news.update(canary.canary_status(canary.read_rounds(self._context.store)))
        while True:
            known, number = await self._turn(asker.teacher, asker.writer, known, number)
            await self._clock.sleep(self._context.config.canary.every_s)

    async def _turn(
        self, teacher: Teacher, async_writer: AsyncWriter, known: KnownReplies, number: int
    ) -> tuple[KnownReplies, int]:
        """Ask the next round; one that can't be asked is reported as missed.

        Raises:
            StoreError: an answer can't be kept. TeacherRefused: the teacher is not asked again.
        """
        try:
            asks = await asyncio.to_thread(self._requests, number + 1)
        except UsageError as error:
            self._miss(error)
            return known, number
        number += 1
        try:
            async with self._asking:
                known = await self._round(teacher, async_writer, number, asks, known)
            self.news.pop("missed", None)
        except (StoreError, TeacherRefused):
            raise
        except (HarvesterError, Parked) as error:
            self._miss(error)
        return known, number

    def _miss(self, error: Exception) -> None:
        if self.news.get("missed") != str(error):
            self._context.on_error(error)
        self.news["missed"] = str(error)

    def _stop(self, error: Exception) -> None:
        self.news["stopped"] = str(error)
        self._context.on_error(error)

    async def finish(self, patience_s: float) -> None:
        """Wait at most `patience_s` for a round under way: it is paid for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._asking.acquire()

    async def _round(
        self,
        teacher: Teacher,
        async_writer: AsyncWriter,
        number: int,
        asks: list[tuple[str, Request]],
        known: KnownReplies,
    ) -> KnownReplies:
        """Ask all canaries, compare, write the round down; return what is known from now on."""
        replies: dict[str, CanaryReply] = {}
        turns = asyncio.Semaphore(AT_ONCE)

        async def ask(canary_id: str, request: Request) -> None:
            async with turns:
                try:
                    answered = await teacher.ask(request)
                except RequestFailed:
                    return  # it has no answer in this round; the others are compared
            record = answer_record(request, answered)
            async_writer.submit(record, lambda: self._paid(record.cost_microusd))
            answered.raw.release()
            completion = answered.completion
            replies[canary_id] = CanaryReply(
                completion.text or completion.refusal or "", completion.model, completion.system_fingerprint
            )

        outstanding = [asyncio.ensure_future(ask(key, request)) for key, request in asks]
        try:
            await asyncio.gather(*outstanding)
        finally:
            for task in outstanding:
                task.cancel()
            await asyncio.gather(*outstanding, return_exceptions=True)
        await async_writer.flush()
        finding = canary.compare(known, replies, self._context.config.canary.tolerance)
        if finding.changes:  # held before it is written down: a kill in between asks again
            await self._context.on_change("; ".join(finding.changes))
        self._write(number, finding, len(outstanding), len(replies))
        return canary.learn(known, replies, changed=bool(finding.changes))

    def _paid(self, microusd: int) -> None:
        """Count an answer that is durable, and update the news."""
        self._spent.answers_stored += 1
        self._spent.cost_microusd += microusd
        self.news.update(self._spent.of_canaries())

    def _write(self, number: int, finding: canary.CanaryChange, sent: int, answered: int) -> None:
        entry = {
            "round": number,
            "at": round(self._clock.wall(), 3),
            "run_id": self._context.canaries.record.run_id,
            "asked": sent,
            "answered": answered,
            **finding.as_dict(),
        }
        canary.append_round(self._context.store, entry)
        changes = self.news.get("changes", 0) + bool(finding.changes)
        self.news.update(
            rounds=number,
            asked_at=entry["at"],
            distance=entry["distance"],
            changes=changes,
            said="; ".join(finding.changes) or self.news.get("said", ""),
        )

    def _requests(self, number: int) -> list[tuple[str, Request]]:
        """Return for each canary a key that is the same in every round, and the request of this round.

        Raises:
            ConfigError, PromptError: as `check`.
        """
        config = self._context.config
        sampling = config.sampling.model_copy(update={"samples": 1})
        if sampling.temperature is not None:
            sampling = sampling.model_copy(update={"temperature": 0.0})
        prompts = list(reader.read((str(config.canary.prompts),), self._context.root))
        if len(prompts) > MOST_PROMPTS:  # the file grew
            raise _too_many(len(prompts))
        asks = []
        for epoch in (0, number):
            run = config.run.model_copy(update={"epoch": epoch, "purpose": "eval"})
            round_config = config.model_copy(update={"run": run, "sampling": sampling})
            asks.append(list(requests(prompts, round_config)))
        return [
            (
                same.key.hex(),
                replace(
                    request,
                    prompt=replace(request.prompt, metadata={"round": number, "asks": same.key.hex()}),
                ),
            )
            for same, request in zip(*asks, strict=True)
        ]
