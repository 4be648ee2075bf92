"""Test requests for several samples of a prompt at once (`n`), against the mock teacher and its ledger."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from harvester.mock_teacher.running import RunningMock
from harvester.observe.status import current_status, status_lines
from harvester.run.planning.plan_result import Plan
from harvester.run.prepare import look_ahead
from harvester.store.journal.journal import Journal
from harvester.store.maintain.rederive import rederive
from harvester.store.maintain.verify_report import verify_with_bill
from harvester.store.reader import Corpus
from harvester.store.shards.schema import Sample
from tests.faults.bench import Ended, run_harvest

Mock = Callable[..., RunningMock]
PROMPTS = tuple(f"What is {number} + 30?" for number in range(10, 14))
PRICE = {"input": 3.0, "output": 10.0}
STATUS = {"action": "status", "status": 400, "message": "Bad request."}


def harvest(
    mock: RunningMock, root: Path, *faults: Mapping[str, Any], samples: int = 4, max_n: int = 4, **parts: Any
) -> Ended:
    sampling = {"samples": samples, "temperature": 1.0, **parts.pop("sampling", {})}
    teacher = {"max_n": max_n, "price": PRICE, **parts.pop("teacher", {})}
    prompts = parts.pop("prompts", PROMPTS)
    return run_harvest(mock, root, faults, prompts=prompts, teacher=teacher, sampling=sampling, **parts)


def rows(ended: Ended) -> list[Sample]:
    return list(Corpus.open(ended.store).samples())


def assert_whole(ended: Ended, mock: RunningMock, *, samples: int = 4, prompts: int = len(PROMPTS)) -> None:
    """Every sample of every prompt is there once, and the rows add up to the teacher's bill."""
    held = rows(ended)
    wanted = {(prompt, sample) for prompt in {row.prompt_id for row in held} for sample in range(samples)}
    assert Counter((row.prompt_id, row.sample_index) for row in held) == Counter(wanted)
    assert len(held) == samples * prompts
    assert_billed(ended, mock)


def assert_billed(ended: Ended, mock: RunningMock) -> None:
    held, billed = rows(ended), mock.totals()
    assert sum(row.input_tokens for row in held) == billed["prompt_tokens"]
    assert sum(row.output_tokens for row in held) == billed["completion_tokens"]
    exact = billed["prompt_tokens"] * PRICE["input"] + billed["completion_tokens"] * PRICE["output"]
    assert sum(row.cost_microusd for row in held) == ended.totals.cost_microusd == exact


def keys_of(ended: Ended) -> dict[tuple[str, int], str]:
    return {(row.prompt_id, row.sample_index): row.key for row in rows(ended)}


