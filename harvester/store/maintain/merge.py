"""Merge stores, such as those of the shards of a harvest, into a new one: each key once, nothing asked again.

Sealed files are linked, or copied where the disk has no links; a file with an answer that another store
holds too is written without it. Runs with their lineage and counters, failed rows, further prompts, and
attempts that may have been billed are taken over. Stores of different teachers, purposes or terms are
refused.

The new store is made beside OUT under a hidden name and renamed when it is whole and verified. Each file that
is taken over is one transaction, so the same call after a kill goes on where that stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from harvester.errors import ConfigError, StoreCorrupt, StoreError
from harvester.store import paths, terms_check
from harvester.store.journal import sqlite
from harvester.store.journal.adoptions import require_complete
from harvester.store.journal.batches import waiting_in_batches
from harvester.store.journal.copies import insert_row
from harvester.store.journal.journal import KEYS_PER_LOOKUP, Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.journal.merged_from import MERGE, note_sources
from harvester.store.journal.meta_values import read_value, write_values
from harvester.store.journal.records import ShardEntry, asker_digest, prompt_json
from harvester.store.maintain.ledgers import Ledgers, Source
from harvester.store.maintain.seal_task import last_target_bytes
from harvester.store.reader import Corpus
from harvester.store.shards import swap, unlisted
from harvester.store.shards.manifest import index_rows, insert_keys, insert_new_entry, read_manifest
from harvester.store.shards.parquet_file import check_written_file, translate_disk_errors
from harvester.store.shards.proved import open_entry
from harvester.store.shards.recover_rows import prompt_of
from harvester.store.shards.rewrite import write_without
from harvester.store.shards.seal import finish_interrupted, seal
from harvester.store.shards.steps import run_to_end
from harvester.system.failpoints import reach
from harvester.system.files import fsync
from harvester.system.objects.url import require_local

# Fields of a lineage in which merged stores may not differ, in the words of the refusal.
_ALIKE = ("teacher", "model", "purpose", "mock", "terms", "permission", "duties")


@dataclass(frozen=True, slots=True)
class Merged:
    """What `merge` made.

    Attributes:
        answers, failed: answers and dead letters in the new store.
        repeated: answers left out, since another store holds one with the same key.
        was_there: OUT is the result of an earlier merge of the same stores; nothing was done.
        notes: what was not taken over.
    """

    stores: int
    answers: int = 0
    failed: int = 0
    repeated: int = 0
    shards: int = 0
    was_there: bool = False
    notes: tuple[str, ...] = ()


def merge(stores: Sequence[Path], out: Path) -> Merged:
    """Merge stores into a new one (`harvester merge`).

    Raises:
        ConfigError: they must not be mixed, OUT is there, or a path is no store or named twice.
        TermsRefused: unsealed answers of a store may not be sealed.
        StoreLocked: a run holds one of them. StoreError, StoreCorrupt: the disk refuses; a file is damaged.
    """
    _require_different(stores, out)
    for store in stores:
        Journal.open(store, read_only=True).close()
        terms_check.require_permitted(Corpus.open(store), "seal", store.resolve().parent)
    with contextlib.ExitStack() as stack:
        sources = [_opened(store, stack) for store in stores]
        _require_alike(sources)
        plan = _digest_of(sources)
        if out.exists():
            return _earlier(out, plan, len(stores))
        staged = out.with_name(f".{out.name}.merging")
        with StoreLock(staged, started_at=time.time()), closing(_staged_journal(staged, plan)) as journal:
            _Merge(journal, staged, sources).run()
            merged = _counts(journal, len(stores))
        notes = _not_taken(sources)
    reach("merge.before_rename")
    with translate_disk_errors(out):
        (staged / paths.LOCK).unlink(missing_ok=True)
        staged.rename(out)
        fsync(out.resolve().parent)
    reach("merge.after_rename")
    return replace(merged, notes=notes)


def _require_different(stores: Sequence[Path], out: Path) -> None:
    """Refuse arguments that name no store, a store twice, or no place for a new folder.

    Raises:
        ConfigError: names the argument, and what to do.
    """
    for path in (*stores, out):
        require_local(path)
    if len(stores) < 2:
        raise ConfigError("name at least two stores, and OUT", remedy="harvester merge store-*-of-8 store")
    for store in stores:
        if not store.is_dir() or not sqlite.has_journal(store):
            problem = "is a file, and a store is a folder" if store.is_file() else "no store is here"
            raise ConfigError(problem, place=f"STORE {store}", remedy="name folders with a journal.db")
    _require_place(out)
    resolved, new = [store.resolve() for store in stores], out.resolve()
    for store, path in zip(stores, resolved, strict=True):
        if resolved.count(path) > 1:
            raise ConfigError(
                "is named twice",
                place=f"STORE {store}",
                remedy="name each store once, then OUT, a new folder",
            )
        if path == new or path in new.parents:
            where = "is one of the stores" if path == new else f"lies inside the store {store}"
            raise ConfigError(
                f"{where}, and OUT is a new folder",
                place=f"OUT {out}",
                remedy="name a new folder outside of every store; OUT is the last argument",
            )


def _require_place(out: Path) -> None:
    """Refuse an OUT where no folder can be made: a file or a link to nothing lies there, or above it.

    Raises:
        ConfigError: names OUT and what lies there.
    """
    remedy = "OUT, the last argument, is a new folder"
    if out.is_symlink() and not out.exists():
        raise ConfigError(
            "is a link to nothing", place=f"OUT {out}", remedy=f"{remedy}: remove the link, or name another"
        )
    if out.exists() and not out.is_dir():
        raise ConfigError("is a file", place=f"OUT {out}", remedy=f"{remedy}: name another path")
    above = next(
        (folder for folder in out.absolute().parents if folder.is_symlink() or folder.exists()), None
    )
    if above is not None and not above.is_dir():
        raise ConfigError(f"{above} is no folder", place=f"OUT {out}", remedy=f"{remedy}: name another path")


def _opened(store: Path, stack: contextlib.ExitStack) -> Source:
    """Lock a store, finish what was interrupted in it, and seal its answers.

    Raises:
        StoreLocked: a run holds it. ConfigError: its batches wait.
    """
    stack.enter_context(StoreLock(store, started_at=time.time()))
    journal = stack.enter_context(Journal.open(store))
    journal.end_killed_runs()
    finish_interrupted(journal, store)
    seal(journal, store, target_bytes=last_target_bytes(journal), everything=True)
    with journal.reading() as connection:
        require_complete(connection, store)
        waiting = waiting_in_batches(connection)
    if waiting.batches:
        raise ConfigError(waiting.note(), place=str(store), remedy="collect them with `harvester run`")
    return Source.of(journal, store)


def _require_alike(sources: Sequence[Source]) -> None:
    """Refuse to mix rows: what the other stores hold must be among what one of them holds already.

    Raises:
        ConfigError: names the stores and in what they differ.
    """
    kinds = {source: source.kinds() for source in sources}
    reference = max(sources, key=lambda source: len(kinds[source]))
    for source in sources:
        other = sorted(kinds[source] - kinds[reference])
        if other:
            nearest = min(
                kinds[reference], key=lambda kind: sum(a != b for a, b in zip(kind, other[0], strict=True))
            )
            changes = [
                f"{name} {theirs or 'none'}, not {ours or 'none'}"
                for name, theirs, ours in zip(_ALIKE, other[0], nearest, strict=True)
                if theirs != ours
            ]
            raise ConfigError(
                f"holds answers with {'; '.join(changes)} as in {reference.path}",
                place=str(source.path),
                remedy="merge only stores of one teacher, purpose and terms; a teacher with several "
                "addresses needs [teacher] identity (`harvester adopt`)",
            )


def _digest_of(sources: Sequence[Source]) -> str:
    """Return a digest of all that is merged, so that a merge goes on only with the same stores."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(orjson.dumps(source.state()))
    return digest.hexdigest()


