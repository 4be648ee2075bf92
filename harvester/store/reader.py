"""Read the samples of a store: sealed shards, unsealed answers, and prompts that share an answer.

Never writes or checkpoints; safe while a run writes. A folder of shards without a journal (a copy,
a curated corpus) is a corpus too. Imports pyarrow, orjson and the standard library only.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from harvester.errors import StoreCorrupt, StoreError, StoreFormatError
from harvester.store import paths
from harvester.store.journal import sqlite, wal
from harvester.store.journal.checksums import (
    checked_rows,
    damaged_row_error,
    is_unchanged,
    require_unchanged,
    select_with_checksum,
    translate_value_errors,
)
from harvester.store.journal.records import ShardEntry
from harvester.store.shards import batching, foreign_columns
from harvester.store.shards.chosen_rows import read_chosen
from harvester.store.shards.manifest import manifest_rows
from harvester.store.shards.parquet_file import lineages_in
from harvester.store.shards.proved import open_entry, open_unlisted
from harvester.store.shards.sample import (
    SELECT_ANSWERS,
    SELECT_TERMS_COLUMNS,
    model_names,
    prompt_columns,
    sample_of,
    terms_columns,
)
from harvester.store.shards.schema import (
    ADDED_COLUMNS,
    SCHEMA,
    Sample,
    columns_with_nulls,
    from_row,
    to_table,
)
from harvester.store.shards.swap import hold_for_reading
from harvester.store.verify import Finding, verify_store
from harvester.store.view import CorpusView, asks_sha256_of, tail_sha256
from harvester.terms.lineage import FACT_COLUMNS, Lineage

# Unsealed rows that are converted to Arrow together; each may have a megabyte of log-probabilities.
UNSEALED_ROWS = 16
_OURS = (
    "name a store, or a folder of its shards; another tool's files are read as prompts (`harvester import`)"
)

_ASKED = ("prompt_id", "sample_index", "reference", "tags", "metadata_json", "source_file", "source_line")


def holds_answers(store: Path) -> bool:
    """Whether `Corpus.open` finds something to open: a journal, or shards. True where that can't be seen."""
    try:
        return (store / paths.JOURNAL).exists() or any(
            any(folder.glob("*.parquet")) for folder in (store / paths.SHARDS, store)
        )
    except OSError:
        return True


class RowFilter(Protocol):
    """A condition on samples."""

    @property
    def columns(self) -> Sequence[str]:
        """Columns that `matches` looks at."""

    @property
    def required_texts(self) -> Mapping[str, Collection[str]]:
        """Texts of which a column has one in every sample that matches, by column."""

    def matches(self, sample: Sample) -> bool:
        """Whether a sample is wanted."""


