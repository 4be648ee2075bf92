"""Who holds a store's runs on purpose, kept in the journal until `resume`: a hold outlives its process."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import orjson

from harvester.store import paths
from harvester.store.journal.checksums import updating_checksum
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock

OPERATOR, DRIFT = "operator", "drift"
_PREFIX = "hold:"


def save(journal: Journal, who: str, why: str, teacher_id: str = "") -> None:
    """Write a hold down; it is durable when this returns.

    Args:
        who: OPERATOR or DRIFT.
        teacher_id: the teacher whose runs it holds, "" for every run of this store.
    """
    note = orjson.dumps({"why": why, "at": round(time.time(), 3), "teacher_id": teacher_id}).decode()
    name = f"{_PREFIX}{who}" + (f"|{teacher_id}" if teacher_id else "")
    with journal.writing() as connection, updating_checksum(connection, "meta"):
        connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, note))


def load(journal: Journal, teacher_id: str | None = None) -> dict[str, str]:
    """Who holds the next run, and why, since when.

    Args:
        teacher_id: the teacher of that run; None for whatever teacher.
    """
    query = "SELECT name, value FROM meta WHERE name GLOB ? ORDER BY name"
    with journal.reading() as connection:
        found = connection.execute(query, (f"{_PREFIX}*",)).fetchall()
    holds: dict[str, str] = {}
    for name, value in found:
        note = orjson.loads(value)
        if teacher_id is None or note["teacher_id"] in {"", teacher_id}:
            since = f"{datetime.fromtimestamp(note['at'], UTC):%Y-%m-%d %H:%M} UTC"
            who = name.removeprefix(_PREFIX).partition("|")[0]
            holds[who] = f"{note['why']} ({since}); `harvester resume` goes on"
    return holds


def clear(journal: Journal, teacher_id: str | None = None) -> None:
    """Forget what `recall` would tell."""
    names = [f"{_PREFIX}{who}" for who in (OPERATOR, f"{DRIFT}|{teacher_id}")]
    with journal.writing() as connection, updating_checksum(connection, "meta"):
        if teacher_id is None:
            connection.execute("DELETE FROM meta WHERE name GLOB ?", (f"{_PREFIX}*",))
        else:
            connection.executemany("DELETE FROM meta WHERE name = ?", [(name,) for name in names])


def clear_without_run(store: Path) -> dict[str, str]:
    """`harvester resume` of a store that no job works on: the holds that its next run won't meet any more.

    Raises:
        StoreLocked: a job began meanwhile. StoreError: the journal can't be read or written.
    """
    if not (store / paths.JOURNAL).exists():
        return {}
    with StoreLock(store, started_at=time.time()), Journal.open(store) as journal:
        holds = load(journal)
        if holds:
            clear(journal)
        return holds
