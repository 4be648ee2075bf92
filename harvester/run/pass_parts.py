"""Build the parts of one pass over the prompts, each from those before it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from harvester.api.http.client import Client
from harvester.api.types import Request
from harvester.config.config import HarvestConfig
from harvester.config.transport import Transport
from harvester.errors import HarvesterError
from harvester.observe.counters import Counters, PassLimits
from harvester.run.accept import Acceptance, AcceptSetup
from harvester.run.allotment import Coordination, allotted
from harvester.run.background.canary_store import CanaryStore
from harvester.run.background.replica_watch import ReplicaWatch
from harvester.run.background.unproven import Unproven
from harvester.run.dead_letters import PossiblyBilledRequests
from harvester.run.endings import PassEnding
from harvester.run.in_flight import InFlight
from harvester.run.served_models import ServedModels
from harvester.run.workers import Worker, WorkerPool
from harvester.store.journal.batches import StoredBatch, waiting_batches
from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.journal import Journal
from harvester.store.journal.writer import AsyncWriter
from harvester.store.maintain.bill import compute_spent
from harvester.store.maintain.seal_hold import SealHold
from harvester.store.reuse import ReuseIndex
from harvester.system.clock import Clock, SystemClock
from harvester.teacher.choice_limit import ChoiceLimit
from harvester.teacher.endpoints import Endpoints
from harvester.teacher.limiter.limiter_state import LimiterState
from harvester.teacher.overshoot import Overshoot
from harvester.teacher.policies import build_policies
from harvester.teacher.preflight import Preflight
from harvester.teacher.sharing.shared_limits import Participant, SharedLimits
from harvester.teacher.teacher import Teacher

if TYPE_CHECKING:
    from harvester.api.batches import BatchClient
    from harvester.run.batch.transport import BatchTransport


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSetup:
    """What a pass is started with.

    `key` is the teacher's credential, None for none. `writer` is the store's only writer during the pass,
    which doesn't close it. `run_id` names a run that the journal has begun. `limits` are ceilings in
    addition to those of `config`. Setting `stop` drains the pass: requests in flight get
    `limits.grace_s`. `sent` is set when the first request is sent. `accept` is None without `[accept]`.
    `finish_by` is the deadline in Unix seconds, None for none. `complain` notes an error that does not
    end the pass. `batch_clock` governs polls and the age of batches; None is `clock`. `config_path` is
    the path of harvest.toml, which other harvests show. `hold` is what the sealing beside the pass
    respects. `canaries` keeps what checks of several addresses are answered; None for no such checks.
    `root` is the folder of harvest.toml. `coordination` is how limits and budget are asked of a
    coordinator; None where they are the pass's own. `idle_since` is since when nothing was sent, in
    seconds of `clock`; None: since now.
    """

    config: HarvestConfig
    key: str | None
    writer: GroupCommit
    run_id: str
    limits: PassLimits
    stop: asyncio.Event
    sent: asyncio.Event = field(default_factory=asyncio.Event)
    all_taken: asyncio.Event = field(default_factory=asyncio.Event)
    clock: Clock = field(default_factory=SystemClock)
    accept: AcceptSetup | None = None
    finish_by: float | None = None
    complain: Callable[[HarvesterError], None] = lambda _: None
    batch_clock: Clock | None = None
    config_path: str = ""
    hold: SealHold = field(default_factory=SealHold)
    canaries: CanaryStore | None = None
    root: Path = Path()
    coordination: Coordination | None = None
    idle_since: float | None = None


@dataclass(frozen=True, slots=True)
class PassParts:
    """The finished parts of one pass."""

    ending: PassEnding
    tally: Counters
    writer: AsyncWriter
    in_flight: InFlight
    teacher: Teacher
    limiter_state: LimiterState
    overshoot: Overshoot
    preflight: Preflight
    worker: Worker
    workers: WorkerPool
    acceptance: Acceptance | None = None
    replicas: ReplicaWatch | None = None


async def open_parts(setup: PassSetup, client: Client) -> PassParts:
    """Build the parts of a pass, each from those before it: ending, writer, in_flight, teacher, workers."""
    config, clock = setup.config, setup.clock
    ending, tally = PassEnding(clock.wall), Counters()
    writer = AsyncWriter(setup.writer, ending.fail)
    await writer.start()
    acceptance = None if setup.accept is None else Acceptance(config, setup.accept, tally, ending)
    in_flight = InFlight(
        writer,
        tally,
        await writer.call(lambda journal: ReuseIndex.of(journal, config)),
        await writer.call(lambda journal: PossiblyBilledRequests.of(journal, config)),
        clock,
        acceptance,
    )
    since = setup.limits.shared_since
    spent = await writer.call(
        lambda journal: compute_spent(journal, clock.wall(), config.teacher.teacher_id, since)
    )
    policies = build_policies(config, setup.limits, clock, spent, setup.idle_since)
    limiter_state = LimiterState(writer, policies.limiters, config.teacher, clock)
    await limiter_state.restore()
    overshoot = Overshoot(writer, policies.budget, config)
    await overshoot.restore()
    endpoints = Endpoints(client, policies)
    ending.when_draining(endpoints.drain)
    teacher = Teacher(endpoints, writer, tally, setup.run_id, setup.sent)
    served_models = ServedModels(tally, strict=config.run.strict_model, providers=config.providers)
    choice_limit = await writer.call(lambda journal: ChoiceLimit.of(journal, config.teacher))
    unproven = Unproven(
        writer,
        in_flight,
        tally,
        clock,
        config.teacher.model,
        setup.hold,
        lambda requests: workers.put_first(requests),
        asks_again=acceptance is None,
    )
    worker = Worker(
        teacher,
        writer,
        in_flight,
        served_models,
        tally,
        ending,
        choice_limit,
        config.teacher.price,
        max_unusable=config.run.max_unusable,
        unproven=unproven,
    )
    places = sum(map(config.teacher.max_concurrency_of, config.teacher.addresses))
    workers = WorkerPool(places, lambda: endpoints.workers, worker.serve, setup.all_taken)
    endpoints.on_room = workers.adjust
    replicas = _replica_watch(setup, endpoints, unproven)
    if replicas is not None:
        await unproven.load_earlier(config.teacher.base_urls)
    return PassParts(
        ending,
        tally,
        writer,
        in_flight,
        teacher,
        limiter_state,
        overshoot,
        Preflight(client, endpoints, config.teacher.model),
        worker,
        workers,
        acceptance,
        replicas,
    )


def _replica_watch(setup: PassSetup, endpoints: Endpoints, unproven: Unproven) -> ReplicaWatch | None:
    """Build what checks the addresses of a teacher, if there are several and they are to be checked."""
    config, canaries = setup.config, setup.canaries
    is_off = canaries is None or config.score is not None or not config.canary.replicas_every_s
    if canaries is None or is_off or len(endpoints.queues) < 2:
        return None
    return ReplicaWatch(config, setup.root, endpoints, unproven, canaries, setup.complain)


@contextlib.asynccontextmanager
async def share_limits(setup: PassSetup, parts: PassParts) -> AsyncIterator[SharedLimits | None]:
    """Share the limits with other harvests during the block; None where that is switched off."""
    if not setup.config.run.share_limits and setup.coordination is None:
        yield None
        return
    endpoints = parts.teacher.endpoints
    shared = SharedLimits(
        endpoints.policies.limiters,
        Participant(setup.key, setup.config.run.priority, setup.config_path),
        clock=setup.clock,
        changed=endpoints.recheck,
        complain=setup.complain,
    )
    if setup.coordination is not None:
        async with allotted(setup.coordination, endpoints, shared):
            yield shared
        return
    await shared.join()
    renewing = asyncio.create_task(shared.watch())
    try:
        yield shared
    finally:
        renewing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await renewing
        await shared.leave()


@contextlib.asynccontextmanager
async def open_batch_transport(setup: PassSetup, parts: PassParts) -> AsyncIterator[BatchTransport | None]:
    """Open the batches of a pass; None where none are sent and none of earlier runs wait."""
    endpoint = setup.config.teacher.base_url

    def waiting(journal: Journal) -> list[StoredBatch]:
        with journal.reading() as connection:
            return [batch for batch in waiting_batches(connection) if batch.endpoint == endpoint]

    batches = await parts.writer.call(waiting)
    if setup.config.run.transport is Transport.ONLINE and not batches:
        yield None
        return
    from harvester.run.batch.context import BatchContext
    from harvester.run.batch.opening import open_batches

    def make_context(client: BatchClient, runs: frozenset[int]) -> BatchContext:
        return BatchContext(
            config=setup.config,
            client=client,
            writer=parts.writer,
            in_flight=parts.in_flight,
            worker=parts.worker,
            ending=parts.ending,
            budget=parts.teacher.endpoints.policies.budget,
            retries=parts.teacher.endpoints.policies.retry.budget,
            clock=setup.batch_clock or setup.clock,
            complain=setup.complain,
            finish_by=setup.finish_by,
            runs=runs,
        )

    async def ask_online(request: Request) -> None:
        await parts.preflight.check()
        await parts.workers.put(request)

    async with open_batches(
        setup.config, setup.key, make_context, batches, ask_online, setup.limits
    ) as transport:
        yield transport
