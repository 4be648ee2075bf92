"""Encode journal records as SQL rows and write them, with their counters, in one transaction.

All rows are encoded before the transaction begins: a record that JSON can't hold fails before anything is
written, and the transaction is short.
"""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from harvester.api.max_tokens import max_tokens_of
from harvester.api.replies.usage import apportion
from harvester.store import paths
from harvester.store.journal.checksums import (
    COVERED,
    checksum,
    meta_number,
    require_unchanged,
    set_meta,
    updating_checksum,
)
from harvester.store.journal.records import (
    Answer,
    AnswerGroup,
    BatchRef,
    BatchRowReopened,
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
from harvester.store.journal.spending import Amounts, charges_at_end, counter_names
from harvester.store.journal.sqlite import OUTCOME_CODES, has_table

FAILURES_KEPT = 1000
FAILURE_RAW_BYTES = 2048
_INSERT_FAILURE = (
    "INSERT INTO failures (attempt_id, run, status, maybe_billed, at_us, code, key, raw, checksum)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


def micros(seconds: float) -> int:
    """Convert seconds to whole microseconds, the unit of every time in the journal."""
    return round(seconds * 1e6)


def charge_at(counts: Counter[str], at: float, amounts: Amounts) -> None:
    """Count tokens and micro-dollars for the budgets, on the day of `at`."""
    for name, amount in zip(counter_names(at), amounts, strict=True):
        counts[name] += amount


class RowEncoder:
    """The rows of one transaction, and the counts they add to run number `run`."""

    def __init__(self, run: int, records: Iterable[Record]) -> None:
        self._run = run
        # Outcomes of a batch are counted for the run that sent it.
        self._counts_of: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._counts = self._counts_of[run]
        self._intents: list[tuple[Any, ...]] = []
        self._ended: list[tuple[int]] = []
        self._answers: defaultdict[int, list[tuple[Any, ...]]] = defaultdict(list)
        self._left_batch: list[tuple[bytes]] = []
        self._failures: list[Failure] = []
        self._batch_failures: list[tuple[Any, ...]] = []
        self._dead: list[tuple[Any, ...]] = []
        self._asks: list[tuple[Any, ...]] = []
        for record in records:
            self._add(record)

    def _add(self, record: Record) -> None:
        match record:
            case Intent():
                self._intent(record)
            case Refund():
                self._refund(record)
            case Failure():
                self._failure(record)
            case Answer():
                self._answer(record)
            case AnswerGroup():
                for answer in record.answers:
                    self._answer(answer)
                self._ended += [(attempt_id,) for attempt_id in record.attempts]
            case DeadLetter():
                self._dead_letter(record)
            case SharedAnswer():
                self._shared_answer(record)
            case BatchRowReopened():
                self._reopened(record)

    def _intent(self, intent: Intent) -> None:
        self._counts["attempts"] += 1
        keys = (intent.key, *intent.further_keys)
        tokens = apportion(intent.reserved_tokens, [1] * len(keys))
        microusd = apportion(intent.reserved_microusd, [1] * len(keys))
        for at, key in enumerate(keys):
            scalars = (
                intent.attempt_id + at,
                self._run,
                micros(intent.at),
                tokens[at],
                microusd[at],
                None,
                intent.endpoint,
            )
            self._intents.append((*scalars, key, checksum(scalars, key)))

    def _refund(self, refund: Refund) -> None:
        self._counts["refunds"] += 1
        self._ended += _numbers(refund.attempt_id, refund.answers)

    def _failure(self, failure: Failure) -> None:
        self._counts[f"error.{failure.code}"] += 1
        self._failures.append(failure)
        if not failure.maybe_billed:
            self._ended += _numbers(failure.attempt_id, failure.answers)

    def _answer(self, answer: Answer) -> None:
        run = self._run_of(answer.batch, answer.key)
        count = self._counts_of[run]
        count["answers"] += 1
        count["outcome." + answer.outcome] += 1
        count["input_tokens"] += answer.input_tokens
        count["output_tokens"] += answer.output_tokens
        count["cost_microusd"] += answer.cost_microusd
        charge_at(count, answer.at if answer.batch is None else answer.batch.sent_at, answer.charge)
        self._ended.append((answer.attempt_id,))
        asker = asker_digest(answer.prompt, answer.sample_index)
        prompt, body = prompt_json(answer.prompt), orjson.dumps(answer.body)
        scalars = (
            run,
            OUTCOME_CODES[answer.outcome],
            max_tokens_of(answer.body),
            answer.status,
            answer.sample_index,
            answer.attempts,
            answer.input_tokens,
            answer.output_tokens,
            answer.cost_microusd,
            micros(answer.latency_s),
            micros(answer.at),
            answer.endpoint,
        )
        check = checksum(scalars, answer.key, asker, prompt, body, answer.raw)
        self._answers[run].append(
            (
                answer.key,
                asker,
                *scalars[:-1],
                check,
                answer.endpoint,
                prompt.decode(),
                body.decode(),
                answer.raw,
            )
        )

    def _run_of(self, batch: BatchRef | None, key: bytes) -> int:
        """Return the run that paid; note that the row has left its batch."""
        if batch is None:
            return self._run
        self._left_batch.append((key,))
        return batch.run

    def _reopened(self, row: BatchRowReopened) -> None:
        run = self._run_of(row.batch, row.key)
        self._counts_of[run][f"error.{row.code}"] += 1
        at = micros(row.at)
        scalars = (row.attempt_id, run, row.status, int(row.maybe_billed), at, row.code)
        raw = row.raw[:FAILURE_RAW_BYTES]
        self._batch_failures.append((*scalars, row.key, raw, checksum(scalars, row.key, raw)))
        if not row.maybe_billed:
            return
        counts, reserved = self._counts_of[run], (row.reserved_tokens, row.reserved_microusd)
        counts["possibly_billed"] += 1
        counts["possibly_billed_microusd"] += row.reserved_microusd
        charge_at(counts, row.batch.sent_at, reserved)
        intent = (row.attempt_id, run, micros(row.batch.sent_at), *reserved, row.code, row.endpoint)
        self._intents.append((*intent, row.key, checksum(intent, row.key)))

    def _dead_letter(self, letter: DeadLetter) -> None:
        self._run_of(letter.batch, letter.key)
        self._counts["dead"] += 1
        asker = asker_digest(letter.prompt, letter.sample_index)
        prompt, body = prompt_json(letter.prompt), orjson.dumps(letter.body)
        scalars = (
            self._run,
            max_tokens_of(letter.body),
            letter.sample_index,
            letter.attempts,
            micros(letter.at),
            letter.code,
            letter.message,
        )
        check = checksum(scalars, letter.key, asker, prompt, body)
        self._dead.append((letter.key, asker, *scalars, prompt.decode(), body.decode(), check))

    def _shared_answer(self, shared: SharedAnswer) -> None:
        prompt = prompt_json(shared.prompt)
        asker = asker_digest(shared.prompt, shared.sample_index)
        check = checksum([shared.sample_index], shared.key, asker, prompt)
        self._asks.append((shared.key, asker, shared.sample_index, prompt.decode(), check))

    def write(self, connection: sqlite3.Connection) -> None:
        """Write rows, then counters, inside an open transaction."""
        if self._intents:
            connection.executemany("INSERT INTO intents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", self._intents)
            last = max(row[0] for row in self._intents)
            if meta_number(connection, "last_attempt_id") < last:
                set_meta(connection, "last_attempt_id", last)
        if self._failures or self._batch_failures:
            self._write_failures(connection)
        for run, answers in self._answers.items():
            self._write_answers(connection, run, answers)
        if self._ended:
            connection.executemany("DELETE FROM intents WHERE attempt_id = ?", self._ended)
        if self._dead:
            connection.executemany(
                "INSERT OR REPLACE INTO dead VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", self._dead
            )
        if self._asks:
            self._write_asks(connection)
        if self._left_batch:
            connection.executemany("DELETE FROM batch_rows WHERE key = ?", self._left_batch)
        for run, counts in self._counts_of.items():
            add_counts(connection, run, counts)

    def _write_answers(
        self, connection: sqlite3.Connection, run: int, answers: Sequence[tuple[Any, ...]]
    ) -> None:
        # A held key is not asked for again. Should it happen, the first answer stays, because a key has one
        # row in the corpus, and the second is only counted.
        stored = _inserted(
            connection,
            "INSERT OR IGNORE INTO answers (key, asker, run, outcome, max_tokens, status, sample_index,"
            " attempts, input_tokens, output_tokens, cost_microusd, latency_us, at_us, checksum, endpoint,"
            " prompt_json, body_json, raw) SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13,"
            " ?14, ?15, ?16, ?17, ?18 WHERE NOT EXISTS (SELECT 1 FROM keys WHERE key = ?1)",
            answers,
        )
        again = len(answers) - stored
        self._counts_of[run]["answers"] -= again
        self._counts_of[run]["paid_twice"] += again
        connection.executemany("DELETE FROM dead WHERE key = ?", [row[:1] for row in answers])

    def _write_asks(self, connection: sqlite3.Connection) -> None:
        # Of the asks of a row the one with the greatest id is valid; a repeated one gets a new id.
        inserted = _inserted(
            connection,
            "INSERT OR REPLACE INTO asks (key, asker, sample_index, prompt_json, checksum)"
            " SELECT ?1, ?2, ?3, ?4, ?5 WHERE NOT EXISTS (SELECT 1 FROM asks WHERE key = ?1 AND asker = ?2"
            " AND id = (SELECT max(id) FROM asks WHERE key = ?1))",
            self._asks,
        )
        self._counts["asks"] += inserted
        if inserted:  # a completed set of prompt files may have other metadata now
            forget_finished(connection)

    def _write_failures(self, connection: sqlite3.Connection) -> None:
        for failure in self._failures:
            raw = failure.raw[:FAILURE_RAW_BYTES]
            scalars = (
                failure.attempt_id,
                self._run,
                failure.status,
                int(failure.maybe_billed),
                micros(failure.at),
                failure.code,
            )
            connection.execute(
                _INSERT_FAILURE, (*scalars, failure.key, raw, checksum(scalars, failure.key, raw))
            )
            for (attempt_id,) in _numbers(failure.attempt_id, failure.answers * failure.maybe_billed):
                self._counts["possibly_billed"] += 1
                at, tokens, microusd = _mark(connection, attempt_id, failure)
                self._counts["possibly_billed_microusd"] += microusd
                charge_at(self._counts, at, (tokens, microusd))
        connection.executemany(_INSERT_FAILURE, self._batch_failures)
        drop_old_failures(connection)


def _numbers(first: int, count: int) -> list[tuple[int]]:
    """The numbers of the intents of one request, as rows of parameters."""
    return [(first + at,) for at in range(count)]


def _mark(connection: sqlite3.Connection, attempt_id: int, failure: Failure) -> tuple[float, int, int]:
    """Keep the intent with its error code; return its time, and the tokens and micro-dollars reserved."""
    row = _row(connection, "intents", attempt_id)
    if not row:
        return failure.at, 0, 0
    require_unchanged("intents", [row], Path(paths.JOURNAL))
    row["code"] = failure.code
    columns, short = COVERED["intents"]
    check = checksum([row[name] for name in columns[:short]], row["key"])
    connection.execute(
        "UPDATE intents SET code = ?, checksum = ? WHERE attempt_id = ?",
        (failure.code, check, attempt_id),
    )
    return row["at_us"] / 1e6, row["reserved_tokens"], row["reserved_microusd"]


def count_reopened(connection: sqlite3.Connection, run: int, outcomes: Iterable[str]) -> None:
    """Count answers that run number `run` took out of the store, by outcome, inside an open transaction."""
    counts = Counter(f"reopened.{outcome}" for outcome in outcomes)
    add_counts(connection, run, {**counts, "reopened": counts.total()})


def forget_finished(connection: sqlite3.Connection) -> None:
    """Forget which sets of prompt files are completed, because this transaction changes rows they rely on."""
    if has_table(connection, "finished"):
        connection.execute("DELETE FROM finished")


def enter_run(connection: sqlite3.Connection, run: RunRecord) -> int:
    """Insert a run that begins, inside an open transaction; return its number."""
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
    """Write how run number `run` ended, inside an open transaction.

    Raises:
        StoreCorrupt: the row of the run is damaged.
    """
    row = _row(connection, "runs", run)
    require_unchanged("runs", [row], Path(paths.JOURNAL))
    if not row["ending"]:
        add_counts(connection, run, charges_at_end(connection, run))
    _end(connection, row, ended_us, ending, exit_code)


def drop_old_failures(connection: sqlite3.Connection) -> None:
    """Delete all failures but the newest `FAILURES_KEPT`, inside an open transaction."""
    connection.execute(
        "DELETE FROM failures WHERE id <= (SELECT max(id) FROM failures) - ?", (FAILURES_KEPT,)
    )


def add_counts(connection: sqlite3.Connection, run: int, counts: Mapping[str, int]) -> None:
    """Add to the counters of a run, inside an open transaction."""
    with updating_checksum(connection, f"counters:{run}"):
        connection.executemany(
            "INSERT INTO counters VALUES (?, ?, ?)"
            " ON CONFLICT (run, name) DO UPDATE SET value = value + excluded.value",
            [(run, name, value) for name, value in counts.items() if value],
        )


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
    row = connection.execute(query, (number,)).fetchone()
    return {} if row is None else dict(zip(names, row, strict=True))


def _inserted(connection: sqlite3.Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> int:
    return connection.executemany(statement, rows).rowcount
