"""Sets of prompt files that were asked to the end, remembered so that a rerun need not look at each row.

What is remembered is a digest: of the bytes of the files, and of everything that turns them into keys. As
long as no answer leaves the store (`ledger.forget_finished`), the same digest means the same rows, all held.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import orjson

from harvester import __version__
from harvester.api.request_key import KEY_VERSION
from harvester.config.config import HarvestConfig
from harvester.observe.counters import Snapshot
from harvester.prompts import reader
from harvester.store import paths
from harvester.store.journal import sqlite
from harvester.store.journal.checksums import checksum
from harvester.store.journal.journal import Journal
from harvester.system.files import sha256_of


@dataclass(frozen=True, slots=True)
class Finished:
    """Files without an open row: their rows (prompts x samples), dead letters, estimated input tokens."""

    rows: int
    dead: int
    input_tokens: int

    def counts(self) -> Snapshot:
        """What a pass over these files would count."""
        return Snapshot(rows=self.rows, from_cache=self.rows - self.dead, dead=self.dead)


def digest_of(config: HarvestConfig, root: Path) -> bytes | None:
    """32 bytes over the files, in order, and what makes keys of them; None when a file can't be read.

    Raises:
        NoPrompts, PromptError: a name that matches nothing, or no file.
    """
    files = []
    for path in reader.find(config.prompts.files, root):
        try:
            files.append([reader.legible(Path(path.name.lower())), sha256_of(path)])
        except OSError:
            return None
    asked = {
        "files": files,
        "endpoint": config.teacher.base_url,
        "model": config.teacher.model,
        "system": config.prompts.system,
        "sampling": config.sampling.model_dump_json(),
        "epoch": config.run.epoch,
        "version": [KEY_VERSION, __version__],
    }
    return hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).digest()


def recall(journal: Journal, digest: bytes | None) -> Finished | None:
    """What is known of these files, None for nothing. A damaged row counts as nothing; `verify` names it."""
    if digest is None:
        return None
    with journal.reading() as connection:
        if not sqlite.has_table(connection, "finished"):
            return None
        query = "SELECT rows, dead, input_tokens, checksum FROM finished WHERE digest = ?"
        found = connection.execute(query, (digest,)).fetchone()
    if found is None or checksum(found[:3], digest) != found[3]:
        return None
    return Finished(*found[:3])


def look_up(store: Path, digest: bytes | None) -> Finished | None:
    """The same for a store that nobody has opened yet, or that is not there.

    Raises:
        StoreError: the journal can't be read.
    """
    if digest is None or not (store / paths.JOURNAL).exists():
        return None
    with contextlib.closing(Journal.open(store, read_only=True)) as journal:
        return recall(journal, digest)


def note(
    journal: Journal, digest: bytes, counts: Snapshot, input_tokens: int, retried: Collection[str]
) -> None:
    """Remember a pass that read the whole feed, if it left no row open.

    With dead letters in it the pass must have sent nothing, and none in the store may wait for another
    chance: only then will the next pass count the same.

    Args:
        retried: codes of dead letters that get another chance in the next run.
    """
    ended = counts.from_cache + counts.duplicates + counts.answers_stored + counts.dead
    if not counts.rows or ended != counts.rows:
        return
    with journal.writing() as connection:
        if counts.dead:
            holes = ",".join("?" * len(retried))
            query = f"SELECT EXISTS (SELECT 1 FROM dead WHERE code IN ({holes}))"  # noqa: S608
            (waits,) = connection.execute(query, sorted(retried)).fetchone()
            if waits or counts.from_cache + counts.dead != counts.rows:
                return
        connection.execute(sqlite.FINISHED)
        row = (counts.rows, counts.dead, input_tokens)
        connection.execute(
            "INSERT OR REPLACE INTO finished VALUES (?, ?, ?, ?, ?)", (digest, *row, checksum(row, digest))
        )
