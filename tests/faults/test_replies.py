"""Test every reply of the fault catalogue: the fault fires; ending, bill and messages are right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from harvester.mock_teacher.running import RunningMock, start_in_thread
from harvester.mock_teacher.settings import MockSettings
from tests.faults.bench import POISON, run_harvest
from tests.tiers import rest_is_slow

FOR_EVER = 10**6
SOON = {"run": {"patience_s": 60}}


@dataclass(frozen=True, slots=True)
class Row:
    """One fault on the second of three prompts and what must come of it.

    `times` is how often it strikes; `billed` what the ledger charges; `kept` the poisoned row's outcome.
    """

    number: int
    fault: dict[str, Any]
    times: int = FOR_EVER
    exit_code: int = 0
    answers: int = 3
    billed: int = 3
    dead: int = 0
    lost: int = 0
    kept: str = ""
    says: str = ""
    letter: str = ""
    parts: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        values = [str(value) for key, value in self.fault.items() if key != "action"]
        result = ["date" if "GMT" in value else value[:24] for value in values]
        return "-".join([str(self.number), self.fault["action"], *result])


def status(number: int, code: int, name: str = "", **more: Any) -> dict[str, Any]:
    return {"action": "status", "status": code, **({"code": name} if name else {}), **more}


def refused(number: int, fault: dict[str, Any], says: str) -> Row:
    return Row(number, fault, exit_code=4, answers=-1, billed=-1, says=says)


def dead(number: int, fault: dict[str, Any], letter: str, **more: Any) -> Row:
    return Row(number, fault, exit_code=3, **{"answers": 2, "billed": 2, **more}, dead=1, letter=letter)


def retried(number: int, fault: dict[str, Any], **more: Any) -> Row:
    return Row(number, fault, times=1, **more)


def flagged(number: int, fault: dict[str, Any], kept: str) -> Row:
    return Row(number, fault, kept=kept)


def asks(value: str | None, name: str = "retry-after") -> dict[str, Any]:
    headers = {} if value is None else {"headers": {name: value}}
    return status(0, 429, "rate_limit_exceeded", **headers)


def a_date(ahead_s: float) -> str:
    """An HTTP date so much ahead of now."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=ahead_s), usegmt=True)