def _earlier(out: Path, plan: str, stores: int) -> Merged:
    """Return the counts of an earlier merge of the same stores.

    Raises:
        ConfigError: something else is there.
    """
    if sqlite.has_journal(out):
        with Journal.open(out, read_only=True) as journal:
            progress = _progress(journal)
            if progress.plan == plan and progress.is_complete:
                return replace(_counts(journal, stores), was_there=True)
    raise ConfigError(
        "is there, and is not the merge of these stores as they are now",
        place=str(out),
        remedy="name a new folder; to add a store to a merged one, merge both into a third",
    )


@dataclass(slots=True)
class _Progress:
    """How far a merge has come.

    Attributes:
        done: sealed files that were taken over, of all stores in order.
        repeated: answers left out.
        added, left_out: answers of a store and run by outcome, as `Ledgers` needs them.
    """

    plan: str = ""
    done: int = 0
    repeated: int = 0
    added: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    is_complete: bool = False

    def note(self, connection: sqlite3.Connection) -> None:
        """Write it, inside an open transaction."""
        value = {name: getattr(self, name) for name in self.__slots__}
        write_values(connection, {MERGE: value})


def _progress(journal: Journal) -> _Progress:
    with journal.reading() as connection:
        return _Progress(**(read_value(connection, MERGE) or {}))


