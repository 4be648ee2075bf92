"""Seal answers: move them from the journal into immutable Parquet shards.

A shard is written under a hidden name, read back and compared, synced and renamed; then one transaction
writes its manifest row and key index and deletes the bodies from the journal. After a crash there may be
leftover files or unfinished work, but manifest and files never disagree: a file that was renamed before the
crash is adopted by the next sealing. `seal_steps` works in slices, so that a run can commit between them.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from harvester.store import paths
from harvester.store.journal.checksums import checked_rows
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import ShardEntry
from harvester.store.shards import unlisted
from harvester.store.shards.manifest import insert_new_entry, move_answers
from harvester.store.shards.parquet_file import (
    BYTES_PER_GROUP,
    ROWS_PER_GROUP,
    ROWS_PER_SHARD,
    check_written_file,
    lineage_digest,
    open_writer,
    translate_disk_errors,
)
from harvester.store.shards.proved import note_written
from harvester.store.shards.ready_rows import ReadyRows, Unsealed, read_slice
from harvester.store.shards.rewrite import finish_interrupted_rewrite
from harvester.store.shards.steps import run_to_end
from harvester.system.failpoints import reach
from harvester.system.files import fsync
from harvester.terms.lineage import Lineage

# Expected bytes in the journal for each byte of a shard; only decides when a shard is written.
EXPECTED_COMPRESSION = 3
# Later than any answer, in Unix seconds.
FAR_S = 9e12


@dataclass(frozen=True, slots=True)
class SealResult:
    """What one sealing moved.

    Attributes:
        rows: answers moved.
        files: names of the new files in `shards/`.
        lacking_bytes: bytes that must still be stored before another shard is full.
    """

    rows: int
    files: tuple[str, ...]
    lacking_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Group:
    """Unsealed answers of runs with one lineage digest; `last_id` is the newest one when sealing began.

    Of these, answers that came at `before_us` or later stay in the journal.
    """

    digest: str
    runs: tuple[int, ...]
    lineages: tuple[Lineage, ...]
    stored_bytes: int
    last_id: int
    before_us: int


def seal(journal: Journal, store: Path, *, target_bytes: int, everything: bool) -> SealResult:
    """Move answers from the journal into shards of about `target_bytes`, one lineage a file.

    Call it on the thread that owns the journal. Without `everything`, only what fills a shard is moved.

    Raises:
        StoreError, StoreFull, StoreCorrupt: what was sealed before stays sealed, the rest stays journalled.
    """
    return run_to_end(seal_steps(journal, store, target_bytes=target_bytes, everything=everything))


def seal_steps(
    journal: Journal,
    store: Path,
    *,
    target_bytes: int,
    everything: bool,
    before: float = math.inf,
    ready: ReadyRows | None = None,
) -> Generator[None, None, SealResult]:
    """Seal in slices: each `next` runs one on the thread that owns the journal, which may write in between.

    Only one such generator may run at a time; closed early, it leaves its answers in the journal. Raises as
    `seal`.

    Args:
        before: answers that came at this time or later stay in the journal, in Unix seconds.
        ready: answers that were converted to columns already.
    """
    ready = ready or ReadyRows()
    folder = store / paths.SHARDS
    with translate_disk_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    files = finish_interrupted(journal, store)
    rows = sum(count for _, count in files)
    full = lacking = target_bytes * EXPECTED_COMPRESSION
    for group in _groups(journal, before):
        left = group.stored_bytes
        while left > 0 and (everything or left >= full):
            with translate_disk_errors(folder):
                name, count, moved = yield from _seal_one(journal, folder, group, target_bytes, ready)
            if count == 0:
                break
            files.append((name, count))
            rows += count
            left -= moved
        lacking = min(lacking, full - left)
    return SealResult(rows, tuple(name for name, _ in files), max(0, lacking))


def used_bytes(journal: Journal) -> int:
    """Return the bytes of the database's pages in use, which grow with the stored answers."""
    with journal.reading() as connection:
        pages, free, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
    return int((pages - free) * size)


def _groups(journal: Journal, before: float) -> list[_Group]:
    before_us = round(min(before, FAR_S) * 1e6)
    by_run: dict[str, list[tuple[int, Lineage, int, int]]] = {}
    with journal.reading() as connection:
        # The limit keeps SQLite from folding the two queries into one, whose sorter would hold every body.
        rows = connection.execute(
            "SELECT run, sum(size), max(id) FROM (SELECT id, run,"
            " length(raw) + length(body_json) + length(prompt_json) AS size FROM answers WHERE at_us < ?"
            " LIMIT -1) JOIN runs USING (run) GROUP BY run ORDER BY run",
            (before_us,),
        ).fetchall()
        # A damaged lineage must not be signed anew in a shard.
        runs_rows = checked_rows(connection, "runs", journal.path) if rows else []
        lineage_of = {row["run"]: Lineage.from_json(row["lineage_json"]) for row in runs_rows}
    for run, stored, last_id in rows:
        lineage = lineage_of[run]
        by_run.setdefault(lineage_digest(lineage), []).append((run, lineage, stored, last_id))
    groups = []
    for digest, runs in sorted(by_run.items()):
        numbers, lineages, stored_bytes, last_ids = zip(*runs, strict=True)
        groups.append(_Group(digest, numbers, lineages, sum(stored_bytes), max(last_ids), before_us))
    return groups


