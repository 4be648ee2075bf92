"""Adopt the answers of a teacher that was named by its address, by an identity; nothing is asked or paid.

The address is part of every request key, so a teacher that moves would have to be paid again. Here the keys
of its rows are computed again with `[teacher] identity` in the place of the address. A row is adopted only if
its old key is proved to be that of its request. It keeps its lineage, and its old key as `former_key`.

Shards are rewritten one by one, and exchanged as merging and purge do it. A kill at any instant leaves a
valid store, in which no run starts before the same call has completed the work.
"""

from __future__ import annotations

import itertools
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from harvester.api.request_key import request_key
from harvester.api.scoring.request_forms import endpoint_in_key
from harvester.config.teacher_section import TEACHER_NAME
from harvester.errors import ConfigError
from harvester.store import paths, terms_check
from harvester.store.journal.adoptions import Adoption, note_adoption, read_adoptions
from harvester.store.journal.batches import waiting_in_batches
from harvester.store.journal.checksums import checked_rows
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.journal.records import ShardEntry
from harvester.store.journal.rows import forget_finished
from harvester.store.maintain.seal_task import last_target_bytes
from harvester.store.reader import Corpus
from harvester.store.shards.manifest import read_manifest, rename_rows
from harvester.store.shards.parquet_file import FORMER_KEY, open_shard
from harvester.store.shards.recover_rows import EPOCHS
from harvester.store.shards.rewrite import rewrite
from harvester.store.shards.seal import finish_interrupted, seal
from harvester.store.shards.steps import run_to_end
from harvester.system.failpoints import reach
from harvester.terms.lineage import Lineage

_ROWS_PER_SLICE = 512
_COLUMNS = ("key", "run_id", "sample_index", "request_json")


@dataclass(frozen=True, slots=True)
class Adopted:
    """What `adopt` did.

    Attributes:
        rows, dead: answers and dead letters with a new key.
        already: answers of this address that had it before.
        held: answers that keep their key, since the store holds another answer under the new one.
        unproved: keys that are not those of their requests; these rows keep them.
    """

    identity: str
    address: str
    rows: int = 0
    dead: int = 0
    already: int = 0
    held: int = 0
    unproved: tuple[str, ...] = ()


@dataclass(slots=True)
class _Runs:
    """Runs of one address by id and number: the epoch of each. Counts what is met on the way."""

    identity: str
    address: str
    epochs: dict[str, int]
    ids: dict[int, str]
    already: int = 0
    held: int = 0
    unproved: list[str] = field(default_factory=list)

    def new_key(self, key: bytes, run_id: str, body: Mapping[str, Any], sample_index: int) -> bytes | None:
        """Return the key under the identity; None for a row that keeps its key."""
        if run_id not in self.epochs:
            return None
        old, new = (endpoint_in_key(name, body) for name in (self.address, self.identity))
        for epoch in itertools.chain([self.epochs[run_id]], range(EPOCHS)):
            if request_key(old, body, sample_index, epoch) == key:
                return request_key(new, body, sample_index, epoch)
            if request_key(new, body, sample_index, epoch) == key:
                self.already += 1
                return None
        self.unproved.append(key.hex())
        return None


def adopt(store: Path, identity: str, address: str | None = None) -> Adopted:
    """Adopt the answers of the teacher at `address` (`harvester adopt`).

    Args:
        address: base URL of the runs that asked; None: the only one of the store.

    Raises:
        ConfigError: there are several addresses, or none of this name; batches wait.
        TermsRefused: unsealed answers may not be sealed. StoreLocked, StoreError, StoreCorrupt by cause.
    """
    if re.fullmatch(TEACHER_NAME, identity) is None:
        raise ConfigError(
            f"{identity!r} is no identity",
            place="--identity",
            remedy="letters, digits, `.`, `_` and `-`, as in team-llama-70b",
        )
    Journal.open(store, read_only=True).close()  # a folder that is no store must not become one
    terms_check.require_permitted(Corpus.open(store), "seal", store.resolve().parent)
    with StoreLock(store, started_at=time.time()), closing(Journal.open(store)) as journal:
        journal.end_killed_runs()
        finish_interrupted(journal, store)
        runs = _runs_of(journal, store, identity, address)
        _require_no_batches(journal, store)
        seal(journal, store, target_bytes=last_target_bytes(journal), everything=True)
        adoption = Adoption(runs.address, identity, time.time(), is_complete=False)
        with journal.writing() as connection:
            note_adoption(connection, adoption)
        reach("adopt.after_note")
        rows = sum(_adopt_shard(journal, store, entry, runs) for entry in read_manifest(journal))
        dead = _adopt_dead(journal, runs)
        with journal.writing() as connection:
            note_adoption(connection, replace(adoption, is_complete=True))
            forget_finished(connection)
        journal.write_dead_letters(store)
        return Adopted(identity, runs.address, rows, dead, runs.already, runs.held, tuple(runs.unproved))