class Corpus:
    """All samples of a store, or of a bare folder of shards.

    Attributes:
        folder: where the Parquet files lie.
        manifest: the sealed files, as of `open`.
    """

    def __init__(self, store: Path, folder: Path, *, has_journal: bool, is_damaged: bool = False) -> None:
        self._store = store
        self._is_damaged = is_damaged
        self.folder = folder
        self._has_journal = has_journal
        self.manifest: tuple[ShardEntry, ...] = self._read_manifest()

    @classmethod
    def open(cls, store: Path, *, is_damaged: bool = False) -> Corpus:
        """Open a store folder, its `shards` folder, or any folder of shards.

        Args:
            is_damaged: open it although rows may be missing, to verify it.

        Raises:
            StoreError: there is no corpus here; StoreCorrupt, StoreFormatError by cause. StoreCorrupt also
                where acknowledged rows lie behind a damaged byte of the journal's log.
        """
        with sqlite.translate_errors(store):
            has_journal = (store / paths.JOURNAL).exists()
        if has_journal:
            if not is_damaged:
                wal.require_whole_for_reading(store)
            return cls(store, store / paths.SHARDS, has_journal=True, is_damaged=is_damaged)
        for folder in (store / paths.SHARDS, store):
            if any(folder.glob("*.parquet")):
                return cls(store, folder, has_journal=False)
        raise StoreError(
            "no answers are stored here",
            place=str(store),
            remedy="name the folder that holds journal.db or shards/",
        )

    def samples(
        self,
        columns: Sequence[str] | None = None,
        *,
        include_unsealed: bool = True,
        where: RowFilter | None = None,
    ) -> Iterator[Sample]:
        """Yield every sample, once for each prompt that asked for it, in bounded memory.

        All come from one snapshot, also when answers are sealed meanwhile. Unsealed answers come first, then
        shards in the order they were sealed.

        Args:
            columns: fields to fill; the others keep their defaults. None fills all.
            include_unsealed: also answers that are not sealed yet.
            where: which samples; of shards, row groups without a match are not read beyond its columns.

        Raises:
            StoreError, StoreCorrupt: a file is missing or is not what was sealed, or an unsealed row is not
                what was journalled; its name is in the error.
        """
        wanted = SCHEMA.names if columns is None else list(columns)
        unknown = set(wanted) - set(SCHEMA.names)
        if unknown:
            raise KeyError(f"no such columns: {sorted(unknown)}")
        if where is None:
            yield from self._samples(wanted, {}, include_unsealed=include_unsealed)
            return
        needed = list(dict.fromkeys([*wanted, *where.columns]))
        for sample in self._samples(needed, where.required_texts, include_unsealed=include_unsealed):
            if where.matches(sample):
                yield sample if len(needed) == len(wanted) else _projected(sample, wanted)

    def _samples(
        self, wanted: Sequence[str], texts: Mapping[str, Collection[str]], *, include_unsealed: bool
    ) -> Iterator[Sample]:
        """Yield the samples; of shards only those that have one of these texts in each of these columns."""
        if not self._has_journal:
            yield from self._sealed(self.manifest, wanted, None, texts)
            return
        with (
            hold_for_reading(self.folder),
            contextlib.closing(sqlite.open_for_reading(self._store)) as connection,
        ):
            place = self._store / paths.JOURNAL
            with sqlite.translate_errors(place), translate_value_errors(place):
                connection.execute("BEGIN")
                manifest = tuple(manifest_rows(connection))
                if include_unsealed:
                    yield from self._tail(connection, wanted)
                connection.execute("COMMIT")  # a reader that stays open would keep the WAL growing
            yield from self._sealed(manifest, wanted, connection, texts)

    @contextlib.contextmanager
    def view(self, columns: Sequence[str]) -> Iterator[CorpusView]:
        """Give one snapshot that can be read part by part, the sealed parts by other processes too.

        No shard is replaced inside the block. Read the unsealed answers first: they end the transaction.
        """
        if not self._has_journal:
            yield CorpusView(self.manifest, "", "", 0, iter(()))
            return
        place = self._store / paths.JOURNAL
        with (
            hold_for_reading(self.folder),
            contextlib.closing(sqlite.open_for_reading(self._store)) as connection,
        ):
            with sqlite.translate_errors(place), translate_value_errors(place):
                connection.execute("BEGIN")
                unsealed = connection.execute("SELECT count(*) FROM answers").fetchone()[0]
                view = CorpusView(
                    tuple(manifest_rows(connection)),
                    tail_sha256(connection),
                    asks_sha256_of(connection),
                    int(unsealed),
                    self._tail_of_snapshot(connection, columns),
                )
            yield view

    def _tail_of_snapshot(self, connection: sqlite3.Connection, columns: Sequence[str]) -> Iterator[Sample]:
        place = self._store / paths.JOURNAL
        with sqlite.translate_errors(place), translate_value_errors(place):
            yield from self._tail(connection, columns)
            connection.execute("COMMIT")  # a reader that stays open would keep the WAL growing

    def parts(self, entry: ShardEntry, most_rows: int) -> list[tuple[range, int]]:
        """Return row groups of a shard that are read together, and their rows.

        Args:
            most_rows: rows of a part, at most, unless a row group has more.
        """
        with open_entry(self.folder, entry) as file:
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        parts: list[tuple[range, int]] = []
        begin = rows = 0
        for number, size in enumerate(sizes):
            if rows and rows + size > most_rows:
                parts.append((range(begin, number), rows))
                begin, rows = number, 0
            rows += size
        return [*parts, (range(begin, len(sizes)), rows)] if rows else parts

    def part(
        self, entry: ShardEntry, groups: range, columns: Sequence[str], asks_sha256: str = ""
    ) -> Iterator[Sample]:
        """Yield the samples of some row groups of a shard, once for each prompt that asked for them.

        Args:
            asks_sha256: `CorpusView.asks_sha256` of the snapshot that the part belongs to.

        Raises:
            StoreError: further prompts were asked since that snapshot; and as `samples`.
        """
        with contextlib.ExitStack() as reading:
            asks = None
            if self._has_journal:
                connection = reading.enter_context(self._reading())
                if asks_sha256_of(connection) != asks_sha256:
                    raise StoreError(
                        "prompts were asked while the corpus was read",
                        place=str(self._store),
                        remedy="try again when the harvest has ended",
                    )
                asks = _Asks(connection, columns)
            needed = sorted({*columns, "key", "prompt_id", "sample_index"})
            file = reading.enter_context(open_entry(self.folder, entry))
            _require_columns(file, needed, entry.name)
            for batch in chain.from_iterable(batching.batch_group(file, group, needed) for group in groups):
                _require_values(batch, entry.name)
                samples = [from_row(row) for row in batch.to_pylist()]
                yield from asks.fan_out(samples, samples) if asks is not None and asks.are_any else samples

    def part_batches(
        self, entry: ShardEntry, groups: range, columns: Sequence[str]
    ) -> Iterator[pa.RecordBatch]:
        """Yield columns of some row groups of a shard as Arrow batches, as `batches`."""
        with open_entry(self.folder, entry) as file:
            _require_columns(file, columns, entry.name)
            for batch in chain.from_iterable(batching.batch_group(file, group, columns) for group in groups):
                _require_values(batch, entry.name)
                yield _as_written(batch.select(list(columns)), entry.name)

    @contextlib.contextmanager
    def snapshot(
        self, columns: Sequence[str] = SCHEMA.names
    ) -> Iterator[tuple[tuple[ShardEntry, ...], Iterator[Sample]]]:
        """Give the manifest and the unsealed answers of one snapshot.

        Each answer comes once, for the prompt that paid for it, with these columns filled. Read the answers
        inside the block.
        """
        if not self._has_journal:
            yield self.manifest, iter(())
            return
        with self._reading() as connection:
            connection.execute("BEGIN")
            yield tuple(manifest_rows(connection)), self._unsealed(connection, columns)
            connection.execute("COMMIT")

    def _unsealed(self, connection: sqlite3.Connection, columns: Sequence[str]) -> Iterator[Sample]:
        lineages = _lineages(connection, self._store)
        for rows in batching.batch_answers(connection.execute(f"{SELECT_ANSWERS} ORDER BY id")):
            require_unchanged("answers", rows, self._store)
            for row in rows:
                yield _projected(sample_of(row, lineages[row["run"]], columns), columns)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield columns of all answers as Arrow batches of limited size, which is faster for nested columns.

        Each answer comes once, for the prompt that paid for it. Unsealed answers come first; their values are
        rounded as in a shard.

        Raises:
            StoreError, StoreCorrupt: as `samples`.
        """
        with hold_for_reading(self.folder):
            with self.snapshot(columns) as (manifest, unsealed):
                while rows := list(islice(unsealed, UNSEALED_ROWS)):
                    yield from to_table(rows).select(list(columns)).to_batches()
            for entry in manifest:
                with open_entry(self.folder, entry) as file:
                    _require_columns(file, columns, entry.name)
                    for batch in batching.batch_file(file, columns):
                        _require_values(batch, entry.name)
                        yield _as_written(batch.select(list(columns)), entry.name)

    def count(self) -> int:
        """Count the answers. `samples` may yield more, as prompts may share an answer."""
        if not self._has_journal:
            return sum(entry.rows for entry in self.manifest)
        with self._reading() as connection:
            query = "SELECT (SELECT coalesce(sum(rows), 0) FROM manifest) + (SELECT count(*) FROM answers)"
            return int(connection.execute(query).fetchone()[0])

    def lineages(self, *, sealed: bool = True) -> list[Lineage]:
        """One lineage a run that holds rows here: teacher, terms, purpose, duties, configuration hash.

        Two files that say different things of one run give two. `sealed=False` leaves the shards aside.
        """
        lineages: list[Lineage] = []
        if self._has_journal:  # the tail first: what is sealed meanwhile is met again among the shards
            with self._reading() as connection:
                rows = checked_rows(connection, "runs", self._store, "run IN (SELECT run FROM answers)")
                lineages += [Lineage.from_json(row["lineage_json"]) for row in rows]
        with hold_for_reading(self.folder):
            for entry in self._read_manifest() if sealed else ():
                with open_entry(self.folder, entry) as file:
                    lineages += lineages_in(file) or [
                        Lineage({})
                    ]  # a file without one must not pass unnoticed
        distinct = {lineage.to_json(): lineage for lineage in lineages}
        return sorted(distinct.values(), key=lambda lineage: lineage.run_id)

    def distinct(self, columns: Sequence[str], *, sealed: bool = True) -> list[dict[str, Any]]:
        """Return every distinct combination of values in some columns.

        Raises:
            StoreFormatError: a file lacks one of the columns.
        """
        distinct: dict[tuple[Any, ...], None] = {}
        if self._has_journal:
            with self._reading() as connection:
                for row in self._facts(connection, columns):
                    distinct[tuple(row[name] for name in columns)] = None
        with hold_for_reading(self.folder):
            for entry in self._read_manifest() if sealed else ():
                with open_entry(self.folder, entry) as file:
                    distinct.update(dict.fromkeys(_combinations(file, columns, self.folder / entry.name)))
        return [dict(zip(columns, values, strict=True)) for values in distinct]

    def verify(self) -> list[Finding]:
        """Verify all files and rows; return the findings, none when everything is as it was written."""
        with hold_for_reading(self.folder):
            return verify_store(
                self._store, self.folder, self._read_manifest(), has_journal=self._has_journal
            )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with (
            contextlib.closing(sqlite.open_for_reading(self._store)) as connection,
            sqlite.translate_errors(self._store / paths.JOURNAL),
            translate_value_errors(self._store / paths.JOURNAL),
        ):
            yield connection

    def _read_manifest(self) -> tuple[ShardEntry, ...]:
        if self._has_journal:
            with self._reading() as connection:
                return tuple(manifest_rows(connection, checked=not self._is_damaged))
        entries = []
        for number, path in enumerate(sorted(self.folder.glob("*.parquet"))):
            with open_unlisted(path) as file:
                entries.append(
                    ShardEntry(number, path.name, "", file.metadata.num_rows, path.stat().st_size, "", 0.0)
                )
        return tuple(entries)

    def _facts(self, connection: sqlite3.Connection, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Yield columns of unsealed answers; those of the terms check without parsing the answer."""
        if not set(columns) <= set(FACT_COLUMNS):
            for sample in self._tail(connection, columns):
                yield {name: getattr(sample, name) for name in columns}
            return
        lineages = _lineages(connection, self._store)
        known = set[tuple[int, str, str, str]]()
        for run, body_json, raw in connection.execute(SELECT_TERMS_COLUMNS):
            names = (run, *model_names(body_json, raw))
            if names not in known:
                known.add(names)
                yield terms_columns(*names[1:], lineages[run])

    def _tail(self, connection: sqlite3.Connection, wanted: Sequence[str]) -> Iterator[Sample]:
        lineages = _lineages(connection, self._store)
        asks = _Asks(connection, wanted)
        for rows in batching.batch_answers(connection.execute(f"{SELECT_ANSWERS} ORDER BY id")):
            require_unchanged("answers", rows, self._store)
            samples = [sample_of(row, lineages[row["run"]], wanted) for row in rows]
            yield from asks.fan_out([_projected(sample, wanted) for sample in samples], samples)

    def _sealed(
        self,
        manifest: Sequence[ShardEntry],
        wanted: Sequence[str],
        connection: sqlite3.Connection | None,
        texts: Mapping[str, Collection[str]],
    ) -> Iterator[Sample]:
        asks = None if connection is None else _Asks(connection, wanted)
        needed = list(wanted)
        if asks is not None and asks.are_any:
            needed = sorted({*wanted, "key", "prompt_id", "sample_index"})
            texts = {name: values for name, values in texts.items() if name not in _ASKED}
        for entry in manifest:
            with open_entry(self.folder, entry) as file:
                _require_columns(file, needed, entry.name)
                left = entry.rows
                for chosen in read_chosen(file, needed, texts):
                    left -= chosen.passed_over + chosen.batch.num_rows
                    _require_values(chosen.batch, entry.name)
                    samples = [from_row(row) for row in chosen.rows().to_pylist()]
                    if asks is None or not asks.are_any:
                        yield from samples
                        continue
                    shown = samples
                    if len(needed) > len(wanted):
                        shown = [_projected(sample, wanted) for sample in samples]
                    yield from asks.fan_out(shown, samples)
                if left:
                    raise StoreCorrupt(f"{left} of {entry.rows} rows are missing", place=entry.name)


