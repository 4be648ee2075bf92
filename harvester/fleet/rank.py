"""Harvest one rank's prompts into a store of its own: the rank actor, one process of the fleet.

It is `harvester run --shard` in a thread, with limits and budget from the coordinator. It reads the
configuration, the prompts, the terms and the credential where it runs: none of these is sent to it.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harvester import library
from harvester.config.budget_spans import BudgetSpan
from harvester.config.config import load
from harvester.config.shard import Shard
from harvester.errors import HarvesterError, StoreError, StoreLocked
from harvester.fleet.status import error_facts
from harvester.run import job, prepare
from harvester.run.allotment import Message
from harvester.run.endings import Summary
from harvester.run.prepare import Prepared
from harvester.store import paths
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import is_held
from harvester.store.journal.spending import Amounts
from harvester.store.maintain.bill import compute_spent, compute_spent_up_to
from harvester.system.background import Running, StopRequests
from harvester.system.open_files import limit_kept

# Seconds within which a lost process of a rank has ended: without its node or its driver, Ray ends it sooner.
FREE_WITHIN_S = 30.0
# Sends rank, incarnation and report; returns the answer.
Send = Callable[[int, int, str], str]


class Rank:
    """The actor. Its methods return at once, but `prepare`, which reads the prompts.

    Args:
        spec: JSON object: `config` (path), `options` (of the harvest), `rank`, `of`, `pay_again`.
        send: reaches the coordinator; what it raises means that nothing was heard.
    """

    def __init__(self, spec: str, send: Send) -> None:
        self._spec = json.loads(spec)
        self._send = send
        self._incarnation = 0
        self._prepared: Prepared | None = None
        self._running: Running[Mapping[str, Any], Summary] | None = None
        self._status: Mapping[str, Any] = {}

    def prepare(self, expected_run: str) -> str:
        """Check the harvest as far as that costs nothing, and read what the store has spent.

        Args:
            expected_run: a run that the store must hold, "" for none.

        Returns:
            JSON: the facts, or `error`.
        """
        try:
            return json.dumps(self._prepare(expected_run))
        except HarvesterError as error:
            return json.dumps({"error": error_facts(error)})

    def _prepare(self, expected_run: str) -> dict[str, Any]:
        path, number = Path(self._spec["config"]), self._spec["rank"] + 1
        flags = replace(
            library.overrides(self._spec["options"]),
            shard=f"{number}/{self._spec['of']}",
            is_allocated=True,
        )
        ready = prepare.prepare(path, flags)
        is_same_store = self._require_store(ready, expected_run)
        _require_free(ready.store)
        spent, former = self._spent(ready, expected_run)
        self._prepared = ready
        wall = time.time()
        ends = {span.value: span.end(wall) for span in BudgetSpan}
        return {
            "config_sha256": load(path).sha256,
            "prompts_digest": "" if ready.digest is None else ready.digest.hex(),
            "rows_total": ready.rows_total,
            "store": str(ready.store),
            "is_same_store": is_same_store,
            "spent": {span.value: list(amounts) for span, amounts in spent.items()},
            "former": list(former),
            "ends_at": {span: None if end == float("inf") else end for span, end in ends.items()},
        }

    def _require_store(self, ready: Prepared, expected_run: str) -> bool:
        """Return whether the store is the one that the rank had.

        A store that can't be reached here is fetched from its mirror, if it has one.

        Raises:
            StoreError: it is another one, and `pay_again` was not asked for; or the mirror can't be read.
        """
        if not expected_run or expected_run in _runs_of(ready.store):
            return True
        mirror = ready.config.store.mirror
        if mirror and not ready.store.exists():
            from harvester.publish.fetch import fetch
            from harvester.system.objects.location import Location
            from harvester.system.objects.transfer import read_publication

            if read_publication(Location.open(mirror), absent_is_none=True) is not None:
                fetch(mirror, ready.store)
                return False
        if not self._spec["pay_again"]:
            raise StoreError(
                f"the store of rank {ready.flags.shard} does not lie on this machine ({platform.node()})"
                + (" and is not in its mirror" if mirror else ""),
                place=str(ready.store),
                remedy="start the fleet again when its machine is back, or copy the store here; --pay-again "
                "begins a new one, and pays once more for what was stored there",
            )
        return False

    def _spent(self, ready: Prepared, run_id: str) -> tuple[dict[BudgetSpan, Amounts], Amounts]:
        """Return what the store says was spent by span, and up to a run, however that ended."""
        if not _is_begun(ready.store):
            return {}, (0, 0)
        with Journal.open(ready.store, read_only=True) as journal:
            spent = compute_spent(journal, time.time(), ready.config.teacher.teacher_id)
            return spent, compute_spent_up_to(journal, run_id)

    def start(self, incarnation: int) -> None:
        """Begin to harvest what `prepare` has checked."""
        assert self._prepared is not None
        self._incarnation = incarnation
        self._running = Running("rank", self._work)

    def _work(self, emit: Callable[[Mapping[str, Any]], None], requests: StopRequests) -> Summary:
        import asyncio

        assert self._prepared is not None
        with limit_kept():
            return asyncio.run(
                job.run(self._prepared, self._note, requests=requests, exchange=self._exchange)
            )

    def _note(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def _exchange(self, report: Message) -> Message:
        text = json.dumps({**report, "run_id": self._status.get("run_id", "")})
        reply = self._send(self._spec["rank"], self._incarnation, text)
        if not reply:
            raise HarvesterError(
                "another process has taken the place of this rank",
                remedy="nothing: the other process goes on with its rows",
            )
        answer: Message = json.loads(reply)
        return answer

    def poll(self) -> str:
        """Return as JSON how far the rank is: `status`, and once it has ended `summary` or `error`."""
        values: dict[str, Any] = {"status": self._status, "is_over": False}
        if self._running is not None and self._running.is_over:
            values["is_over"] = True
            try:
                summary = self._running.result()
                values["summary"] = summary.as_dict()
            except HarvesterError as error:
                values["error"] = error_facts(error)
            except Exception as error:  # noqa: BLE001 - the driver reports it
                values["error"] = error_facts(HarvesterError(f"{type(error).__name__}: {error}"))
        return json.dumps(values, default=str)

    def stop(self) -> None:
        """Let the answers in flight arrive and end; the second time, end at once."""
        if self._running is not None:
            self._running.stop()


def _require_free(store: Path) -> None:
    """Wait until a process of this rank that was lost has ended too: until then it may spend.

    Raises:
        StoreLocked: another process holds the store for longer.
    """
    until = time.monotonic() + FREE_WITHIN_S
    while store.exists() and is_held(store):
        if time.monotonic() >= until:
            raise StoreLocked(
                "another process holds it",
                place=str(store),
                remedy="`harvester status` shows which one; end it, then start the fleet again",
            )
        time.sleep(0.2)


def stores_here(config: str) -> list[str]:
    """Return the shards, as "2/8", whose stores lie on this machine.

    Raises:
        ConfigError: the configuration can't be read here.
    """
    path = Path(config)
    whole = library.store_of(path, {})
    found = (Shard.of_store(f.name, whole.name) for f in whole.parent.glob("*") if _is_begun(f))
    return [str(shard) for shard in found if shard is not None]


def _is_begun(store: Path) -> bool:
    return (store / paths.JOURNAL).exists()


def _runs_of(store: Path) -> set[str]:
    """Return the runs that a store has seen; none where there is no store."""
    if not _is_begun(store):
        return set()
    with Journal.open(store, read_only=True) as journal, journal.reading() as connection:
        return {run_id for (run_id,) in connection.execute("SELECT run_id FROM runs")}
