"""Repair: what is damaged or foreign leaves a store, what still reads stays.

It moves damaged and foreign files into `quarantine/`, never deletes one, keeps every row that still
reads, and forgets only keys whose answers are gone, so that the next run asks for exactly these again.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from harvester.api.max_tokens import max_tokens_of
from harvester.errors import StoreCorrupt, StoreError
from harvester.store import paths
from harvester.store.journal import sqlite, wal
from harvester.store.journal.checksums import COVERED, changed_rows, checksum, write_checksum
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock, is_held
from harvester.store.journal.records import ShardEntry
from harvester.store.journal.rows import forget_finished
from harvester.store.journal.sqlite import OUTCOME_CODES
from harvester.store.maintain import quarantine
from harvester.store.maintain.bill import Bill, compute_bill
from harvester.store.reader import Corpus
from harvester.store.shards.manifest import indexed_keys, insert_entry, read_manifest
from harvester.store.shards.parquet_file import translate_disk_errors
from harvester.store.shards.recover_rows import recoverable_rows
from harvester.store.shards.rewrite import finished_off, rewrite
from harvester.store.shards.seal import adopt_unlisted
from harvester.store.shards.unlisted import read_contents, unlisted_files
from harvester.store.verify import Finding, has_lost_journal, verify_copy, verify_journal, verify_store
from harvester.system.files import sha256_of

_SHARD_FINDINGS = frozenset({"missing", "torn", "changed", "damaged", "disagrees"})
_MENDABLE = frozenset(f"{paths.JOURNAL} {table}" for table in ("answers", "keys", "finished", "meta"))
"""Where a row that is not what was written can go: what it stood for is asked again, or found again."""


@dataclass(frozen=True, slots=True)
class RepairResult:
    """What a repair did: files moved away, rows saved from them, keys that will be asked again."""

    quarantined: tuple[str, ...]
    saved: int
    lost: tuple[str, ...]


def repair(journal: Journal, store: Path) -> RepairResult:
    """Quarantine what is damaged or foreign, keep what still reads, forget what is gone.

    Nothing is sealed: the terms were not asked, and what is journalled stays so.

    Raises:
        StoreCorrupt: the journal is damaged where no program can tell what it held.
        StoreError, StoreFull: the disk refuses.
    """
    lost, unindexed = _give_up_rows(journal, store)
    adopt_unlisted(journal, store)
    _reinstate(journal, store)
    by_name = {entry.name: entry for entry in read_manifest(journal)}
    incomplete = [entry for entry in by_name.values() if _indexed(journal, entry) != entry.rows]
    for entry in incomplete:
        _reindex(journal, store, entry)
    if any(_indexed(journal, entry) < entry.rows for entry in incomplete):
        lost |= unindexed - set(journal.look_up(sorted(unindexed)))
    findings = verify_store(
        store, store / paths.SHARDS, tuple(by_name.values()), has_journal=True, alone=True
    )
    names = sorted({one.place.removeprefix(f"{paths.SHARDS}/") for one in findings if _in_folder(one)})
    moved, saved = [], 0
    for name in sorted(names, key=lambda name: name in by_name):  # strangers first: they may wear a number
        if (store / paths.SHARDS / name).exists():
            quarantine.move_in(store, store / paths.SHARDS / name, keep=name in by_name)
            moved.append(name)
        if name in by_name:
            indexed = _indexed(journal, by_name[name])
            gone = finished_off(rewrite(journal, store, [by_name[name]], salvage=True))
            lost |= gone
            saved += indexed - len(gone)
    lost |= _forget_strays(journal)
    return RepairResult(tuple(moved), saved, tuple(sorted(key.hex() for key in lost)))


def _give_up_rows(journal: Journal, store: Path) -> tuple[set[bytes], set[bytes]]:
    """Take out rows that are not what was written, where what they stood for can be had again.

    Returns the keys of answers, which are asked again, and those of index rows, which a shard may give back.

    Raises:
        StoreCorrupt: something else is damaged; nothing has changed.
    """
    places = set()
    for one in verify_journal(store):
        if one.place not in _MENDABLE and not one.place.startswith((f"{paths.SHARDS}/", "shard ")):
            raise StoreCorrupt(
                one.message,
                place=one.place,
                remedy="restore journal.db from a copy; the shards stay readable as they are",
            )
        places.add(one.place)
    if not places & _MENDABLE:
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
            _renew_numbers(connection)
    return _keys(answers), _keys(index)


def _keys(found: set[Any]) -> set[bytes]:
    """Without those that a flipped bit turned into another type."""
    return {one for one in found if isinstance(one, bytes)}


def _renew_numbers(connection: sqlite3.Connection) -> None:
    """The numbers of `meta` from what the other tables show; holds that still read stay, other notes go."""
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


def _reinstate(journal: Journal, store: Path) -> None:
    """Give whole files back the manifest row they lost; the key index still knows their number."""
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


def _indexed(journal: Journal, entry: ShardEntry) -> int:
    with journal.reading() as connection:
        query = "SELECT count(*) FROM keys WHERE shard = ?"
        return int(connection.execute(query, (entry.shard,)).fetchone()[0])


def _reindex(journal: Journal, store: Path, entry: ShardEntry) -> None:
    """Put rows of a readable shard back into the key index where they are missing there."""
    known = indexed_keys(journal, entry)
    rows: list[tuple[bytes, int, int | None]] = []
    path = store / paths.SHARDS / entry.name
    if not path.exists() or sha256_of(path) != entry.sha256:
        return  # a row without an index row has nothing left to prove it by
    for table in recoverable_rows(journal, store, entry):
        for row in table.select(["key", "outcome", "request_json"]).to_pylist():
            key = bytes.fromhex(row["key"])
            if key not in known:
                body = orjson.loads(row["request_json"])
                rows.append((key, OUTCOME_CODES[row["outcome"]], max_tokens_of(body)))
    asker = bytes(8)  # nobody's: whoever asks next is noted as a further asker
    with journal.writing() as connection:
        connection.executemany(
            "INSERT OR IGNORE INTO keys SELECT ?1, ?2, ?3, ?4, ?5, ?6"
            " WHERE NOT EXISTS (SELECT 1 FROM answers WHERE key = ?1)",
            [
                (key, entry.shard, code, most, asker, checksum([entry.shard, code, most], key, asker))
                for key, code, most in rows
            ],
        )


def _in_folder(one: Finding) -> bool:
    return one.place.startswith(f"{paths.SHARDS}/") and one.kind in {*_SHARD_FINDINGS, "foreign"}


def _forget_strays(journal: Journal) -> set[bytes]:
    """Keys that point at a shard nobody knows."""
    query = "SELECT key FROM keys WHERE shard NOT IN (SELECT shard FROM manifest)"
    with journal.reading() as connection:
        strays = {key for (key,) in connection.execute(query)}
    if strays:
        with journal.writing() as connection:
            connection.executemany("DELETE FROM keys WHERE key = ?", [(key,) for key in strays])
            forget_finished(connection)
    return strays


def check(store: Path, *, repair: bool) -> tuple[dict[str, Any], list[str], int]:
    """`harvester verify`: its values, its lines for people, and how many findings are left.

    Raises:
        StoreLocked: a repair needs the store for itself.
        StoreError, StoreCorrupt, StoreFormatError.
    """
    data: dict[str, Any] = {}
    lines: list[str] = []
    if repair:
        if has_lost_journal(store):
            raise StoreCorrupt(
                "gone, and no repair can tell what it held",
                place=str(store / paths.JOURNAL),
                remedy="put it back from a copy; what lies in shards/ stays readable as it is",
            )
        Journal.open(store, read_only=True).close()  # a folder that is no store must not become one
        with StoreLock(store, started_at=time.time()):
            moved, done = _repaired(store)
            if (store / paths.CANARY / paths.JOURNAL).exists():
                further, canaries = _repaired(store / paths.CANARY)
                moved += tuple(f"{paths.CANARY}/{name}" for name in further)
                done = RepairResult((), done.saved + canaries.saved, done.lost + canaries.lost)
        data["repaired"] = {"quarantined": moved, "saved": done.saved, "lost": done.lost}
        lines.append(
            f"repaired: {len(moved)} files in {store / paths.QUARANTINE}, {done.saved:,} of their "
            f"answers saved, {len(done.lost):,} to be asked again"
        )
    findings, answers = _looked(store)
    bill = Bill(0, 0, ())
    if (store / paths.JOURNAL).exists() and not any(paths.JOURNAL in one for one in findings):
        with closing(Journal.open(store, read_only=True)) as journal:
            bill = compute_bill(journal, alive=is_held(store))
    if (store / paths.CANARY / paths.JOURNAL).exists() or has_lost_journal(store / paths.CANARY):
        findings += [f"{paths.CANARY}: {one}" for one in _looked(store / paths.CANARY)[0]]
    data |= {
        "answers": answers,
        "findings": findings,
        "billed": bill.billed,
        "billed_microusd": bill.billed_microusd,
        "possibly_billed": [one.facts() for one in bill.possibly_billed],
        "possibly_billed_microusd": bill.possibly_billed_microusd,
    }
    lines.append(
        f"{answers:,} answers stored, {len(findings)} findings; {bill.billed:,} billed for "
        f"${bill.billed_microusd / 1e6:.6f}, {len(bill.possibly_billed)} attempts possibly billed"
    )
    lines += [f"  {one}" for one in findings]
    lines += [
        f"  possibly billed: {one['key']} at {one['at']}, reserved ${one['reserved_microusd'] / 1e6:.6f}"
        f" ({one['code'] or 'no outcome'})"
        for one in data["possibly_billed"]
    ]
    return data, lines, len(findings)


def _repaired(store: Path) -> tuple[tuple[str, ...], RepairResult]:
    """Mend a store whose lock is held; also returns every file that was put away."""
    logs = _put_log_aside(store)
    with closing(Journal.open(store)) as journal:
        done = repair(journal, store)
    return (*logs, *done.quarantined), done


def _looked(store: Path) -> tuple[list[str], int]:
    """Every finding, and the answers held; what can't even be opened is a finding too.

    Raises:
        StoreError: there is no store and no corpus here.
    """
    try:
        corpus = Corpus.open(store)
        return [str(one) for one in corpus.verify()], corpus.count()
    except StoreError as error:
        if (store / paths.JOURNAL).exists():
            return [str(Finding("damaged", paths.JOURNAL, error.message))], 0
        folder = store / paths.SHARDS if (store / paths.SHARDS).is_dir() else store
        found = [str(one) for one in verify_copy(folder)]
        if has_lost_journal(store):
            found.append(str(Finding("missing", paths.JOURNAL, error.message)))
        if not found:
            raise
        return found, 0


def _put_log_aside(store: Path) -> tuple[str, ...]:
    """A write-ahead log with a changed byte is copied into quarantine, and what still reads of it is kept."""
    log = wal.log_path(store / paths.JOURNAL)
    with translate_disk_errors(store):
        if not wal.commits_lost(log):
            return ()
        copy = store / f".{log.name}.copy"
        shutil.copyfile(log, copy)  # not a link: SQLite goes on writing into the same file
        copy.chmod(0o600)
        name = quarantine.move_in(store, copy, keep=False, name=log.name)
    sqlite.empty_log(store)
    return (name,)
