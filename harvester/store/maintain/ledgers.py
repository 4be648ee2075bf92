"""Add the ledgers of merged stores: runs, counters, failed rows, further prompts, doubtful attempts.

A run that two stores know, because one copied answers from the other, is entered once, with the counters of
the store in which it ran. Its answers that came from the other store alone count as copied.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harvester.store.journal.adoptions import read_adoptions
from harvester.store.journal.checksums import checked_rows, meta_number, set_meta, updating_checksum
from harvester.store.journal.copies import insert_row
from harvester.store.journal.journal import Journal
from harvester.store.journal.ledger import COPIED, LOST, OF_STORE, PURGED, PURGED_OUTCOME
from harvester.store.journal.rows import add_counts, drop_old_failures
from harvester.store.journal.spending import COPIED_ENDING
from harvester.store.shards.manifest import read_manifest
from harvester.store.shards.parquet_file import lineage_digest
from harvester.terms.lineage import Lineage

_Kind = tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A store that is merged, under its lock: its journal, its runs, and their counters by run number."""

    path: Path
    journal: Journal
    runs: Sequence[Mapping[str, Any]]
    counters: Mapping[int, Mapping[str, int]]

    @classmethod
    def of(cls, journal: Journal, path: Path) -> Source:
        """Read the runs of a store.

        Raises:
            StoreCorrupt: a row is damaged.
        """
        counters: dict[int, dict[str, int]] = {}
        with journal.reading() as connection:
            runs = checked_rows(connection, "runs", journal.path)
            for run, name, value in connection.execute("SELECT run, name, value FROM counters"):
                counters.setdefault(run, {})[name] = value
        return cls(path, journal, runs, counters)

    def kinds(self) -> set[_Kind]:
        """Return teacher, model, purpose, mock, terms, permission and duties of the rows, as text."""
        with self.journal.reading() as connection:
            adoptions = read_adoptions(connection)
        digests = {entry.lineage_digest for entry in read_manifest(self.journal)}
        kinds: set[_Kind] = set()
        for row in self.runs:
            lineage = Lineage.from_json(row["lineage_json"])
            if lineage_digest(lineage) not in digests:
                continue
            adoption = adoptions.get(lineage.teacher_name)
            kinds.add(
                (
                    lineage.teacher_name if adoption is None else adoption.identity,
                    lineage.model,
                    lineage.purpose,
                    "yes" if lineage.mock else "no",
                    lineage.terms_id,
                    lineage.permission_sha256,
                    ", ".join(lineage.duties),
                )
            )
        return kinds

    def state(self) -> list[Any]:
        """Return what a merge of this store depends on, as JSON values."""
        with self.journal.reading() as connection:
            counts = [
                connection.execute(f"SELECT count(*), total(checksum) FROM {table}").fetchone()  # noqa: S608
                for table in ("dead", "asks", "intents", "failures")
            ]
            adoptions = sorted(
                connection.execute("SELECT name, value FROM meta WHERE name GLOB 'identity:*'")
            )
        shards = [(entry.sha256, entry.rows) for entry in read_manifest(self.journal)]
        runs = [row["checksum"] for row in self.runs]
        counters = sorted(
            (run, name, value) for run, each in self.counters.items() for name, value in each.items()
        )
        return [shards, runs, counters, counts, adoptions]


