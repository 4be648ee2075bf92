"""Test refusals that concern one row, and refusals that concern all, through a whole run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.mock_teacher.running import RunningMock
from tests.faults.bench import POISON, run_harvest

Mock = Callable[..., RunningMock]
MANY = (*(f"What is {n} + {3 * n}?" for n in range(40)), f"What is {POISON}?")
TOO_LARGE = {"action": "status", "status": 429, "code": "tokens", "message": "larger than all of it"}


@pytest.mark.parametrize("headers", [{}, {"retry-after": "1"}, {"retry-after": "0"}])
def test_row_11_a_row_that_alone_is_refused_is_a_dead_letter(
    mock_teacher: Mock, tmp_path: Path, headers: dict[str, str]
) -> None:
    mock = mock_teacher()
    fault = {**TOO_LARGE, "prompt": POISON, "headers": headers}
    ended = run_harvest(mock, tmp_path, [fault], prompts=MANY, run={"patience_s": 600})
    assert (ended.exit_code, ended.totals.answers, len(ended.letters)) == (3, 40, 1)
    assert "larger than all of it" in ended.letters[0]["message"]
    assert 6 <= ended.fired <= 40


@pytest.mark.parametrize(("status", "code"), [(400, "content_filter"), (403, "moderation"), (403, "")])
def test_row_4_rejected_prompts_among_answered_ones_are_dead_letters(
    mock_teacher: Mock, tmp_path: Path, status: int, code: str
) -> None:
    mock = mock_teacher()
    fault = {"action": "status", "status": status, "code": code, "every": 4}
    ended = run_harvest(mock, tmp_path, [fault], prompts=MANY)
    assert (ended.exit_code, ended.totals.answers, len(ended.letters)) == (3, 31, 10)
    assert ended.fired == 10


@pytest.mark.parametrize("count", [30, 41])
def test_row_4_many_moderated_prompts_in_a_row_do_not_stop_the_run(
    mock_teacher: Mock, tmp_path: Path, count: int
) -> None:
    mock = mock_teacher()
    fault = {"action": "status", "status": 400, "code": "content_filter", "first": count}
    ended = run_harvest(mock, tmp_path, [fault], prompts=MANY)
    assert (ended.exit_code, ended.totals.answers, len(ended.letters)) == (3, 41 - count, count)


@pytest.mark.parametrize("after", [0, 7])
def test_row_4_an_account_that_may_nothing_stops_the_run(
    mock_teacher: Mock, tmp_path: Path, after: int
) -> None:
    mock = mock_teacher()
    ended = run_harvest(mock, tmp_path, [{"action": "status", "status": 403, "after": after}], prompts=MANY)
    assert (ended.exit_code, ended.totals.answers, len(ended.letters)) == (4, after, 0)
    assert 1 <= ended.fired <= 5
