"""Repair and purge: the two verbs that take rows out of a store.

Repair moves damaged and foreign files into `quarantine/`, never deletes one, keeps every row that still
reads, and forgets only keys whose answers are gone, so that the next run asks for exactly these again.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow.compute as pc

from harvester import finished
from harvester.bill import Bill, bill_of
from harvester.corpus import Corpus
from harvester.database import OUTCOME_CODES, checksum
from harvester.errors import ConfigError, HarvesterError, StoreCorrupt
from harvester.findings import Finding
from harvester.journal import Journal
from harvester.ledger import ceiling
from harvester.lock import StoreLock, is_held
from harvester.manifest import enter, keys_in, manifest_of
from harvester.proof import proven
from harvester.records import ShardEntry
from harvester.rewriting import rewrite, tidy
from harvester.shard_file import (
    FOLDER,
    NAME,
    digest_of,
    disk,
    lineage_digest,
    lineages_in,
    opened,
    sync_folder,
)
from harvester.shards import seal

QUARANTINE = "quarantine"
_SHARD_FINDINGS = frozenset({"missing", "torn", "changed", "damaged", "disagrees"})
_TABLES = ("answers", "keys", "dead", "asks", "failures", "intents")


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair did: files moved away, rows saved from them, keys that will be asked again."""

    quarantined: tuple[str, ...]
    saved: int
    lost: tuple[str, ...]


def mend(journal: Journal, store: Path) -> Repaired:
    """Quarantine what is damaged or foreign, keep what still reads, forget what is gone.

    Raises:
        StoreCorrupt: the journal itself is damaged: no program can tell what it held.
        StoreError, StoreFull: the disk refuses.
    """
    tidy(journal, store)
    seal(journal, store, target_bytes=1, everything=False)  # adopts what a crash left half sealed
    findings = Corpus.open(store).verify()
    for one in findings:
        if not one.place.startswith((f"{FOLDER}/", "shard ")):
            raise StoreCorrupt(
                one.message, place=one.place,
                remedy="restore journal.db from a copy; the shards stay readable as they are",
            )  # fmt: skip
    if _reinstate(journal, store):
        findings = Corpus.open(store).verify()
    moved: list[str] = []
    saved, lost = 0, set[bytes]()
    by_name = {entry.name: entry for entry in manifest_of(journal)}
    for name in sorted({one.place.removeprefix(f"{FOLDER}/") for one in findings if _in_folder(one)}):
        entry = by_name.get(name)
        if (store / FOLDER / name).exists():
            _copy_away(store, name, keep=entry is not None)
            moved.append(name)
        if entry is not None:
            _reindex(journal, store, entry)
            indexed = len(keys_in(journal, entry))
            gone = _drain(rewrite(journal, store, [entry], salvage=True))
            lost |= gone
            saved += indexed - len(gone)
    lost |= _forget_strays(journal)
    return Repaired(tuple(moved), saved, tuple(sorted(key.hex() for key in lost)))


def _reinstate(journal: Journal, store: Path) -> bool:
    """Give whole files back the manifest row they lost; the key index still knows their number."""
    known = {entry.shard for entry in manifest_of(journal)}
    again = False
    for path in sorted((store / FOLDER).glob("part-*.parquet")):
        match = NAME.match(path.name)
        if match is None or int(match[1]) in known:
            continue
        digest, size = digest_of(path)
        if digest[:16] != match[2]:
            continue
        with opened(path) as file:
            rows, lineage = file.metadata.num_rows, lineage_digest(lineages_in(file)[0])
        entry = ShardEntry(int(match[1]), path.name, digest, rows, size, lineage, path.stat().st_mtime)
        if len(keys_in(journal, entry)) == rows:
            with journal.writing() as connection:
                enter(connection, entry)
            again = True
    return again


def _reindex(journal: Journal, store: Path, entry: ShardEntry) -> None:
    """Put rows of a readable shard back into the key index where they are missing there."""
    known = keys_in(journal, entry)
    rows: list[tuple[bytes, int, int | None]] = []
    path = store / FOLDER / entry.name
    if not path.exists() or digest_of(path)[0] != entry.sha256:
        return  # a row without an index row has nothing left to prove it by
    for table in proven(journal, store, entry):
        for row in table.select(["key", "outcome", "request_json"]).to_pylist():
            key = bytes.fromhex(row["key"])
            if key not in known:
                body = orjson.loads(row["request_json"])
                rows.append((key, OUTCOME_CODES[row["outcome"]], ceiling(body)))
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
    return one.place.startswith(f"{FOLDER}/") and one.kind in {*_SHARD_FINDINGS, "foreign"}


