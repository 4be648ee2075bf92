"""One pass: feed -> bounded queue -> workers -> one writer; drains on cancel.

The feed is read in chunks; what the store holds already never becomes a task. Equal requests share one
flight. A worker hands its answer to the writer and goes on; it counts as stored when it is durable.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator

from harvester.api.client import Client
from harvester.api.types import Request
from harvester.config.config import HarvestConfig
from harvester.errors import Ending, GaveUp, HarvesterError, NotSent, Parked
from harvester.observe.counters import PassLimits, PassResult, Snapshot, Tally, snapshot
from harvester.run.canary_task import CanaryTask
from harvester.run.control.settings import RuntimeSettings
from harvester.run.endings import Closing
from harvester.run.failures import RejectionStreak
from harvester.run.in_flight import InFlight, answer_record
from harvester.run.possibly_billed import PossiblyBilledRequests
from harvester.run.served_models import ServedModels
from harvester.run.workers import WorkerPool, take
from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.writer import AsyncWriter
from harvester.store.reuse import ReuseIndex
from harvester.system.clock import Clock, SystemClock
from harvester.teacher.limiter_state import LimiterState
from harvester.teacher.policies import build_policies
from harvester.teacher.preflight import Preflight
from harvester.teacher.teacher import Answered, Teacher

__all__ = ["PassLimits", "PassResult", "Snapshot", "harvest"]

CHUNK = 500
PROGRESS_EVERY_S = 0.2
REST_S = 1.0
NO_MEMORY = "memory ran out while an answer was taken in: lower [teacher.limits] max_concurrency"


async def harvest(  # noqa: PLR0913 - the parts of a pass; all but the first two by name
    feed: Iterator[Request | None],
    config: HarvestConfig,
    *,
    key: str | None,
    writer: GroupCommit,
    run_id: str,
    limits: PassLimits,
    stop: asyncio.Event,
    on_progress: Callable[[Snapshot], None],
    on_levers: Callable[[RuntimeSettings], None] = lambda _: None,
    sentinel: CanaryTask | None = None,
    clock: Clock | None = None,
) -> PassResult:
    """Drain the feed once.

    Args:
        feed: requests in order, pulled in a thread, a chunk at a time. None means "no more for now": what was
            read is sent, and a second later the feed is asked again.
        key: the credential, None for none.
        writer: the store's only writer while the pass lives; it is not closed here.
        run_id: the run, begun in the journal already.
        limits: ceilings of this pass beside those of the configuration.
        stop: set it to drain: nothing new is sent, what is on the wire gets `limits.grace_s`.
        on_progress: gets a Snapshot every 0.2 s and once at the end, whatever the ending.
        on_levers: gets the levers of this pass before anything is sent.
        sentinel: asks the same teacher its canaries while the pass lives.

    Returns:
        The ending ("complete", "interrupted", "rows", "budget", "runtime", "parked") and the counts.

    Raises:
        TeacherRefused: after everything on the wire was stored.
        StoreError: an answer could not be kept; nothing was sent after that.
        PromptError: the feed met a line that can't be used; earlier rows are stored.
    """
    chosen = clock or SystemClock()
    async with Client(config.teacher, config.run, key) as client:
        one = _Pass(config, limits, on_progress, chosen)
        one.scribe = AsyncWriter(writer, one.closing.fail)
        await one.scribe.start()
        ceilings = await one.scribe.call(lambda journal: ReuseIndex.of(journal, config))
        suspects = await one.scribe.call(lambda journal: PossiblyBilledRequests.of(journal, config))
        one.flights = InFlight(one.scribe, one.tally, ceilings, suspects, chosen)
        laws = build_policies(config, limits, chosen)
        one.levels = LimiterState(one.scribe, laws.limiters, config.teacher, chosen)
        await one.levels.restore()
        one.teacher = Teacher(client, laws, one.scribe, one.tally, run_id)
        one.probe = Preflight(client, one.teacher, config.teacher.model)
        on_levers(RuntimeSettings(one.teacher, one.crew.resize))
        return await one.run(feed, stop, sentinel)


class _Pass:
    """State of one pass; everything here runs on the event loop."""

    scribe: AsyncWriter
    flights: InFlight
    levels: LimiterState
    teacher: Teacher
    probe: Preflight

    def __init__(
        self, config: HarvestConfig, limits: PassLimits, on_progress: Callable[[Snapshot], None], clock: Clock
    ) -> None:
        self.limits = limits
        self.min_free_mib = config.store.min_free_mib
        self.on_progress = on_progress
        self.clock = clock
        self.crew = WorkerPool(config.teacher.limits.max_concurrency, self._work)
        self.tally = Tally()
        self.voices = ServedModels(self.tally, strict=config.run.strict_model, providers=config.providers)
        self.doubts = RejectionStreak()
        self.closing = Closing(clock.wall, lambda: self.teacher.drain())
        self.idle = False

    async def run(
        self, feed: Iterator[Request | None], stop: asyncio.Event, sentinel: CanaryTask | None
    ) -> PassResult:
        try:
            async with asyncio.TaskGroup() as group:
                self.crew.start(group)
                aides = [group.create_task(self._watch(stop)), group.create_task(self._tell())]
                if sentinel is not None:
                    aides.append(group.create_task(sentinel.watch(self.teacher)))
                await group.create_task(self._feed(feed))
                await self.crew.finish()
                self._close_doubts()
                await self.scribe.flush()
                if self.scribe.fault is None:
                    await self.levels.keep(final=True)
                if sentinel is not None:
                    await sentinel.finish(self.limits.grace_s)
                for aide in aides:
                    aide.cancel()
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        finally:
            self.on_progress(self.snapshot())
        if self.closing.error is not None:
            raise self.closing.error
        return PassResult(self.closing.ending, self.snapshot(), self.closing.detail)

    async def _feed(self, feed: Iterator[Request | None]) -> None:
        admitted, more = 0, True
        try:
            while more and not self.closing.draining.is_set():
                chunk, more = await asyncio.to_thread(take, feed, CHUNK)
                self.idle = more and not chunk
                if self.idle:
                    await self._rest()
                    continue
                held = await self.flights.look_up(chunk)
                for request in chunk:
                    if self.closing.draining.is_set():
                        break
                    if not self.flights.is_fresh(request, held.get(request.key)):
                        continue
                    if self.limits.rows is not None and admitted >= self.limits.rows:
                        self.closing.ending = Ending.ROWS
                        return
                    admitted += 1
                    await self._send_off(request)
        except Parked as parked:
            self.closing.park(parked)
        except HarvesterError as error:
            self.closing.fail(error)

    async def _rest(self) -> None:
        """Nothing to read for now. What failed alone, with nobody left to speak for it, is written off."""
        if self.crew.queue_is_empty and not any(door.limiter.window.in_flight for door in self.teacher.doors):
            self._write_off()
        await self.clock.wait(self.closing.draining, REST_S)

    async def _send_off(self, request: Request) -> None:
        if not self.probe.is_done:
            await self._require_room()
            await self.probe.look()
        self.flights.take_off(request)
        await self.crew.put(request)

    async def _work(self, request: Request) -> None:
        if self.closing.draining.is_set():
            self.flights.drop(request)
            return
        await self.scribe.room()
        try:
            self._keep(request, await self.teacher.ask(request))
        except GaveUp as gone:
            self._give_up(request, gone)
        except (NotSent, Parked, HarvesterError) as stopped:
            self.flights.drop(request)
            self.closing.stop_for(stopped)
        except MemoryError:  # the others' answers are still taken in; the next run asks for this one
            self.flights.drop(request)
            self.closing.park(Parked(0.0, NO_MEMORY))

    def _keep(self, request: Request, answered: Answered) -> None:
        record = answer_record(request, answered)
        self._write_off()

        def stored() -> None:
            tally = self.tally
            tally.answers_stored += 1
            tally.cost_microusd += record.cost_microusd
            tally.note(tally.outcomes, record.outcome)
            tally.note_answer(record.latency_s, record.input_tokens, record.output_tokens)
            self.flights.land(request)

        self.scribe.submit(record, stored)
        self.voices.hear(answered.completion)

    def _give_up(self, request: Request, gone: GaveUp) -> None:
        meaning = self.doubts.add(request, gone)
        if meaning is None:
            return
        for doubtful, _ in self.doubts.take():
            self.flights.drop(doubtful)
        self.closing.stop_for(meaning)

    def _close_doubts(self) -> None:
        """The pass is over: what failed is a dead letter, unless nobody gets through any more."""
        if self.closing.error is None and self.closing.ending != Ending.PARKED:
            self._write_off()
        for request, _ in self.doubts.take():
            self.flights.drop(request)

    def _write_off(self) -> None:
        """Others were answered, or the feed is at its end: what failed is a dead letter."""
        for request, gone in self.doubts.take():
            self.flights.bury(request, gone)

    async def _watch(self, stop: asyncio.Event) -> None:
        """Drain on a stop or at the end of the time, then give the wire its grace."""
        runtime_s = self.limits.runtime_s
        await self.clock.wait(stop, math.inf if runtime_s is None else runtime_s)
        self.closing.drain(Ending.INTERRUPTED if stop.is_set() else Ending.RUNTIME)
        await self.clock.sleep(self.limits.grace_s)
        await self.crew.dismiss()

    async def _tell(self) -> None:
        while True:
            self.on_progress(self.snapshot())
            await self.clock.sleep(PROGRESS_EVERY_S)
            try:
                await self._require_room()
                await self.levels.keep()
            except HarvesterError as error:  # drains: what is on the wire is still kept
                self.closing.fail(error)

    async def _require_room(self) -> None:
        """Low disk stops admission before money is spent on what could not be kept."""
        await self.scribe.call(lambda journal: journal.require_room(self.min_free_mib))

    def snapshot(self) -> Snapshot:
        """The counts now."""
        windows = [door.limiter.window for door in self.teacher.doors]
        in_flight = sum(window.in_flight for window in windows)
        return snapshot(
            self.tally,
            in_flight=in_flight,
            window=sum(int(window.size) for window in windows),
            why=self._why(in_flight),
        )

    def _why(self, in_flight: int) -> str:
        """What holds the next request back, or the end up."""
        if self.closing.draining.is_set():
            return "what is on the wire, for it is paid for; then it ends" if in_flight else ""
        return self.probe.why or self.teacher.why() or ("new prompts" if self.idle else "")