ROWS = [
    dead(1, status(1, 400, "context_length_exceeded"), "HTTP 400"),
    refused(2, status(2, 401, "invalid_api_key"), "401"),
    refused(3, status(3, 402), "no credit"),
    dead(4, status(4, 403), "may not do this"),
    dead(4, status(4, 403, "content_policy_violation"), "moderated"),
    dead(5, status(5, 404), "no such model or path"),
    refused(5, status(5, 404, "model_not_found"), "/v1"),
    *(retried(6, status(6, code)) for code in (408, 409)),
    dead(7, status(7, 413), "HTTP 413"),
    dead(8, status(8, 422), "HTTP 422"),
    retried(9, asks(a_date(2))),
    *(retried(9, asks(value, name)) for value, name in (("1", "retry-after"), ("300", "retry-after-ms"))),
    *(retried(10, asks(value)) for value in ("0", "-5", "nan", "soon", "Tue, 01 Jan 1980 00:00:00 GMT")),
    Row(10, asks("7200"), exit_code=10, answers=-1, billed=-1, says="Retry-After", parts=SOON),
    retried(11, asks(None)),
    retried(12, status(12, 429, "slow_down")),
    *(
        refused(12, status(12, 429, code), "no credit or quota")
        for code in (
            "insufficient_quota",
            "credit_balance_exhausted",
            "org_spend_limit_exceeded",
            "x_usage_limit_exceeded",
        )
    ),
    Row(
        13,
        status(
            13,
            429,
            "rate_limit_exceeded",
            headers={
                "x-ratelimit-limit-requests": "200",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "5h0m0s",
            },
        ),
        exit_code=10,
        answers=-1,
        billed=-1,
        says="requests per day",
    ),
    *(retried(14, status(14, code)) for code in (500, 503, 529)),
    *(retried(14, status(14, code), lost=1) for code in (502, 504, 520, 524)),
    refused(15, {"action": "redirect", "location": "https://elsewhere.example/v1"}, "elsewhere.example"),
    retried(16, {"action": "error_200", "code": "rate_limit_exceeded"}),
    refused(16, {"action": "error_200", "code": "insufficient_quota"}, "no credit or quota"),
    *(
        dead(17, {"action": action}, "without choices", billed=4, lost=2)
        for action in ("empty_choices", "no_choices", "null_choices")
    ),
    flagged(18, {"action": "null_content"}, "empty"),
    flagged(18, {"action": "empty_content"}, "empty"),
    flagged(18, {"action": "refusal", "value": "No."}, "refused"),
    flagged(18, {"action": "tool_call"}, "invalid"),
    flagged(19, {"action": "length"}, "truncated"),
    flagged(20, {"action": "content_filter"}, "filtered"),
    *(
        retried(21, {"action": "finish_reason", "value": value}, billed=4, lost=1)
        for value in ("error", "network_error")
    ),
    flagged(22, {"action": "finish_reason", "value": "because"}, "unknown"),
    flagged(23, {"action": "no_usage"}, "ok"),
    *(
        flagged(23, {"action": "usage", "value": {"prompt_tokens": value, "completion_tokens": value}}, "ok")
        for value in (-1, "many", 10**18)
    ),
    flagged(24, {"action": "no_id"}, "ok"),
    flagged(24, {"action": "id", "value": "same"}, "ok"),
    *(
        flagged(25, {"action": action}, "ok")
        for action in ("extra_choice", "reversed_choices", "wrong_index")
    ),
    flagged(26, {"action": "model", "value": "mock-teacher-2"}, "ok"),
    flagged(26, {"action": "fingerprint", "value": "fp-new"}, "ok"),
    *(
        retried(27, {"action": action}, billed=4, lost=1)
        for action in ("truncated_json", "cut_body", "chunk_cut")
    ),
    *(
        retried(28, {"action": action}, billed=4, lost=1)
        for action in ("reset_body", "fin_headers", "garbage_status", "reset", "fin")
    ),
    retried(
        31,
        {"action": "drip", "bytes": 1, "interval_s": 0.2},
        billed=4,
        lost=1,
        parts={"run": {"deadline_s": 2}},
    ),
    retried(32, {"action": "silence"}, billed=4, lost=1, parts={"run": {"deadline_s": 2}}),
    # The deadline leaves a busy machine the time to read 32 MiB.
    dead(33, {"action": "gzip_bomb"}, "larger than", billed=3, lost=1, parts={"run": {"deadline_s": 60}}),
    dead(
        33,
        {"action": "huge_body", "bytes": 40 * 2**20},
        "larger than",
        billed=3,
        lost=1,
        parts={"run": {"deadline_s": 60}},
    ),
    retried(33, {"action": "endless_headers", "bytes": 2**20}, billed=4, lost=1),
    dead(34, {"action": "html", "status": 200}, "not JSON"),
    flagged(34, {"action": "content_type", "value": "text/plain"}, "ok"),
    *(
        flagged(35, {"action": action}, kept)
        for action, kept in (
            ("invalid_utf8", "unknown"),
            ("bom", "ok"),
            ("lone_surrogate", "unknown"),
            ("nul", "ok"),
            ("nan", "unknown"),
            ("duplicate_keys", "ok"),
            ("big_integer", "unknown"),
            ("deep_json", "unknown"),
        )
    ),
    *(retried(35, {"action": action}, billed=4, lost=1) for action in ("junk_json", "empty_body")),
    retried(38, {"action": "close_idle"}),
]

# More values that take the path of a row above.
SLOW_ROWS = [
    Row(10, asks(value), exit_code=10, answers=-1, billed=-1, says="Retry-After", parts=SOON)
    for value in ("1e99", a_date(7200))
]


@pytest.fixture(scope="module")
def mock() -> Iterator[RunningMock]:
    with start_in_thread(MockSettings(latency_s=0.01)) as running:
        yield running
        assert running.state()["errors"] == []


@pytest.mark.parametrize("row", rest_is_slow([*ROWS, *SLOW_ROWS], first=len(ROWS)), ids=str)
def test_row(row: Row, mock: RunningMock, tmp_path: Path) -> None:
    fault = {**row.fault, "prompt": POISON, "times": row.times}
    ended = run_harvest(mock, tmp_path, [fault], **row.parts)
    assert ended.fired >= 1, "the fault never fired"
    assert ended.exit_code == row.exit_code, ended.output
    assert row.says in ended.output
    assert ended.totals.dead == row.dead == len(ended.letters)
    assert ended.totals.possibly_billed == row.lost
    if row.answers >= 0:
        assert ended.totals.answers == row.answers
        assert ended.billed["requests"] == row.billed
    # What the teacher charged is what we hold and what we know to be possibly billed, and no more.
    assert ended.billed["requests"] <= ended.totals.answers + ended.totals.possibly_billed
    if row.kept:
        assert ended.outcomes.get(row.kept, 0) == (3 if row.kept == "ok" else 1), ended.outcomes
    if row.letter:
        assert row.letter in ended.letters[0]["message"]
