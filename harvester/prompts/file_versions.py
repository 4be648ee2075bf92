"""Warn about prompt files that changed since the last run, with the number of new and of stored rows.

Informational only: rows are identified by their keys, so nothing in an edited file is paid twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import orjson

from harvester.api.request_builder import requests
from harvester.config.config import HarvestConfig
from harvester.errors import PromptError
from harvester.prompts import reader
from harvester.prompts.bad_lines import BadLines
from harvester.prompts.row_rules import rules_of
from harvester.store.journal.checksums import updating_checksum
from harvester.store.journal.journal import Journal
from harvester.store.reuse import ReuseIndex, find_answers
from harvester.system.files import sha256_of

# Rows looked up in the store at once.
CHUNK = 1000

# The rows of a larger file are not counted here, to start the run sooner.
MOST_BYTES_COUNTED = 64 * 1024 * 1024


def note(journal: Journal, config: HarvestConfig, root: Path, run_id: str) -> tuple[str, ...]:
    """Store each prompt file's digest; return one line for each file that changed since an earlier run."""
    changes = []
    for path in _files(config, root):
        name = reader.name_of(path, root)
        try:
            digest = sha256_of(path)
        except OSError:  # the feed reports it
            continue
        before = _exchange(journal, f"prompts:{name}", {"sha256": digest, "run_id": run_id})
        if before and before["sha256"] != digest:
            changes.append(f"{name} changed since run {before['run_id']}{_rows(journal, path, config, root)}")
    return tuple(changes)


def _files(config: HarvestConfig, root: Path) -> Iterator[Path]:
    for pattern in config.prompts.files:
        try:
            yield from reader.find((pattern,), root)
        except PromptError:  # a watching run waits for the file; the feed reports the error
            continue


def _exchange(journal: Journal, name: str, version: dict[str, str]) -> dict[str, str]:
    """Store the file's version and return the previous one, empty for none."""
    with journal.writing() as connection, updating_checksum(connection, "meta"):
        row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        connection.execute(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, orjson.dumps(version).decode())
        )
    before: dict[str, str] = orjson.loads(row[0]) if row else {}
    return before


def _rows(journal: Journal, path: Path, config: HarvestConfig, root: Path) -> str:
    """Count the rows of a changed file: those the store does not hold, and those it does."""
    if path.stat().st_size > MOST_BYTES_COUNTED:
        return ""
    rows = held = 0
    ceilings = ReuseIndex.of(journal, config)
    bad, rules = BadLines(config.prompts.max_bad), rules_of(config.prompts, root)
    feed = requests(reader.read_file(path, root, bad, rules=rules), config)
    try:
        while chunk := list(itertools.islice(feed, CHUNK)):
            known = find_answers(journal, chunk, ceilings)
            rows += len(chunk)
            held += sum(request.key in known for request in chunk)
    except PromptError:
        return ""
    return f": {rows - held:,} rows new, {held:,} already stored"
