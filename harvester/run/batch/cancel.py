"""Cancel the batches of a store at their provider without a run (`harvester stop --cancel-batches`)."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing
from pathlib import Path

import orjson

from harvester.api.batches import BatchClient
from harvester.config import dotenv
from harvester.config.teacher_section import TeacherSection, api_key
from harvester.errors import TeacherError
from harvester.store.journal.batches import BatchState, StoredBatch, change_batch, waiting_batches
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock


def cancel_waiting(store: Path) -> list[str]:
    """Cancel every batch that has not ended; return a line for each. The next run collects their answers.

    Each is cancelled with the teacher, and the key's variable, of the run that sent it.

    Raises:
        ConfigError: the key is not set. StoreError: the store can't be opened.
    """
    with StoreLock(store, started_at=time.time()), closing(Journal.open(store)) as journal:
        with journal.reading() as connection:
            batches = waiting_batches(connection)
            runs = dict(connection.execute("SELECT run, config_json FROM runs").fetchall())
        return [_cancel(journal, batch, str(runs.get(batch.run, "{}")), store) for batch in batches]


def _cancel(journal: Journal, batch: StoredBatch, config_json: str, store: Path) -> str:
    name = batch.batch_id or batch.name
    if batch.state is not BatchState.CREATED:
        return f"batch {name}: not known to be created; the next run looks for it"
    stored = orjson.loads(config_json).get("teacher")
    if not stored:
        return f"batch {name}: the configuration of its run is not known"
    teacher = TeacherSection.model_validate(stored)
    key = api_key(teacher, dotenv.variables(store.resolve().parent))
    change_batch(journal, batch, cancel=True)

    async def call() -> str:
        async with BatchClient(teacher, key) as client:
            return (await client.cancel(batch.batch_id)).status

    try:
        status = asyncio.run(call())
    except TeacherError as error:
        return f"batch {name}: not cancelled: {error.message}"
    change_batch(journal, batch, cancel=True, status=status)
    return f"batch {name}: {status}"