class Ledgers:
    """The ledgers of all stores together.

    Args:
        added: answers taken over by "source|run id|outcome".
        left_out: answers left out by "source|run id|outcome|same" or "|other": whether the answer that is
            held instead is of the same run, so that the two are copies of one.
    """

    def __init__(
        self, sources: Sequence[Source], added: Mapping[str, int], left_out: Mapping[str, int]
    ) -> None:
        self._sources = sources
        self._added = _split(added)
        self._left_out = _split(left_out)

    def write(self, connection: sqlite3.Connection) -> None:
        """Write everything, inside an open transaction of the new store."""
        numbers = self._enter_runs(connection)
        for source in self._sources:
            by_run = {row["run"]: numbers[row["run_id"]] for row in source.runs}
            with source.journal.reading() as theirs:
                self._add_dead(connection, theirs, source, by_run)
                self._add_asks(connection, theirs, source)
                self._add_attempts(connection, theirs, source, by_run)
                self._add_meta(connection, theirs)
        connection.execute("DELETE FROM dead WHERE key IN (SELECT key FROM keys)")
        drop_old_failures(connection)
        self._count_store(connection)

    def _enter_runs(self, connection: sqlite3.Connection) -> dict[str, int]:
        """Enter every run once, the oldest first, with its counters; return numbers by run id."""
        known: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
        for number, source in enumerate(self._sources):
            for row in source.runs:
                known.setdefault(row["run_id"], []).append((number, row))
        numbers = {}
        ordered = sorted(known.values(), key=lambda rows: (rows[0][1]["started_us"], rows[0][1]["run_id"]))
        for number, rows in enumerate(ordered, start=1):
            home, row = max(rows, key=lambda each: self._weight(*each))
            insert_row(connection, "runs", {**row, "run": number})
            add_counts(connection, number, self._counts(home, row, [source for source, _ in rows]))
            numbers[row["run_id"]] = number
        return numbers

    def _weight(self, source: int, row: Mapping[str, Any]) -> tuple[bool, int]:
        counts = self._sources[source].counters.get(row["run"], {})
        return row["ending"] != COPIED_ENDING, counts.get("attempts", 0)

    def _counts(self, home: int, row: Mapping[str, Any], sources: Sequence[int]) -> Counter[str]:
        """Return the counters of a run.

        Args:
            home: the store in which it ran; or, if all have copies of its answers, one of these.
            sources: all stores that know it.
        """
        run_id = row["run_id"]
        is_copy = row["ending"] == COPIED_ENDING
        counts = Counter[str]() if is_copy else Counter(self._sources[home].counters.get(row["run"], {}))
        if not is_copy:
            for outcome, same, count in self._left_out.get((home, run_id), ()):
                if same == "other":  # two runs paid for one key
                    counts.update({"answers": -count, "paid_twice": count, f"outcome.{outcome}": -count})
                else:  # a copy of it was taken over before
                    counts.update({COPIED: -count, f"outcome.{outcome}": -count})
        for source in sources:
            if source != home or is_copy:
                for outcome, _, count in self._added.get((source, run_id), ()):
                    counts.update({COPIED: count, f"outcome.{outcome}": count})
        return counts

    def _add_dead(
        self,
        connection: sqlite3.Connection,
        theirs: sqlite3.Connection,
        source: Source,
        runs: Mapping[int, int],
    ) -> None:
        for row in checked_rows(theirs, "dead", source.journal.path):
            known = connection.execute("SELECT at_us FROM dead WHERE key = ?", (row["key"],)).fetchone()
            if known is not None and known[0] >= row["at_us"]:
                continue
            connection.execute("DELETE FROM dead WHERE key = ?", (row["key"],))
            insert_row(connection, "dead", {**row, "run": runs[row["run"]]})

    def _add_asks(self, connection: sqlite3.Connection, theirs: sqlite3.Connection, source: Source) -> None:
        held = "SELECT EXISTS (SELECT 1 FROM asks WHERE key = ? AND asker = ?)"
        for row in checked_rows(theirs, "asks", source.journal.path, "1 ORDER BY id"):
            if not connection.execute(held, (row["key"], row["asker"])).fetchone()[0]:
                insert_row(connection, "asks", row)

    def _add_attempts(
        self,
        connection: sqlite3.Connection,
        theirs: sqlite3.Connection,
        source: Source,
        runs: Mapping[int, int],
    ) -> None:
        """Add attempts that may have been billed, and the newest failures, under new numbers."""
        first, last = (meta_number(journal, "last_attempt_id") for journal in (connection, theirs))
        for table in ("intents", "failures"):
            for row in checked_rows(theirs, table, source.journal.path):
                number = first + row["attempt_id"]
                insert_row(connection, table, {**row, "run": runs[row["run"]], "attempt_id": number})
        set_meta(connection, "last_attempt_id", first + last)

    def _add_meta(self, connection: sqlite3.Connection, theirs: sqlite3.Connection) -> None:
        """Add pauses, and which teachers were adopted by an identity."""
        query = "SELECT name, value FROM meta WHERE name GLOB 'hold:*' OR name GLOB 'identity:*'"
        rows = theirs.execute(query).fetchall()
        with updating_checksum(connection, "meta"):
            connection.executemany("INSERT OR IGNORE INTO meta VALUES (?, ?)", rows)

    def _count_store(self, connection: sqlite3.Connection) -> None:
        """Add what the stores purged and lost; where one does not know it, nobody can compare any more."""
        counts = [source.counters.get(OF_STORE, {}) for source in self._sources]
        by_outcome = {name for each in counts for name in each if name.startswith(PURGED_OUTCOME)}
        sums = {name: sum(each.get(name, 0) for each in counts) for name in (PURGED, LOST, *by_outcome)}
        if all(PURGED in each for each in counts):
            add_counts(connection, OF_STORE, sums)
            return
        with updating_checksum(connection, f"counters:{OF_STORE}"):
            connection.execute("DELETE FROM counters WHERE run = ? AND name = ?", (OF_STORE, PURGED))


def _split(counts: Mapping[str, int]) -> dict[tuple[int, str], list[tuple[str, str, int]]]:
    """Return outcome, whether of the same run, and count, by source and run id."""
    split: dict[tuple[int, str], list[tuple[str, str, int]]] = {}
    for name, count in counts.items():
        source, run_id, outcome, *same = name.split("|")
        split.setdefault((int(source), run_id), []).append((outcome, same[0] if same else "", count))
    return split