class _Asks:
    """Looks up further prompts that share an answer, for a batch of samples at a time."""

    def __init__(self, connection: sqlite3.Connection, wanted: Sequence[str]) -> None:
        self._connection = connection
        self._wanted = set(wanted) & set(_ASKED)
        (exists,) = connection.execute("SELECT EXISTS (SELECT 1 FROM asks)").fetchone()
        self.are_any = bool(exists)

    def fan_out(self, shown: Sequence[Sample], samples: Sequence[Sample]) -> Iterator[Sample]:
        """Yield each sample, and a copy for every further row that asked, with its newest metadata.

        `samples` are the same rows with at least key, prompt id and sample number filled.
        """
        by_key = self._of([bytes.fromhex(sample.key) for sample in samples]) if self.are_any else {}
        for bare, full in zip(shown, samples, strict=True):
            rows_of_key = by_key.get(full.key)
            if rows_of_key is None:
                yield bare
                continue
            rows: dict[tuple[str, int], dict[str, Any]] = {(full.prompt_id, full.sample_index): {}}
            for row in rows_of_key:
                rows[row["prompt_id"], row["sample_index"]] = row
            for row in rows.values():
                yield replace(bare, **{name: row[name] for name in self._wanted if name in row})

    def _of(self, keys: Sequence[bytes]) -> dict[str, list[dict[str, Any]]]:
        holes = ",".join("?" * len(keys))
        query = f"{select_with_checksum('asks')} WHERE key IN ({holes}) ORDER BY id"
        by_key: dict[str, list[dict[str, Any]]] = {}
        for sample_index, key, asker, prompt_json, check in self._connection.execute(query, keys):
            if not is_unchanged((sample_index, key, asker, prompt_json), 1, check):
                raise damaged_row_error("asks", key.hex(), Path(paths.JOURNAL))
            by_key.setdefault(key.hex(), []).append(prompt_columns(prompt_json, sample_index))
        return by_key


