"""Reopen requests: take their answers or dead letters out of a store, so that a run asks them again.

What is taken out was paid for. It is appended to `retried.jsonl` in the store first.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Collection
from pathlib import Path

import orjson

from harvester.store import paths
from harvester.store.journal.journal import Journal
from harvester.store.journal.rows import count_reopened, forget_finished
from harvester.store.journal.sqlite import disk_error
from harvester.store.reader import Corpus
from harvester.store.shards.manifest import indexed_keys, read_manifest
from harvester.store.shards.rewrite import rewrite
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


def _write_down(store: Path, keys: Collection[str]) -> None:
    """Append the answers of these keys to `retried.jsonl`, and wait until they are on disk."""
    path, at = store / paths.RETRIED, time.time()
    written: set[str] = set()
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with os.fdopen(own_files.open_file(path, flags), "ab") as out:
            for sample in Corpus.open(store).samples(list(_COLUMNS)):
                if sample.key not in keys or sample.key in written:
                    continue
                written.add(sample.key)
                entry = {name: getattr(sample, name) for name in _COLUMNS}
                raw = sample.raw if isinstance(sample.raw, bytes) else str(sample.raw).encode()
                entry |= {"raw": base64.b64encode(raw).decode(), "reopened_at": at}
                out.write(orjson.dumps(entry) + b"\n")
            out.flush()
            os.fsync(out.fileno())
        path.chmod(0o600)
    except OSError as error:
        raise disk_error(error, path) from None
