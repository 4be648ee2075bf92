"""The long life of a harvest: lock, resume, heartbeat, signals, sealing, ending.

`prepare.prepare` has done everything that can fail for free; `run` is the only part that may spend money.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from harvester import __version__, compaction, doors, prompts, report, shards
from harvester.clock import Clock
from harvester.corpus import Corpus
from harvester.errors import HarvesterError, StoppedAtLimit, StoreError, TooManyFailures
from harvester.group_commit import GroupCommit
from harvester.harvest import harvest
from harvester.heartbeat import Heart
from harvester.journal import Journal
from harvester.lock import StoreLock, is_held
from harvester.metrics import COMPLETE, INTERRUPTED, PassResult
from harvester.plan import requests
from harvester.prepare import Prepared
from harvester.records import RunRecord
from harvester.signals import handled

T = TypeVar("T")
ABORTED = "aborted"
SEAL_EVERY_S = 5.0
_END = object()


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended."""

    run_id: str
    ending: str
    exit_code: int
    rows_total: int
    requests_sent: int
    answers_stored: int
    from_cache: int
    duplicates: int
    dead: int
    possibly_billed: int
    cost_microusd: int
    sealed_rows: int
    store: str
    resume: str
    detail: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For --json and run.json."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        said = [
            f"{self.ending}: {self.requests_sent:,} requests sent, {self.answers_stored:,} answers stored, "
            f"{self.from_cache:,} from cache, {self.dead:,} failed, cost ${self.cost_microusd / 1e6:.4f}",
            f"answers lie in {self.store}/shards ({self.sealed_rows:,} sealed now)",
        ]
        if self.detail:
            said.insert(1, f"why: {self.detail}")
        if self.possibly_billed:
            said.append(f"{self.possibly_billed:,} attempts were possibly billed without an answer to hold")
        if self.dead:
            said.append(f"failed rows and reasons: {self.store}/dead_letters.jsonl")
        if self.exit_code not in {0, TooManyFailures.exit_code}:
            said.append(f"resume with: {self.resume}")
        return said


async def run(
    prepared: Prepared, watch: Callable[[Mapping[str, Any]], None], clock: Clock | None = None
) -> Summary:
    """Harvest until an ending; every ending is recorded, sealed and reported.

    Args:
        watch: gets the counts, five times a second.
        clock: governs every wait of the pass; None is the machine's.

    Raises:
        HarvesterError: nothing could start (store held, disk unfit, teacher unreachable), the teacher
            refuses, or the disk fails; what was paid before is stored.
    """
    with StoreLock(prepared.store, started_at=time.time()):
        writer = GroupCommit(Journal.open(prepared.store))
        try:
            record = _record(prepared)
            await _on_writer(writer, lambda journal: journal.begin_run(record))
            return await _live(prepared, record.run_id, writer, watch, clock)
        finally:
            await asyncio.to_thread(writer.close)


def _record(prepared: Prepared) -> RunRecord:
    config, verdict = prepared.config, prepared.verdict
    return RunRecord(
        run_id=f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}",
        started_at=time.time(),
        teacher_id=config.teacher.identity,
        host=urlsplit(config.teacher.base_url).netloc,
        model=config.teacher.model,
        terms_id=",".join(verdict.record_ids),
        permission_sha256=verdict.permission_sha256,
        purpose=config.run.purpose,
        mock=verdict.mock,
        duties=tuple(verdict.duties),
        config_sha256=config.sha256,
        config_json=config.model_dump_json(),
        tool_version=__version__,
    )


async def _live(
    prepared: Prepared,
    run_id: str,
    writer: GroupCommit,
    watch: Callable[[Mapping[str, Any]], None],
    clock: Clock | None,
) -> Summary:
    heart = Heart(prepared.store, run_id, prepared.rows_total, watch)
    beat = asyncio.create_task(heart.beat())
    sealing = asyncio.create_task(_seal_along(prepared, writer))
    stop = asyncio.Event()
    error: HarvesterError | None = None
    with handled(stop) as caught:
        feed = requests(prompts.read(prepared.config.prompts.files, prepared.root), prepared.config)
        work = asyncio.create_task(
            harvest(
                feed, prepared.config, key=prepared.key, writer=writer, run_id=run_id,
                limits=prepared.limits(), stop=stop, on_progress=heart.note, clock=clock,
            )
        )  # fmt: skip
        caught.second = work.cancel
        try:
            result = await work
        except asyncio.CancelledError:
            result = PassResult(ABORTED, heart.latest)
        except HarvesterError as raised:
            result, error = PassResult(raised.code, heart.latest), raised
    for aide in (beat, sealing):
        aide.cancel()
        with contextlib.suppress(asyncio.CancelledError, StoreError):  # a failed sealing is met again below
            await aide
    exit_code = error.exit_code if error else _exit_code(result, caught.number, prepared)
    sealed = (
        0 if isinstance(error, StoreError) else await _settle(prepared, run_id, writer, result, exit_code)
    )
    heart.write(result.ending, exit_code=exit_code)
    if error is not None:
        raise error
    return _summary(prepared, run_id, result, exit_code, sealed)