def test_one_prompt_fee_for_four_answers(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    ended = harvest(mock, tmp_path)
    assert (ended.exit_code, ended.billed["requests"], ended.billed["answers"]) == (0, 4, 16)
    assert_whole(ended, mock)
    assert (ended.totals.attempts, ended.totals.answers) == (4, 16)
    (tmp_path / "one").mkdir()
    alone = harvest(mock, tmp_path / "one", max_n=1)
    assert alone.billed["prompt_tokens"] == 4 * ended.billed["prompt_tokens"]
    assert keys_of(alone) == keys_of(ended)


def test_a_row_reads_like_an_answer_of_its_own(mock_teacher: Mock, tmp_path: Path) -> None:
    ended = harvest(mock_teacher(), tmp_path, sampling={"top_logprobs": 2})
    for row in rows(ended):
        assert "n" not in json.loads(row.request_json)
        body = json.loads(row.raw)
        (choice,) = body["choices"]
        assert choice["index"] == row.sample_index
        assert (row.completion, row.outcome, row.usage_source) == (
            choice["message"]["content"],
            "ok",
            "reported",
        )
        assert body["usage"]["total_tokens"] == row.input_tokens + row.output_tokens
        assert "".join(token["token"] for token in row.logprobs or ()) == row.completion


def test_a_run_with_more_samples_asks_only_for_the_missing_ones(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    harvest(mock, tmp_path, samples=3)
    more = harvest(mock, tmp_path, samples=8)
    assert (more.billed["requests"], more.billed["answers"]) == (8, 20)  # 5 missing: 4 and 1
    assert_whole(more, mock, samples=8)
    assert harvest(mock, tmp_path, samples=8).billed["requests"] == 0


def test_samples_of_many_prompts_are_not_cut_by_the_chunks_of_the_feed(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    many = tuple(f"What is {number} + 30?" for number in range(100, 280))
    ended = harvest(mock, tmp_path, samples=3, prompts=many, teacher={"limits": {"max_concurrency": 64}})
    assert ended.billed["requests"] == len(many)


@pytest.mark.parametrize("action", ["shuffled_choices", "reversed_choices", "wrong_index"])
@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_told_apart_by_their_index(
    mock_teacher: Mock, tmp_path: Path, action: str, stream: bool
) -> None:
    mock = mock_teacher(accuracy=0.5)
    ended = harvest(mock, tmp_path, {"action": action}, sampling={"stream": stream})
    assert (ended.fired, ended.exit_code) == (4, 0)
    assert_whole(ended, mock)
    orders = [json.loads(row.raw)["choices"][0]["index"] for row in rows(ended)]
    expected = [row.sample_index + 7 * (action == "wrong_index") for row in rows(ended)]
    assert orders == expected


def test_choices_short_of_n_are_asked_again(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    ended = harvest(mock, tmp_path, {"action": "fewer_choices", "count": 3, "nth": 1})
    assert (ended.fired, ended.exit_code, ended.billed["requests"], ended.billed["answers"]) == (1, 0, 5, 16)
    assert_whole(ended, mock)
    assert "1 were short" in ended.output


def test_a_teacher_that_answers_fewer_choices_is_asked_for_fewer(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(max_n=2, n_above="fewer")
    many = tuple(f"What is {number} + 30?" for number in range(100, 110))
    ended = harvest(mock, tmp_path, prompts=many)
    assert_whole(ended, mock, prompts=10)
    asked = [entry["choices"] for entry in mock.ledger()["entries"]]
    assert ended.billed["answers"] == 40
    assert set(asked) == {2}


@pytest.mark.parametrize("stream", [False, True])
def test_a_surplus_or_repeated_choice_is_counted_and_paid(
    mock_teacher: Mock, tmp_path: Path, stream: bool
) -> None:
    mock = mock_teacher()
    ended = harvest(mock, tmp_path, {"action": "extra_choice", "nth": 1}, sampling={"stream": stream})
    assert (ended.fired, ended.billed["requests"]) == (1, 4)
    assert_whole(ended, mock)
    assert "1 came beyond" in ended.output
    if not stream:  # in a stream, two choices with one index are one
        (tmp_path / "repeated").mkdir()
        again = harvest(mock, tmp_path / "repeated", {"action": "repeated_choice", "nth": 6})
        assert (again.fired, again.exit_code, again.billed["requests"]) == (1, 0, 5)
        assert "1 were short" in again.output
        assert "1 came beyond" in again.output


def test_refusing_n_by_name_costs_nothing_and_is_learned_for_good(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(max_n=2)
    ended = harvest(mock, tmp_path)
    assert (ended.exit_code, ended.billed["requests"], ended.billed["answers"]) == (0, 8, 16)
    assert_whole(ended, mock)
    refused = mock.state()["statuses"]["400"]
    assert 1 <= refused <= 4
    more = harvest(mock, tmp_path, samples=8)
    assert mock.state()["statuses"]["400"] == refused  # not tried again
    assert_whole(more, mock, samples=8)
    harvest(mock, tmp_path, samples=12, max_n=8)
    assert mock.state()["statuses"]["400"] > refused  # another max_n is tried anew


def test_refusing_n_without_a_reason_is_found_out(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    many = tuple(f"What is {number} + 30?" for number in range(100, 120))
    ended = harvest(mock, tmp_path, {**STATUS, "n_above": 1}, prompts=many)
    assert ended.exit_code == 0
    assert_whole(ended, mock, prompts=20)
    assert ended.billed["requests"] == 80
    assert ended.fired <= 8  # then nobody asks for several any more
    assert not ended.letters


def test_a_rejected_prompt_is_the_matter_of_its_own_rows(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    ended = harvest(mock, tmp_path, {**STATUS, "prompt": "11 + 30"})
    assert ended.exit_code == 3
    assert len(ended.letters) == 4
    assert (ended.billed["requests"], ended.billed["answers"]) == (3, 12)  # n goes on for the others
    assert_billed(ended, mock)


@pytest.mark.parametrize("stream", [False, True])
def test_one_filtered_choice_is_that_rows_matter(mock_teacher: Mock, tmp_path: Path, stream: bool) -> None:
    mock = mock_teacher()
    fault = {"action": "content_filter", "at": 2, "nth": 1}
    ended = harvest(mock, tmp_path, fault, sampling={"stream": stream})
    assert ended.outcomes == {"ok": 15, "filtered": 1}
    assert_whole(ended, mock)
    filtered = [row.sample_index for row in rows(ended) if row.outcome == "filtered"]
    assert filtered == [2]


@pytest.mark.parametrize("stream", [False, True])
def test_one_broken_choice_is_asked_again_alone(mock_teacher: Mock, tmp_path: Path, stream: bool) -> None:
    mock = mock_teacher()
    fault = {"action": "finish_reason", "value": "error", "at": 1, "nth": 1}
    ended = harvest(mock, tmp_path, fault, sampling={"stream": stream})
    assert (ended.fired, ended.exit_code, ended.billed["requests"], ended.billed["answers"]) == (1, 0, 5, 17)
    assert_whole(ended, mock)


def test_a_stream_that_breaks_off_keeps_the_choices_that_are_whole(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    long = {"action": "content", "value": "word " * 40, "at": 3, "nth": 1}
    whole = harvest(mock, tmp_path, long, sampling={"stream": True}, prompts=PROMPTS[:1])
    assert whole.exit_code == 0
    (tmp_path / "cut").mkdir()
    # Choices 0 to 2 end within 5 events each; the fourth is cut off.
    mock.set_faults(())
    cut = harvest(
        mock,
        tmp_path / "cut",
        {"action": "stream_cut", "events": 15, "times": 1},
        sampling={"stream": True},
        prompts=("What is 5 + 30?",),
    )
    assert (cut.fired, cut.exit_code) == (1, 0)
    assert sorted(row.sample_index for row in rows(cut)) == [0, 1, 2, 3]
    assert {row.outcome for row in rows(cut)} == {"ok"}


def test_without_usage_the_estimate_is_split_as_well(mock_teacher: Mock, tmp_path: Path) -> None:
    ended = harvest(mock_teacher(), tmp_path, {"action": "no_usage"}, prompts=PROMPTS[:1])
    held = rows(ended)
    assert {row.usage_source for row in held} == {"estimated"}
    assert sum(row.output_tokens for row in held) == ended.totals.output_tokens > 0


def test_seeds_of_samples_keep_them_apart(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    ended = harvest(mock, tmp_path, sampling={"seed": 7})
    assert ended.billed["requests"] == 16
    assert sorted({json.loads(row.request_json)["seed"] for row in rows(ended)}) == [7, 8, 9, 10]


def test_accepting_asks_for_several_at_once(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=0.5)
    ended = run_harvest(
        mock,
        tmp_path,
        prompts=[{"prompt": text, "reference": str(40 + at)} for at, text in enumerate(PROMPTS)],
        teacher={"max_n": 4, "price": PRICE},
        sampling={"temperature": 1.0},
        verify={"plain": {"kind": "exact"}},
        accept={"per_prompt": 4, "of": 12},
    )
    assert ended.exit_code == 0
    assert ended.billed["requests"] < ended.billed["answers"] / 2
    assert_billed(ended, mock)
    status = current_status(ended.store)
    assert f"accepted {status['accepted']} of {ended.totals.answers} answers" in "\n".join(
        status_lines(status)
    )


@pytest.mark.parametrize("budget", [{"tokens": 400}, {"usd": 0.004}])
def test_no_budget_is_exceeded(mock_teacher: Mock, tmp_path: Path, budget: Mapping[str, Any]) -> None:
    mock = mock_teacher()
    many = tuple(f"What is {number} + 30?" for number in range(100, 160))
    sampling = {"max_tokens": 8}
    ended = harvest(mock, tmp_path, prompts=many, budget=budget, sampling=sampling)
    assert ended.exit_code == 10
    assert 0 < mock.totals()["total_tokens"] <= budget.get("tokens", 10**9)
    assert ended.totals.cost_microusd <= budget.get("usd", 10**9) * 1e6
    assert_billed(ended, mock)


def test_a_request_with_n_counts_once_against_a_limit_on_requests(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    many = tuple(f"What is {number} + 30?" for number in range(100, 160))
    limits = {"limits": {"requests_per_day": 24}}  # half of it may be spent at once
    for _ in range(2):  # nor is it counted more than once after a restart
        ended = harvest(mock, tmp_path, prompts=many, teacher=limits)
        assert ended.exit_code == 10
    assert 11 <= mock.totals()["requests"] <= 14
    assert mock.totals()["answers"] == 4 * mock.totals()["requests"]


def test_a_possibly_billed_request_is_remembered_for_each_of_its_rows(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    run = {"retry_possibly_billed": False}
    ended = harvest(mock, tmp_path, {"action": "reset", "nth": 1}, run=run, prompts=PROMPTS[:1])
    assert [letter["code"] for letter in ended.letters] == ["possibly_billed"] * 4
    with Journal.open(ended.store, read_only=True) as journal:
        attempts = journal.possibly_billed(in_flight=False)
    assert (len({attempt.key for attempt in attempts}), ended.totals.attempts) == (4, 1)
    assert ended.totals.possibly_billed == 4


def test_the_plan_shows_what_is_saved_and_agrees_with_the_bill(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    many = tuple(f"What is {number} + 30?" for number in range(100, 130))
    harvest(mock, tmp_path, samples=6, prompts=many)
    planned = _plan(tmp_path, samples=14)  # 8 are missing: 4 and 4
    assert (planned.rows, planned.cached, planned.requests) == (420, 180, 60)
    assert planned.saved_input_tokens == 3 * planned.input_tokens
    assert planned.saved_usd == pytest.approx(planned.saved_input_tokens * 3e-6)
    before = mock.totals()["prompt_tokens"]
    harvest(mock, tmp_path, samples=14, prompts=many)
    assert mock.totals()["prompt_tokens"] - before == planned.input_tokens
    assert "240 answers in 60 requests" in "\n".join(planned.lines())


def test_the_plan_says_when_n_is_not_used(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(max_n=2)
    harvest(mock, tmp_path, samples=4)
    learned = _plan(tmp_path, samples=8)
    assert (learned.max_n, learned.requests) == (2, 8)
    assert "the teacher refuses n" in "\n".join(learned.lines())
    seeded = _plan(tmp_path, samples=4, seed="7")
    assert seeded.requests == 16
    assert "max_n = 4 is not used" in "\n".join(seeded.lines())


def _plan(root: Path, *, samples: int, seed: str = "") -> Plan:
    """Plan the harvest in this folder with another number of samples."""
    path = root / "harvest.toml"
    text = re.sub(r"samples = \d+", f"samples = {samples}", path.read_text())
    path.write_text(text.replace("[sampling]", f"[sampling]\nseed = {seed}") if seed else text)
    return look_ahead(path)


def test_a_key_that_only_the_split_spells_is_not_stored(
    mock_teacher: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret-value")
    mock = mock_teacher(require_key_env="TEACHER_KEY")
    fault = {"action": "content", "value": "it is sk-very-secret-value, I think", "at": 2}
    ended = harvest(
        mock,
        tmp_path,
        fault,
        teacher={"api_key_env": "TEACHER_KEY"},
        sampling={"stream": True, "max_tokens": 64},
    )
    assert ended.fired == 4
    assert [row.completion for row in rows(ended) if row.sample_index == 2] == ["it is ***, I think"] * 4
    assert not any(b"secret" in row.raw for row in rows(ended))


def test_a_store_of_joined_requests_verifies_and_derives_the_same_again(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    ended = harvest(mock_teacher(), tmp_path, {"action": "no_usage", "nth": 2})
    assert not verify_with_bill(ended.store, repair=False).findings
    before = rows(ended)
    rederive(ended.store)
    assert rows(ended) == before


def test_the_status_counts_requests_and_rows_apart(mock_teacher: Mock, tmp_path: Path) -> None:
    ended = harvest(mock_teacher(), tmp_path, {"action": "fewer_choices", "count": 3, "nth": 1})
    status = current_status(ended.store)
    assert (status["requests_sent"], status["answers_stored"]) == (5, 16)
    assert (status["requests_joined"], status["answers_joined"]) == (4, 15)
    assert (status["choices_missing"], status["choices_surplus"]) == (1, 0)
    assert "15 answers came in 4 requests for several; 1 were short" in "\n".join(status_lines(status))


def test_the_plan_of_batches_promises_nothing_from_n(mock_teacher: Mock, tmp_path: Path) -> None:
    harvest(mock_teacher(), tmp_path, samples=2)
    path = tmp_path / "harvest.toml"
    path.write_text(path.read_text().replace("[run]\n", '[run]\ntransport = "batch"\npurpose = "eval"\n'))
    planned = _plan(tmp_path, samples=6)
    assert (planned.requests, planned.max_n, planned.saved_input_tokens) == (16, 1, 0)
    assert "not used in batches" in "\n".join(planned.lines())
