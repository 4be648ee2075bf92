"""Remember sets of prompt files that are complete, so that a rerun need not look each row up.

A set is known by a digest over the bytes of its files and everything that turns them into request keys. As
long as no answer leaves the store (the sets are forgotten then), the same digest means that all rows are
held.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import orjson

from harvester.api.request_key import KEY_VERSION
from harvester.config.config import HarvestConfig
from harvester.observe.counters import Snapshot
from harvester.prompts import reader, recognise
from harvester.prompts.row_rules import RowRules, rules_of
from harvester.store.journal import sqlite
from harvester.store.journal.checksums import checksum
from harvester.store.journal.journal import Journal
from harvester.system.command_line.version import __version__
from harvester.system.files import sha256_of


@dataclass(frozen=True, slots=True)
class Finished:
    """A complete set of files: its rows (prompts x samples), dead letters and estimated input tokens."""

    rows: int
    dead: int
    input_tokens: int

    def counts(self) -> Snapshot:
        """Return what a pass over these files would count."""
        return Snapshot(rows=self.rows, from_cache=self.rows - self.dead, dead=self.dead)


def digest_of(config: HarvestConfig, root: Path, rules: RowRules | None = None) -> bytes | None:
    """Return 32 bytes over the files, in order, and what makes keys of them; None if one can't be read.

    Raises:
        NoPrompts, PromptError: a name matches nothing, or something that is not a file.
        ConfigError: see `rules_of`.
    """
    files = []
    for path in reader.find(config.prompts.files, root):
        try:
            files.append([reader.printable_path(Path(path.name.lower())), sha256_of(path)])
        except OSError:
            return None
    identity = {
        "files": files,
        "endpoint": config.teacher.key_name,
        "model": config.teacher.model,
        "system": config.prompts.system,
        "sampling": config.sampling.model_dump_json(),
        "epoch": config.run.epoch,
        "version": [KEY_VERSION, __version__],
        "sent_fields": recognise.SENT_FIELDS,
    }
    rules = rules_of(config.prompts, root) if rules is None else rules
    identity |= rules.identity
    return hashlib.sha256(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS)).digest()


def recall(journal: Journal, digest: bytes | None) -> Finished | None:
    """Return what is known of these files, or None. A damaged row counts as unknown; `verify` reports it."""
    if digest is None:
        return None
    with journal.reading() as connection:
        if not sqlite.has_table(connection, "finished"):
            return None
        query = "SELECT rows, dead, input_tokens, checksum FROM finished WHERE digest = ?"
        row = connection.execute(query, (digest,)).fetchone()
    if row is None or checksum(row[:3], digest) != row[3]:
        return None
    return Finished(*row[:3])


def look_up(store: Path, digest: bytes | None) -> Finished | None:
    """Return the same from a store that is not open, or does not exist.

    Raises:
        StoreError: the journal can't be read.
    """
    if digest is None or not sqlite.has_journal(store):
        return None
    with contextlib.closing(Journal.open(store, read_only=True)) as journal:
        return recall(journal, digest)


def note(
    journal: Journal, digest: bytes, counts: Snapshot, input_tokens: int, retried: Collection[str]
) -> None:
    """Remember the files of a pass that read the whole feed, if it left no row open.

    If there are dead letters, the pass must have sent nothing, and no dead letter in the store may be one
    that the next run retries: only then will the next pass count the same.

    Args:
        retried: codes of dead letters that the next run retries.
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
