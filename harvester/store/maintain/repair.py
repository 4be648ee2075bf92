"""Repair a store: move damaged and foreign files to `quarantine/`, keep every row that can still be read.

No file is deleted. Only keys whose answers are lost are forgotten, so the next run asks for exactly these.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from harvester.api.max_tokens import max_tokens_of
from harvester.errors import StoreCorrupt
from harvester.store import paths
from harvester.store.journal import sqlite, wal
from harvester.store.journal.journal import Journal
from harvester.store.journal.ledger import count_lost, count_missing
from harvester.store.journal.lock import StoreLock
from harvester.store.journal.records import ShardEntry
from harvester.store.journal.rows import forget_finished
from harvester.store.journal.sqlite import OUTCOME_CODES
from harvester.store.maintain import quarantine
from harvester.store.maintain.rebuild import rebuild_if_damaged
from harvester.store.maintain.repair_rows import repair_rows
from harvester.store.shards.manifest import (
    UNKNOWN_ASKER,
    indexed_keys,
    insert_entry,
    insert_missing_keys,
    manifest_rows,
    read_manifest,
)
from harvester.store.shards.mend_file import mended_content
from harvester.store.shards.parquet_file import translate_disk_errors
from harvester.store.shards.recover_rows import recoverable_rows
from harvester.store.shards.rewrite import rewrite
from harvester.store.shards.seal import adopt_unlisted
from harvester.store.shards.steps import run_to_end
from harvester.store.shards.unlisted import read_contents, unlisted_files
from harvester.store.verify import Finding, has_lost_journal, verify_store
from harvester.system import own_files
from harvester.system.files import fsync, sha256_of


@dataclass(frozen=True, slots=True)
class RepairResult:
    """What a repair did.

    Attributes:
        quarantined: names of the files moved or copied to quarantine.
        saved: rows saved from those that could not be mended.
        lost: keys, in hex, that the next run asks for again.
        mended: shards, and a number of rows of the journal, that are again as they were written.
        notes: what else was lost, one line each.
    """

    quarantined: tuple[str, ...]
    saved: int
    lost: tuple[str, ...]
    mended: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        facts: dict[str, Any] = {"quarantined": self.quarantined, "saved": self.saved, "lost": self.lost}
        return {**facts, "mended": self.mended, "notes": self.notes}

    def with_canaries(self, other: RepairResult) -> RepairResult:
        """Add the repair of the canary store; its names begin with its folder."""
        moved, mended, notes = (
            tuple(f"{paths.CANARY}/{name}" for name in names)
            for names in (other.quarantined, other.mended, other.notes)
        )
        return RepairResult(
            quarantined=self.quarantined + moved,
            saved=self.saved + other.saved,
            lost=self.lost + other.lost,
            mended=self.mended + mended,
            notes=self.notes + notes,
        )


def repair(journal: Journal, store: Path) -> RepairResult:
    """Quarantine damaged and foreign files, keep readable rows, forget the keys of lost answers.

    Nothing is sealed, because the terms are not checked here: journalled answers stay in the journal.

    Raises:
        StoreError, StoreFull: the disk refuses.
    """
    mended_shards = _mend_shards(journal, store)
    of_rows = repair_rows(journal, store)
    lost, unindexed = set(of_rows.lost), set(of_rows.unindexed)
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
    moved, saved = list(mended_shards), 0
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
    mended = [*mended_shards, *([f"{of_rows.mended} rows of {paths.JOURNAL}"] if of_rows.mended else [])]
    notes = [*of_rows.notes, *_note_missing(journal, len(lost))]
    return RepairResult(
        tuple(moved), saved, tuple(sorted(key.hex() for key in lost)), tuple(mended), tuple(notes)
    )


def _mend_shards(journal: Journal, store: Path) -> list[str]:
    """Put back the byte of each shard that changed, where its hash proves it; keep the damaged file too."""
    with journal.reading() as connection:
        entries = manifest_rows(connection, checked=False)
    mended = []
    for entry in entries:
        path = store / paths.SHARDS / str(entry.name)
        with translate_disk_errors(path):
            content = mended_content(path, entry.sha256, entry.size_bytes)
            if content is None:
                continue
            quarantine.move_in(store, path, keep=True)
            with own_files.replacing(path, durable=True) as file:
                file.write(content)
            fsync(path.parent)
        mended.append(path.name)
    return mended


def _note_missing(journal: Journal, lost: int) -> Iterator[str]:
    """Note that answers are gone, so that the ledger agrees again; name those whose keys are unknown."""
    with journal.reading() as connection:
        missing = count_missing(connection)
    if missing:
        with journal.writing() as connection:
            count_lost(connection, missing)
    if missing > lost:
        yield f"{missing - lost} more answers are lost whose keys are unknown; a run asks their rows again"


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
    rows: list[tuple[bytes, int, int | None, bytes]] = []
    path = store / paths.SHARDS / entry.name
    if not path.exists() or sha256_of(path) != entry.sha256:
        return  # rows of a changed file can be verified only against their index rows
    for table in recoverable_rows(journal, store, entry):
        for row in table.select(["key", "outcome", "request_json"]).to_pylist():
            key = bytes.fromhex(row["key"])
            if key not in known:
                body = orjson.loads(row["request_json"])
                rows.append((key, OUTCOME_CODES[row["outcome"]], max_tokens_of(body), UNKNOWN_ASKER))
    with journal.writing() as connection:
        insert_missing_keys(connection, entry.shard, rows)


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
        StoreCorrupt: the journal is gone, or nothing of it can be read; nothing has changed.
        StoreLocked: a process works on the store.
        StoreError, StoreFull: there is no store here, or the disk refuses.
    """
    if has_lost_journal(store):
        raise StoreCorrupt(
            "the journal is missing, and its content can't be recovered",
            place=str(store / paths.JOURNAL),
            remedy="put it back from a copy; the shards stay readable as they are",
        )
    try:
        if not (store / paths.JOURNAL).exists() or sqlite.has_journal(store):
            sqlite.open_for_reading(store).close()  # a folder that is no store must not become one
        with StoreLock(store, started_at=time.time()):
            result = _repair_locked(store)
            if (store / paths.CANARY / paths.JOURNAL).exists():
                result = result.with_canaries(_repair_locked(store / paths.CANARY))
    except StoreCorrupt as error:
        if error.remedy == sqlite.DAMAGED_REMEDY:  # it names this command
            error.remedy = (
                "nothing of it can be read: restore journal.db from a copy; commands that read a corpus take "
                f"the sealed rows without it, from {store / paths.SHARDS}"
            )
        raise
    return result


def _repair_locked(store: Path) -> RepairResult:
    """Repair one store whose lock is held, its write-ahead log included."""
    logs = (*_quarantine_log(store), *rebuild_if_damaged(store))
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
