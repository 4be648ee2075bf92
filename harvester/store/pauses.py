"""Keep pauses in the journal until `harvester resume`, so that a pause outlasts its process."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import orjson

from harvester.store import paths
from harvester.store.journal.checksums import updating_checksum
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.journal.meta_values import write_values

OPERATOR, DRIFT = "operator", "drift"
_PREFIX = "hold:"


def save(journal: Journal, who: str, why: str, teacher_id: str = "") -> None:
    """Write a pause; it is durable when this returns.

    Args:
        who: OPERATOR or DRIFT.
        teacher_id: the teacher whose runs are paused, "" for every run of this store.
    """
    note = {"why": why, "at": round(time.time(), 3), "teacher_id": teacher_id}
    name = f"{_PREFIX}{who}" + (f"|{teacher_id}" if teacher_id else "")
    with journal.writing() as connection:
        write_values(connection, {name: note})


def why_drift(change: str) -> str:
    """Return the reason of a pause for drift.

    Args:
        change: what is otherwise than before.
    """
    return f"the teacher changed ({change})"


def load(journal: Journal, teacher_id: str | None = None) -> dict[str, str]:
    """Return the pauses of the next run: who paused it, and as text why and since when.

    Args:
        teacher_id: the teacher of that run; None for any teacher.
    """
    query = "SELECT name, value FROM meta WHERE name GLOB ? ORDER BY name"
    pauses: dict[str, str] = {}
    with journal.reading() as connection:
        for name, value in connection.execute(query, (f"{_PREFIX}*",)).fetchall():
            note = orjson.loads(value)
            if teacher_id is None or note["teacher_id"] in {"", teacher_id}:
                since = f"{datetime.fromtimestamp(note['at'], UTC):%Y-%m-%d %H:%M} UTC"
                who = name.removeprefix(_PREFIX).partition("|")[0]
                pauses[who] = f"{note['why']} ({since}); `harvester resume` goes on"
    return pauses


def clear(journal: Journal, teacher_id: str | None = None) -> None:
    """Delete the operator's pause and the drift pause of this teacher; with None delete all pauses."""
    names = [f"{_PREFIX}{who}" for who in (OPERATOR, f"{DRIFT}|{teacher_id}")]
    with journal.writing() as connection, updating_checksum(connection, "meta"):
        if teacher_id is None:
            connection.execute("DELETE FROM meta WHERE name GLOB ?", (f"{_PREFIX}*",))
        else:
            connection.executemany("DELETE FROM meta WHERE name = ?", [(name,) for name in names])


def clear_without_run(store: Path) -> dict[str, str]:
    """Delete all pauses of a store without a running process (`harvester resume`); return them.

    Raises:
        StoreLocked: a run has begun. StoreError: the journal can't be read or written.
    """
    if not (store / paths.JOURNAL).exists():
        return {}
    with StoreLock(store, started_at=time.time()), Journal.open(store) as journal:
        pauses = load(journal)
        if pauses:
            clear(journal)
        return pauses
