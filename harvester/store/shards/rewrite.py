"""Rewrite shards into one new shard, with rows left out or columns changed where asked.

Merging, purge, repair and rederive use it.

The new file is written under a hidden name and read back. Then the folder is exchanged for one with the new
file in place of the old ones (`swap`), and one transaction updates the manifest and the key index. No reader
sees a row twice or misses one; after a kill `finish_interrupted_rewrite` completes or undoes the work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harvester.errors import ShardsInUse
from harvester.store import paths
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import ShardEntry
from harvester.store.journal.rows import forget_finished
from harvester.store.shards import swap, unlisted
from harvester.store.shards.manifest import (
    indexed_keys,
    insert_new_entry,
    move_keys,
    read_manifest,
    rename_keys,
    require_index,
)
from harvester.store.shards.parquet_file import (
    BYTES_PER_GROUP,
    ROWS_PER_GROUP,
    check_written_file,
    former_keys_of,
    keys_in_index,
    lineages_in,
    open_writer,
    translate_disk_errors,
)
from harvester.store.shards.proved import note_written, open_entry
from harvester.store.shards.recover_rows import recoverable_rows
from harvester.store.shards.schema import with_added_columns
from harvester.store.shards.steps import run_to_end
from harvester.system.failpoints import reach
from harvester.terms.lineage import Lineage

# Yielded by the step before the exchange: the caller may wait for readers there.
READY = "ready"
# How long purge and repair wait for readers to end.
PATIENCE_S = 20.0


def rewrite(  # noqa: PLR0913 - one value per thing in which merge, purge, repair and rederive differ
    journal: Journal,
    store: Path,
    entries: Sequence[ShardEntry],
    *,
    without: Collection[bytes] = frozenset(),
    salvage: bool = False,
    change: Callable[[pa.Table], pa.Table] | None = None,
    patience_s: float | None = None,
    readers: swap.ReaderWatch | None = None,
) -> Generator[str | None, None, set[bytes]]:
    """Write the rows of some shards, in their order, into one new shard; return the keys left out.

    Args:
        without: keys to leave out.
        change: changes columns of the rows; it keeps the rows and their order. A row whose key it changes
            gets the one before as its former key.
        salvage: leave out rows that can't be read or verified (`recover_rows`), with their keys.
        patience_s: how long to wait for readers of this program; None: `PATIENCE_S`.
        readers: exchange the folder only while this watch is quiet. Without it, readers of other programs
            are disregarded.

    Raises:
        ShardsInUse: another process reads the shards; nothing has changed.
        StoreError, StoreFull, StoreCorrupt: nothing has changed.
    """
    folder = store / paths.SHARDS
    if folder.with_name(swap.STAGED).exists():  # a reader still needs it
        raise ShardsInUse(folder)
    unlisted.require_none(folder, journal.next_shard() - 1)
    hidden = folder / f".part-{journal.next_shard():08d}.tmp"
    with contextlib.ExitStack() as held:  # no reader may begin between this check and the commit
        try:
            with translate_disk_errors(folder):
                entry, keys = yield from _staged(journal, store, entries, hidden, without, salvage, change)
            yield READY
            reach("compaction.before_exchange")
            patience_s = PATIENCE_S if patience_s is None else patience_s
            is_free = held.enter_context(swap.if_no_reader(folder, patience_s, readers))
            if not is_free or not (readers is None or readers.is_quiet()):
                raise ShardsInUse(folder)
        except BaseException:
            _undo(folder, hidden)
            raise
        with translate_disk_errors(folder):
            is_exchanged = swap.exchange(folder, readers)
        if not is_exchanged:
            _undo(folder, hidden)
            raise ShardsInUse(folder)
        reach("compaction.after_exchange")
        gone = _commit_swap(journal, entries, entry, keys)
        with translate_disk_errors(folder):
            swap.discard(folder)
        return gone


def write_without(hidden: Path, path: Path, without: Collection[str]) -> list[bytes]:
    """Write the rows of one shard but some into a new file under a hidden name; return their keys.

    Args:
        without: keys to leave out, in hex.

    Raises:
        OSError: the disk refuses.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        lineages = lineages_in(file)
    return run_to_end(_copy(hidden, lineages, _row_groups(_tables(path), without)))


def _undo(folder: Path, hidden: Path) -> None:
    with contextlib.suppress(OSError):
        hidden.unlink(missing_ok=True)
        swap.discard(folder)


def _staged(  # noqa: PLR0913 - as `rewrite`
    journal: Journal,
    store: Path,
    entries: Sequence[ShardEntry],
    hidden: Path,
    without: Collection[bytes],
    salvage: bool,
    change: Callable[[pa.Table], pa.Table] | None,
) -> Generator[str | None, None, tuple[ShardEntry | None, _Keys]]:
    """Write the new file and build the next folder; return its manifest entry and its keys."""
    folder = store / paths.SHARDS
    lineages = _lineages(journal, folder, entries, salvage)
    tables: Iterator[pa.Table] = chain.from_iterable(
        recoverable_rows(journal, store, entry) if salvage else _tables(folder / entry.name)
        for entry in entries
    )
    if change is not None:
        tables = map(change, tables)
    written = yield from _copy(hidden, lineages, _row_groups(tables, {key.hex() for key in without}))
    entry, keys = None, _Keys(written, written)
    if written:
        entry = yield from check_written_file(
            hidden, journal.next_shard(), written, entries[0].lineage_digest
        )
        note_written(hidden, entry.sha256)
        if change is not None:
            keys = _Keys(_keys_before(journal, hidden, entries, written), written)
        yield from require_index(journal, keys.before)
    new = None if entry is None else (hidden, entry.name)
    swap.stage(folder, without={shard.name for shard in entries}, new=new)
    return entry, keys


