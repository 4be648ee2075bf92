"""Purge answers: remove them from a store for good.

Shards are rewritten without them, freed pages of the journal are overwritten, and damaged shards in
quarantine are deleted as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

import pyarrow.compute as pc

from harvester.api.request_key import KEY_BYTES
from harvester.errors import ConfigError, StoreError
from harvester.store import paths
from harvester.store.journal.journal import Journal
from harvester.store.journal.ledger import count_purged
from harvester.store.journal.lock import StoreLock
from harvester.store.journal.rows import forget_finished
from harvester.store.journal.sqlite import has_table
from harvester.store.maintain import quarantine
from harvester.store.reader import Corpus
from harvester.store.shards.manifest import indexed_keys, read_manifest
from harvester.store.shards.parquet_file import open_shard
from harvester.store.shards.rewrite import rewrite
from harvester.store.shards.sample import prompt_columns
from harvester.store.shards.seal import finish_interrupted
from harvester.store.shards.steps import run_to_end
from harvester.store.where import Where

_TABLES = ("answers", "keys", "dead", "asks", "failures", "intents")
_PATIENCE_S = 10.0
_PAUSE_S = 0.2
_SHOWN = "keys and prompt ids are columns of the shards, of `harvester export` and of dead_letters.jsonl"


def purge(journal: Journal, store: Path, keys: Collection[bytes]) -> int:
    """Remove keys from journal and shards for good; return how many of them were held.

    Freed pages are overwritten and the write-ahead log is emptied. Damaged shards and logs in quarantine are
    deleted: it is unknown what they hold, and their readable rows were saved. Counters keep their sums.

    Raises:
        ConfigError: the store knows none of the keys.
        StoreError: the disk refuses; or the answers are removed, but a reader still holds old pages of the
            journal, so they are not overwritten yet; StoreFull, StoreCorrupt by cause.
    """
    wanted = set(keys)
    finish_interrupted(journal, store)
    held = journal.look_up(sorted(wanted))
    for entry in read_manifest(journal):
        if wanted & indexed_keys(journal, entry):
            run_to_end(rewrite(journal, store, [entry], without=wanted))
    removed = len(held)
    with journal.writing() as connection:
        forget_finished(connection)
        count_purged(connection, [entry.outcome for entry in held.values() if entry.state == "answered"])
        for table in (*_TABLES, *(["batch_rows"] if has_table(connection, "batch_rows") else [])):
            removed += connection.executemany(
                f"DELETE FROM {table} WHERE key = ?",  # noqa: S608 - our own names
                [(key,) for key in sorted(wanted)],
            ).rowcount
    if removed <= 0:  # -1 where there was nothing to try
        raise ConfigError("no answer or dead letter has this key", place=str(store), remedy=_SHOWN)
    quarantine.delete_damaged(store)
    journal.write_dead_letters(store)
    _overwrite(journal)
    return len(held)


def _overwrite(journal: Journal) -> None:
    """Checkpoint the overwritten pages into journal.db and empty its write-ahead log."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        with journal.reading() as connection:
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if not busy:
            return
        if time.monotonic() > until:
            raise StoreError(
                "purged, but another process still reads old pages of the journal",
                place=str(journal.path),
                remedy="end that reader; the next `harvester seal` of this store, or run, overwrites them",
            )
        time.sleep(_PAUSE_S)


def find_keys_of_prompt(journal: Journal, store: Path, prompt_id: str) -> set[bytes]:
    """Return every key that a row of this prompt asked for."""
    keys: set[bytes] = set()
    with journal.reading() as connection:
        for table in ("answers", "asks", "dead"):
            for key, text in connection.execute(f"SELECT key, prompt_json FROM {table}"):  # noqa: S608
                if prompt_columns(text, 0)["prompt_id"] == prompt_id:
                    keys.add(key)
    for entry in read_manifest(journal):
        with open_shard(store / paths.SHARDS / entry.name) as file:
            for batch in file.iter_batches(columns=["key", "prompt_id"]):
                mask = pc.equal(batch.column("prompt_id"), prompt_id)
                keys |= {bytes.fromhex(text) for text in batch.filter(mask).column("key").to_pylist()}
    return keys


def purge_store(store: Path, key: str | None, prompt_id: str | None, where: Where | None = None) -> int:
    """Purge a key, a prompt, or the answers of a condition (`harvester purge`); return how many were removed.

    Raises:
        ConfigError: not exactly one of the three, no key at all, or none that the store knows.
        StoreLocked, StoreError.
    """
    if sum(choice is not None for choice in (key, prompt_id, where)) != 1:
        raise ConfigError("name a KEY, a --prompt-id or a --where", remedy=_SHOWN)
    if where is not None and where.chooses_all:
        raise ConfigError(
            "the condition chooses every answer",
            place="--where",
            remedy="name a field; to remove all answers, delete the folder of the store",
        )
    wanted = set() if key is None else {_key_of(key)}
    Journal.open(store, read_only=True).close()
    with StoreLock(store, started_at=time.time()), closing(Journal.open(store)) as journal:
        journal.end_killed_runs()  # budgets keep what their attempts in flight were charged
        if key is None:
            finish_interrupted(journal, store)
        if prompt_id is not None:
            wanted = find_keys_of_prompt(journal, store, prompt_id)
            if not wanted:
                raise ConfigError(f"no prompt {prompt_id!r} asked here", place=str(store), remedy=_SHOWN)
        if where is not None:
            chosen = Corpus.open(store).samples(["key"], where=where.bind(store))
            wanted = {bytes.fromhex(sample.key) for sample in chosen}
            if not wanted:
                raise ConfigError(
                    f"no answer here is one with {where.text}",
                    place=str(store),
                    remedy="`harvester export STORE OUT --where ...` shows what a condition chooses",
                )
        return purge(journal, store, wanted)


def _key_of(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"{text!r} is not a key: a key has 64 hex digits", remedy="`--prompt-id ID` removes by prompt id"
        )
    return key
