"""Read and write the journal: intents, answers, failures, the key index and the counters of each run.

An intent is committed before its request is sent. An answer is stored when `apply` has returned. After one
failed commit the journal refuses all writes: after a failed fsync a second one may report success although
the data is lost. `rows.py` encodes the records that `apply` writes.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from harvester.errors import StoreError, StoreFull
from harvester.store import paths
from harvester.store.journal import checksums, sqlite, wal
from harvester.store.journal.ledger import PURGED_OUTCOME
from harvester.store.journal.records import HeldAnswer, PossiblyBilledAttempt, Record, RunRecord, Totals
from harvester.store.journal.rows import RowEncoder, end_run, enter_run, micros
from harvester.store.journal.spending import KILLED
from harvester.store.journal.sqlite import OUTCOMES
from harvester.system import own_files
from harvester.system.failpoints import reach

KEYS_PER_LOOKUP = 500
_KEYS = "SELECT key, outcome, max_tokens, asker FROM keys"
_ANSWERS = "SELECT key, outcome, max_tokens, asker FROM answers"
_DEAD = "SELECT key, code, max_tokens, asker FROM dead"
_ASKS = "SELECT id, key, sample_index, asker, prompt_json FROM asks"
_Askers = dict[bytes, dict[tuple[str, int], bytes]]


class Journal:
    """The journal of one store. Not thread-safe: during a run only the writer thread may call it."""

    def __init__(self, store: Path, connection: sqlite3.Connection, *, read_only: bool) -> None:
        self.path = store / paths.JOURNAL
        self._connection = connection
        self._read_only = read_only
        self._failed: BaseException | None = None
        self._run = 0
        self._identity = _identity(self.path)

    @classmethod
    def open(cls, store: Path, *, read_only: bool = False) -> Journal:
        """Open `store/journal.db`; create it where there is none, unless `read_only`.

        Raises:
            StoreError: it can't be opened; StoreFull, StoreCorrupt, StoreFormatError by cause. StoreCorrupt
                also where opening would lose answers: shards without a journal, or a damaged write-ahead log.
        """
        if read_only:
            wal.require_whole_for_reading(store)
        else:
            wal.require_whole(wal.log_path(store / paths.JOURNAL))
            sqlite.require_journal(store)
        connect = sqlite.open_for_reading if read_only else sqlite.open_for_writing
        return cls(store, connect(store), read_only=read_only)

    def close(self) -> None:
        """Close the connection. An open transaction is rolled back."""
        with sqlite.translate_errors(self.path):
            sqlite.close(self._connection, self.path.parent, may_write=self._failed is None)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Run one transaction; it is durable when the block has ended.

        Raises:
            StoreError: this transaction failed, or an earlier one did.
        """
        if self._failed is not None:
            raise self._failed
        try:
            with sqlite.translate_errors(self.path), sqlite.transaction(self._connection):
                yield self._connection
        except StoreError as error:
            self._failed = error
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give the connection for reading and translate SQLite's errors to `StoreError`.

        A row that can't be turned into values in the block is a `StoreCorrupt` too.
        """
        with sqlite.translate_errors(self.path), checksums.translate_value_errors(self.path):
            yield self._connection

    def begin_run(self, run: RunRecord) -> None:
        """Insert a run before its first intent; later records are counted for it.

        Earlier runs without an ending get the ending `killed`: a store has one process at a time.
        """
        with self.writing() as connection:
            _end_killed_runs(connection)
            number = enter_run(connection, run)
        self._run = number

    @property
    def run_number(self) -> int:
        """Number of the run that `begin_run` began; 0 before."""
        return self._run

    def end_killed_runs(self) -> None:
        """Give earlier runs without an ending the ending `killed`. Call it only while no run is active."""
        with self.writing() as connection:
            _end_killed_runs(connection)

    def end_run(self, run_id: str, ending: str, exit_code: int, at: float) -> None:
        """Write how a run ended. `at` is Unix seconds.

        Raises:
            KeyError: there is no such run.
        """
        with self.writing() as connection:
            row = connection.execute("SELECT run FROM runs WHERE run_id = ?", (run_id,)).fetchone()
            if row is None:
                raise KeyError(run_id)
            end_run(connection, row[0], micros(at), ending, exit_code)

    def require_whole_index(self) -> None:
        """Check every row of the key index: a key that changed would be asked, and paid for, again.

        A damaged row tells the lost key of no request: only when all rows are whole is a key that is not
        found one that was never asked. So the whole index is read before anything is sent, 1.5 us a row.
        Neither the times of the file nor a sum that is kept beside the rows can spare that: a bit that flips
        on the disk changes no time, and a sum has to be computed over every key again to be compared.

        Raises:
            StoreCorrupt: one is damaged; names its key.
        """
        with self.reading() as connection:
            for key in checksums.changed_index_keys(connection):
                raise checksums.damaged_row_error("keys", checksums.printable(key), self.path)

    def next_attempt_id(self) -> int:
        """Return the lowest attempt number that was never used in this store."""
        with self.reading() as connection:
            return checksums.meta_number(connection, "last_attempt_id") + 1

    def next_shard(self) -> int:
        """Return the number of the next shard; no number is used twice."""
        with self.reading() as connection:
            return checksums.meta_number(connection, "last_shard") + 1

    def look_up(self, keys: Sequence[bytes]) -> dict[bytes, HeldAnswer]:
        """Return the answer or dead letter of each key; keys the store does not know are left out."""
        held: dict[bytes, HeldAnswer] = {}
        with self.reading() as connection:
            has_asks, has_dead = _is_any(connection, "asks"), _is_any(connection, "dead")
            queries = [_KEYS, _ANSWERS] if _is_any(connection, "answers") else [_KEYS]
            for start in range(0, len(keys), KEYS_PER_LOOKUP):
                chunk = keys[start : start + KEYS_PER_LOOKUP]
                also = _askers(connection, chunk) if has_asks else {}
                for key, code, ceiling, asker in _rows_of(connection, _DEAD, chunk) if has_dead else ():
                    held[key] = HeldAnswer("dead", code, ceiling, asker, also.get(key, {}))
                for query in queries:
                    for key, outcome, ceiling, asker in _rows_of(connection, query, chunk):
                        held[key] = HeldAnswer(
                            "answered", OUTCOMES[outcome], ceiling, asker, also.get(key, {})
                        )
        return held

    def apply(self, records: Sequence[Record]) -> None:
        """Write records in one transaction; when this returns, they survive power loss.

        Their order does not matter. An intent and its outcome must be in different calls.

        Raises:
            StoreError, StoreFull, StoreCorrupt: nothing of this call is stored.
            TypeError: a record holds what JSON can't (a bug; the journal stays usable).
        """
        entries = RowEncoder(self._run, records)
        with self.writing() as connection:
            entries.write(connection)
            reach("journal.after_insert")
        reach("journal.after_commit")

    def write_dead_letters(self, store: Path) -> int:
        """Rewrite `dead_letters.jsonl`, a copy for people to read; return its number of lines.

        The file is removed when there are no dead letters.

        Raises:
            StoreError: the file can't be written.
        """
        path = store / paths.DEAD_LETTERS
        query = (
            "SELECT key, prompt_json, body_json, sample_index, code, message, attempts, at_us FROM dead"
            " ORDER BY at_us, key"
        )
        lines = 0
        try:
            with self.reading() as connection, own_files.replacing(path, durable=True) as out:
                for row in connection.execute(query):
                    out.write(_dead_letter_line(row))
                    lines += 1
            if not lines:
                own_files.remove(path)
        except OSError as error:
            raise sqlite.disk_error(error, path) from None
        return lines

    def require_free_space(self, free_mib: float) -> None:
        """Do nothing when the disk has at least `free_mib` free, so that paid answers can be stored.

        Raises:
            StoreFull: less is free; StoreError: the free space can't be read, or the journal was removed or
                replaced: what is written from now on would be lost.
        """
        if self._identity != _identity(self.path) or not own_files.is_in_place(self.path.parent):
            raise StoreError(
                "was removed or replaced while this run writes it",
                place=str(self.path),
                remedy="put it back from a copy; what was answered since then is lost",
            )
        try:
            free = shutil.disk_usage(self.path.parent).free / 2**20
        except OSError as error:
            raise sqlite.disk_error(error, self.path.parent) from None
        if free < free_mib:
            raise StoreFull(
                f"{free:,.0f} MiB free, [store] min_free_mib is {free_mib:,.0f}",
                place=str(self.path.parent),
                remedy="free space, then run again; no further request was sent",
            )

    def possibly_billed(self, *, in_flight: bool, run_id: str | None = None) -> list[PossiblyBilledAttempt]:
        """Return the attempts that may have been charged without an answer, in the order they were sent.

        Args:
            in_flight: include attempts of a run without an ending. While its process is alive they are only
                in flight; when it has died they may have been charged.
            run_id: only attempts of this run; None for all.
        """
        query = (
            "SELECT attempt_id, key, at_us / 1e6, run_id, coalesce(code, ''), reserved_tokens,"
            " reserved_microusd FROM intents JOIN runs USING (run)"
            " WHERE (code IS NOT NULL OR ending <> '' OR :in_flight) AND run_id = coalesce(:run_id, run_id)"
            " ORDER BY attempt_id"
        )
        bound = {"in_flight": in_flight, "run_id": run_id}
        with self.reading() as connection:
            return [PossiblyBilledAttempt(*row) for row in connection.execute(query, bound)]

    def totals(self, run_id: str | None = None) -> Totals:
        """Return the counts of one run, or of all runs.

        Attempts without an outcome count as possibly billed once their run has ended.
        """
        where = "" if run_id is None else " WHERE run = (SELECT run FROM runs WHERE run_id = :run_id)"
        query = f"SELECT name, sum(value) FROM counters{where} GROUP BY name"  # noqa: S608 - our own text
        with self.reading() as connection:
            counts = dict(connection.execute(query, {"run_id": run_id}))
        # Failures that were possibly billed are in the counters already.
        lost = [
            attempt for attempt in self.possibly_billed(in_flight=False, run_id=run_id) if not attempt.code
        ]
        plain = {name: counts.get(name, 0) for name in _PLAIN_COUNTERS}
        plain["possibly_billed"] += len(lost)
        plain["possibly_billed_microusd"] += sum(attempt.reserved_microusd for attempt in lost)
        return Totals(
            **plain,
            outcomes=_with_prefix("outcome.", counts),
            reopened_outcomes=_with_prefix("reopened.", counts),
            purged_outcomes=_with_prefix(PURGED_OUTCOME, counts),
            errors=_with_prefix("error.", counts),
        )


_PLAIN_COUNTERS = (
    "answers",
    "dead",
    "attempts",
    "refunds",
    "asks",
    "possibly_billed",
    "possibly_billed_microusd",
    "paid_twice",
    "reopened",
    "copied",
    "purged",
    "lost",
    "input_tokens",
    "output_tokens",
    "cost_microusd",
)


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, None where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _end_killed_runs(connection: sqlite3.Connection) -> None:
    for (number,) in connection.execute("SELECT run FROM runs WHERE ending = ''").fetchall():
        end_run(connection, number, None, KILLED, None)


def _is_any(connection: sqlite3.Connection, table: str) -> bool:
    (exists,) = connection.execute(f"SELECT EXISTS (SELECT 1 FROM {table})").fetchone()  # noqa: S608
    return bool(exists)


def _rows_of(connection: sqlite3.Connection, query: str, keys: Sequence[bytes]) -> list[tuple[Any, ...]]:
    holes = ",".join("?" * len(keys))
    return connection.execute(f"{query} WHERE key IN ({holes})", keys).fetchall()


def _askers(connection: sqlite3.Connection, keys: Sequence[bytes]) -> _Askers:
    askers: _Askers = defaultdict(dict)
    for _, key, sample_index, asker, prompt in sorted(_rows_of(connection, _ASKS, keys)):
        with contextlib.suppress(orjson.JSONDecodeError):  # damaged: `harvester verify` reports it
            askers[key][orjson.loads(prompt)["id"], sample_index] = asker
    return askers


def _with_prefix(prefix: str, counts: Mapping[str, int]) -> dict[str, int]:
    return {
        name.removeprefix(prefix): count
        for name, count in counts.items()
        if name.startswith(prefix) and count
    }


def _dead_letter_line(row: tuple[Any, ...]) -> bytes:
    key, prompt, body, sample_index, code, message, attempts, at_us = row
    prompt_fields = orjson.loads(prompt)
    letter = {
        "key": key.hex(),
        "prompt_id": prompt_fields["id"],
        "file": prompt_fields["file"],
        "line": prompt_fields["line"],
        "sample_index": sample_index,
        "code": code,
        "message": message,
        "attempts": attempts,
        "at": at_us / 1e6,
        "messages": orjson.loads(body).get("messages", []),
    }
    return orjson.dumps(letter) + b"\n"