def _lineages(connection: sqlite3.Connection, store: Path) -> dict[int, Lineage]:
    rows = checked_rows(connection, "runs", store / paths.JOURNAL)
    return {row["run"]: Lineage.from_json(row["lineage_json"]) for row in rows}


def _require_columns(file: pq.ParquetFile, wanted: Sequence[str], place: str) -> None:
    """Refuse a file that lacks a column, has it twice, or holds values of another kind in it.

    Raises:
        StoreFormatError: names the columns.
    """
    names = file.schema_arrow.names
    wrong = [name for name in wanted if names.count(name) != 1 and name not in ADDED_COLUMNS - set(names)]
    if wrong:
        raise StoreFormatError(
            f"lacks columns, or has them twice: {', '.join(wrong)}", place=place, remedy=_OURS
        )
    for name in wanted:
        if name in names and (what := foreign_columns.unreadable_type(file.schema_arrow.field(name))):
            raise StoreFormatError(what, place=place, remedy=foreign_columns.REMEDY)


def _require_values(batch: pa.RecordBatch, place: str) -> None:
    """Refuse nulls in columns that always have a value, and values that no harvest writes.

    Raises:
        StoreCorrupt, StoreFormatError: names the column.
    """
    if names := columns_with_nulls(batch):
        raise StoreCorrupt(f"column {names[0]} lacks values", place=place)
    if what := foreign_columns.odd_values(batch):
        raise StoreFormatError(what, place=place, remedy=foreign_columns.REMEDY)