@dataclass(frozen=True, slots=True)
class _Keys:
    """The keys of the rows of a new file, in order: in the index before its commit, and afterwards."""

    before: Sequence[bytes]
    after: Sequence[bytes]

    @property
    def renamed(self) -> dict[bytes, bytes]:
        """The keys that change, and what they become."""
        pairs = zip(self.before, self.after, strict=True)
        return {before: after for before, after in pairs if before != after}


def _keys_before(
    journal: Journal, path: Path, entries: Sequence[ShardEntry], keys: Sequence[bytes]
) -> list[bytes]:
    with pq.ParquetFile(path) as file:
        former_keys = former_keys_of(file)
    known = {key for entry in entries for key in indexed_keys(journal, entry)}
    return keys_in_index(keys, former_keys, known)


def _lineages(journal: Journal, folder: Path, entries: Sequence[ShardEntry], salvage: bool) -> list[Lineage]:
    """Return the lineages of the runs whose rows are kept; with `salvage` from the journal."""
    lineages: dict[str, Lineage] = {}
    for entry in entries:
        if not salvage:
            with open_entry(folder, entry) as file:
                lineages |= {lineage.run_id: lineage for lineage in lineages_in(file)}
            continue
        present = {
            run_id
            for table in recoverable_rows(journal, folder.parent, entry)
            for run_id in table.column("run_id").unique().to_pylist()
        }
        with journal.reading() as connection:
            stored = connection.execute("SELECT run_id, lineage_json FROM runs").fetchall()
        lineages |= {run_id: Lineage.from_json(text) for run_id, text in stored if run_id in present}
    return [lineages[run_id] for run_id in sorted(lineages)]


def _copy(
    hidden: Path, lineages: Sequence[Lineage], groups: Iterator[pa.Table]
) -> Generator[None, None, list[bytes]]:
    keys: list[bytes] = []
    with hidden.open("xb") as sink:
        with open_writer(sink, lineages) as writer:
            for table in groups:
                writer.write_table(table.cast(writer.schema))
                keys += [bytes.fromhex(key) for key in table.column("key").to_pylist()]
                yield
        sink.flush()
        os.fsync(sink.fileno())
    hidden.chmod(0o600)
    return keys


def _row_groups(tables: Iterable[pa.Table], without: Collection[str]) -> Iterator[pa.Table]:
    """Yield all rows in row groups of the usual size."""
    waiting: list[pa.Table] = []
    for table in tables:
        if without:
            kept = [key not in without for key in table.column("key").to_pylist()]
            table = table.filter(pa.array(kept))
        waiting.append(table)
        rows, size = sum(part.num_rows for part in waiting), sum(part.nbytes for part in waiting)
        if rows >= ROWS_PER_GROUP or size >= BYTES_PER_GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
    if any(table.num_rows for table in waiting):
        yield pa.concat_tables(waiting)


def _tables(path: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for number in range(file.num_row_groups):
            table = with_added_columns(file.read_row_group(number))
            table.validate(full=True)
            yield table


def _commit_swap(
    journal: Journal, old: Sequence[ShardEntry], new: ShardEntry | None, keys: _Keys
) -> set[bytes]:
    """Update manifest and key index after the exchange; return the keys left out."""
    # The whole index is scanned only where rows were left out: a merge must not delay a run.
    gone = set[bytes]()
    if sum(entry.rows for entry in old) != len(keys.before):
        gone = {key for entry in old for key in indexed_keys(journal, entry)}.difference(keys.before)
    with journal.writing() as connection:
        connection.executemany("DELETE FROM keys WHERE key = ?", [(key,) for key in sorted(gone)])
        if gone:
            forget_finished(connection)
        connection.executemany("DELETE FROM manifest WHERE shard = ?", [(entry.shard,) for entry in old])
        if new is not None:
            move_keys(connection, new.shard, keys.before)
            if renamed := keys.renamed:
                rename_keys(connection, renamed)
                forget_finished(connection)
            insert_new_entry(connection, new)
        reach("compaction.before_commit")
    reach("compaction.after_commit")
    return gone


def finish_interrupted_rewrite(journal: Journal, store: Path) -> None:
    """Finish a rewrite that a kill interrupted: undo it before its exchange, complete it after.

    Raises:
        StoreError: the disk refuses.
    """
    folder = store / paths.SHARDS
    with translate_disk_errors(folder):
        is_staged = swap.finish_interrupted(folder)
        for path in folder.glob(".part-*.tmp"):
            path.unlink()
        if not is_staged:
            return
        old = [shard for shard in read_manifest(journal) if swap.locate(folder, shard.name).parent != folder]
        if old:
            exchanged = _exchanged(journal, folder, old)
            if exchanged is not None:
                _commit_swap(journal, old, *exchanged)
            else:
                for entry in old:  # no file replaces them: move the old files back
                    swap.locate(folder, entry.name).rename(folder / entry.name)
        with swap.if_no_reader(folder) as is_free:
            if is_free:  # else a reader may still open the old files: the next process removes them
                swap.discard(folder)


def _exchanged(journal: Journal, folder: Path, old: Sequence[ShardEntry]) -> tuple[ShardEntry, _Keys] | None:
    """Find the undamaged file that replaced `old`: it has the next shard's number and only their rows."""
    number = journal.next_shard()
    known = {key for entry in old for key in indexed_keys(journal, entry)}
    for file_number, path in unlisted.unlisted_files(folder, number - 1):
        held = unlisted.read_contents(path) if file_number == number else None
        if held is not None and known.issuperset(before := held.keys_before(known)):
            entry = held.entry(path.stat().st_mtime)
            return replace(entry, lineage_digest=old[0].lineage_digest), _Keys(before, held.keys)
    return None
