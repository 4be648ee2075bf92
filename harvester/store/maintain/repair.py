"""Repair a store: move damaged and foreign files to `quarantine/`, keep every row that can still be read.

No file is deleted. Only keys whose answers are lost are forgotten, so the next run asks for exactly these.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from harvester.api.max_tokens import max_tokens_of
from harvester.errors import StoreCorrupt
from harvester.store import paths
from harvester.store.journal import sqlite, wal
from harvester.store.journal.checksums import COVERED, changed_rows, checksum, write_checksum
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.journal.records import ShardEntry
from harvester.store.journal.rows import forget_finished
from harvester.store.journal.sqlite import OUTCOME_CODES
from harvester.store.maintain import quarantine
from harvester.store.shards.manifest import indexed_keys, insert_entry, read_manifest
from harvester.store.shards.parquet_file import translate_disk_errors
from harvester.store.shards.recover_rows import recoverable_rows
from harvester.store.shards.rewrite import rewrite
from harvester.store.shards.seal import adopt_unlisted
from harvester.store.shards.steps import run_to_end
from harvester.store.shards.unlisted import read_contents, unlisted_files
from harvester.store.verify import Finding, has_lost_journal, verify_journal, verify_store
from harvester.system import own_files
from harvester.system.files import sha256_of

# Tables whose damaged rows may be deleted: their content is asked for again or recomputed.
_REPAIRABLE = frozenset(f"{paths.JOURNAL} {table}" for table in ("answers", "keys", "finished", "meta"))


@dataclass(frozen=True, slots=True)
class RepairResult:
    """What a repair did.

    Attributes:
        quarantined: names of the files moved or copied to quarantine.
        saved: rows saved from them.
        lost: keys, in hex, that the next run asks for again.
    """

    quarantined: tuple[str, ...]
    saved: int
    lost: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {"quarantined": self.quarantined, "saved": self.saved, "lost": self.lost}


def repair(journal: Journal, store: Path) -> RepairResult:
    """Quarantine damaged and foreign files, keep readable rows, forget the keys of lost answers.

    Nothing is sealed, because the terms are not checked here: journalled answers stay in the journal.

    Raises:
        StoreCorrupt: the journal is damaged in a table that can't be recomputed.
        StoreError, StoreFull: the disk refuses.
    """
    lost, unindexed = _delete_damaged_rows(journal, store)
    adopt_unlisted(journal, store)
    _restore_manifest_rows(journal, store)
    by_name = {entry.name: entry for entry in read_manifest(journal)}
    incomplete = [entry for entry in by_name.values() if _count_indexed(journal, entry) != entry.rows]
    for entry in incomplete:
        _restore_index_rows(journal, store, entry)
    if any(_count_indexed(journal, entry) < entry.rows for entry in incomplete):
        lost |= unindexed - set(journal.look_up(sorted(unindexed)))
    findings = verify_store(
        store, store / paths.SHARDS, tuple(by_name.values()), has_journal=True, alone=True
    )
    names = sorted(
        {finding.place.removeprefix(f"{paths.SHARDS}/") for finding in findings if _is_file_finding(finding)}
    )
    moved, saved = [], 0
    for name in sorted(
        names, key=lambda name: name in by_name
    ):  # unlisted files first: one may have the number of the next shard
        if (store / paths.SHARDS / name).exists():
            quarantine.move_in(store, store / paths.SHARDS / name, keep=name in by_name)
            moved.append(name)
        if name in by_name:
            indexed = _count_indexed(journal, by_name[name])
            twice = _held_elsewhere(journal, store, by_name[name])
            gone = run_to_end(rewrite(journal, store, [by_name[name]], without=twice, salvage=True))
            lost |= gone
            saved += indexed - len(gone)
    lost |= _delete_stray_keys(journal)
    return RepairResult(tuple(moved), saved, tuple(sorted(key.hex() for key in lost)))


def _delete_damaged_rows(journal: Journal, store: Path) -> tuple[set[bytes], set[bytes]]:
    """Delete damaged rows whose content can be asked for again or recomputed.

    Returns the keys of deleted answers, which are asked again, and of deleted index rows, which may still be
    found in a shard.

    Raises:
        StoreCorrupt: another table is damaged; nothing has changed.
    """
    places = set()
    for finding in verify_journal(store):
        if finding.place not in _REPAIRABLE and not finding.place.startswith((f"{paths.SHARDS}/", "shard ")):
            raise StoreCorrupt(
                finding.message,
                place=finding.place,
                remedy="restore journal.db from a copy; the shards stay readable as they are",
            )
        places.add(finding.place)
    if not places & _REPAIRABLE:
        return set(), set()
    with journal.reading() as connection:
        answers, index = (
            {values[COVERED[table][0].index("key")] for values in changed_rows(connection, table)}
            for table in ("answers", "keys")
        )
    with journal.writing() as connection:
        forget_finished(connection)
        connection.executemany("DELETE FROM answers WHERE key = ?", [(key,) for key in answers])
        connection.executemany("DELETE FROM keys WHERE key = ?", [(key,) for key in index])
        if f"{paths.JOURNAL} meta" in places:
            _recompute_meta(connection)
    return _keys(answers), _keys(index)


def _keys(values: set[Any]) -> set[bytes]:
    """Keep the keys; a flipped bit can turn a column into another type."""
    return {value for value in values if isinstance(value, bytes)}


def _recompute_meta(connection: sqlite3.Connection) -> None:
    """Recompute the numbers of `meta` from the other tables; readable pauses stay, other rows are deleted."""
    highest = {
        "last_shard": "SELECT coalesce(max(shard), 0) FROM"
        " (SELECT shard FROM manifest UNION SELECT shard FROM keys)",
        "last_attempt_id": "SELECT coalesce(max(attempt_id), 0) FROM"
        " (SELECT attempt_id FROM intents UNION SELECT attempt_id FROM failures)",
    }
    rows = [(name, str(connection.execute(query).fetchone()[0])) for name, query in highest.items()]
    connection.execute("DELETE FROM meta WHERE name NOT GLOB 'hold:*' OR NOT json_valid(value)")
    connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
    write_checksum(connection, "meta")


def _restore_manifest_rows(journal: Journal, store: Path) -> None:
    """Insert the missing manifest row of every undamaged shard whose keys the index still lists."""
    known = {entry.shard for entry in read_manifest(journal)}
    for number, path in unlisted_files(store / paths.SHARDS, 0):
        held = None if number in known else read_contents(path)
        if held is None:
            continue
        entry = held.entry(path.stat().st_mtime)
        if indexed_keys(journal, entry) == set(held.keys):
            known.add(number)
            with journal.writing() as connection:
                insert_entry(connection, entry)


def _count_indexed(journal: Journal, entry: ShardEntry) -> int:
    with journal.reading() as connection:
        query = "SELECT count(*) FROM keys WHERE shard = ?"
        return int(connection.execute(query, (entry.shard,)).fetchone()[0])


def _restore_index_rows(journal: Journal, store: Path, entry: ShardEntry) -> None:
    """Insert missing index rows of an undamaged shard."""
    known = indexed_keys(journal, entry)
    rows: list[tuple[bytes, int, int | None]] = []
    path = store / paths.SHARDS / entry.name
    if not path.exists() or sha256_of(path) != entry.sha256:
        return  # rows of a changed file can be verified only against their index rows
    for table in recoverable_rows(journal, store, entry):
        for row in table.select(["key", "outcome", "request_json"]).to_pylist():
            key = bytes.fromhex(row["key"])
            if key not in known:
                body = orjson.loads(row["request_json"])
                rows.append((key, OUTCOME_CODES[row["outcome"]], max_tokens_of(body)))
    asker = bytes(8)  # matches no row: the next run records its row as sharing the answer
    with journal.writing() as connection:
        connection.executemany(
            "INSERT OR IGNORE INTO keys SELECT ?1, ?2, ?3, ?4, ?5, ?6"
            " WHERE NOT EXISTS (SELECT 1 FROM answers WHERE key = ?1)",
            [
                (key, entry.shard, code, most, asker, checksum([entry.shard, code, most], key, asker))
                for key, code, most in rows
            ],
        )


def _held_elsewhere(journal: Journal, store: Path, entry: ShardEntry) -> set[bytes]:
    """Return the keys of a shard whose answer another shard or the journal holds too.

    A key that was lost from the index is asked again. Its second answer is the one that the index names, and
    the first one would stand in the corpus twice.
    """
    keys = {
        bytes.fromhex(key)
        for table in recoverable_rows(journal, store, entry)
        for key in table.column("key").to_pylist()
    }
    missing = sorted(keys - indexed_keys(journal, entry))
    return {key for key, held in journal.look_up(missing).items() if held.state == "answered"}


def _is_file_finding(finding: Finding) -> bool:
    return finding.place.startswith(f"{paths.SHARDS}/")


def _delete_stray_keys(journal: Journal) -> set[bytes]:
    """Delete index rows that point at a shard missing from the manifest; return their keys."""
    query = "SELECT key FROM keys WHERE shard NOT IN (SELECT shard FROM manifest)"
    with journal.reading() as connection:
        strays = {key for (key,) in connection.execute(query)}
    if strays:
        with journal.writing() as connection:
            connection.executemany("DELETE FROM keys WHERE key = ?", [(key,) for key in strays])
            forget_finished(connection)
    return strays


def repair_store(store: Path) -> RepairResult:
    """Repair a store and its canary store (`harvester verify --repair`).

    Raises:
        StoreCorrupt: the journal is gone or damaged beyond repair; nothing has changed.
        StoreLocked: a process works on the store.
        StoreError, StoreFull: there is no store here, or the disk refuses.
    """
    if has_lost_journal(store):
        raise StoreCorrupt(
            "the journal is missing, and its content can't be recovered",
            place=str(store / paths.JOURNAL),
            remedy="put it back from a copy; the shards stay readable as they are",
        )
    if not (store / paths.JOURNAL).exists() or sqlite.has_journal(store):
        sqlite.open_for_reading(store).close()  # a folder that is no store must not become one
    with StoreLock(store, started_at=time.time()):
        result = _repair_locked(store)
        if (store / paths.CANARY / paths.JOURNAL).exists():
            canary = _repair_locked(store / paths.CANARY)
            moved = tuple(f"{paths.CANARY}/{name}" for name in canary.quarantined)
            result = RepairResult(
                result.quarantined + moved, result.saved + canary.saved, result.lost + canary.lost
            )
    return result


def _repair_locked(store: Path) -> RepairResult:
    """Repair one store whose lock is held, its write-ahead log included."""
    logs = _quarantine_log(store)
    with closing(Journal.open(store)) as journal:
        result = repair(journal, store)
    return replace(result, quarantined=(*logs, *result.quarantined))


def _quarantine_log(store: Path) -> tuple[str, ...]:
    """Copy a damaged write-ahead log to quarantine and apply its readable part to the journal.

    Returns the name of the copy, or nothing where the log is undamaged.
    """
    log = wal.log_path(store / paths.JOURNAL)
    with translate_disk_errors(store):
        if not wal.commits_lost(log):
            return ()
        copy = store / f".{log.name}.copy"
        # Not a link: SQLite goes on writing into the same file.
        with own_files.replacing(copy) as out, os.fdopen(own_files.open_file(log), "rb") as source:
            shutil.copyfileobj(source, out)
        name = quarantine.move_in(store, copy, keep=False, name=log.name)
    sqlite.empty_log(store)
    return (name,)
