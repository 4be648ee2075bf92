"""One pass: feed -> bounded queue -> workers -> one writer; drains on cancel.

The feed is read in chunks; what the store holds already never becomes a task. Equal requests share one
flight. A worker hands its answer to the writer and goes on; it counts as stored when it is durable.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from harvester.admission import NotSent
from harvester.ceilings import Ceilings
from harvester.client import Client
from harvester.clock import Clock, SystemClock
from harvester.config import HarvestConfig
from harvester.doubts import Doubts
from harvester.errors import HarvesterError, StoppedAtLimit
from harvester.flights import Flights, answer_record, dead_record
from harvester.group_commit import GroupCommit
from harvester.journey import Request
from harvester.laws import laws_of
from harvester.levels import Levels
from harvester.metrics import (
    COMPLETE,
    INTERRUPTED,
    LIMIT_BUDGET,
    LIMIT_PARKED,
    LIMIT_ROWS,
    LIMIT_RUNTIME,
    PassLimits,
    PassResult,
    Snapshot,
    Tally,
    snapshot,
)
from harvester.scribe import Scribe
from harvester.teacher import Answered, GaveUp, Parked, Teacher

__all__ = ["PassLimits", "PassResult", "Snapshot", "harvest"]

CHUNK = 500
PROGRESS_EVERY_S = 0.2


async def harvest(  # noqa: PLR0913 - the parts of a pass; all but the first two by name
    feed: Iterator[Request],
    config: HarvestConfig,
    *,
    key: str | None,
    writer: GroupCommit,
    run_id: str,
    limits: PassLimits,
    stop: asyncio.Event,
    on_progress: Callable[[Snapshot], None],
    clock: Clock | None = None,
) -> PassResult:
    """Drain the feed once.

    Args:
        feed: requests in order, pulled in a thread, a chunk at a time.
        key: the credential, None for none.
        writer: the store's only writer while the pass lives; it is not closed here.
        run_id: the run, begun in the journal already.
        limits: ceilings of this pass beside those of the configuration.
        stop: set it to drain: nothing new is sent, what is on the wire gets `limits.grace_s`.
        on_progress: gets a Snapshot every 0.2 s and once at the end, whatever the ending.

    Returns:
        The ending ("complete", "interrupted", "rows", "budget", "runtime", "parked") and the counts.

    Raises:
        TeacherRefused: after everything on the wire was stored.
        StoreError: an answer could not be kept; nothing was sent after that.
        PromptError: the feed met a line that can't be used; earlier rows are stored.
    """
    chosen = clock or SystemClock()
    async with Client(config.teacher, config.run, key) as client:
        one = _Pass(client, config, limits, on_progress, chosen)
        one.scribe = Scribe(writer, one.fail)
        await one.scribe.start()
        ceilings = await one.scribe.call(lambda journal: Ceilings.of(journal, config))
        one.flights = Flights(one.scribe, one.tally, ceilings)
        laws = laws_of(config, limits, chosen)
        one.levels = Levels(one.scribe, laws.limiters, config.teacher, chosen)
        await one.levels.restore()
        one.teacher = Teacher(client, laws, one.scribe, one.tally, run_id)
        return await one.run(feed, stop)


class _Pass:
    """State of one pass; everything here runs on the event loop."""

    scribe: Scribe
    flights: Flights
    levels: Levels
    teacher: Teacher

    def __init__(
        self,
        client: Client,
        config: HarvestConfig,
        limits: PassLimits,
        on_progress: Callable[[Snapshot], None],
        clock: Clock,
    ) -> None:
        self.client = client
        self.limits = limits
        self.min_free_mib = config.store.min_free_mib
        self.on_progress = on_progress
        self.clock = clock
        self.size = config.teacher.limits.max_concurrency
        self.tally = Tally()
        self.queue: asyncio.Queue[Request | None] = asyncio.Queue(maxsize=self.size)
        self.doubts = Doubts()
        self.ending = COMPLETE
        self.detail = ""
        self.error: HarvesterError | None = None
        self.draining = asyncio.Event()
        self.probed = False

    async def run(self, feed: Iterator[Request], stop: asyncio.Event) -> PassResult:
        try:
            async with asyncio.TaskGroup() as group:
                crew = [group.create_task(self._work()) for _ in range(self.size)]
                aides = [
                    group.create_task(self._watch(stop, crew)),
                    group.create_task(self._tell()),
                ]
                await group.create_task(self._feed(feed))
                await asyncio.wait(crew)
                self._close_doubts()
                await self.scribe.flush()
                if self.scribe.fault is None:
                    await self.levels.keep(final=True)
                for aide in aides:
                    aide.cancel()
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        finally:
            self.on_progress(self.snapshot())
        if self.error is not None:
            raise self.error
        return PassResult(self.ending, self.snapshot(), self.detail)

    def fail(self, error: HarvesterError) -> None:
        """The pass can't go on; the first reason counts."""
        if self.error is None:
            self.error = error
        self._drain(self.ending)

    def _drain(self, ending: str) -> None:
        if not self.draining.is_set():
            self.ending = ending
            self.draining.set()
            self.teacher.drain()

    async def _feed(self, feed: Iterator[Request]) -> None:
        admitted = 0
        try:
            while not self.draining.is_set():
                chunk = await asyncio.to_thread(lambda: list(itertools.islice(feed, CHUNK)))
                if not chunk:
                    break
                held = await self.flights.look_up(chunk)
                for request in chunk:
                    if self.draining.is_set():
                        break
                    if not self.flights.is_fresh(request, held.get(request.key)):
                        continue
                    if self.limits.rows is not None and admitted >= self.limits.rows:
                        self.ending = LIMIT_ROWS
                        return
                    admitted += 1
                    await self._send_off(request)
        except HarvesterError as error:
            self.fail(error)
        finally:
            for _ in range(self.size):
                await self.queue.put(None)

    async def _send_off(self, request: Request) -> None:
        if not self.probed:
            await self._require_room()
            await self.client.probe()
            self.probed = True
        self.flights.take_off(request)
        await self.queue.put(request)

    async def _work(self) -> None:
        while (request := await self.queue.get()) is not None:
            if self.draining.is_set():
                self.flights.drop(request)
                continue
            await self.scribe.room()
            try:
                self._keep(request, await self.teacher.ask(request))
            except NotSent:
                self.flights.drop(request)
            except Parked as parked:
                self.flights.drop(request)
                self._park(parked)
            except StoppedAtLimit:
                self.flights.drop(request)
                self._drain(LIMIT_BUDGET)
            except GaveUp as gone:
                self._give_up(request, gone)
            except HarvesterError as error:
                self.flights.drop(request)
                self.fail(error)

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

    def _park(self, parked: Parked) -> None:
        if not self.draining.is_set():
            at = datetime.fromtimestamp(self.clock.wall() + parked.wait_s, UTC)
            self.detail = f"{parked.why}; go on after {at:%Y-%m-%d %H:%M:%S} UTC"
        self._drain(LIMIT_PARKED)

    def _give_up(self, request: Request, gone: GaveUp) -> None:
        meaning = self.doubts.add(request, gone)
        if meaning is None:
            return
        for doubtful, _ in self.doubts.take():
            self.flights.drop(doubtful)
        if isinstance(meaning, Parked):
            self._park(meaning)
        else:
            self.fail(meaning)

    def _close_doubts(self) -> None:
        """The pass is over: what failed is a dead letter, unless nobody gets through any more."""
        if self.error is None and self.ending != LIMIT_PARKED:
            self._write_off()
        for request, _ in self.doubts.take():
            self.flights.drop(request)

    def _write_off(self) -> None:
        """Others were answered, or the feed is at its end: what failed is a dead letter."""
        for request, gone in self.doubts.take():
            self._bury(request, gone)

    def _bury(self, request: Request, gone: GaveUp) -> None:
        def stored() -> None:
            self.tally.dead += 1
            self.flights.land(request)

        self.scribe.submit(dead_record(request, gone, self.clock.wall()), stored)

    async def _watch(self, stop: asyncio.Event, crew: list[asyncio.Task[None]]) -> None:
        """Drain on a stop or at the end of the time, then give the wire its grace."""
        runtime_s = self.limits.runtime_s
        await self.clock.wait(stop, math.inf if runtime_s is None else runtime_s)
        self._drain(INTERRUPTED if stop.is_set() else LIMIT_RUNTIME)
        await self.clock.sleep(self.limits.grace_s)
        for worker in crew:
            worker.cancel()
        while True:  # nobody takes from the queue any more; the feeder must not wait for room
            await self.queue.get()

    async def _tell(self) -> None:
        while True:
            self.on_progress(self.snapshot())
            await self.clock.sleep(PROGRESS_EVERY_S)
            try:
                await self._require_room()
                await self.levels.keep()
            except HarvesterError as error:  # drains: what is on the wire is still kept
                self.fail(error)

    async def _require_room(self) -> None:
        """Low disk stops admission before money is spent on what could not be kept."""
        await self.scribe.call(lambda journal: journal.require_room(self.min_free_mib))

    def snapshot(self) -> Snapshot:
        """The counts now."""
        windows = self.teacher.windows
        return snapshot(
            self.tally,
            in_flight=sum(window.in_flight for window in windows),
            window=sum(int(window.size) for window in windows),
            why=self.teacher.why(),
        )
