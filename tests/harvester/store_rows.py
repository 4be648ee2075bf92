"""Make rows for the store's tests: a run, intents and answers that are functions of a number."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harvester.api.request_key import request_key
from harvester.api.types import Prompt
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import Answer, Intent, PossiblyBilledAttempt, RunRecord
from harvester.store.maintain.verify_report import verify_with_bill

AT = 1_790_000_000.25
ENDPOINT = "http://127.0.0.1:8000/v1"


def run_record(run_id: str = "run-1", **changes: Any) -> RunRecord:
    facts = {
        "teacher_id": f"{ENDPOINT}|mock",
        "host": "127.0.0.1",
        "model": "mock",
        "terms_id": "mock-teacher",
    }
    return RunRecord(run_id=run_id, started_at=AT, **{**facts, "tool_version": "0.1.0", **changes})


def key_of(number: int) -> bytes:
    return request_key(ENDPOINT, body_of(number), 0)


def body_of(number: int) -> dict[str, Any]:
    system = {"role": "system", "content": "Briefly."}
    return {"model": "mock", "messages": [system, *prompt_of(number).messages], "max_tokens": 64}


def prompt_of(number: int, **changes: Any) -> Prompt:
    facts: dict[str, Any] = {
        "id": f"p{number}",
        "messages": ({"role": "user", "content": f"What is {number} + 1?"},),
        "reference": str(number + 1),
        "tags": ("sum",),
        "metadata": {"task": "sum", "split": "train"},
        "file": "prompts/sum.jsonl",
        "line": number + 1,
    }
    return Prompt(**{**facts, **changes})


def raw_of(number: int, **message: Any) -> bytes:
    return json.dumps(
        {
            "id": f"chatcmpl-{number}",
            "model": "mock-2026",
            "system_fingerprint": "fp_1",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": str(number + 1), **message},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 12, "completion_tokens": 3},
        }
    ).encode()


def intent(number: int, run_id: str = "run-1", attempt_id: int | None = None) -> Intent:
    return Intent(
        number + 1 if attempt_id is None else attempt_id, key_of(number), run_id, ENDPOINT, AT, 40, 9
    )


def answer(number: int, **changes: Any) -> Answer:
    facts: dict[str, Any] = {
        "attempt_id": number + 1,
        "key": key_of(number),
        "raw": raw_of(number),
        "status": 200,
        "prompt": prompt_of(number),
        "sample_index": 0,
        "body": body_of(number),
        "outcome": "ok",
        "input_tokens": 12,
        "output_tokens": 3,
        "cost_microusd": 7,
        "attempts": 1,
        "latency_s": 0.25,
        "at": AT + number,
        "endpoint": ENDPOINT,
    }
    return Answer(**{**facts, **changes})


def fill(journal: Journal, numbers: Iterable[int]) -> None:
    """Intents and their answers, each in a transaction of its own kind."""
    chosen = list(numbers)
    journal.apply([intent(number) for number in chosen])
    journal.apply([answer(number) for number in chosen])


def open_store(store: Path, **changes: Any) -> Journal:
    journal = Journal.open(store)
    journal.begin_run(run_record(**changes))
    return journal


def verified(store: Path, *, repair: bool) -> tuple[dict[str, Any], int]:
    """What `harvester verify --json` prints of a store, and the number of findings."""
    report = verify_with_bill(store, repair=repair)
    return report.facts(), len(report.messages)


def without_outcome(journal: Journal, *, in_flight: bool = True) -> list[PossiblyBilledAttempt]:
    """Attempts of which the journal has an intent and nothing else."""
    return [attempt for attempt in journal.possibly_billed(in_flight=in_flight) if not attempt.code]
