"""Open the batch transport of a pass: its client, and the batches that earlier runs left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from harvester.api.batches import BatchClient
from harvester.config.config import HarvestConfig
from harvester.observe.counters import PassLimits
from harvester.run.batch.context import BatchContext
from harvester.run.batch.transport import AskOnline, BatchTransport
from harvester.store.journal import spending
from harvester.store.journal.batches import StoredBatch, waiting_keys
from harvester.store.journal.journal import Journal

# Makes the context from the client and the numbers of the runs whose batches count for this run's budget.
MakeContext = Callable[[BatchClient, frozenset[int]], BatchContext]


@asynccontextmanager
async def open_batches(
    config: HarvestConfig,
    key: str | None,
    make_context: MakeContext,
    batches: Sequence[StoredBatch],
    ask_online: AskOnline,
    limits: PassLimits,
) -> AsyncIterator[BatchTransport]:
    """Build the transport, with the batches that have not ended; close its client at the end.

    Args:
        key: the teacher's credential, None for none.
        batches: those of this provider.
        ask_online: hands a row to the workers.
        limits: of the pass. A batch that is being sent may take `grace_s` after the pass began to drain.
    """
    numbers = {batch.number for batch in batches}

    def held(journal: Journal) -> tuple[dict[bytes, int], frozenset[int]]:
        with journal.reading() as connection:
            keys = {key: batch for key, batch in waiting_keys(connection).items() if batch in numbers}
            run_ids = spending.runs_to_continue(connection, config.teacher.teacher_id, limits.shared_since)
            runs = {run_id: run for run, run_id in connection.execute("SELECT run, run_id FROM runs")}
        return keys, frozenset(runs[run_id] for run_id in run_ids)

    async with BatchClient(config.teacher, key, trust_env=config.run.trust_env) as client:
        context = make_context(client, frozenset())
        keys, runs = await context.writer.call(held)
        context = make_context(client, runs)
        yield BatchTransport(context, ask_online, batches, keys, limits.grace_s)
