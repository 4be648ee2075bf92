"""Run one harvest from lock to summary: open, pass over the prompts, check the terms, seal, report.

`prepare.prepare` has done everything that can fail for free; `run` is the only part that may spend money.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from harvester.api.error_body import excerpt
from harvester.errors import (
    Ending,
    HarvesterError,
    PromptError,
    RunState,
    StoreError,
    TeacherChanged,
    TermsRefused,
)
from harvester.observe.counters import PassResult, Snapshot
from harvester.observe.sd_notify import ServiceNotifier
from harvester.prompts import bad_lines, completed_files, file_versions
from harvester.prompts.feed import PromptFeed
from harvester.run import endings
from harvester.run.accept import AcceptSetup, prepare_accept
from harvester.run.allotment import Coordination, Exchange
from harvester.run.background import schedule_watch, terms_watch
from harvester.run.background.canary_store import CanaryStore
from harvester.run.background.canary_task import CanaryContext, CanaryTask
from harvester.run.background.heartbeat import ErrorLog, Heartbeat, StatusSources, Watch
from harvester.run.background.mirror_task import FINAL_INTERRUPTED_S, FINAL_S, MirrorTask
from harvester.run.background.sealing import Sealing
from harvester.run.control import server
from harvester.run.control.settings import RunControl, RuntimeSettings
from harvester.run.endings import Stop, Summary
from harvester.run.in_flight import RE_ASKED
from harvester.run.one_pass import make_pass
from harvester.run.operator import OperatorCommands, StoredPauses
from harvester.run.pass_parts import PassSetup
from harvester.run.prepare import Prepared, require_still_permitted
from harvester.run.retry import reopen_rows
from harvester.run.shared_answers import copy_shared
from harvester.run.signals import Signals, handled
from harvester.store import paths, pauses
from harvester.store.journal.adoptions import require_complete
from harvester.store.journal.batches import WaitingBatches, waiting_in_batches
from harvester.store.journal.group_commit import GroupCommit, on_writer
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.journal.records import RunRecord
from harvester.store.maintain.bill import compute_spent
from harvester.store.shards.manifest import read_manifest
from harvester.store.terms_check import require_unsealed_permitted
from harvester.system.background import StopRequests
from harvester.system.clock import Clock, SystemClock
from harvester.system.command_line.version import __version__
from harvester.teacher.policies import build_budget


async def run(
    prepared: Prepared,
    watch: Watch,
    clock: Clock | None = None,
    batch_clock: Clock | None = None,
    *,
    requests: StopRequests | None = None,
    exchange: Exchange | None = None,
) -> Summary:
    """Harvest until an ending; every ending is recorded, sealed and reported.

    Args:
        watch: gets the status, as status.json has it, five times a second.
        clock: governs every wait of the pass and of the schedule; None is the machine's.
        batch_clock: governs polls and the age of batches; None is `clock`.
        requests: how the program around the run ends it, which then leaves that program's signal handlers,
            garbage collection and service manager alone. None: the process is the run's own.
        exchange: asks the coordinator of a fleet for limits and budget; None: they are the run's own.

    Raises:
        HarvesterError: nothing could start (store held, disk unfit, teacher unreachable), the teacher
            refuses, or the disk fails; what was paid before is stored.
    """
    with StoreLock(prepared.store, started_at=time.time()):
        writer = GroupCommit(Journal.open(prepared.store))
        try:
            host = Host(prepared, watch, requests, exchange)
            parts = await _open(host, writer, clock or SystemClock(), batch_clock)
            return await _run(parts)
        finally:
            await asyncio.to_thread(writer.close)


async def _run(parts: RunParts) -> Summary:
    """Pass, check the terms, seal, report; the background tasks live until sealing has ended."""
    with handled(partial(parts.drain, Ending.INTERRUPTED, ""), parts.host.requests) as signals:
        commands = server.served(parts.prepared.store, parts.operator.act, parts.errors.add)
        async with background_tasks(_watches(parts)), commands:
            result, error = await _pass(parts, signals)
            await _check_terms(parts)
            error = error or parts.stop.refused
            if error is None:
                await _hold_later_runs(parts, result)
            exit_code = _exit_code(parts, result, error, signals)
            parts.control.detach()
            parts.heartbeat.set_state(RunState.SEALING)
            sealing = asyncio.create_task(_seal(parts, result, exit_code, error))
            signals.cancel_at_second(sealing)
            sealed_rows = 0
            try:
                sealed_rows = await sealing
            except asyncio.CancelledError:
                exit_code = 128 + signals.number
            if not isinstance(error, StoreError):
                await _finish_mirror(parts.mirror, signals)
    parts.heartbeat.end(result.ending, exit_code, result.detail if error is None else str(error))
    if error is not None:
        raise error
    return await _summary(parts, result, exit_code, sealed_rows)


async def _finish_mirror(mirror: MirrorTask | None, signals: Signals) -> None:
    """Give the mirror a while for what was sealed last; a second signal ends it."""
    if mirror is None or signals.count > 1:
        return
    limit_s = FINAL_INTERRUPTED_S if signals.count else FINAL_S
    finishing = asyncio.create_task(mirror.finish(limit_s))
    signals.cancel_at_second(finishing)
    with contextlib.suppress(asyncio.CancelledError):
        await finishing


@dataclass(frozen=True, slots=True)
class Host:
    """What a run is given: see `run`."""

    prepared: Prepared
    watch: Watch
    requests: StopRequests | None
    exchange: Exchange | None = None

    def notifier(self) -> ServiceNotifier:
        """Return what tells the service manager of the process; nothing if the process is another's."""
        return ServiceNotifier() if self.requests is None else ServiceNotifier({})


