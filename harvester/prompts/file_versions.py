"""Prompt files as the last run read them: who edits one between two runs is told what that changes.

Nothing hangs on it: rows are known by their keys, and an edited file re-pays nothing.
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
from harvester.store.journal.checksums import updating_checksum
from harvester.store.journal.journal import Journal
from harvester.store.reuse import ReuseIndex, find_answers
from harvester.system.files import sha256_of

CHUNK = 1000
MOST_BYTES_COUNTED = 64 * 1024 * 1024
"""The rows of a larger file are not counted beforehand; the pass will."""


def note(journal: Journal, config: HarvestConfig, root: Path, run_id: str) -> tuple[str, ...]:
    """Remember each prompt file's digest for this run; a line for each that changed since a run before."""
    said = []
    for path in _files(config, root):
        name = reader.name_of(path, root)
        try:
            digest = sha256_of(path)
        except OSError:  # whoever reads the prompts says so
            continue
        before = _exchange(journal, f"prompts:{name}", {"sha256": digest, "run_id": run_id})
        if before and before["sha256"] != digest:
            said.append(f"{name} changed since run {before['run_id']}{_rows(journal, path, config, root)}")
    return tuple(said)


def _files(config: HarvestConfig, root: Path) -> Iterator[Path]:
    for pattern in config.prompts.files:
        try:
            yield from reader.find((pattern,), root)
        except PromptError:  # a watching run waits for it; whoever reads it says what it is
            continue


def _exchange(journal: Journal, name: str, edition: dict[str, str]) -> dict[str, str]:
    """Write this edition down; returns the one before, empty for none."""
    with journal.writing() as connection, updating_checksum(connection, "meta"):
        row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        connection.execute(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, orjson.dumps(edition).decode())
        )
    before: dict[str, str] = orjson.loads(row[0]) if row else {}
    return before


def _rows(journal: Journal, path: Path, config: HarvestConfig, root: Path) -> str:
    """How many rows of a changed file the store does not know, and how many it does."""
    if path.stat().st_size > MOST_BYTES_COUNTED:
        return ""
    rows = held = 0
    ceilings = ReuseIndex.of(journal, config)
    feed = requests(reader.read_file(path, root, BadLines(config.prompts.max_bad)), config)
    try:
        while chunk := list(itertools.islice(feed, CHUNK)):
            known = find_answers(journal, chunk, ceilings)
            rows += len(chunk)
            held += sum(request.key in known for request in chunk)
    except PromptError:
        return ""
    return f": {rows - held:,} rows new, {held:,} held"
