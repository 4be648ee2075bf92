"""Test faults of a whole run: streaks of failures, hosts, budgets, limits, prompts, replicas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.config import run_section
from harvester.config.run_section import RunSection
from harvester.errors import PromptError
from harvester.mock_teacher.running import RunningMock
from harvester.observe.status import current_status, status_lines
from harvester.run.prepare import prepare
from harvester.store import pauses
from harvester.store.journal.journal import Journal
from harvester.store.reader import Corpus
from harvester.system.clock import SystemClock
from tests.faults import bench
from tests.faults.bench import PROMPTS, run_harvest

Mock = Callable[..., RunningMock]
# Addresses are asked rows and nothing else, so that requests can be counted.
UNCHECKED = {"replicas_every_s": 0}
MANY = tuple(f"What is {n} + {3 * n}?" for n in range(60))


def test_row_1_twenty_rejections_in_a_row_stop_and_write_nothing_off(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    ended = run_harvest(mock, tmp_path, [{"action": "status", "status": 400}], prompts=MANY)
    assert 20 <= ended.fired <= 25
    assert (ended.exit_code, ended.totals.dead, ended.billed["requests"]) == (4, 0, 0)
    assert "20 prompts in a row were rejected" in ended.output
    mended = run_harvest(mock, tmp_path, prompts=MANY)
    assert (mended.exit_code, mended.totals.answers) == (0, 60)


def test_row_1_scattered_rejections_are_rows_not_the_configuration(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    ended = run_harvest(mock, tmp_path, [{"action": "status", "status": 400, "every": 2}], prompts=MANY)
    assert (ended.exit_code, ended.totals.dead, ended.totals.answers) == (3, 30, 30)


def test_row_2_a_key_revoked_midway_keeps_what_was_paid_and_shows_no_key(
    mock_teacher: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-CANARY-0123456789")
    mock = mock_teacher(require_key_env="TEACHER_KEY", latency_s=0.01)
    fault = {"action": "status", "status": 401, "after": 10, "message": "bad key sk-CANARY-0123456789"}
    ended = run_harvest(mock, tmp_path, [fault], prompts=MANY, teacher={"api_key_env": "TEACHER_KEY"})
    assert ended.fired >= 1
    assert (ended.exit_code, ended.totals.answers) == (4, ended.billed["requests"])
    assert "CANARY" not in ended.output


@pytest.mark.slow
def test_row_11_five_hundred_bare_refusals_lose_no_row(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(latency_s=0.02)
    fault = {"action": "status", "status": 429, "code": "rate_limit_exceeded", "first": 30}
    limits = {"limits": {"max_concurrency": 64}}
    ended = run_harvest(mock, tmp_path, [fault], prompts=MANY, teacher=limits)
    assert ended.fired >= 16
    assert (ended.exit_code, ended.totals.answers, ended.totals.dead) == (0, 60, 0), ended.output


def test_row_14_a_teacher_that_always_fails_parks_and_meets_few_retries(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    run = {"patience_s": 0.5}
    ended = run_harvest(mock, tmp_path, [{"action": "status", "status": 500}], prompts=MANY, run=run)
    assert ended.exit_code == 10
    assert "no answer from" in ended.output
    assert ended.fired <= 20


def test_rows_14_and_17_the_body_of_a_failure_is_kept(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    faults = [
        {"action": "html", "status": 502, "prompt": "3 + 4", "times": 1},
        {"action": "empty_choices", "prompt": "5 + 6", "times": 1},
        {"action": "body", "value": "<p>" + "x" * 9000, "prompt": bench.POISON, "times": 1},
    ]
    ended = run_harvest(mock, tmp_path, faults)
    assert (ended.exit_code, ended.fired, ended.totals.answers) == (0, 3, 3)
    with Journal.open(tmp_path / "store", read_only=True) as journal, journal.reading() as connection:
        kept = [bytes(raw) for (raw,) in connection.execute("SELECT raw FROM failures ORDER BY length(raw)")]
    assert b"<title>Sign in</title>" in kept[0]
    assert b'"choices":[]' in kept[1]
    assert (len(kept[2]), kept[2][:4]) == (2048, b"<p>x")


@pytest.mark.parametrize("fault", [{"action": "model", "value": "mock-teacher-2"}, {"action": "fingerprint"}])
def test_row_26_another_teacher_midway_is_reported_and_parks_where_wanted(
    mock_teacher: Mock, tmp_path: Path, fault: dict[str, object]
) -> None:
    mock = mock_teacher()
    status = run_harvest(mock, tmp_path, [{**fault, "after": 20}], prompts=MANY)
    assert (status.exit_code, status.fired, status.totals.answers) == (0, 40, 60)
    assert "note: answers name more than one model or build: mock-teacher" in status.output
    strict = {"strict_model": True}
    parked = run_harvest(
        mock, tmp_path, [{**fault, "after": 80}], prompts=MANY, run=strict, sampling={"seed": 1}
    )
    assert parked.exit_code == 10
    assert "another teacher answers now" in parked.output
    assert "the next run sends nothing: the teacher changed (mock-teacher" in parked.output
    resume = f"harvester resume {tmp_path / 'store'} && harvester run {tmp_path / 'harvest.toml'}"
    assert parked.output.splitlines()[-1] == f"resume with: {resume}"
    held = pauses.clear_without_run(tmp_path / "store")
    assert list(held) == ["drift"]
    assert 21 <= parked.billed["requests"] == parked.totals.answers - 60 <= 24
    rows = Corpus.open(tmp_path / "store").samples()
    assert len({(row.response_model, row.system_fingerprint) for row in rows}) == 2


def test_row_29_a_host_that_goes_down_parks_and_costs_no_row(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    first = run_harvest(
        mock, tmp_path, [{"action": "reset", "after": 5}], prompts=MANY, run={"patience_s": 0.5}
    )
    assert first.exit_code == 10
    assert (first.totals.dead, first.totals.answers) == (0, 5)
    second = run_harvest(mock, tmp_path, prompts=MANY)
    assert (second.exit_code, second.totals.answers) == (0, 60)


def test_row_29_an_unused_address_stops_before_any_send(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    run_harvest(mock, tmp_path)
    (tmp_path / "more.jsonl").write_text('{"prompt": "What is 8 + 8?"}\n')
    path = tmp_path / "harvest.toml"
    path.write_text(path.read_text().replace("patience_s = 3600", "patience_s = 0.1"))
    mock.stop()
    exit_code, stderr = bench.run(path)
    assert exit_code == 10
    assert "nobody answers at" in stderr


@pytest.mark.slow
def test_row_40_after_a_storm_of_lost_attempts_all_are_served(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    fault = {"action": "silence", "every": 2, "times": 20}  # answers in between: this is no dead host
    run = {"deadline_s": 1, "max_attempts": 9}
    limits = {"max_concurrency": 64}
    ended = run_harvest(mock, tmp_path, [fault], prompts=MANY, run=run, teacher={"limits": limits})
    assert ended.fired == 20
    assert (ended.exit_code, ended.totals.answers, ended.totals.dead) == (0, 60, 0)
    # On a busy machine an answer may miss the deadline, too.
    assert 20 <= ended.billed["requests"] - 60 <= ended.totals.possibly_billed


def test_row_59_another_temperature_is_another_row_and_the_old_ones_stay(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    run_harvest(mock, tmp_path)
    changed = run_harvest(mock, tmp_path, sampling={"temperature": 0.5})
    assert (changed.exit_code, changed.totals.answers, changed.billed["requests"]) == (0, 6, 3)


@pytest.mark.parametrize(
    "line", ['{"prompt": "a"', '{"text": 1}', "[]", '{"prompt": "\\ud800"}', '{"prompt": ""}']
)
def test_rows_60_and_61_a_bad_line_is_named_before_anything_is_sent(
    mock_teacher: Mock, tmp_path: Path, line: str
) -> None:
    mock = mock_teacher()
    run_harvest(mock, tmp_path)
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(PromptError, match=r"p\.jsonl:2"):
        prepare(tmp_path / "harvest.toml")


def test_rows_62_and_63_edited_prompts_and_equal_requests_are_paid_once(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    run_harvest(mock, tmp_path, prompts=(*PROMPTS, *PROMPTS))
    assert mock.totals()["requests"] == 3
    again = run_harvest(mock, tmp_path, prompts=("What is 9 + 9?", *reversed(PROMPTS)))
    assert (again.exit_code, again.billed["requests"], again.totals.answers) == (0, 1, 4)


@pytest.mark.parametrize("fault", [[], [{"action": "no_usage"}], [{"action": "cut_body", "every": 3}]])
def test_row_64_billed_never_passes_the_ceiling(
    mock_teacher: Mock, tmp_path: Path, fault: list[dict[str, object]]
) -> None:
    mock = mock_teacher(latency_s=0.01)
    ended = run_harvest(mock, tmp_path, fault, prompts=MANY, budget={"tokens": 600})
    assert ended.exit_code == 10
    assert ended.output.startswith("budget")
    assert 0 < ended.billed["total_tokens"] <= 600


@pytest.mark.parametrize("fault", [[], [{"action": "no_usage"}], [{"action": "reset_body", "every": 3}]])
def test_row_64_money_never_passes_its_ceiling(
    mock_teacher: Mock, tmp_path: Path, fault: list[dict[str, object]]
) -> None:
    mock = mock_teacher(latency_s=0.005)
    price = {"input": 10.0, "output": 30.0}
    budget = {"usd": 0.006}
    ended = run_harvest(mock, tmp_path, fault, prompts=MANY, budget=budget, teacher={"price": price})
    assert (ended.exit_code, ended.output.startswith("budget")) == (10, True)
    billed_usd = (ended.billed["prompt_tokens"] * 10 + ended.billed["completion_tokens"] * 30) / 1e6
    assert 0 < billed_usd <= 0.006
    unpriced = run_harvest(mock, tmp_path, prompts=MANY, budget=budget)
    assert (unpriced.exit_code, unpriced.billed["requests"]) == (2, 0)
    assert "set [budget] tokens" in unpriced.output


def test_a_dead_replica_is_left_and_the_others_do_its_work(mock_teacher: Mock, tmp_path: Path) -> None:
    good, bad = mock_teacher(latency_s=0.01), mock_teacher()
    bad.set_faults([{"action": "status", "status": 500}])
    ended = run_harvest(
        good,
        tmp_path,
        prompts=MANY,
        teacher={"replicas": [bad.base_url]},
        run={"max_attempts": 5},
        canary=UNCHECKED,
    )
    assert 1 <= sum(bad.fired().values()) < 25
    assert (ended.exit_code, ended.totals.answers) == (0, 60)
    bad.stop()
    again = run_harvest(
        good,
        tmp_path,
        prompts=MANY,
        teacher={"replicas": [bad.base_url]},
        sampling={"seed": 2},
        canary=UNCHECKED,
    )
    assert (again.exit_code, again.billed["requests"]) == (0, 60)


@pytest.mark.parametrize("action", ["junk_json", "no_choices", "empty_body"])
def test_row_99_a_teacher_that_breaks_half_its_answers_is_paid_little_more_than_once_a_row(
    mock_teacher: Mock, tmp_path: Path, action: str
) -> None:
    mock = mock_teacher()
    fault = {"action": action, "probability": 0.6, "seed": 5}
    ended = run_harvest(mock, tmp_path, [fault], prompts=MANY, run={"max_attempts": 5})
    assert ended.fired >= 25
    assert (ended.exit_code, ended.totals.answers + len(ended.letters)) == (3, len(MANY))
    assert len(MANY) < ended.billed["requests"] <= len(MANY) + 3 + len(MANY) // 20
    assert "held no completion" in ended.output
    again = run_harvest(mock, tmp_path, prompts=MANY, run={"max_attempts": 5})
    assert (again.exit_code, again.billed["requests"]) == (3, 0)  # only --retry-dead asks them again


def test_row_99_a_few_broken_answers_are_asked_again(mock_teacher: Mock, tmp_path: Path) -> None:
    fault = {"action": "junk_json", "every": 15}
    ended = run_harvest(mock_teacher(), tmp_path, [fault], prompts=MANY, run={"max_attempts": 5})
    assert (ended.exit_code, ended.totals.answers, ended.fired) == (0, len(MANY), 4)


@pytest.mark.parametrize("replicas", [1, 2])
def test_each_replica_gets_as_many_requests_at_once_as_max_concurrency_says(
    mock_teacher: Mock, tmp_path: Path, replicas: int
) -> None:
    mock, *others = (mock_teacher(latency_s=0.4) for _ in range(replicas + 1))
    in_flight: list[int] = []
    ended = run_harvest(
        mock,
        tmp_path,
        prompts=MANY[:30],
        teacher={"replicas": [other.base_url for other in others], "limits": {"max_concurrency": 3}},
        clock=SystemClock(),
        watch=lambda status: in_flight.append(status["in_flight"]),
    )
    assert (ended.exit_code, ended.totals.answers) == (0, 30)
    assert max(in_flight) == 3 * (replicas + 1)


@pytest.mark.parametrize(
    "slow", [pytest.param({"slots": 2, "slot_s": 0.5}, marks=pytest.mark.slow), {"latency_s": 2.0}]
)
def test_rows_that_wait_for_a_slow_replica_go_to_a_free_one(
    mock_teacher: Mock, tmp_path: Path, slow: dict[str, float]
) -> None:
    """All rows are queued at once; those that the slow replica has not begun must not wait for it."""
    quick, other = mock_teacher(latency_s=0.02), mock_teacher(**slow)
    ended = run_harvest(
        quick,
        tmp_path,
        prompts=MANY,
        teacher={"replicas": [other.base_url], "limits": {"max_concurrency": 32}},
        clock=SystemClock(),
        run={"deadline_s": 60},
        canary=UNCHECKED,
    )
    assert (ended.exit_code, ended.totals.answers) == (0, len(MANY))
    assert 1 <= other.totals()["requests"] <= 17  # the window it begins with, and one


@pytest.mark.parametrize("action", ["junk_json", "no_choices", "html"])
def test_row_99_a_replica_that_answers_nonsense_is_left(
    mock_teacher: Mock, tmp_path: Path, action: str
) -> None:
    good, bad = mock_teacher(latency_s=0.01), mock_teacher()
    bad.set_faults([{"action": action, "status": 200} if action == "html" else {"action": action}])
    ended = run_harvest(
        good,
        tmp_path,
        prompts=MANY,
        teacher={"replicas": [bad.base_url]},
        run={"max_attempts": 5},
        canary=UNCHECKED,
    )
    assert 1 <= sum(bad.fired().values()) < 25
    assert (ended.exit_code, ended.totals.answers) == (0, len(MANY))


def test_two_replicas_share_the_work(mock_teacher: Mock, tmp_path: Path) -> None:
    first, second = mock_teacher(latency_s=0.01), mock_teacher(latency_s=0.01)
    run_harvest(
        first,
        tmp_path,
        prompts=MANY,
        teacher={"replicas": [second.base_url], "limits": {"max_concurrency": 8}},
        canary=UNCHECKED,
    )
    assert first.totals()["requests"] + second.totals()["requests"] == 60
    assert min(first.totals()["requests"], second.totals()["requests"]) >= 15


def test_one_text_for_many_prompts_is_kept_counted_and_reported(mock_teacher: Mock, tmp_path: Path) -> None:
    """A gateway may send words of its own as an answer; many short answers are alike for good reasons."""
    mock = mock_teacher(accuracy={"*": 1.0})
    prompts = [f"What is {number} + {number}?" for number in range(20)]
    words = "I can't serve this request: the daily quota is used up."
    ended = run_harvest(mock, tmp_path, [{"action": "content", "value": words, "first": 12}], prompts=prompts)
    assert (ended.fired, ended.exit_code, ended.totals.answers) == (12, 0, 20)
    assert "11 of 20 answers have the text of one to another prompt" in ended.output
    assert any("11 answers have the text" in line for line in status_lines(current_status(ended.store)))
    again = run_harvest(
        mock, tmp_path, [{"action": "content", "value": words}], prompts=prompts[:1], sampling={"samples": 15}
    )
    assert (again.fired, "have the text" in again.output) == (14, False)


def test_row_24_an_id_that_comes_twice_is_kept_counted_and_reported_once(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    ended = run_harvest(mock, tmp_path, [{"action": "id", "value": "same"}])
    assert ended.fired == 3
    assert (ended.exit_code, ended.totals.answers, ended.billed["requests"]) == (0, 3, 3)
    assert ended.output.count("2 answers carry the id of an earlier one") == 1
    assert any("2 answers carry the id" in line for line in status_lines(current_status(ended.store)))
    own = run_harvest(mock, tmp_path, sampling={"seed": 7})
    assert (own.totals.answers, "carry the id" in own.output) == (6, False)


def test_what_may_have_been_billed_is_never_sent_again_where_that_is_asked(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    cut = [{"action": "cut_body", "prompt": bench.POISON}]
    once = {"retry_possibly_billed": False, "max_failed": 1}
    ended = run_harvest(mock, tmp_path, cut, run=once)
    assert (ended.exit_code, ended.fired, ended.billed["requests"]) == (0, 1, 3)
    assert (ended.totals.answers, ended.totals.dead, ended.totals.possibly_billed) == (2, 1, 1)
    (letter,) = ended.letters
    assert (letter["code"], letter["attempts"]) == ("possibly_billed", 1)
    assert "possibly billed, so not sent again" in letter["message"]
    still = run_harvest(mock, tmp_path, run=once)
    assert (still.billed["requests"], len(still.letters), still.totals.answers) == (0, 1, 2)
    freed = run_harvest(mock, tmp_path)
    assert (freed.exit_code, freed.billed["requests"], freed.totals.answers) == (0, 1, 3)
    assert freed.letters == []


def test_row_32_without_a_deadline_the_length_of_the_answer_sets_it(
    mock_teacher: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RunSection().deadline_for(512) == 120 + 51.2
    assert (RunSection().deadline_for(0), RunSection().deadline_for(10**6)) == (600, 3600)
    assert RunSection(deadline_s=7).deadline_for(10**6) == 7
    mock = mock_teacher()
    monkeypatch.setattr(run_section, "BASE_DEADLINE_S", 0.25)
    monkeypatch.setattr(run_section, "SLOWEST_TOKENS_PER_S", 128.0)
    silent = [{"action": "silence", "prompt": bench.POISON}]
    ended = run_harvest(
        mock, tmp_path, silent, run={"deadline_s": None, "max_attempts": 1}, sampling={"max_tokens": 64}
    )
    assert (ended.exit_code, ended.fired, ended.totals.possibly_billed) == (3, 1, 1)
    assert "no last byte within 0.75 s" in ended.letters[0]["message"]
