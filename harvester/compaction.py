"""Sealed shards -> other sealed shards: small ones merged, some rows left out, leftovers of a crash removed.

The new file is written like any shard; one transaction names it in the manifest in place of the old ones,
points the key index at it and notes the old names as doomed; then they are removed. `Corpus` reads by the
manifest and never sees the change. A plain reader of the folder may meet old and new rows side by side, or
miss a file it has listed, in the instant between rename and removal.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Collection, Generator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harvester.database import checksum
from harvester.errors import StoreError
from harvester.failpoints import reach
from harvester.journal import Journal
from harvester.ledger import micros
from harvester.records import ShardEntry
from harvester.shard_file import digest_of, disk, lineages_in, opened, writer_of
from harvester.shards import FOLDER, NAME, finish, next_shard

SMALL = 2
"""A shard below the target by this factor is worth merging."""
_DOOMED = "doomed:"


def compact_steps(journal: Journal, store: Path, *, target_bytes: int) -> Generator[None, None, int]:
    """Merge small neighbours of one lineage digest into shards of about `target_bytes`, in slices.

    Each `next` runs one slice on the thread that owns the journal. Returns the files merged away.

    Raises:
        StoreError, StoreFull, StoreCorrupt: the old files stay in the manifest.
    """
    merged = 0
    tidy(journal, store)
    for batch in _batches(journal, target_bytes):
        yield from rewrite(journal, store, batch)
        merged += len(batch)
    return merged


def _batches(journal: Journal, target_bytes: int) -> list[list[ShardEntry]]:
    by_digest: dict[str, list[ShardEntry]] = {}
    for entry in manifest_of(journal):
        if entry.size_bytes < target_bytes / SMALL:
            by_digest.setdefault(entry.lineage_digest, []).append(entry)
    batches: list[list[ShardEntry]] = []
    for _, entries in sorted(by_digest.items()):
        batch: list[ShardEntry] = []
        for entry in entries:
            batch.append(entry)
            if sum(one.size_bytes for one in batch) >= target_bytes:
                batches.append(batch)
                batch = []
        batches.append(batch)
    return [batch for batch in batches if len(batch) > 1]


def rewrite(
    journal: Journal,
    store: Path,
    entries: Sequence[ShardEntry],
    *,
    without: Collection[bytes] = frozenset(),
    salvage: bool = False,
) -> Generator[None, None, set[bytes]]:
    """Put the rows of some shards into one new shard, in their order; returns the keys left behind.

    Args:
        without: keys to leave out.
        salvage: a row group that can't be read is left out, with its keys, instead of raising.

    Raises:
        StoreError, StoreFull, StoreCorrupt: nothing has changed.
    """
    folder = store / FOLDER
    shard = next_shard(journal)
    hidden = folder / f".part-{shard:08d}.tmp"
    entry: ShardEntry | None = None
    try:
        with disk(folder):
            keys = yield from _copy(folder, hidden, entries, {key.hex() for key in without}, salvage)
            if keys:
                entry = yield from finish(hidden, shard, keys, entries[0].lineage_digest)
            else:
                hidden.unlink(missing_ok=True)
    except BaseException:
        with contextlib.suppress(OSError):
            hidden.unlink(missing_ok=True)
        raise
    return _swap(journal, store, entries, entry, keys)


def _copy(
    folder: Path, hidden: Path, entries: Sequence[ShardEntry], without: Collection[str], salvage: bool
) -> Generator[None, None, list[bytes]]:
    lineages: dict[str, dict[str, object]] = {}
    for entry in entries:
        with contextlib.suppress(*(StoreError,) if salvage else ()), opened(folder / entry.name) as file:
            lineages.update({str(one["run_id"]): one for one in lineages_in(file)})
    keys: list[bytes] = []
    with hidden.open("xb") as sink:
        with writer_of(sink, [lineages[run_id] for run_id in sorted(lineages)]) as writer:
            for entry in entries:
                for table in tables_of(folder / entry.name, salvage=salvage):
                    held = table.column("key").to_pylist()
                    kept = [key not in without for key in held]
                    writer.write_table(table.filter(pa.array(kept)).cast(writer.schema))
                    keys += [bytes.fromhex(key) for key, keep in zip(held, kept, strict=True) if keep]
                    yield
        sink.flush()
        os.fsync(sink.fileno())
    hidden.chmod(0o600)
    return keys


def tables_of(path: Path, *, salvage: bool) -> Generator[pa.Table]:
    """Row groups of a shard; with `salvage`, those that still decode under their page checksums."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):
                try:
                    table = file.read_row_group(number)
                    table.validate(full=True)
                except (pa.ArrowException, OSError):
                    if not salvage:
                        raise
                    continue
                yield table
    except (pa.ArrowException, OSError):
        if not salvage:
            raise


