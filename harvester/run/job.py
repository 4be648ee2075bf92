"""The long life of a harvest: lock, resume, heartbeat, signals, hours, control, sealing, ending.

`prepare.prepare` has done everything that can fail for free; `run` is the only part that may spend money.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from datetime import UTC, datetime
from functools import partial
from urllib.parse import urlsplit

from harvester import __version__
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
from harvester.prompts import bad_lines, completed_files, file_versions
from harvester.prompts.feed import PromptFeed
from harvester.run import endings, schedule_watch, terms_watch
from harvester.run.aides import background_task
from harvester.run.canary_task import CanaryContext, CanaryTask
from harvester.run.control import server
from harvester.run.control.settings import RuntimeSettings
from harvester.run.endings import Stop, Summary
from harvester.run.harvest import PassSetup, harvest
from harvester.run.heartbeat import Heartbeat, Watch
from harvester.run.in_flight import RE_ASKED
from harvester.run.operator import OperatorCommands
from harvester.run.prepare import Prepared, ask_again
from harvester.run.signals import Caught, handled
from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.journal.records import RunRecord
from harvester.store.maintain import seal_task
from harvester.store.maintain.seal_task import on_writer
from harvester.store.shards.seal import finish_interrupted
from harvester.store.terms_check import require_unsealed_permitted
from harvester.system.clock import Clock, SystemClock


async def run(prepared: Prepared, watch: Watch, clock: Clock | None = None) -> Summary:
    """Harvest until an ending; every ending is recorded, sealed and reported.

    Args:
        watch: gets what status.json says, five times a second.
        clock: governs every wait of the pass and the hours; None is the machine's.

    Raises:
        HarvesterError: nothing could start (store held, disk unfit, teacher unreachable), the teacher
            refuses, or the disk fails; what was paid before is stored.
    """
    with StoreLock(prepared.store, started_at=time.time()):
        writer = GroupCommit(Journal.open(prepared.store))
        try:
            record = _record(prepared)
            await on_writer(writer, lambda journal: finish_interrupted(journal, prepared.store))
            await on_writer(writer, lambda journal: journal.begin_run(record))
            bad_lines.write_down(prepared.store, prepared.bad)
            life = _Life(prepared, record, writer, watch, clock or SystemClock())
            await life.helm.recall()
            life.news = await on_writer(
                writer, lambda j: file_versions.note(j, prepared.config, prepared.root, record.run_id)
            )
            return await life.live()
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
        providers=config.providers,
        config_sha256=config.sha256,
        config_json=config.model_dump_json(),
        tool_version=__version__,
    )


class _Life:
    """One run from its first beat to its last; everything here is on the event loop."""

    def __init__(
        self, prepared: Prepared, record: RunRecord, writer: GroupCommit, watch: Watch, clock: Clock
    ) -> None:
        self.prepared = prepared
        self.clock = clock
        self.run_id = record.run_id
        self.writer = writer
        self.stop = Stop()
        self.news: tuple[str, ...] = ()
        self.target_bytes = int(prepared.config.store.shard_mib * 1024 * 1024)
        self.inbox = PromptFeed(prepared.config, prepared.root, lambda error: self.heart.complain(error))
        facts = {
            "run_id": record.run_id,
            "rows_total": prepared.rows_total,
            "input_tokens_total": prepared.input_tokens,
            "config": str(prepared.path),
            "model": prepared.config.teacher.model,
        }
        self.heart = Heartbeat(prepared.store, facts, self.inbox, watch, prepared.hours)
        self.helm = OperatorCommands(self.heart, writer, record.teacher_id, self._drain)
        self.refused: TermsRefused | None = None
        self.sentinel: CanaryTask | None = None
        if prepared.config.canary.prompts is not None:
            orders = CanaryContext(
                prepared.config, prepared.root, prepared.store, record, self._changed, self.heart.complain
            )
            self.sentinel = CanaryTask(orders, clock)
            self.heart.canary = self.sentinel.news

    async def live(self) -> Summary:
        """The pass among its aides, then the settling of accounts."""
        prepared, heart = self.prepared, self.heart
        with handled() as caught:
            async with (
                background_task("heartbeat", heart.beat(), heart.complain),
                server.served(prepared.store, self.helm.act, heart.complain),
                background_task(
                    "hours",
                    schedule_watch.watch(
                        prepared.hours, self.clock, self.stop, heart, wait=prepared.flags.watch
                    ),
                    heart.complain,
                ),
                background_task("terms", terms_watch.watch(self._ears(), self.clock), self._unwatched),
            ):
                result, error = await self._pass(caught)
                await self._door()
                error = error or self.refused
                code = error.exit_code if error else self._exit_code(result, caught)
                heart.levers = None
                heart.turn(RunState.SEALING)
                settling = asyncio.create_task(self._settle(result, code, error))
                caught.first, caught.second = (lambda: None), settling.cancel
                sealed = 0
                try:
                    sealed = await settling
                except asyncio.CancelledError:
                    code = 128 + caught.number
        heart.end(result.ending, code)
        if error is not None:
            raise error
        return Summary(
            run_id=self.run_id,
            ending=result.ending,
            exit_code=code,
            rows_total=prepared.rows_total,
            sealed_rows=sealed,
            store=str(prepared.store),
            resume=prepared.flags.again(prepared.path),
            detail=result.detail,
            counts=result.counts,
            canary_microusd=heart.canary.get("cost_microusd", 0),
            warnings=(*self.news, *endings.warnings_of(result.counts, len(prepared.bad))),
        )

    def _ears(self) -> terms_watch.TermsHooks:
        return terms_watch.TermsHooks(
            partial(ask_again, self.prepared),
            lambda: self.heart.latest.served_models,
            self._refuse,
            self.heart.complain,
        )

    def _refuse(self, error: TermsRefused) -> None:
        self.refused = error
        self.stop.ask(Ending.TERMS, error.message)

    def _unwatched(self, error: Exception) -> None:
        """Nobody asks the terms any more: unknown means no."""
        self.heart.complain(error)
        self._refuse(terms_watch.unreadable_terms(error))

    async def _door(self) -> None:
        """Ask before sealing; what may not be sealed stays journalled."""
        try:
            await asyncio.to_thread(require_unsealed_permitted, self.prepared.store)
        except TermsRefused as error:
            self.refused = self.refused or error
        except StoreError:
            return  # sealing meets it again
        except (HarvesterError, OSError) as error:
            self.refused = self.refused or terms_watch.unreadable_terms(error)

    def _exit_code(self, result: PassResult, caught: Caught) -> int:
        return endings.exit_code(result, caught.number, self.prepared.config.run.max_failed)

    async def _pass(self, caught: Caught) -> tuple[PassResult, HarvesterError | None]:
        prepared, heart, stop = self.prepared, self.heart, self.stop
        caught.first = self._interrupted
        known = await on_writer(self.writer, lambda journal: completed_files.recall(journal, prepared.digest))
        if known is not None:  # asked to the end before, and nothing has left the store since
            self.inbox.pass_over(known)
            heart.note(known.counts())
            return PassResult(Ending.COMPLETE, known.counts()), None
        work = asyncio.create_task(
            harvest(
                self.inbox.watched() if prepared.flags.watch else self.inbox.once(),
                PassSetup(
                    config=prepared.config,
                    key=prepared.key,
                    writer=self.writer,
                    run_id=self.run_id,
                    limits=prepared.limits(),
                    stop=stop.event,
                    clock=self.clock,
                ),
                on_progress=heart.note,
                on_settings=self._take_levers,
                canary=self.sentinel,
            )
        )
        caught.second = work.cancel
        if caught.heard > 1:  # before there was anything to cancel
            work.cancel()
        along = seal_task.seal_periodically(prepared.store, self.writer, self.target_bytes)
        async with background_task("sealing", along, heart.complain):
            try:
                return stop.named(await work), None
            except asyncio.CancelledError:
                return PassResult(Ending.ABORTED, heart.latest), None
            except HarvesterError as raised:
                return PassResult(Ending.of(raised), heart.latest), raised

    def _take_levers(self, levers: RuntimeSettings) -> None:
        self.helm.take(levers)
        schedule_watch.apply_schedule(
            self.prepared.hours, self.clock.wall(), self.stop, levers, wait=self.prepared.flags.watch
        )

    async def _changed(self, said: str) -> None:
        """A canary found the teacher changed."""
        self.heart.complain(TeacherChanged(said))
        if self.prepared.config.canary.pause:
            await self.helm.changed(said)

    def _interrupted(self) -> None:
        self._drain(Ending.INTERRUPTED, "")

    def _drain(self, ending: Ending, detail: str) -> None:
        self.stop.ask(ending, detail)
        self.heart.turn(RunState.DRAINING)

    async def _settle(self, result: PassResult, code: int, error: HarvesterError | None) -> int:
        """Seal, record the ending, write the view of dead letters; returns the rows sealed.

        After a fault of the disk nothing is written any more; after an abort only the ending is.
        """
        sealed = 0
        if isinstance(error, StoreError):
            return sealed
        store = self.prepared.store
        try:
            if result.ending != Ending.ABORTED and self.refused is None:
                sealed = await seal_task.seal_all(store, self.writer, self.target_bytes)
        finally:
            await on_writer(self.writer, lambda j: j.end_run(self.run_id, result.ending, code, time.time()))
        await on_writer(self.writer, lambda j: j.write_dead_letters(store))
        if error is None and result.ending == Ending.COMPLETE:
            await self._remember(result.counts)
        return sealed

    async def _remember(self, counts: Snapshot) -> None:
        """Files that are still as they were checked, read to their end without a line left out, are done."""
        prepared, digest = self.prepared, self.prepared.digest
        if digest is None or prepared.bad or counts.rows != prepared.rows_total:
            return
        try:
            now = await asyncio.to_thread(completed_files.digest_of, prepared.config, prepared.root)
        except PromptError:  # gone meanwhile
            return
        if now == digest:
            tokens = self.inbox.input_tokens
            await on_writer(self.writer, lambda j: completed_files.note(j, digest, counts, tokens, RE_ASKED))
