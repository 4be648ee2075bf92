"""Write answers into the journal that another store paid for.

Their runs are entered with the lineage they have there and the ending `copied`. Their counter `copied` counts
the answers, which cost this store nothing and are no part of its bill or budgets.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harvester.store.journal.checksums import COVERED, checksum
from harvester.store.journal.ledger import COPIED
from harvester.store.journal.rows import add_counts
from harvester.store.journal.spending import COPIED_ENDING
from harvester.store.journal.sqlite import OUTCOMES

_COLUMNS, _SHORT = COVERED["answers"]


@dataclass(frozen=True, slots=True)
class CopiedAnswer:
    """An answer of another store: its run there, and the values of its row of `answers` but for `run`."""

    run_id: str
    values: Mapping[str, Any]


def write_copies(
    connection: sqlite3.Connection, runs: Mapping[str, Mapping[str, Any]], answers: Sequence[CopiedAnswer]
) -> int:
    """Store copied answers inside an open transaction; return how many were not held.

    Args:
        runs: rows of `runs` in the other store, by run id.
    """
    copied, counts = 0, dict[int, Counter[str]]()
    for answer in answers:
        run = _enter_run(connection, runs[answer.run_id])
        if not _insert(connection, {**answer.values, "run": run}):
            continue
        copied += 1
        counts.setdefault(run, Counter()).update([COPIED, f"outcome.{OUTCOMES[answer.values['outcome']]}"])
        connection.execute("DELETE FROM dead WHERE key = ?", (answer.values["key"],))
    for run, count in counts.items():
        add_counts(connection, run, count)
    return copied


def _enter_run(connection: sqlite3.Connection, row: Mapping[str, Any]) -> int:
    """Return the number of a run of another store; enter it where it is not known."""
    known = connection.execute("SELECT run FROM runs WHERE run_id = ?", (row["run_id"],)).fetchone()
    if known is not None:
        return int(known[0])
    (last,) = connection.execute("SELECT coalesce(max(run), 0) FROM runs").fetchone()
    values = {**row, "run": last + 1, "ending": COPIED_ENDING, "exit_code": None}
    insert_row(connection, "runs", values)
    return int(last + 1)


def _insert(connection: sqlite3.Connection, values: Mapping[str, Any]) -> bool:
    held = (
        "SELECT EXISTS (SELECT 1 FROM keys WHERE key = ?1) OR EXISTS (SELECT 1 FROM answers WHERE key = ?1)"
    )
    if connection.execute(held, (values["key"],)).fetchone()[0]:
        return False
    insert_row(connection, "answers", values)
    return True


def insert_row(connection: sqlite3.Connection, table: str, values: Mapping[str, Any]) -> None:
    """Insert one row, its checksum computed, inside an open transaction.

    Args:
        values: of all columns that the checksum covers; others are left out.
    """
    columns, short = COVERED[table]
    row = [values[name] for name in columns]
    long = [value.encode() if isinstance(value, str) else value for value in row[short:]]
    holes = ",".join("?" * (len(row) + 1))
    connection.execute(
        f"INSERT INTO {table} ({', '.join(columns)}, checksum) VALUES ({holes})",  # noqa: S608
        (*row, checksum(row[:short], *long)),
    )