@dataclass(frozen=True, slots=True)
class RunParts:
    """The finished parts of one run.

    `drain` ends the pass for a reason; after the pass it does nothing. `warnings` are for the summary.
    """

    host: Host
    run_id: str
    clock: Clock
    batch_clock: Clock | None
    writer: GroupCommit
    errors: ErrorLog
    stop: Stop
    control: RunControl
    feed: PromptFeed
    canaries: CanaryStore
    canary: CanaryTask | None
    mirror: MirrorTask | None
    sealing: Sealing
    heartbeat: Heartbeat
    operator: OperatorCommands
    drain: Callable[[Ending, str], None]
    warnings: tuple[str, ...]

    @property
    def prepared(self) -> Prepared:
        """What is run."""
        return self.host.prepared


async def _open(host: Host, writer: GroupCommit, clock: Clock, batch_clock: Clock | None) -> RunParts:
    """Begin the run in the journal and build its parts, each from those before it."""
    prepared = host.prepared
    record = _record(prepared)
    await on_writer(writer, lambda journal: journal.require_whole_index())
    await on_writer(writer, lambda journal: _check_shards(journal, prepared.store))
    await on_writer(writer, lambda journal: _require_adopted(journal, prepared.store))
    shared = await copy_shared(prepared, writer)
    await on_writer(writer, lambda journal: journal.begin_run(record))
    await on_writer(writer, lambda journal: reopen_rows(journal, prepared))
    bad_lines.write_down(prepared.store, prepared.bad)
    prepared.skipped.write_down(prepared.store)
    warnings = await on_writer(
        writer, lambda journal: file_versions.note(journal, prepared.config, prepared.root, record.run_id)
    )
    errors, stop, control = ErrorLog(), Stop(), RunControl()
    stored_pauses = StoredPauses(control, writer, record.teacher_id)
    await stored_pauses.restore()
    feed = PromptFeed(prepared.config, prepared.root, errors.add, prepared.skipped, prepared.rules)
    purpose = record.purpose if prepared.config.canary.prompts is None else "eval"
    canaries = CanaryStore(prepared.store, record, purpose, errors.add)
    canary = _canary(prepared, canaries, stored_pauses, errors, clock)
    canary_news = canary.news if canary is not None else {}
    mirror = _mirror(prepared, writer, errors)
    mirror_news = mirror.news if mirror is not None else None
    facts = _facts(prepared, record)
    sources = StatusSources(facts, feed, control, errors, canary_news, prepared.hours, mirror_news)
    heartbeat = Heartbeat(prepared.store, sources, host.watch, host.notifier())

    def drain(ending: Ending, detail: str) -> None:
        if not control.is_over:
            stop.ask(ending, detail)
            heartbeat.set_state(RunState.DRAINING)

    return RunParts(
        host=host,
        run_id=record.run_id,
        clock=clock,
        batch_clock=batch_clock,
        writer=writer,
        errors=errors,
        stop=stop,
        control=control,
        feed=feed,
        canaries=canaries,
        canary=canary,
        mirror=mirror,
        sealing=Sealing(prepared.store, writer, _shard_bytes(prepared), host.requests is None),
        heartbeat=heartbeat,
        operator=OperatorCommands(control, stored_pauses, heartbeat.status, drain),
        drain=drain,
        warnings=(*shared, *warnings),
    )