def _as_written(batch: pa.RecordBatch, place: str) -> pa.RecordBatch:
    """Return the columns of a batch in the types of the schema.

    Raises:
        StoreFormatError: a value can't be converted.
    """
    try:
        return foreign_columns.as_written(batch)
    except pa.ArrowException as error:
        message = f"a column can't be converted: {error}"
        raise StoreFormatError(message, place=place, remedy=foreign_columns.REMEDY) from None


def _projected(sample: Sample, wanted: Sequence[str]) -> Sample:
    return from_row({name: getattr(sample, name) for name in wanted})


def _combinations(file: pq.ParquetFile, columns: Sequence[str], place: Path) -> Iterator[tuple[Any, ...]]:
    present = [name for name in columns if name in file.schema_arrow.names]
    held_to = any(lineage.providers for lineage in lineages_in(file))  # then the column was written
    if lacking := sorted(set(columns) - set(present) - (frozenset() if held_to else ADDED_COLUMNS)):
        raise StoreFormatError(f"lacks columns: {', '.join(lacking)}", place=str(place), remedy=_OURS)
    for batch in file.iter_batches(columns=present):
        held = pa.Table.from_batches([batch]).group_by(present).aggregate([])
        yield from (tuple(row.get(name, "") for name in columns) for row in held.to_pylist())
