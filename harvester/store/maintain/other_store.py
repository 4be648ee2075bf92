"""Find answers in another store and copy them into this one: nothing is asked and nothing is paid.

The other store is only read, also while a run writes it. A copy keeps the lineage of the run that asked, and
is stored under the prompt that needs it here. The terms are asked before a row of a run is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from harvester.api.max_tokens import max_tokens_of
from harvester.api.types import Outcome, Request
from harvester.config.config import HarvestConfig
from harvester.errors import ConfigError, TermsRefused
from harvester.store import other_settings, paths
from harvester.store.journal import sqlite
from harvester.store.journal.checksums import checked_rows, require_unchanged, translate_value_errors
from harvester.store.journal.copies import CopiedAnswer, write_copies
from harvester.store.journal.journal import KEYS_PER_LOOKUP, Journal
from harvester.store.journal.records import asker_digest, prompt_json
from harvester.store.journal.rows import micros
from harvester.store.journal.sqlite import OUTCOME_CODES
from harvester.store.reuse import ReuseIndex, find_answers
from harvester.store.shards import batching
from harvester.store.shards.manifest import manifest_rows
from harvester.store.shards.parquet_file import lineage_digest
from harvester.store.shards.proved import open_entry
from harvester.store.shards.sample import SELECT_ANSWERS, model_names, terms_columns
from harvester.store.shards.swap import hold_for_reading
from harvester.terms import gate
from harvester.terms.gate import RecordedTerms
from harvester.terms.lineage import FACT_COLUMNS, Lineage

# Columns of a sealed row that its row in the journal is made of, and those that the terms are asked by.
_SEALED_COLUMNS = (
    *("key", "outcome", "input_tokens", "output_tokens", "cost_microusd", "attempts", "latency_s"),
    *("created_at", "endpoint", "request_json", "raw", *FACT_COLUMNS),
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OK_STATUS = 200


def open_others(config: HarvestConfig, root: Path, *, mock: bool) -> list[OtherStore]:
    """Open the stores of `[store] read_also`; the caller closes them.

    Args:
        mock: whether this run asks the mock teacher.

    Raises:
        ConfigError: one is no store, or is this one. StoreError, StoreCorrupt by cause.
    """
    others: list[OtherStore] = []
    try:
        for name in config.store.read_also:
            path = root / name
            if path.resolve() == (root / config.store.path).resolve():
                raise ConfigError(
                    "is the store of this run itself",
                    place=f"store.read_also: {name}",
                    remedy="leave it out of [store] read_also, which names other stores",
                )
            if not path.is_dir() or not sqlite.has_journal(path):
                is_file = path.exists() and not path.is_dir()
                what = f"{path} is no folder, and a store is one" if is_file else f"no store is in {path}"
                raise ConfigError(
                    what,
                    place="store.read_also",
                    remedy="name a folder with a journal.db",
                )
            others.append(OtherStore(path, config, mock=mock))
    except BaseException:
        for other in others:
            other.close()
        raise
    return others


class OtherStore:
    """A store that answers are copied from.

    Answers that were asked for another purpose are not used: rows for evaluation would never be trained on.
    Neither are those of the mock teacher mixed with others.
    """

    def __init__(self, store: Path, config: HarvestConfig, *, mock: bool) -> None:
        self.path = store
        self._journal = Journal.open(store, read_only=True)
        self._config, self._purpose, self._mock = config, config.run.purpose, mock
        self._looked_up = self._found = 0
        self._judged: set[tuple[Any, ...]] = set()
        try:
            self._reuse = ReuseIndex.of(self._journal, config)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close its journal."""
        self._journal.close()

    def find(self, requests: Sequence[Request]) -> dict[bytes, bytes]:
        """Return for each request that has a usable answer here its key, and the key of that answer."""
        found = {
            key: answer.key
            for key, answer in find_answers(self._journal, requests, self._reuse).items()
            if answer.held.state == "answered"
        }
        usable = self._usable(list(found.values())) if found else set()
        found = {wanted: key for wanted, key in found.items() if key in usable}
        self._looked_up += len(requests)
        self._found += len(found)
        return found

    def note(self) -> str:
        """Say that nothing fitted so far, although the teacher does; "" otherwise.

        Raises:
            StoreError: the journal can't be read.
        """
        if self._found or not self._looked_up or not other_settings.may_fit(self.path, self._config):
            return ""
        kinds = other_settings.kinds_text(self.path, self._config)
        return (
            f"{self.path} ([store] read_also) holds no usable answer to the {self._looked_up:,} requests "
            f"that the store lacks: other prompts or settings; {kinds}"
        )

    def _usable(self, keys: Sequence[bytes]) -> set[bytes]:
        """Return the keys whose answers were asked for the same purpose."""
        usable: set[bytes] = set()
        with self._journal.reading() as connection, sqlite.snapshot(connection):
            runs = self._usable_runs(connection)
            digests = {lineage_digest(lineage) for _, lineage in runs.values()}
            shards = [entry.shard for entry in manifest_rows(connection) if entry.lineage_digest in digests]
            for start in range(0, len(keys), KEYS_PER_LOOKUP):
                chunk = keys[start : start + KEYS_PER_LOOKUP]
                for table, column, allowed in (("keys", "shard", shards), ("answers", "run", list(runs))):
                    query = f"SELECT key, {column} FROM {table} WHERE key IN ({_holes(chunk)})"  # noqa: S608
                    rows = connection.execute(query, chunk).fetchall()
                    usable |= {key for key, number in rows if number in allowed}
        return usable

    def _usable_runs(self, connection: Any) -> dict[int, tuple[Mapping[str, Any], Lineage]]:
        rows = checked_rows(connection, "runs", self._journal.path)
        runs = {row["run"]: (row, Lineage.from_json(row["lineage_json"])) for row in rows}
        return {
            number: (row, lineage)
            for number, (row, lineage) in runs.items()
            if lineage.purpose == self._purpose and lineage.mock == self._mock
        }

    def copy(self, wanted: Mapping[bytes, Request], recorded: RecordedTerms, journal: Journal) -> int:
        """Copy answers into the journal of this store; return how many it did not hold.

        Args:
            wanted: the request that needs an answer, by the key of that answer.
            recorded: terms that count for this store.

        Raises:
            TermsRefused: the terms of a run do not permit it; nothing of it was copied.
            StoreError, StoreCorrupt: of either store.
        """
        copied = 0
        folder, place = self.path / paths.SHARDS, self.path / paths.JOURNAL
        with (
            hold_for_reading(folder),
            closing(sqlite.open_for_reading(self.path)) as connection,
            sqlite.translate_errors(place),
            translate_value_errors(place),
        ):
            with sqlite.snapshot(connection):
                runs = self._usable_runs(connection)
                manifest = manifest_rows(connection)
                shards = _shards_of(connection, list(wanted))
                unsealed = list(self._unsealed(connection, runs, wanted, recorded))
            by_id = {row["run_id"]: row for row, _ in runs.values()}
            lineages = {row["run_id"]: lineage for row, lineage in runs.values()}
            if unsealed:
                with journal.writing() as written:
                    copied += write_copies(written, by_id, unsealed)
            for entry in manifest:
                if entry.shard not in shards:
                    continue
                with open_entry(folder, entry) as file:
                    for batch in batching.batch_file(file, _SEALED_COLUMNS):
                        answers = self._sealed(batch, lineages, wanted, recorded)
                        if answers:
                            with journal.writing() as written:
                                copied += write_copies(written, by_id, answers)
        return copied

    def _unsealed(
        self,
        connection: Any,
        runs: Mapping[int, tuple[Mapping[str, Any], Lineage]],
        wanted: Mapping[bytes, Request],
        recorded: RecordedTerms,
    ) -> Iterator[CopiedAnswer]:
        keys = list(wanted)
        for start in range(0, len(keys), KEYS_PER_LOOKUP):
            chunk = keys[start : start + KEYS_PER_LOOKUP]
            cursor = connection.execute(f"{SELECT_ANSWERS} WHERE key IN ({_holes(chunk)})", chunk)
            for rows in batching.batch_answers(cursor):
                require_unchanged("answers", rows, self._journal.path)
                for row in rows:
                    if row["run"] not in runs:
                        continue
                    lineage = runs[row["run"]][1]
                    names = model_names(row["body_json"], row["raw"])
                    self._require_permitted(lineage, terms_columns(*names, lineage), recorded)
                    yield CopiedAnswer(lineage.run_id, {**row, **_asked_by(wanted[row["key"]])})

    def _sealed(
        self,
        batch: pa.RecordBatch,
        lineages: Mapping[str, Lineage],
        wanted: Mapping[bytes, Request],
        recorded: RecordedTerms,
    ) -> list[CopiedAnswer]:
        chosen = [bytes.fromhex(key) in wanted for key in batch.column("key").to_pylist()]
        answers = []
        for row in batch.filter(pa.array(chosen)).to_pylist() if any(chosen) else ():
            lineage = lineages.get(row["run_id"])
            if lineage is None:
                continue
            self._require_permitted(lineage, row, recorded)
            request = wanted[bytes.fromhex(row["key"])]
            values = {
                "key": bytes.fromhex(row["key"]),
                "outcome": OUTCOME_CODES[Outcome(row["outcome"])],
                "max_tokens": max_tokens_of(orjson.loads(row["request_json"])),
                "status": _OK_STATUS,
                **{
                    name: row[name] for name in ("attempts", "input_tokens", "output_tokens", "cost_microusd")
                },
                "latency_us": micros(row["latency_s"]),
                "at_us": micros((row["created_at"] - _EPOCH).total_seconds()),
                **{name: row[name] for name in ("endpoint", "raw")},
                "body_json": row["request_json"],
                **_asked_by(request),
            }
            answers.append(CopiedAnswer(row["run_id"], values))
        return answers

    def _require_permitted(self, lineage: Lineage, row: Mapping[str, Any], recorded: RecordedTerms) -> None:
        """Ask the terms, once for each combination of what they depend on.

        Raises:
            TermsRefused: they do not permit to seal such a row.
        """
        fact = {name: row[name] for name in FACT_COLUMNS}
        name = tuple(fact.values())
        if name in self._judged:
            return
        for verdict in gate.judge_lineages(recorded, [lineage], [fact], use="seal"):
            try:
                verdict.require()
            except TermsRefused as error:
                error.message = f"answers of {self.path} can't be used here: {error.message}"
                raise
        self._judged.add(name)


def _asked_by(request: Request) -> dict[str, Any]:
    """Return the columns that say for which prompt an answer is stored."""
    return {
        "asker": asker_digest(request.prompt, request.sample_index),
        "sample_index": request.sample_index,
        "prompt_json": prompt_json(request.prompt).decode(),
    }


def _shards_of(connection: Any, keys: Sequence[bytes]) -> set[int]:
    shards: set[int] = set()
    for start in range(0, len(keys), KEYS_PER_LOOKUP):
        chunk = keys[start : start + KEYS_PER_LOOKUP]
        query = f"SELECT DISTINCT shard FROM keys WHERE key IN ({_holes(chunk)})"  # noqa: S608
        shards |= {shard for (shard,) in connection.execute(query, chunk)}
    return shards


def _holes(keys: Sequence[bytes]) -> str:
    return ",".join("?" * len(keys))