def _copy_away(store: Path, name: str, *, keep: bool) -> None:
    """Into quarantine; a shard of the manifest is linked there, for its rows are still to be saved."""
    folder = store / QUARANTINE
    with disk(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        target = folder / name
        target.unlink(missing_ok=True)
        if keep:
            target.hardlink_to(store / FOLDER / name)
        else:
            (store / FOLDER / name).rename(target)
        sync_folder(folder)


def _forget_strays(journal: Journal) -> set[bytes]:
    """Keys that point at a shard nobody knows."""
    query = "SELECT key FROM keys WHERE shard NOT IN (SELECT shard FROM manifest)"
    with journal.reading() as connection:
        strays = {key for (key,) in connection.execute(query)}
    if strays:
        with journal.writing() as connection:
            connection.executemany("DELETE FROM keys WHERE key = ?", [(key,) for key in strays])
            finished.forget(connection)
    return strays


def purge(journal: Journal, store: Path, keys: Collection[bytes]) -> int:
    """Take keys out of journal and shards for good; returns how many of them were held.

    Freed pages are overwritten and the write-ahead log is emptied. Damaged shards in quarantine go as a
    whole: what they hold can't be told, and their readable rows were saved. Counters of runs keep their sums.

    Raises:
        StoreError, StoreFull, StoreCorrupt.
    """
    wanted = set(keys)
    tidy(journal, store)
    with journal.reading() as connection:
        connection.execute("PRAGMA secure_delete=ON")
    held = set(journal.held(sorted(wanted)))
    for entry in manifest_of(journal):
        if wanted & keys_in(journal, entry):
            _drain(rewrite(journal, store, [entry], without=wanted))
    with journal.writing() as connection:
        finished.forget(connection)
        for table in _TABLES:
            connection.executemany(
                f"DELETE FROM {table} WHERE key = ?",  # noqa: S608 - our own names
                [(key,) for key in sorted(wanted)],
            )
    with journal.reading() as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    if held:
        with disk(store / QUARANTINE):
            for path in (store / QUARANTINE).glob("part-*.parquet"):
                path.unlink()
        journal.write_dead_letters(store)
    return len(held)


def keys_of_prompt(journal: Journal, store: Path, prompt_id: str) -> set[bytes]:
    """Every key that this prompt asked for, by whichever row."""
    found: set[bytes] = set()
    with journal.reading() as connection:
        for table in ("answers", "asks", "dead"):
            for key, text in connection.execute(f"SELECT key, prompt_json FROM {table}"):  # noqa: S608
                if orjson.loads(text)["id"] == prompt_id:
                    found.add(key)
    for entry in manifest_of(journal):
        with opened(store / FOLDER / entry.name) as file:
            for batch in file.iter_batches(columns=["key", "prompt_id"]):
                mask = pc.equal(batch.column("prompt_id"), prompt_id)
                found |= {bytes.fromhex(text) for text in batch.filter(mask).column("key").to_pylist()}
    return found


def _drain(steps: Generator[str | None, None, set[bytes]]) -> set[bytes]:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            gone: set[bytes] = end.value
            return gone


def check(store: Path, *, repair: bool) -> tuple[dict[str, Any], list[str], int]:
    """`harvester verify`: its values, its lines for people, and how many findings are left.

    Raises:
        StoreLocked: a repair needs the store for itself.
        StoreError, StoreCorrupt, StoreFormatError.
    """
    data: dict[str, Any] = {}
    lines: list[str] = []
    if repair:
        Journal.open(store, read_only=True).close()  # a folder that is no store must not become one
        with StoreLock(store, started_at=time.time()), closing(Journal.open(store)) as journal:
            done = mend(journal, store)
        data["repaired"] = {"quarantined": done.quarantined, "saved": done.saved, "lost": done.lost}
        lines.append(
            f"repaired: {len(done.quarantined)} files in {store / QUARANTINE}, {done.saved:,} of their "
            f"answers saved, {len(done.lost):,} to be asked again"
        )
    corpus = Corpus.open(store)
    try:
        findings = [str(one) for one in corpus.verify()]
        answers = corpus.count()
    except HarvesterError as error:
        findings, answers = [str(error)], 0
    bill = Bill(0, 0, ())
    if (store / "journal.db").exists() and not any("journal.db" in one for one in findings):
        with closing(Journal.open(store, read_only=True)) as journal:
            bill = bill_of(journal, alive=is_held(store))
    data |= {
        "answers": answers, "findings": findings, "billed": bill.billed,
        "billed_microusd": bill.billed_microusd, "possibly_billed": [one.facts() for one in bill.suspects],
        "possibly_billed_microusd": bill.suspected_microusd,
    }  # fmt: skip
    lines.append(
        f"{answers:,} answers stored, {len(findings)} findings; {bill.billed:,} billed for "
        f"${bill.billed_microusd / 1e6:.6f}, {len(bill.suspects)} attempts possibly billed"
    )
    lines += [f"  {one}" for one in findings]
    lines += [
        f"  possibly billed: {one['key']} at {one['at']}, reserved ${one['reserved_microusd'] / 1e6:.6f}"
        f" ({one['code'] or 'no outcome'})"
        for one in data["possibly_billed"]
    ]
    return data, lines, len(findings)


def purge_store(store: Path, key: str | None, prompt_id: str | None) -> int:
    """`harvester purge`; returns the answers taken out.

    Raises:
        ConfigError: neither a key nor a prompt, or no key at all.
        StoreLocked, StoreError.
    """
    if (key is None) == (prompt_id is None):
        raise ConfigError("name a KEY or a --prompt-id", remedy="`harvester export` shows both")
    try:
        wanted = set() if key is None else {bytes.fromhex(key)}
    except ValueError:
        raise ConfigError(f"{key!r} is not a key", remedy="64 hex digits") from None
    Journal.open(store, read_only=True).close()
    with StoreLock(store, started_at=time.time()), closing(Journal.open(store)) as journal:
        if prompt_id is not None:
            wanted = keys_of_prompt(journal, store, prompt_id)
        return purge(journal, store, wanted)
