"""Note in a merged store what it was merged from, so that `harvester status` can say what the store is."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harvester.store.journal.meta_values import read_value, write_values

# Rows of `meta`: how far the merge has come, which every merged store has, and where its sources were.
MERGE, _SOURCES = "merge", "merged_from"


@dataclass(frozen=True, slots=True)
class MergedFrom:
    """What a merged store was made of.

    Attributes:
        stores: where the merged stores were; empty where an earlier release merged them.
        at: when, in Unix seconds; 0.0 where an earlier release did.
        has_run_since: a run has begun in the merged store itself.
    """

    stores: tuple[str, ...] = ()
    at: float = 0.0
    has_run_since: bool = False

    def facts(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"stores": list(self.stores), "at": self.at, "has_run_since": self.has_run_since}


def note_sources(connection: sqlite3.Connection, stores: Sequence[Path], at: float) -> None:
    """Write where the sources are, once the runs of all of them are in, inside an open transaction."""
    names = [os.fsencode(store.resolve()).decode("utf-8", "backslashreplace") for store in stores]
    note = {"stores": names, "at": round(at, 3), "last_run": _last_run(connection)}
    write_values(connection, {_SOURCES: note})


def merged_from(connection: sqlite3.Connection) -> MergedFrom | None:
    """Return what a store was merged from; None for one that was not merged."""
    note = read_value(connection, _SOURCES)
    if note is not None:
        has_run = _last_run(connection) > note["last_run"]
        return MergedFrom(tuple(note["stores"]), float(note["at"]), has_run)
    return None if read_value(connection, MERGE) is None else MergedFrom()


def _last_run(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT coalesce(max(run), 0) FROM runs").fetchone()[0])