def _staged_journal(staged: Path, plan: str) -> Journal:
    """Open the half-made store of the same merge, or make a new one.

    Raises:
        StoreError: the disk refuses.
    """
    journal = _journal_of_same_merge(staged, plan)
    if journal is None:
        with translate_disk_errors(staged):
            for path in staged.iterdir():
                if path.name == paths.LOCK:
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            (staged / paths.SHARDS).mkdir(mode=0o700)
        journal = Journal.open(staged)
        with journal.writing() as connection:
            _Progress(plan).note(connection)
    with translate_disk_errors(staged):
        folder = staged / paths.SHARDS
        for _, stray in unlisted.unlisted_files(folder, journal.next_shard() - 1):
            stray.unlink()  # its transaction was not reached
        for hidden in folder.glob(".part-*.tmp"):
            hidden.unlink()
    return journal


def _journal_of_same_merge(staged: Path, plan: str) -> Journal | None:
    if not (staged / paths.JOURNAL).exists():
        return None
    try:
        journal = Journal.open(staged)
    except StoreError:  # half made
        return None
    if _progress(journal).plan == plan:
        return journal
    journal.close()
    return None


class _Merge:
    """Takes the sealed files of all stores over, then their ledgers, then verifies the new store."""

    def __init__(self, journal: Journal, staged: Path, sources: Sequence[Source]) -> None:
        self._journal = journal
        self._staged = staged
        self._folder = staged / paths.SHARDS
        self._sources = sources
        self._progress = _progress(journal)
        self._runs_of_shard: dict[int, dict[bytes, str]] = {}

    def run(self) -> None:
        """Make the new store.

        Raises:
            StoreCorrupt: it is not what was merged.
        """
        entries = [(source, entry) for source in self._sources for entry in read_manifest(source.journal)]
        for source, entry in entries[self._progress.done :]:
            with translate_disk_errors(self._folder):
                self._take(source, entry)
            reach("merge.after_shard")
        if not self._progress.is_complete:
            reach("merge.before_ledger")
            with self._journal.writing() as connection:
                Ledgers(self._sources, self._progress.added, self._progress.left_out).write(connection)
                note_sources(connection, [source.path for source in self._sources], time.time())
                self._progress.is_complete = True
                self._progress.note(connection)
            reach("merge.after_ledger")
        self._journal.write_dead_letters(self._staged)
        if findings := Corpus.open(self._staged).verify():
            raise StoreCorrupt(f"the merged store is damaged: {findings[0]}", place=str(self._staged))

    def _take(self, source: Source, entry: ShardEntry) -> None:
        """Take one sealed file over, without the answers that are held already."""
        path = source.path / paths.SHARDS / entry.name
        with source.journal.reading() as connection:
            rows = index_rows(connection, entry.shard)
        held = self._held([row[0] for row in rows])
        facts = _facts(source.path / paths.SHARDS, entry, {key.hex() for key in held})
        shard = self._journal.next_shard()
        if not held:
            name = f"part-{shard:08d}-{entry.sha256[:16]}.parquet"
            swap.link(path, self._folder / name)
            new: ShardEntry | None = replace(entry, shard=shard, name=name)
        else:
            new = self._written_without(path, shard, entry, held)
        fsync(self._folder)
        reach("merge.after_link")
        askers = list(self._further_askers(rows, facts.left_out))
        progress = self._progress
        for counts, added in ((progress.added, facts.added), (progress.left_out, self._named(facts, held))):
            for name, count in added.items():
                key = f"{self._sources.index(source)}|{name}"
                counts[key] = counts.get(key, 0) + count
        progress.done += 1
        progress.repeated += len(held)
        with self._journal.writing() as written:
            if new is not None:
                insert_new_entry(written, new)
                insert_keys(written, new.shard, [row for row in rows if row[0] not in held])
            for ask in askers:
                insert_row(written, "asks", ask)
            progress.note(written)
            reach("merge.before_commit")

    def _written_without(
        self, path: Path, shard: int, entry: ShardEntry, held: Mapping[bytes, int]
    ) -> ShardEntry | None:
        """Write a file without these answers; None where none are left."""
        hidden = self._folder / f".part-{shard:08d}.tmp"
        keys = write_without(hidden, path, {key.hex() for key in held})
        if not keys:
            hidden.unlink()
            return None
        new = run_to_end(check_written_file(hidden, shard, keys, entry.lineage_digest))
        hidden.rename(self._folder / new.name)
        return new

    def _held(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """Return the keys that the new store holds, and the shards where they lie."""
        held: dict[bytes, int] = {}
        with self._journal.reading() as connection:
            for start in range(0, len(keys), KEYS_PER_LOOKUP):
                chunk = keys[start : start + KEYS_PER_LOOKUP]
                holes = ",".join("?" * len(chunk))
                query = f"SELECT key, shard FROM keys WHERE key IN ({holes})"  # noqa: S608
                held.update(connection.execute(query, chunk))
        return held

    def _named(self, facts: _Facts, held: Mapping[bytes, int]) -> Counter[str]:
        """Count the answers left out by run, outcome, and whether the held one is of the same run."""
        counts: Counter[str] = Counter()
        for row in facts.left_out:
            same = self._run_of(bytes.fromhex(row["key"]), held) == row["run_id"]
            counts[f"{row['run_id']}|{row['outcome']}|{'same' if same else 'other'}"] += 1
        return counts

    def _run_of(self, key: bytes, held: Mapping[bytes, int]) -> str:
        """Return the run of an answer in the new store."""
        shard = held[key]
        if shard not in self._runs_of_shard:
            self._runs_of_shard = {}  # neighbours lie in one shard: remember one
            entry = next(each for each in read_manifest(self._journal) if each.shard == shard)
            with open_entry(self._folder, entry) as file:
                table = file.read(["key", "run_id"])
            keys = [bytes.fromhex(text) for text in table["key"].to_pylist()]
            runs = dict(zip(keys, table["run_id"].to_pylist(), strict=True))
            self._runs_of_shard[shard] = runs
        return self._runs_of_shard[shard][key]

    def _further_askers(
        self, rows: Sequence[tuple[bytes, int, int | None, bytes]], left_out: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """Yield rows of `asks` for the prompts of answers left out: they share the answer that is held."""
        with self._journal.reading() as connection:
            for row in left_out:
                key, prompt = bytes.fromhex(row["key"]), prompt_of(row)
                asker = asker_digest(prompt, row["sample_index"])
                query = (
                    "SELECT EXISTS (SELECT 1 FROM keys WHERE key = ?1 AND asker = ?2)"
                    " OR EXISTS (SELECT 1 FROM asks WHERE key = ?1 AND asker = ?2)"
                )
                if connection.execute(query, (key, asker)).fetchone()[0]:
                    continue
                text = prompt_json(prompt).decode()
                values = {"key": key, "asker": asker, "sample_index": row["sample_index"]}
                yield {**values, "prompt_json": text}


@dataclass(frozen=True, slots=True)
class _Facts:
    """Rows of one sealed file: those taken over by "run|outcome", and those left out, with their prompts."""

    added: Counter[str]
    left_out: list[Mapping[str, Any]]


def _facts(folder: Path, entry: ShardEntry, held: set[str]) -> _Facts:
    columns = ("key", "run_id", "outcome")
    asked = ("prompt_id", "sample_index", "reference", "tags", "metadata_json", "source_file", "source_line")
    added, left_out = Counter[str](), list[Mapping[str, Any]]()
    with open_entry(folder, entry) as file:
        for batch in file.iter_batches(columns=[*columns, *(asked if held else ())]):
            for row in batch.to_pylist():
                if row["key"] in held:
                    left_out.append(row)
                else:
                    added[f"{row['run_id']}|{row['outcome']}"] += 1
    return _Facts(added, left_out)


def _counts(journal: Journal, stores: int) -> Merged:
    with journal.reading() as connection:
        answers, failed, shards = (
            int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608
            for table in ("keys", "dead", "manifest")
        )
    return Merged(stores, answers, failed, _progress(journal).repeated, shards)


def _not_taken(sources: Sequence[Source]) -> tuple[str, ...]:
    with_canaries = [str(source.path) for source in sources if (source.path / paths.CANARY).exists()]
    if not with_canaries:
        return ()
    return (f"canaries stay where they are: {', '.join(with_canaries)}",)