def _seal_one(
    journal: Journal, folder: Path, group: _Group, target_bytes: int, ready: ReadyRows
) -> Generator[None, None, tuple[str, int, int]]:
    """Write and commit one shard; return its name, its rows and the bytes they had in the journal."""
    shard = journal.next_shard()
    hidden = folder / f".part-{shard:08d}.tmp"
    try:
        keys, moved = yield from _write(journal, hidden, group, target_bytes, ready)
        reach("shards.after_write")
        entry = yield from check_written_file(hidden, shard, keys, group.digest)
        reach("shards.before_rename")
        hidden.rename(folder / entry.name)
        note_written(folder / entry.name, entry.sha256)
        reach("shards.after_rename")
        fsync(folder)
    except BaseException:
        with contextlib.suppress(OSError):  # frees space on a full disk; the rows are still in the journal
            hidden.unlink(missing_ok=True)
        raise
    _commit(journal, entry, keys)
    return entry.name, len(keys), moved


def _write(
    journal: Journal, hidden: Path, group: _Group, target_bytes: int, ready: ReadyRows
) -> Generator[None, None, tuple[list[bytes], int]]:
    lineages = sorted(group.lineages, key=lambda lineage: lineage.run_id)
    by_run = dict(zip(group.runs, group.lineages, strict=True))
    unsealed = Unsealed(group.runs, group.last_id, group.before_us)
    keys: list[bytes] = []
    waiting: list[pa.Table] = []  # as objects, log-probabilities would be eight times their raw bytes
    moved = waiting_bytes = waiting_rows = last_id = 0
    with hidden.open("xb") as sink:
        with open_writer(sink, lineages) as writer:
            while True:
                prepared = ready.take(journal, unsealed, last_id)
                rows = prepared or read_slice(journal, unsealed, by_run, last_id)
                if rows is None:
                    break
                last_id = rows.last_id
                waiting.append(rows.table)
                keys += rows.keys
                waiting_bytes += rows.stored_bytes
                waiting_rows += rows.table.num_rows
                is_full = waiting_rows >= ROWS_PER_GROUP or waiting_bytes >= BYTES_PER_GROUP
                if is_full:
                    writer.write_table(_in_one_piece(waiting).cast(writer.schema))
                    moved += waiting_bytes
                    waiting, waiting_bytes, waiting_rows = [], 0, 0
                    if sink.tell() >= target_bytes or len(keys) > ROWS_PER_SHARD - ROWS_PER_GROUP:
                        break
                if is_full or prepared is None:
                    yield
            if waiting:
                writer.write_table(_in_one_piece(waiting).cast(writer.schema))
        sink.flush()
        os.fsync(sink.fileno())
    hidden.chmod(0o600)
    return keys, moved + waiting_bytes


def _in_one_piece(tables: Sequence[pa.Table]) -> pa.Table:
    """One table, in one piece: the bytes written don't depend on the slices it came in."""
    return pa.concat_tables(tables).combine_chunks()


def _commit(journal: Journal, entry: ShardEntry, keys: Sequence[bytes]) -> None:
    """Write manifest row and key index and delete the bodies, in one transaction."""
    with journal.writing() as connection:
        insert_new_entry(connection, entry)
        move_answers(connection, entry.shard, keys)
        reach("shards.before_commit")
    reach("shards.after_commit")


def finish_interrupted(journal: Journal, store: Path) -> list[tuple[str, int]]:
    """Finish an interrupted rewrite or sealing; return names and rows of the adopted shards.

    Raises:
        StoreCorrupt: an unknown file has a number that no shard has had yet.
        StoreError: the disk refuses.
    """
    adopted = adopt_unlisted(journal, store)
    unlisted.require_none(store / paths.SHARDS, journal.next_shard() - 1)
    return adopted


def adopt_unlisted(journal: Journal, store: Path) -> list[tuple[str, int]]:
    """Finish an interrupted rewrite and adopt the shard whose rows are still in the journal.

    Raises:
        StoreError: the disk refuses.
    """
    finish_interrupted_rewrite(journal, store)
    folder, number, adopted = store / paths.SHARDS, journal.next_shard(), []
    with translate_disk_errors(folder):
        for path in sorted(folder.glob(f"part-{number:08d}-*.parquet")):
            held = unlisted.read_contents(path)
            with journal.reading() as connection:
                if held is None or not unlisted.is_half_sealed(connection, path):
                    continue  # damaged or foreign
            fsync(folder)
            _commit(journal, held.entry(time.time()), held.keys)
            adopted.append((path.name, len(held.keys)))
            break
    return adopted
