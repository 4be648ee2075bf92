"""Reopen requests: take their answers or dead letters out of a store, so that a run asks them again.

What is taken out was paid for. It is appended to `retried.jsonl` in the store first.
"""

from __future__ import annotations

import base64
import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import orjson

from harvester.store import paths
from harvester.store.journal.checksums import require_unchanged
from harvester.store.journal.journal import Journal
from harvester.store.journal.rows import count_reopened, forget_finished
from harvester.store.journal.sqlite import OUTCOMES, disk_error
from harvester.store.reader import Corpus
from harvester.store.shards.manifest import indexed_keys, read_manifest
from harvester.store.shards.rewrite import rewrite
from harvester.store.shards.sample import SELECT_ANSWERS, prompt_columns
from harvester.store.shards.seal import finish_interrupted
from harvester.store.shards.steps import run_to_end
from harvester.system import own_files

_COLUMNS = ("key", "prompt_id", "sample_index", "outcome", "raw")


def reopen(journal: Journal, store: Path, keys: Collection[bytes]) -> int:
    """Take what the store holds for these keys out of it; return how many answers that were.

    The journal must have begun a run: the counts are those of that run.

    Raises:
        StoreError: the disk refuses; ShardsInUse while another process reads the shards.
    """
    wanted = set(keys)
    if not wanted:
        return 0
    finish_interrupted(journal, store)
    held = journal.look_up(sorted(wanted))
    outcomes = [entry.outcome for entry in held.values() if entry.state == "answered"]
    if outcomes:
        _write_down(store, {key.hex() for key, entry in held.items() if entry.state == "answered"})
    for entry in read_manifest(journal):
        if wanted & indexed_keys(journal, entry):
            run_to_end(rewrite(journal, store, [entry], without=wanted))
    with journal.writing() as connection:
        forget_finished(connection)
        for table in ("answers", "dead"):
            connection.executemany(
                f"DELETE FROM {table} WHERE key = ?",  # noqa: S608 - our own names
                [(key,) for key in sorted(wanted)],
            )
        count_reopened(connection, journal.run_number, outcomes)
    return len(outcomes)


def reopen_journalled(journal: Journal, store: Path, keys: Collection[bytes]) -> set[bytes]:
    """Take answers that are not sealed out of the journal; return the keys of those that there were.

    The journal must have begun a run: the counts are those of that run. Nothing may be sealed meanwhile.

    Raises:
        StoreError: the disk refuses. StoreCorrupt: one is damaged; names its key.
    """
    rows: list[dict[str, Any]] = []
    with journal.reading() as connection:
        for key in sorted(keys):
            cursor = connection.execute(f"{SELECT_ANSWERS} WHERE key = ?", (key,))
            names = [column[0] for column in cursor.description]
            rows += [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    require_unchanged("answers", rows, journal.path)
    if not rows:
        return set()
    with _retried_file(store) as append:
        for row in rows:
            columns = prompt_columns(row["prompt_json"], row["sample_index"])
            append(
                {
                    "key": row["key"].hex(),
                    "prompt_id": columns["prompt_id"],
                    "sample_index": row["sample_index"],
                    "outcome": OUTCOMES[row["outcome"]],
                    "raw": row["raw"],
                }
            )
    taken = {row["key"] for row in rows}
    with journal.writing() as connection:
        forget_finished(connection)
        connection.executemany("DELETE FROM answers WHERE key = ?", [(key,) for key in sorted(taken)])
        count_reopened(connection, journal.run_number, [OUTCOMES[row["outcome"]] for row in rows])
    return taken


@contextlib.contextmanager
def _retried_file(store: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Append entries to `retried.jsonl` in the block; at its end they are on disk.

    Raises:
        StoreError: the disk refuses.
    """
    path, at = store / paths.RETRIED, time.time()
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with os.fdopen(own_files.open_file(path, flags), "ab") as out:

            def append(entry: dict[str, Any]) -> None:
                raw = entry["raw"] if isinstance(entry["raw"], bytes) else str(entry["raw"]).encode()
                entry |= {"raw": base64.b64encode(raw).decode(), "reopened_at": at}
                out.write(orjson.dumps(entry) + b"\n")

            yield append
            out.flush()
            os.fsync(out.fileno())
        path.chmod(0o600)
    except OSError as error:
        raise disk_error(error, path) from None


def _write_down(store: Path, keys: Collection[str]) -> None:
    """Append the answers of these keys to `retried.jsonl`, and wait until they are on disk."""
    written: set[str] = set()
    with _retried_file(store) as append:
        for sample in Corpus.open(store).samples(list(_COLUMNS)):
            if sample.key in keys and sample.key not in written:
                written.add(sample.key)
                append({name: getattr(sample, name) for name in _COLUMNS})
