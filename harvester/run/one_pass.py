"""Make one pass over the prompts: feed -> bounded queue -> workers -> one writer.

The feed is read in chunks. Requests whose answer the store holds never reach the queue, and equal requests
share one attempt. When the pass drains, nothing new is sent and requests in flight are awaited.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from harvester.api.http.client import Client
from harvester.api.joining import join, may_join
from harvester.api.types import Request
from harvester.errors import Ending, HarvesterError, NotSent, Parked, PromptError
from harvester.observe.counters import PassResult, Snapshot, snapshot
from harvester.run.background.canary_task import CanaryTask
from harvester.run.background.replica_watch import ReplicaWatch
from harvester.run.control.settings import RuntimeSettings
from harvester.run.pass_parts import PassParts, PassSetup, open_batch_transport, open_parts, share_limits

if TYPE_CHECKING:
    from harvester.run.batch.transport import BatchTransport

# Requests read from the feed, and looked up in the store, at once.
CHUNK = 500

PROGRESS_EVERY_S = 0.2

# Pause before a feed that had nothing new is asked again.
IDLE_S = 1.0

Feed = Iterator[Request | None]


async def make_pass(
    feed: Feed,
    setup: PassSetup,
    *,
    on_progress: Callable[[Snapshot], None],
    on_settings: Callable[[RuntimeSettings], None] = lambda _: None,
    canary: CanaryTask | None = None,
) -> PassResult:
    """Drain the feed once.

    Args:
        feed: requests in order, pulled in a thread, a chunk at a time. None means "no more for now": what was
            read is sent, and a second later the feed is asked again.
        setup: configuration, store and limits of the pass.
        on_progress: gets a Snapshot every 0.2 s and once at the end, whatever the ending.
        on_settings: gets the settings that may change during the pass, before anything is sent.
        canary: asks the same teacher its canary prompts during the pass.

    Raises:
        TeacherRefused: after every answer in flight was stored.
        StoreError: an answer could not be kept; nothing was sent after that.
        PromptError: the feed met a line that can't be used; earlier rows are stored.
    """
    async with Client(setup.config.teacher, setup.config.run, setup.key) as client:
        parts = await open_parts(setup, client)
        async with open_batch_transport(setup, parts) as batches, share_limits(setup, parts) as shared:
            cancel_batches = None if batches is None else batches.cancel_at_end
            limit = parts.worker.choice_limit
            others = None if shared is None else shared.gauges
            endpoints = parts.teacher.endpoints
            replicas = endpoints.gauges if parts.replicas is None else parts.replicas.gauges
            is_allocated = setup.coordination is not None
            on_settings(
                RuntimeSettings(endpoints, limit, replicas, cancel_batches, others, is_allocated=is_allocated)
            )
            return await _Pass(setup, parts, batches, on_progress).run(feed, canary)


class _Pass:
    """One pass over a feed; everything here runs on the event loop."""

    def __init__(
        self,
        setup: PassSetup,
        parts: PassParts,
        batches: BatchTransport | None,
        on_progress: Callable[[Snapshot], None],
    ) -> None:
        self._setup = setup
        self._parts = parts
        self._batches = batches
        self._on_progress = on_progress
        self._admitted = 0
        self._is_idle = False
        samples = setup.config.first_samples
        # Whole prompts, so that the samples of one may be joined.
        self._chunk = max(1, CHUNK // samples) * samples

    async def run(self, feed: Feed, canary: CanaryTask | None) -> PassResult:
        """Send what the feed brings, wait for the answers, then return how it ended."""
        try:
            async with asyncio.TaskGroup() as group:
                self._parts.workers.start(group)
                background = [self._drain_on_stop(), self._report_and_save()]
                if self._parts.acceptance is not None:
                    background.append(self._parts.acceptance.judge_rows())
                if canary is not None:
                    background.append(canary.watch(self._parts.teacher))
                if self._parts.replicas is not None:
                    background.append(self._parts.replicas.watch())
                if self._batches is not None:
                    background.append(self._batches.watch())
                tasks = [group.create_task(work) for work in background]
                if self._parts.replicas is not None and self._parts.replicas.has_earlier:
                    await group.create_task(self._prove_earlier(self._parts.replicas))
                await group.create_task(self._read(feed))
                if self._batches is not None:
                    await group.create_task(self._finish_batches(self._batches))
                if self._parts.replicas is not None:
                    await group.create_task(self._prove(self._parts.replicas))
                await self._finish(canary)
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        finally:
            self._on_progress(self._snapshot())
        return self._parts.ending.result(self._snapshot())

    async def _finish_batches(self, batches: BatchTransport) -> None:
        """Wait until batches hold no rows any more, or the pass drains."""
        try:
            await batches.finish()
        except HarvesterError as error:
            self._parts.ending.fail(error)

    async def _prove_earlier(self, replicas: ReplicaWatch) -> None:
        """Check the addresses that an earlier run left unproven, before the prompts are looked up."""
        try:
            await self._parts.preflight.check()
            await replicas.prove_earlier()
        except Parked as parked:
            self._parts.ending.park(parked)
        except HarvesterError as error:
            self._parts.ending.fail(error)

    async def _prove(self, replicas: ReplicaWatch) -> None:
        """Check all addresses a last time, until no row is asked again for it."""
        await self._parts.workers.wait_until_idle()
        try:
            while await replicas.finish():
                await self._parts.workers.wait_until_idle()
        except NotSent:  # it drains
            return
        except HarvesterError as error:
            self._parts.ending.fail(error)

    async def _finish(self, canary: CanaryTask | None) -> None:
        """Wait for the workers and the writer, and for a canary round under way: it is paid for."""
        parts = self._parts
        await parts.workers.finish()
        if self._batches is not None:
            self._batches.conclude()
        parts.worker.close()
        await parts.writer.flush()
        if parts.acceptance is not None:
            await parts.acceptance.finish()
        if parts.writer.fault is None:
            await parts.limiter_state.save(final=True)
            await parts.overshoot.save()
        if canary is not None:
            await canary.finish(self._setup.limits.grace_s)
        if parts.replicas is not None:
            await parts.replicas.rest(self._setup.limits.grace_s)

    async def _read(self, feed: Feed) -> None:
        """Queue the requests of the feed, and the further ones of [accept], until none come or it drains."""
        ending, acceptance = self._parts.ending, self._parts.acceptance
        more = True
        try:
            while not ending.draining.is_set():
                chunk = acceptance.next_requests(CHUNK) if acceptance is not None else []
                if not chunk and more:
                    chunk, more = await asyncio.to_thread(take, feed, self._chunk)
                elif not chunk and acceptance is not None and acceptance.is_open:
                    if self._batches is not None:
                        await self._batches.step()
                    await self._rest(acceptance.changed)
                    continue
                elif not chunk:
                    return
                self._is_idle = more and not chunk
                if self._is_idle:
                    await self._rest(ending.draining)
                elif not await self._admit(chunk):
                    ending.at_row_limit()
                    return
        except Parked as parked:
            ending.park(parked)
        except HarvesterError as error:
            ending.fail(error)

    async def _admit(self, chunk: list[Request]) -> bool:
        """Queue the requests of a chunk that have no answer yet; False when the row limit is reached.

        Those for several samples of one prompt are joined, as far as `[teacher] max_n` allows.
        """
        in_flight, limits = self._parts.in_flight, self._setup.limits
        held = await in_flight.look_up(chunk)
        is_at_limit, group = False, list[Request]()
        for request in chunk:
            if self._parts.ending.draining.is_set():
                break
            if not in_flight.is_fresh(request, held.get(request.key)):
                continue
            if self._batches is not None and self._batches.holds(request.key):
                self._batches.wait_for(request)
                continue
            is_at_limit = limits.rows is not None and self._admitted >= limits.rows
            if is_at_limit:
                break
            self._admitted += 1
            if group and not self._may_join(group, request):
                await self._queue(group)
                group = []
            in_flight.begin(request)
            group.append(request)
        if group:
            await self._queue(group)
        return not is_at_limit

    def _may_join(self, group: list[Request], request: Request) -> bool:
        return len(group) < self._parts.worker.choice_limit.size and may_join(group[0], request)

    async def _queue(self, group: list[Request]) -> None:
        if not self._parts.preflight.is_done:
            await self._require_free_space()
            await self._parts.preflight.check()
        if self._batches is not None and self._batches.sends_batches:
            for row in group:
                await self._batches.add(row)
        else:
            await self._parts.workers.put(join(group, self._setup.config.teacher.price))

    async def _rest(self, event: asyncio.Event) -> None:
        """Wait a second at most. With nothing in flight, held failures are dead letters: no answer comes."""
        if self._parts.workers.queue_is_empty and not self._in_flight():
            self._parts.worker.dead_letter_held()
        await self._setup.clock.wait(event, IDLE_S)

    async def _drain_on_stop(self) -> None:
        """Drain on a stop or at the end of `runtime_s`; after `grace_s` more, cancel what is in flight."""
        setup, runtime_s = self._setup, self._setup.limits.runtime_s
        await setup.clock.wait(setup.stop, math.inf if runtime_s is None else runtime_s)
        self._parts.ending.drain(Ending.INTERRUPTED if setup.stop.is_set() else Ending.RUNTIME)
        await setup.clock.sleep(setup.limits.grace_s)
        await self._parts.workers.cancel()

    async def _report_and_save(self) -> None:
        """Report progress, check the free space and save what the limiters learned, until cancelled."""
        while True:
            self._on_progress(self._snapshot())
            await self._setup.clock.sleep(PROGRESS_EVERY_S)
            try:
                await self._require_free_space()
                await self._parts.limiter_state.save()
                await self._parts.overshoot.save()
            except HarvesterError as error:  # drains: what is in flight is still kept
                self._parts.ending.fail(error)

    async def _require_free_space(self) -> None:
        """Raise StoreFull when the disk is low, before money is spent on what could not be kept."""
        min_free_mib = self._setup.config.store.min_free_mib
        await self._parts.writer.call(lambda journal: journal.require_free_space(min_free_mib))

    def _in_flight(self) -> int:
        return sum(queue.limiter.window.in_flight for queue in self._parts.teacher.endpoints.queues)

    def _snapshot(self) -> Snapshot:
        in_flight = self._in_flight()
        return snapshot(
            self._parts.tally,
            in_flight=in_flight,
            window=sum(int(queue.limiter.window.size) for queue in self._parts.teacher.endpoints.queues),
            waiting=self._why(in_flight),
        )

    def _why(self, in_flight: int) -> str:
        """What the next request, or the end of the pass, waits for; "" for nothing."""
        if self._parts.ending.draining.is_set():
            return "requests in flight, for they are paid for; then it ends" if in_flight else ""
        idle = "new prompts" if self._is_idle else ""
        parts = self._parts
        reason = parts.preflight.waiting_reason or parts.teacher.endpoints.waiting_reason() or idle
        return reason or ("" if self._batches is None else self._batches.waiting_reason())


def take(feed: Feed, most: int) -> tuple[list[Request], bool]:
    """Read up to `most` requests; also return whether the feed may bring more. None in it ends the chunk.

    Raises:
        HarvesterError: whatever else ends the feed becomes a PromptError, so that the pass keeps its answers.
    """
    chunk: list[Request] = []
    try:
        for request in feed:
            if request is None:
                return chunk, True
            chunk.append(request)
            if len(chunk) == most:
                return chunk, True
    except HarvesterError:
        raise
    except Exception as error:
        why = f"the prompts can't be read on: {type(error).__name__}: {error}"
        raise PromptError(why, remedy="what was answered is stored; please report this") from error
    return chunk, False
