"""Asks the canaries again on schedule, through the doors of the pass, and keeps their answers apart.

They pay the same limits and the same budget as every row, and are journalled like them, but in a store of
their own, `canary/` inside the store, as answers for evaluation: they never become rows of the corpus.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harvester import canary, prompts, shards
from harvester.admission import NotSent, Parked
from harvester.canary import Reply
from harvester.clock import Clock
from harvester.config import HarvestConfig
from harvester.corpus import Corpus
from harvester.errors import ConfigError, HarvesterError, StoreError
from harvester.flights import answer_record
from harvester.group_commit import GroupCommit
from harvester.journal import Journal
from harvester.journey import Request
from harvester.metrics import Tally
from harvester.plan import requests
from harvester.records import RunRecord
from harvester.scribe import Scribe
from harvester.teacher import GaveUp, Teacher

FOLDER, ROUNDS = "canary", "rounds.jsonl"
MOST_PROMPTS = 50
AT_ONCE = 4
SHARD_BYTES = 64 * 1024 * 1024
_COLUMNS = ("completion", "refusal", "response_model", "system_fingerprint", "metadata_json")


@dataclass(frozen=True, slots=True)
class Orders:
    """What a sentinel needs of its run: where, as whom, and whom to tell of a change."""

    config: HarvestConfig
    root: Path
    store: Path
    record: RunRecord
    on_change: Callable[[str], Awaitable[None]]
    complain: Callable[[Exception], None]


def check(config: HarvestConfig, root: Path) -> int:
    """How many canaries there are; reads them all.

    Raises:
        ConfigError: more than fifty. PromptError: the first that can't be used.
    """
    if config.canary.prompts is None:
        return 0
    count = sum(1 for _ in prompts.read((config.canary.prompts,), root))
    if count > MOST_PROMPTS:
        raise ConfigError(
            f"{count} canaries, at most {MOST_PROMPTS}: each is paid for in every round",
            place="canary.prompts",
            remedy="a few that cover what you ask for are enough",
        )
    return count


def read_rounds(store: Path) -> list[dict[str, Any]]:
    """The rounds so far, oldest first; a torn last line is left out."""
    rounds = []
    with contextlib.suppress(OSError):
        for line in (store / FOLDER / ROUNDS).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and "round" in found:
                    rounds.append(found)
    return rounds


class Sentinel:
    """Watches one teacher while a pass lives. `news` is what the status shows of it."""

    def __init__(self, orders: Orders, clock: Clock) -> None:
        self.news: dict[str, Any] = {}
        self._orders = orders
        self._clock = clock
        self._folder = orders.store / FOLDER
        self._asking = asyncio.Lock()

    async def watch(self, teacher: Teacher) -> None:
        """A round now, and one every so often, until cancelled or the teacher's doors close."""
        try:
            writer = GroupCommit(await asyncio.to_thread(Journal.open, self._folder))
        except StoreError as error:
            self._orders.complain(error)
            return
        ending = "interrupted"
        try:
            scribe = Scribe(writer, self._orders.complain)
            record = replace(self._orders.record, purpose="eval")
            await scribe.call(lambda journal: journal.begin_run(record))
            await scribe.start()
            aside = teacher.beside(scribe, Tally(), record.run_id)
            reference: Mapping[str, Reply]
            reference, number = await asyncio.to_thread(self._remembered)
            while True:
                number += 1
                async with self._asking:
                    reference = await self._round(aside, scribe, number, reference)
                await self._clock.sleep(self._orders.config.canary.every_s)
        except (NotSent, Parked):
            ending = "complete"
        except HarvesterError as error:  # the pass meets what concerns it by itself
            self._orders.complain(error)
        finally:
            await asyncio.shield(asyncio.to_thread(self._close, writer, ending))

    async def finish(self, patience_s: float) -> None:
        """Wait for a round under way, at most so long: it is paid for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._asking.acquire()

    async def _round(
        self, teacher: Teacher, scribe: Scribe, number: int, reference: Mapping[str, Reply]
    ) -> Mapping[str, Reply]:
        """Ask all, compare, write it down; returns the reference from now on."""
        replies: dict[str, Reply] = {}
        turns = asyncio.Semaphore(AT_ONCE)

        async def ask(asked: str, request: Request) -> None:
            async with turns:
                try:
                    answered = await teacher.ask(request)
                except GaveUp:
                    return  # it has no answer in this round; the others speak
            scribe.submit(answer_record(request, answered), lambda: None)
            found = answered.completion
            replies[asked] = Reply(found.text or found.refusal or "", found.model, found.system_fingerprint)

        outstanding = [
            asyncio.ensure_future(ask(*one)) for one in await asyncio.to_thread(self._requests, number)
        ]
        try:
            await asyncio.gather(*outstanding)
        finally:
            for one in outstanding:
                one.cancel()
            await asyncio.gather(*outstanding, return_exceptions=True)
        await scribe.flush()
        finding = canary.compare(reference, replies, self._orders.config.canary.tolerance)
        # A change is told once: from now on the changed teacher is what others are compared with.
        kept = replies if finding.changes else {**replies, **reference}
        if finding.changes:  # held before it is written down: a kill in between asks again
            await self._orders.on_change("; ".join(finding.changes))
        self._write(number, finding, len(outstanding), len(replies))
        return kept

    def _write(self, number: int, finding: canary.Finding, asked: int, answered: int) -> None:
        told = {
            "round": number, "at": round(self._clock.wall(), 3), "run_id": self._orders.record.run_id,
            "asked": asked, "answered": answered, **finding.as_dict(),
        }  # fmt: skip
        with contextlib.suppress(OSError), (self._folder / ROUNDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")
        changes = self.news.get("changes", 0) + bool(finding.changes)
        self.news.update(
            rounds=number, asked_at=told["at"], distance=told["distance"], changes=changes,
            said="; ".join(finding.changes) or self.news.get("said", ""),
        )  # fmt: skip

    def _tell(self, rounds: list[dict[str, Any]]) -> None:
        """What earlier rounds found is no news of this process, and still true."""
        if rounds:
            changed = [one for one in rounds if one.get("changes")]
            last = rounds[-1]
            self.news.update(
                rounds=last["round"], asked_at=last.get("at"), distance=last.get("distance"),
                changes=len(changed), said="; ".join(changed[-1]["changes"]) if changed else "",
            )  # fmt: skip

    def _requests(self, number: int) -> list[tuple[str, Request]]:
        """The canaries of a round: what is asked, the same in every round, and the request of this one."""
        config = self._orders.config
        sampling = config.sampling.model_copy(update={"samples": 1})
        if sampling.temperature is not None:
            sampling = sampling.model_copy(update={"temperature": 0.0})
        asks = []
        for epoch in (0, number):
            run = config.run.model_copy(update={"epoch": epoch, "purpose": "eval"})
            told = config.model_copy(update={"run": run, "sampling": sampling})
            asks.append(list(requests(prompts.read((str(config.canary.prompts),), self._orders.root), told)))
        return [
            (
                same.key.hex(),
                replace(one, prompt=replace(one.prompt, metadata={"round": number, "asks": same.key.hex()})),
            )
            for same, one in zip(*asks, strict=True)
        ]

    def _remembered(self) -> tuple[dict[str, Reply], int]:
        """What to compare with (the newest round that changed, else the first), and the last round."""
        rounds = read_rounds(self._orders.store)
        self._tell(rounds)
        since = max((one["round"] for one in rounds if one.get("changes")), default=0)
        found: dict[str, tuple[int, Reply]] = {}
        last = max((one["round"] for one in rounds), default=0)
        for sample in Corpus.open(self._folder).samples(columns=_COLUMNS):
            number, asks = sample.metadata.get("round", 0), sample.metadata.get("asks", "")
            last = max(last, number)
            if number >= since and (asks not in found or number < found[asks][0]):
                text = sample.completion or sample.refusal or ""
                found[asks] = (number, Reply(text, sample.response_model, sample.system_fingerprint))
        return {asks: reply for asks, (_, reply) in found.items()}, last

    def _close(self, writer: GroupCommit, ending: str) -> None:
        run_id, at = self._orders.record.run_id, time.time()
        with contextlib.suppress(StoreError):
            writer.call(
                lambda j: shards.seal(j, self._folder, target_bytes=SHARD_BYTES, everything=True)
            ).result()
            writer.call(lambda j: j.end_run(run_id, ending, 0, at)).result()
        with contextlib.suppress(StoreError):
            writer.close()
