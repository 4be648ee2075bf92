"""Test refusals that concern one row, and refusals that concern all, through a whole run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.mock_teacher.running import RunningMock
from tests.faults.bench import POISON, Hasty, run_harvest
from tests.tiers import rest_is_slow

Mock = Callable[..., RunningMock]
MANY = (*(f"What is {n} + {3 * n}?" for n in range(40)), f"What is {POISON}?")
SLOWLY = {"patience_s": 600, "deadline_s": 600}
TOO_LARGE = {"action": "status", "status": 429, "code": "tokens", "message": "larger than all of it"}


@pytest.mark.parametrize("headers", rest_is_slow([{}, {"retry-after": "1"}, {"retry-after": "0"}], first=1))
def test_row_11_a_row_that_alone_is_refused_is_a_dead_letter(
    mock_teacher: Mock, tmp_path: Path, headers: dict[str, str]
) -> None:
    mock = mock_teacher()
    fault = {**TOO_LARGE, "prompt": POISON, "headers": headers}
    ended = run_harvest(mock, tmp_path, [fault], prompts=MANY, clock=Hasty(100.0), run=SLOWLY)
    assert (ended.exit_code, ended.totals.answers, len(ended.letters)) == (3, 40, 1)
    assert "larger than all of it" in ended.letters[0]["message"]
    assert 8 <= ended.fired <= 40


@pytest.mark.parametrize(
    ("status", "code"), [(400, "content_filter"), (403, "moderation"), (403, ""), (404, "")]
)
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


@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize("after", [0, 7])
def test_row_4_and_5_an_account_that_may_nothing_or_a_wrong_model_stops_the_run(
    mock_teacher: Mock, tmp_path: Path, after: int, status: int
) -> None:
    mock = mock_teacher()
    fault = {"action": "status", "status": status, "after": after}
    ended = run_harvest(mock, tmp_path, [fault], prompts=MANY)
    assert (ended.exit_code, ended.totals.answers, len(ended.letters)) == (4, after, 0)
    assert 1 <= ended.fired <= 5


def _many(count: int, start: int = 0) -> tuple[str, ...]:
    return tuple(f"What is {n} + {3 * n}?" for n in range(start, start + count))


def _statuses(mock: RunningMock) -> dict[str, int]:
    statuses: dict[str, int] = mock.state()["statuses"]
    return statuses


def test_row_92_a_server_that_queues_is_kept_busy_without_timeouts(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    """Four slots of 0.2 s each (two seconds of the fast clock), a deadline of 12 s, 64 in flight allowed."""
    mock = mock_teacher(slots=4, slot_s=0.2)
    limits = {"limits": {"max_concurrency": 64}}
    ended = run_harvest(
        mock, tmp_path, prompts=_many(40), teacher=limits, clock=Hasty(10.0), run={"deadline_s": 12}
    )
    assert (ended.exit_code, ended.totals.answers) == (0, 40)
    assert ended.billed["requests"] == 40  # none timed out and was asked twice


@pytest.mark.parametrize("status", rest_is_slow([429, 503], first=1))
def test_row_93_a_cap_on_requests_in_flight_is_learned_and_outlives_a_restart(
    mock_teacher: Mock, tmp_path: Path, status: int
) -> None:
    mock = mock_teacher(max_concurrency=4, concurrency_status=status, latency_s=0.05)
    limits = {"limits": {"max_concurrency": 32}}
    run = {"max_attempts": 20, "patience_s": 120, "deadline_s": 60}
    first = run_harvest(mock, tmp_path, prompts=_many(80), teacher=limits, clock=Hasty(5.0), run=run)
    refused = _statuses(mock).get(str(status), 0)
    assert (first.exit_code, first.totals.answers, refused > 0) == (0, 80, True)
    # A busy machine may send too few at once to be sure of the cap within one run.
    for number in range(1, 6):
        before = _statuses(mock).get(str(status), 0)
        prompts = _many(40, 100 * number)
        again = run_harvest(mock, tmp_path, prompts=prompts, teacher=limits, clock=Hasty(5.0), run=run)
        assert (again.exit_code, again.totals.answers) == (0, 80 + 40 * number)
        if _statuses(mock).get(str(status), 0) - before < refused / 2:
            return
    pytest.fail("each run is refused as much as the first")


@pytest.mark.parametrize("told", rest_is_slow([{}, {"requests_per_minute": 60_000}], first=1))
@pytest.mark.parametrize("window_s", rest_is_slow([0.25, 0.5], first=1))
def test_row_94_a_limit_in_windows_is_not_taken_per_minute(
    mock_teacher: Mock, tmp_path: Path, told: dict[str, float], window_s: float
) -> None:
    """240 requests/s in windows; the headers name limit, rest and reset, but no length of the window."""
    mock = mock_teacher(rpm=240 * 60, window_s=window_s, latency_s=0.01)
    ended = run_harvest(
        mock,
        tmp_path,
        prompts=_many(240),
        teacher={"limits": {"max_concurrency": 32, **told}},
        clock=Hasty(1.0),
        run={"patience_s": 60, "deadline_s": 60},
    )
    assert (ended.exit_code, ended.totals.answers) == (0, 240)


@pytest.mark.parametrize("headers", rest_is_slow([{}, {"retry-after": "0"}, {"retry-after": "1"}], first=1))
def test_row_95_refusals_at_random_slow_nobody_down_and_lose_no_row(
    mock_teacher: Mock, tmp_path: Path, headers: dict[str, str]
) -> None:
    mock = mock_teacher(latency_s=0.01)
    fault = {"action": "status", "status": 429, "probability": 0.1, "seed": 3, "headers": headers}
    ended = run_harvest(
        mock,
        tmp_path,
        [fault],
        prompts=_many(200),
        teacher={"limits": {"max_concurrency": 16}},
        run={"patience_s": 600},
    )
    assert (ended.exit_code, ended.totals.answers, ended.totals.dead) == (0, 200, 0)
    assert 10 <= ended.fired <= 60


@pytest.mark.parametrize("reset", ["6m0s", "1h0m0s", "360"])
def test_row_96_a_named_wait_outranks_a_long_reset(mock_teacher: Mock, tmp_path: Path, reset: str) -> None:
    mock = mock_teacher()
    headers = {
        "retry-after": "1",
        "x-ratelimit-limit-tokens": "150000",
        "x-ratelimit-remaining-tokens": "149984",
        "x-ratelimit-reset-tokens": reset,
    }
    fault = {"action": "status", "status": 429, "headers": headers, "every": 10}
    ended = run_harvest(mock, tmp_path, [fault], prompts=_many(40), run={"patience_s": 300})
    assert (ended.exit_code, ended.totals.answers) == (0, 40)  # a wait of 360 s would have parked it
    assert ended.fired >= 4


@pytest.mark.parametrize("wait", ["0", "0.001"])
def test_row_97_a_named_wait_of_nothing_that_was_wrong_gets_a_back_off(
    mock_teacher: Mock, tmp_path: Path, wait: str
) -> None:
    mock = mock_teacher()
    fault = {"action": "status", "status": 429, "headers": {"retry-after": wait}, "first": 12}
    ended = run_harvest(mock, tmp_path, [fault], prompts=_many(20))
    assert (ended.exit_code, ended.totals.answers, ended.fired) == (0, 20, 12), ended.output


@pytest.mark.parametrize("burst_s", rest_is_slow([0.1, 0.25], first=1))
def test_row_98_a_small_burst_is_not_taken_for_the_rate(
    mock_teacher: Mock, tmp_path: Path, burst_s: float
) -> None:
    """400 requests/s with room for 40 or 100 at once, told right."""
    mock = mock_teacher(rpm=24_000, burst_s=burst_s, hide_limits=True, latency_s=0.02)
    ended = run_harvest(
        mock,
        tmp_path,
        prompts=_many(300),
        teacher={"limits": {"max_concurrency": 64, "requests_per_minute": 24_000}},
        clock=Hasty(1.0),
    )
    assert (ended.exit_code, ended.totals.answers) == (0, 300)
    assert _statuses(mock).get("429", 0) <= 30