def _record(prepared: Prepared) -> RunRecord:
    config, verdict = prepared.config, prepared.verdict
    return RunRecord(
        run_id=f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}",
        started_at=time.time(),
        teacher_id=config.teacher.teacher_id,
        host=urlsplit(config.teacher.base_url).netloc,
        model=config.teacher.model,
        terms_id=",".join(verdict.record_ids),
        permission_sha256=verdict.permission_sha256,
        purpose=config.run.purpose,
        mock=verdict.mock,
        duties=tuple(verdict.duties),
        providers=config.providers,
        config_sha256=config.sha256,
        template_sha256="" if prepared.rules.template is None else prepared.rules.template.sha256,
        config_json=config.model_dump_json(),
        tool_version=__version__,
    )


def _facts(prepared: Prepared, record: RunRecord) -> dict[str, Any]:
    """Return what a status says of a run from its first beat to its last."""
    return {
        "run_id": record.run_id,
        "rows_total": prepared.rows_total,
        "input_tokens_total": prepared.input_tokens,
        "config": str(prepared.path),
        "model": prepared.config.teacher.model,
    }


def _canary(
    prepared: Prepared, canaries: CanaryStore, stored_pauses: StoredPauses, errors: ErrorLog, clock: Clock
) -> CanaryTask | None:
    """Build the canary task, if canary prompts are configured."""
    settings = prepared.config.canary
    if settings.prompts is None:
        return None

    async def on_change(change: str) -> None:
        errors.add(TeacherChanged(change))
        if settings.pause:
            await stored_pauses.pause_for_drift(change)

    context = CanaryContext(prepared.config, prepared.root, prepared.store, canaries, on_change, errors.add)
    return CanaryTask(context, clock)


def _mirror(prepared: Prepared, writer: GroupCommit, errors: ErrorLog) -> MirrorTask | None:
    url = prepared.config.store.mirror
    return MirrorTask(prepared.store, url, writer, errors.add) if url else None