def _runs_of(journal: Journal, store: Path, identity: str, address: str | None) -> _Runs:
    """Return the runs of the address; it may be left out where the store has only one.

    Raises:
        ConfigError: it has none, or several, or the address was adopted by another identity.
    """
    with journal.reading() as connection:
        rows = checked_rows(connection, "runs", journal.path)
        adoptions = read_adoptions(connection)
    by_address: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if teacher := address_of(Lineage.from_json(row["lineage_json"])):
            by_address.setdefault(teacher, []).append(row)
    known = ", ".join(by_address) or "none"
    if address is None and len(by_address) == 1:
        (address,) = by_address
    if address not in by_address:
        problem = "its teachers have these addresses" if address is None else f"no run asked {address}, but"
        raise ConfigError(f"{problem}: {known}", place=str(store), remedy="--from URL names one of them")
    before = adoptions.get(address)
    if before is not None and before.identity != identity:
        raise ConfigError(
            f"{address} was adopted by {before.identity!r}", place=str(store), remedy="use this identity"
        )
    chosen = by_address[address]
    epochs = {
        row["run_id"]: int(orjson.loads(row["config_json"]).get("run", {}).get("epoch", 0)) for row in chosen
    }
    return _Runs(identity, address, epochs, {row["run"]: row["run_id"] for row in chosen})


def address_of(lineage: Lineage) -> str:
    """Return the address in a teacher's id; "" for one that is named by an identity."""
    name = lineage.teacher_name
    return name if "://" in name else ""


def _require_no_batches(journal: Journal, store: Path) -> None:
    """Refuse a store whose batches wait: their lines are known to the provider by the keys of now."""
    with journal.reading() as connection:
        waiting = waiting_in_batches(connection)
    if waiting.batches:
        raise ConfigError(
            waiting.note(), place=str(store), remedy="collect them with `harvester run`, then adopt"
        )


def _adopt_shard(journal: Journal, store: Path, entry: ShardEntry, runs: _Runs) -> int:
    """Rewrite a shard with the new keys of its rows; return how many there are."""
    new_keys: dict[str, str] = {}
    with open_shard(store / paths.SHARDS / entry.name) as file:
        for batch in file.iter_batches(_ROWS_PER_SLICE, columns=list(_COLUMNS)):
            new_keys |= _free(journal, runs, _sealed_keys(batch.to_pylist(), runs))
    if not new_keys:
        return 0

    def change(table: pa.Table) -> pa.Table:
        keys = table["key"].to_pylist()
        columns = {
            "key": [new_keys.get(key, key) for key in keys],
            FORMER_KEY: [
                key if key in new_keys else former
                for key, former in zip(keys, table[FORMER_KEY].to_pylist(), strict=True)
            ],
        }
        for name, values in columns.items():
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(name), pa.array(values, pa.string()))
        return table

    run_to_end(rewrite(journal, store, [entry], change=change))
    reach("adopt.after_shard")
    return len(new_keys)


def _sealed_keys(rows: Sequence[Mapping[str, Any]], runs: _Runs) -> dict[bytes, bytes]:
    pairs = {}
    for row in rows:
        key, body = bytes.fromhex(row["key"]), orjson.loads(row["request_json"])
        new = runs.new_key(key, row["run_id"], body, row["sample_index"])
        if new is not None:
            pairs[key] = new
    return pairs


def _free(journal: Journal, runs: _Runs, pairs: Mapping[bytes, bytes]) -> dict[str, str]:
    """Return those whose new key holds no answer, in hex."""
    held = journal.look_up(list(pairs.values()))
    answered = {key for key, entry in held.items() if entry.state == "answered"}
    runs.held += sum(new in answered for new in pairs.values())
    return {old.hex(): new.hex() for old, new in pairs.items() if new not in answered}


def _adopt_dead(journal: Journal, runs: _Runs) -> int:
    """Give dead letters new keys; return how many."""
    with journal.writing() as connection:
        pairs = dict(_dead_keys(connection, runs))
        taken = set(journal.look_up(list(pairs.values())))
        pairs = {old: new for old, new in pairs.items() if new not in taken}
        for old, new in pairs.items():
            for table in ("dead", "asks", "intents", "failures"):
                rename_rows(connection, table, {old: new})
    return len(pairs)


def _dead_keys(connection: sqlite3.Connection, runs: _Runs) -> Iterator[tuple[bytes, bytes]]:
    query = "SELECT key, run, sample_index, body_json FROM dead"
    for key, run, sample_index, body_json in connection.execute(query).fetchall():
        if run in runs.ids:
            counts = runs.already
            new = runs.new_key(key, runs.ids[run], orjson.loads(body_json), sample_index)
            runs.already = counts  # of answers alone
            if new is not None:
                yield key, new
