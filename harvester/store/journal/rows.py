"""Records -> rows: what one transaction of the journal writes, and what it counts for its run.

Everything is turned into rows before the transaction begins, so that a record JSON can't hold fails alone
and the disk is held for as short as possible.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from harvester.api.max_tokens import max_tokens_of
from harvester.store import paths
from harvester.store.journal.checksums import (
    COVERED,
    checksum,
    require_unchanged,
    set_meta,
    updating_checksum,
)
from harvester.store.journal.records import (
    Answer,
    DeadLetter,
    Failure,
    Intent,
    Record,
    Refund,
    RunRecord,
    SharedAnswer,
    asker_digest,
    prompt_json,
)
from harvester.store.journal.sqlite import OUTCOME_CODES, has_table

FAILURES_KEPT = 1000
FAILURE_RAW_BYTES = 2048


def micros(seconds: float) -> int:
    """Seconds as whole microseconds, as every time in the journal is kept."""
    return round(seconds * 1e6)


class RowEncoder:
    """The rows of one transaction, and the counts they add to run number `run`."""

    def __init__(self, run: int, records: Iterable[Record]) -> None:
        self._run = run
        self._counts: Counter[str] = Counter()
        self._intents: list[tuple[Any, ...]] = []
        self._ended: list[tuple[int]] = []
        self._answers: list[tuple[Any, ...]] = []
        self._failures: list[Failure] = []
        self._dead: list[tuple[Any, ...]] = []
        self._asks: list[tuple[Any, ...]] = []
        take = {
            Intent: self._intent,
            Refund: self._refund,
            Failure: self._failure,
            Answer: self._answer,
            DeadLetter: self._dead_letter,
            SharedAnswer: self._ask,
        }
        for record in records:
            take[type(record)](record)  # type: ignore[operator]

    def _intent(self, one: Intent) -> None:
        self._counts["attempts"] += 1
        scalars = (
            one.attempt_id,
            self._run,
            micros(one.at),
            one.reserved_tokens,
            one.reserved_microusd,
            None,
            one.endpoint,
        )
        self._intents.append((*scalars, one.key, checksum(scalars, one.key)))

    def _refund(self, one: Refund) -> None:
        self._counts["refunds"] += 1
        self._ended.append((one.attempt_id,))

    def _failure(self, one: Failure) -> None:
        self._counts[f"error.{one.code}"] += 1
        self._failures.append(one)
        if not one.maybe_billed:
            self._ended.append((one.attempt_id,))

    def _answer(self, one: Answer) -> None:
        count = self._counts
        count["answers"] += 1
        count["outcome." + one.outcome] += 1
        count["input_tokens"] += one.input_tokens
        count["output_tokens"] += one.output_tokens
        count["cost_microusd"] += one.cost_microusd
        self._ended.append((one.attempt_id,))
        asker = asker_digest(one.prompt, one.sample_index)
        prompt, body = prompt_json(one.prompt), orjson.dumps(one.body)
        scalars = (
            self._run,
            OUTCOME_CODES[one.outcome],
            max_tokens_of(one.body),
            one.status,
            one.sample_index,
            one.attempts,
            one.input_tokens,
            one.output_tokens,
            one.cost_microusd,
            micros(one.latency_s),
            micros(one.at),
            one.endpoint,
        )
        check = checksum(scalars, one.key, asker, prompt, body, one.raw)
        self._answers.append(
            (one.key, asker, *scalars[:-1], check, one.endpoint, prompt.decode(), body.decode(), one.raw)
        )

    def _dead_letter(self, one: DeadLetter) -> None:
        self._counts["dead"] += 1
        asker = asker_digest(one.prompt, one.sample_index)
        prompt, body = prompt_json(one.prompt), orjson.dumps(one.body)
        scalars = (
            self._run,
            max_tokens_of(one.body),
            one.sample_index,
            one.attempts,
            micros(one.at),
            one.code,
            one.message,
        )
        check = checksum(scalars, one.key, asker, prompt, body)
        self._dead.append((one.key, asker, *scalars, prompt.decode(), body.decode(), check))

    def _ask(self, one: SharedAnswer) -> None:
        prompt = prompt_json(one.prompt)
        asker = asker_digest(one.prompt, one.sample_index)
        check = checksum([one.sample_index], one.key, asker, prompt)
        self._asks.append((one.key, asker, one.sample_index, prompt.decode(), check))

    def write(self, connection: sqlite3.Connection) -> None:
        """Inside an open transaction: rows, then counters."""
        if self._intents:
            connection.executemany("INSERT INTO intents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", self._intents)
            last = max(row[0] for row in self._intents)
            (known,) = connection.execute("SELECT value FROM meta WHERE name = 'last_attempt_id'").fetchone()
            if int(known) < last:
                set_meta(connection, "last_attempt_id", last)
        if self._failures:
            self._write_failures(connection)
        if self._answers:
            self._write_answers(connection)
        if self._ended:
            connection.executemany("DELETE FROM intents WHERE attempt_id = ?", self._ended)
        if self._dead:
            connection.executemany(
                "INSERT OR REPLACE INTO dead VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", self._dead
            )
        if self._asks:
            self._write_asks(connection)
        with updating_checksum(connection, f"counters:{self._run}"):
            connection.executemany(
                "INSERT INTO counters VALUES (?, ?, ?)"
                " ON CONFLICT (run, name) DO UPDATE SET value = value + excluded.value",
                [(self._run, name, value) for name, value in self._counts.items() if value],
            )

    def _write_answers(self, connection: sqlite3.Connection) -> None:
        # Nobody asks for a key that is held; should it happen, the first answer stays and the second is
        # counted, for a key has one row in the corpus.
        stored = _inserted(
            connection,
            "INSERT OR IGNORE INTO answers (key, asker, run, outcome, max_tokens, status, sample_index,"
            " attempts, input_tokens, output_tokens, cost_microusd, latency_us, at_us, checksum, endpoint,"
            " prompt_json, body_json, raw) SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13,"
            " ?14, ?15, ?16, ?17, ?18 WHERE NOT EXISTS (SELECT 1 FROM keys WHERE key = ?1)",
            self._answers,
        )
        again = len(self._answers) - stored
        self._counts["answers"] -= again
        self._counts["paid_twice"] += again
        connection.executemany("DELETE FROM dead WHERE key = ?", [row[:1] for row in self._answers])

    def _write_asks(self, connection: sqlite3.Connection) -> None:
        # Among the asks of a row the one with the greatest id holds: one told before gets a new id.
        told = _inserted(
            connection,
            "INSERT OR REPLACE INTO asks (key, asker, sample_index, prompt_json, checksum)"
            " SELECT ?1, ?2, ?3, ?4, ?5 WHERE NOT EXISTS (SELECT 1 FROM asks WHERE key = ?1 AND asker = ?2"
            " AND id = (SELECT max(id) FROM asks WHERE key = ?1))",
            self._asks,
        )
        self._counts["asks"] += told
        if told:  # a file that was walked before may tell otherwise
            forget_finished(connection)

    def _write_failures(self, connection: sqlite3.Connection) -> None:
        for one in self._failures:
            raw = one.raw[:FAILURE_RAW_BYTES]
            scalars = (one.attempt_id, self._run, one.status, int(one.maybe_billed), micros(one.at), one.code)
            connection.execute(
                "INSERT INTO failures (attempt_id, run, status, maybe_billed, at_us, code, key, raw,"
                " checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*scalars, one.key, raw, checksum(scalars, one.key, raw)),
            )
            if one.maybe_billed:
                self._counts["possibly_billed"] += 1
                self._counts["possibly_billed_microusd"] += _mark(connection, one)
        connection.execute(
            "DELETE FROM failures WHERE id <= (SELECT max(id) FROM failures) - ?", (FAILURES_KEPT,)
        )


def _mark(connection: sqlite3.Connection, failure: Failure) -> int:
    """Leave the intent on the list with its error; returns what was reserved for it."""
    row = _row(connection, "intents", failure.attempt_id)
    if not row:
        return 0
    require_unchanged("intents", [row], Path(paths.JOURNAL))
    row["code"] = failure.code
    columns, short = COVERED["intents"]
    check = checksum([row[name] for name in columns[:short]], row["key"])
    connection.execute(
        "UPDATE intents SET code = ?, checksum = ? WHERE attempt_id = ?",
        (failure.code, check, failure.attempt_id),
    )
    return int(row["reserved_microusd"])


def forget_finished(connection: sqlite3.Connection) -> None:
    """What rows stood for changes in this transaction: no set of prompt files is finished any more."""
    if has_table(connection, "finished"):
        connection.execute("DELETE FROM finished")


def enter_run(connection: sqlite3.Connection, run: RunRecord) -> int:
    """Note a run that begins, inside an open transaction; returns its number."""
    lineage = run.lineage().to_json().decode()
    cursor = connection.execute(
        "INSERT INTO runs (run_id, started_us, ending, lineage_json, config_json, checksum)"
        " VALUES (?, ?, '', ?, ?, 0)",
        (run.run_id, micros(run.started_at), lineage, run.config_json),
    )
    number = int(cursor.lastrowid or 0)
    _end(connection, _row(connection, "runs", number), None, "", None)
    return number


def end_run(
    connection: sqlite3.Connection, run: int, ended_us: int | None, ending: str, exit_code: int | None
) -> None:
    """Note how run number `run` ended, inside an open transaction.

    Raises:
        StoreCorrupt: its row is not what was written.
    """
    row = _row(connection, "runs", run)
    require_unchanged("runs", [row], Path(paths.JOURNAL))
    _end(connection, row, ended_us, ending, exit_code)


def _end(
    connection: sqlite3.Connection,
    row: Mapping[str, Any],
    ended_us: int | None,
    ending: str,
    exit_code: int | None,
) -> None:
    check = checksum(
        [row["run"], row["run_id"], row["started_us"], ended_us, ending, exit_code],
        row["lineage_json"].encode(),
        row["config_json"].encode(),
    )
    connection.execute(
        "UPDATE runs SET ended_us = ?, ending = ?, exit_code = ?, checksum = ? WHERE run = ?",
        (ended_us, ending, exit_code, check, row["run"]),
    )


def _row(connection: sqlite3.Connection, table: str, number: int) -> dict[str, Any]:
    """A row of `runs` or `intents` by its number, with its checksum; empty where there is none."""
    names = (*COVERED[table][0], "checksum")
    query = f"SELECT {', '.join(names)} FROM {table} WHERE {names[0]} = ?"  # noqa: S608 - our own names
    found = connection.execute(query, (number,)).fetchone()
    return {} if found is None else dict(zip(names, found, strict=True))


def _inserted(connection: sqlite3.Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> int:
    return connection.executemany(statement, rows).rowcount