@dataclass(frozen=True, slots=True)
class BackgroundTask:
    """Work beside the pass. `on_error` gets its error, with `name` as the place, if it stops by itself."""

    name: str
    work: Coroutine[Any, Any, None]
    on_error: Callable[[Exception], None]

    def report(self, task: asyncio.Task[None]) -> None:
        """Report the error of a task that has ended, if it has one."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.on_error(HarvesterError(f"stopped by {error or type(error).__name__}", place=self.name))


@contextlib.asynccontextmanager
async def background_tasks(backgrounds: Sequence[BackgroundTask]) -> AsyncIterator[None]:
    """Run these until the block ends. Whatever they raise is reported, and ends nothing here."""
    tasks = []
    for background in backgrounds:
        task = asyncio.create_task(background.work)
        task.add_done_callback(background.report)
        tasks.append(task)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _watches(parts: RunParts) -> list[BackgroundTask]:
    """List what goes on from the first beat to the end of sealing."""
    prepared, errors, stop = parts.prepared, parts.errors, parts.stop
    hooks = terms_watch.TermsHooks(
        check=partial(require_still_permitted, prepared),
        served_models=lambda: parts.heartbeat.latest.served_models,
        on_refused=stop.refuse,
        on_error=errors.add,
    )

    def terms_unwatched(error: Exception) -> None:
        errors.add(error)
        stop.refuse(terms_watch.unreadable_terms(error))

    schedule = schedule_watch.watch(
        prepared.hours, parts.clock, stop, parts.control, wait=prepared.flags.watch
    )
    return [
        BackgroundTask("heartbeat", parts.heartbeat.beat(), errors.add),
        BackgroundTask("hours", schedule, errors.add),
        BackgroundTask("terms", terms_watch.watch(hooks, parts.clock), terms_unwatched),
        *([BackgroundTask("mirror", parts.mirror.run(), errors.add)] if parts.mirror is not None else []),
    ]


def _check_shards(journal: Journal, store: Path) -> None:
    """Finish what an earlier run left half sealed, and require every sealed shard.

    Raises:
        StoreError, StoreCorrupt: as `finish_interrupted` and `require_present`.
    """
    folder = store / paths.SHARDS
    if journal.next_shard() == 1 and not any(folder.glob("*")):  # nothing was ever sealed
        return
    from harvester.store.shards.proved import require_present
    from harvester.store.shards.seal import finish_interrupted

    finish_interrupted(journal, store)
    require_present(folder, read_manifest(journal))


def _require_adopted(journal: Journal, store: Path) -> None:
    with journal.reading() as connection:
        require_complete(connection, store)


async def _pass(parts: RunParts, signals: Signals) -> tuple[PassResult, HarvesterError | None]:
    """Make the pass, sealing meanwhile; return how it ended, and the error that ended it."""
    prepared, heartbeat = parts.prepared, parts.heartbeat
    known = await on_writer(parts.writer, lambda journal: completed_files.recall(journal, prepared.digest))
    if known is not None:  # an earlier run completed these files, and nothing has left the store since
        parts.feed.pass_over(known)
        await _show_budget(parts)
        heartbeat.note(known.counts())
        return PassResult(Ending.COMPLETE, known.counts()), None
    work = asyncio.create_task(_harvest(parts))
    signals.cancel_at_second(work)
    if signals.count > 1:  # before there was anything to cancel
        work.cancel()
    sealing, on_error = parts.sealing, parts.errors.add
    beside = [
        BackgroundTask("sealing", sealing.seal_meanwhile(), on_error),
        BackgroundTask("columns", sealing.convert_meanwhile(), on_error),
    ]
    async with background_tasks(beside):
        try:
            result = await work
            sealing.hurry.set()
            return parts.stop.named(result), None
        except asyncio.CancelledError:
            return PassResult(Ending.ABORTED, heartbeat.latest), None
        except HarvesterError as error:
            return PassResult(Ending.of(error), heartbeat.latest), error


async def _show_budget(parts: RunParts) -> None:
    """Show what is left of each ceiling, as after a run that sent something."""
    config, now = parts.prepared.config, parts.clock.wall()
    teacher_id = config.teacher.teacher_id
    limits = parts.prepared.limits()
    spent = await on_writer(
        parts.writer, lambda journal: compute_spent(journal, now, teacher_id, limits.shared_since)
    )
    parts.control.show_budget(build_budget(config, limits, spent, now))


async def _harvest(parts: RunParts) -> PassResult:
    prepared = parts.prepared
    accept = await asyncio.to_thread(_accept, parts)
    exchange, control = parts.host.exchange, parts.control
    is_own_pace = exchange is None and isinstance(parts.clock, SystemClock)
    setup = PassSetup(
        accept=accept,
        config=prepared.config,
        key=prepared.key,
        writer=parts.writer,
        run_id=parts.run_id,
        limits=prepared.limits(),
        stop=parts.stop.event,
        sent=parts.sealing.sent,
        all_taken=parts.sealing.all_taken,
        clock=parts.clock,
        finish_by=prepared.hours.finish_by,
        complain=parts.errors.add,
        batch_clock=parts.batch_clock,
        config_path=str(prepared.path.resolve()),
        hold=parts.sealing.hold,
        canaries=parts.canaries,
        root=prepared.root,
        coordination=None if exchange is None else Coordination(exchange, control.pause, control.resume),
        idle_since=prepared.prepared_at if is_own_pace else None,
    )

    def on_settings(settings: RuntimeSettings) -> None:
        """Apply the schedule before anything is sent."""
        now, wait = parts.clock.wall(), prepared.flags.watch
        schedule_watch.apply_schedule(prepared.hours, now, parts.stop, parts.control, wait=wait)
        parts.control.attach(settings)

    return await make_pass(
        parts.feed.watched() if prepared.flags.watch else parts.feed.once(),
        setup,
        on_progress=parts.heartbeat.note,
        on_settings=on_settings,
        canary=parts.canary,
    )


def _accept(parts: RunParts) -> AcceptSetup | None:
    """Judge what the store holds; None without `[accept]`."""
    prepared = parts.prepared
    if prepared.verifiers is None:
        return None
    return prepare_accept(
        prepared.store, prepared.config, prepared.verifiers, parts.feed.prompts(), parts.feed.count_further
    )


async def _check_terms(parts: RunParts) -> None:
    """Ask the terms before sealing; refused rows stay in the journal."""
    try:
        await asyncio.to_thread(require_unsealed_permitted, parts.prepared.store)
    except TermsRefused as error:
        parts.stop.refuse(error)
    except StoreError:
        return  # sealing meets it again
    except (HarvesterError, OSError) as error:
        parts.stop.refuse(terms_watch.unreadable_terms(error))


async def _hold_later_runs(parts: RunParts, result: PassResult) -> None:
    """Pause the runs to come where another model answered a strict one.

    A later run would take its own first answer as the one to compare with, so a schedule would go on with
    the other model within the hour.
    """
    config, models = parts.prepared.config, list(result.counts.served_models)
    if config.run.strict_model and len(models) > 1:
        why = pauses.why_drift(f"{excerpt(models[1])} answers in place of {excerpt(models[0])}")
        teacher_id = config.teacher.teacher_id
        await on_writer(parts.writer, lambda journal: pauses.save(journal, pauses.DRIFT, why, teacher_id))


def _exit_code(parts: RunParts, result: PassResult, error: HarvesterError | None, signals: Signals) -> int:
    if error is not None:
        return error.exit_code
    run = parts.prepared.config.run
    return endings.exit_code(result, signals.number, run.max_failed, run.max_unusable)


async def _seal(parts: RunParts, result: PassResult, exit_code: int, error: HarvesterError | None) -> int:
    """Seal, record the ending, write dead_letters.jsonl; return the number of rows sealed.

    After a fault of the disk nothing is written any more; after an abort only the ending is.
    """
    sealed_rows = 0
    if isinstance(error, StoreError):
        return sealed_rows
    store, writer = parts.prepared.store, parts.writer
    try:
        if result.ending != Ending.ABORTED and parts.stop.refused is None:
            sealed_rows = await parts.sealing.finish()
    finally:
        run_id, ending, ended_at = parts.run_id, result.ending, time.time()
        await on_writer(writer, lambda journal: journal.end_run(run_id, ending, exit_code, ended_at))
    await on_writer(writer, lambda journal: journal.write_dead_letters(store))
    if error is None and result.ending == Ending.COMPLETE:
        await _note_completed_files(parts, result.counts)
    return sealed_rows


def _shard_bytes(prepared: Prepared) -> int:
    return int(prepared.config.store.shard_mib * 1024 * 1024)


async def _note_completed_files(parts: RunParts, counts: Snapshot) -> None:
    """Note the prompt files as completed, if they did not change meanwhile and no line was passed over."""
    prepared, digest = parts.prepared, parts.prepared.digest
    if digest is None or prepared.bad or counts.rows != prepared.rows_total or counts.taken_back:
        return
    try:
        now = await asyncio.to_thread(completed_files.digest_of, prepared.config, prepared.root)
    except PromptError:  # removed meanwhile
        return
    if now == digest:
        tokens = parts.feed.input_tokens
        await on_writer(
            parts.writer,
            lambda journal: completed_files.note(journal, digest, counts, tokens, RE_ASKED),
        )


def waiting_batches_of(journal: Journal) -> WaitingBatches:
    """Return what the batches of a store hold."""
    with journal.reading() as connection:
        return waiting_in_batches(connection)


async def _summary(parts: RunParts, result: PassResult, exit_code: int, sealed_rows: int) -> Summary:
    prepared = parts.prepared
    totals = await on_writer(parts.writer, lambda journal: journal.totals())
    waiting = await on_writer(parts.writer, waiting_batches_of)
    notes = [waiting.note()] if waiting.batches else []
    holds = await on_writer(
        parts.writer, lambda journal: pauses.load(journal, prepared.config.teacher.teacher_id)
    )
    if holds:
        notes.append(f"the next run sends nothing: {'; '.join(holds.values())}")
    return Summary(
        run_id=parts.run_id,
        ending=result.ending,
        exit_code=exit_code,
        rows_total=prepared.rows_total + parts.feed.further_rows,
        sealed_rows=sealed_rows,
        store=str(prepared.store),
        resume=prepared.flags.again(prepared.path),
        detail=result.detail,
        counts=result.counts,
        held=totals.held,
        held_outcomes=totals.held_outcomes,
        is_on_hold=bool(holds),
        canary_microusd=parts.canary.news.get("cost_microusd", 0) if parts.canary is not None else 0,
        warnings=(
            *parts.warnings,
            *notes,
            *([note] if parts.mirror is not None and (note := parts.mirror.note()) else []),
            *endings.warnings_of(result.counts, len(prepared.bad), prepared.skipped.note()),
        ),
        skipped=dict(prepared.skipped.by_reason),
    )