def _swap(
    journal: Journal, store: Path, old: Sequence[ShardEntry], new: ShardEntry | None, keys: Sequence[bytes]
) -> set[bytes]:
    present = set(keys)
    with journal.writing() as connection:
        gone: set[bytes] = set()
        for entry in old:
            rows = connection.execute(
                "SELECT key, outcome, max_tokens, asker FROM keys WHERE shard = ?", (entry.shard,)
            ).fetchall()
            gone |= {row[0] for row in rows} - present
            connection.execute("DELETE FROM keys WHERE shard = ?", (entry.shard,))
            connection.execute("DELETE FROM manifest WHERE shard = ?", (entry.shard,))
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, '')", (_DOOMED + entry.name,))
            if new is not None:
                connection.executemany(
                    "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?)",
                    [
                        (key, new.shard, outcome, ceiling, asker,
                         checksum([new.shard, outcome, ceiling], key, asker))
                        for key, outcome, ceiling, asker in sorted(rows) if key in present
                    ],
                )  # fmt: skip
        if new is not None:
            enter(connection, new)
            connection.execute("UPDATE meta SET value = ? WHERE name = 'last_shard'", (str(new.shard),))
        reach("compaction.before_commit")
    reach("compaction.after_commit")
    tidy(journal, store)
    return gone


def enter(connection: sqlite3.Connection, entry: ShardEntry) -> None:
    """Name a shard in the manifest, inside an open transaction."""
    facts = (
        entry.shard, entry.name, entry.sha256, entry.rows, entry.size_bytes, entry.lineage_digest,
        micros(entry.sealed_at),
    )  # fmt: skip
    connection.execute("INSERT INTO manifest VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*facts, checksum(facts)))


def tidy(journal: Journal, store: Path) -> None:
    """Remove what a rewriting left: doomed files, and a new file whose transaction never came.

    Raises:
        StoreError: the folder refuses.
    """
    folder = store / FOLDER
    with disk(folder):
        for path in (*folder.glob(".part-*.tmp"), *_orphans(journal, folder)):
            path.unlink()
    with journal.reading() as connection:
        doomed = [name for (name,) in connection.execute("SELECT name FROM meta WHERE name LIKE 'doomed:%'")]
    if not doomed:
        return
    with disk(folder):
        for name in doomed:
            (folder / name.removeprefix(_DOOMED)).unlink(missing_ok=True)
    with journal.writing() as connection:
        connection.executemany("DELETE FROM meta WHERE name = ?", [(name,) for name in doomed])


def _orphans(journal: Journal, folder: Path) -> list[Path]:
    """Files numbered like the next shard, whole, whose rows all lie in other shards."""
    found: list[Path] = []
    number = next_shard(journal)
    for path in folder.glob(f"part-{number:08d}-*.parquet"):
        match = NAME.match(path.name)
        if match is None or digest_of(path)[0][:16] != match[2]:
            continue
        with opened(path) as file:
            keys = [bytes.fromhex(text) for text in file.read(columns=["key"]).column("key").to_pylist()]
        with journal.reading() as connection:
            query = "SELECT 1 FROM keys WHERE key = ?"
            if all(connection.execute(query, (key,)).fetchone() for key in keys):
                found.append(path)
    return found


def manifest_of(journal: Journal) -> list[ShardEntry]:
    """The sealed shards, in the order they were sealed."""
    query = (
        "SELECT shard, name, sha256, rows, size_bytes, lineage_digest, sealed_us FROM manifest ORDER BY shard"
    )
    with journal.reading() as connection:
        return [
            ShardEntry(shard, name, sha256, rows, size, lineage, sealed_us / 1e6)
            for shard, name, sha256, rows, size, lineage, sealed_us in connection.execute(query)
        ]