async def _seal_along(prepared: Prepared, writer: GroupCommit) -> None:
    """Seal what fills a shard while the harvest goes on: a slice, then whatever was submitted meanwhile."""
    target = int(prepared.config.store.shard_mib * 1024 * 1024)
    while True:
        await asyncio.sleep(SEAL_EVERY_S)
        steps = await _on_writer(
            writer,
            lambda j: shards.seal_steps(j, prepared.store, target_bytes=target, everything=False),
        )
        await _in_slices(writer, steps)


async def _in_slices(writer: GroupCommit, steps: Generator[None, None, object]) -> None:
    """Run a generator's steps on the writer thread; cut short, it is closed there."""
    try:
        while await _on_writer(writer, lambda _: next(steps, _END)) is not _END:
            pass
    finally:
        writer.call(lambda _: steps.close())


async def _settle(
    prepared: Prepared, run_id: str, writer: GroupCommit, result: PassResult, exit_code: int
) -> int:
    """Seal, record the ending, write the view of dead letters; returns the rows sealed."""
    target = int(prepared.config.store.shard_mib * 1024 * 1024)
    store = prepared.store
    sealed = await _on_writer(writer, lambda j: shards.seal(j, store, target_bytes=target, everything=True))
    steps = await _on_writer(writer, lambda j: compaction.compact_steps(j, store, target_bytes=target))
    await _in_slices(writer, steps)
    await _on_writer(writer, lambda j: j.end_run(run_id, result.ending, exit_code, time.time()))
    await _on_writer(writer, lambda j: j.write_dead_letters(store))
    return sealed.rows


def _exit_code(result: PassResult, signal_number: int, prepared: Prepared) -> int:
    if signal_number:
        return 128 + signal_number
    if result.ending not in {COMPLETE, INTERRUPTED, ABORTED}:
        return StoppedAtLimit.exit_code
    return TooManyFailures.exit_code if result.counts.dead > prepared.config.run.max_failed else 0


def _summary(prepared: Prepared, run_id: str, result: PassResult, exit_code: int, sealed: int) -> Summary:
    counts = result.counts
    return Summary(
        run_id, result.ending, exit_code, prepared.rows_total, counts.requests_sent, counts.answers_stored,
        counts.from_cache, counts.duplicates, counts.dead, counts.possibly_billed, counts.cost_microusd,
        sealed, str(prepared.store), f"harvester run {prepared.path}", result.detail,
    )  # fmt: skip


async def _on_writer(writer: GroupCommit, fn: Callable[[Journal], T]) -> T:
    return await asyncio.wrap_future(writer.call(fn))


def seal_now(store: Path) -> shards.SealResult:
    """`harvester seal`: everything journalled becomes Parquet, without a run."""
    doors.ask(Corpus.open(store).lineages(), "seal", store.resolve().parent)
    with StoreLock(store, started_at=time.time()):
        journal = Journal.open(store)
        try:
            return shards.seal(journal, store, target_bytes=64 * 1024 * 1024, everything=True)
        finally:
            journal.close()


def status(store: Path) -> dict[str, Any]:
    """The heartbeat, whether its process lives, and the ledger's totals."""
    journal = Journal.open(store, read_only=True)
    try:
        totals, dangling = journal.totals(), len(journal.dangling(in_flight=not is_held(store)))
    finally:
        journal.close()
    found = report.read_status(store)
    alive = is_held(store)
    if found.get("state") == "running" and not alive:
        found["state"] = "died"
    return {
        **found, "alive": alive, "store": str(store), "held": totals.answers,
        "possibly_billed": totals.possibly_billed, "without_outcome": dangling,
        "cost_microusd": totals.cost_microusd,
    }  # fmt: skip
