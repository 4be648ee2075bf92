"""Test answers that are not usable: they are shown to the operator, can end a run, and are asked again."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harvester import library
from harvester.config.overrides import Overrides
from harvester.mock_teacher.running import RunningMock
from harvester.observe.status import current_status, status_lines
from harvester.run import job
from harvester.run.endings import Summary
from harvester.run.prepare import prepare
from harvester.store.reader import Corpus
from tests.faults.bench import run_harvest

Mock = Callable[..., RunningMock]
MANY = tuple(f"What is {number} + 30?" for number in range(100, 160))
FORM = {"response_format": {"type": "json_object"}}
# For each outcome: the fault that brings it, and what the request must ask for.
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "empty": ({"action": "empty_content"}, {}),
    "invalid": ({"action": "content", "value": "no JSON"}, FORM),
    "filtered": ({"action": "content_filter"}, {}),
    "refused": ({"action": "refusal", "value": "I can't."}, {}),
    "unknown": ({"action": "finish_reason", "value": "sunset"}, {}),
}


def run_again(root: Path, **options: Any) -> Summary:
    return asyncio.run(job.run(prepare(root / "harvest.toml", Overrides(**options)), lambda _: None))


def outcomes(store: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for sample in Corpus.open(store).samples(["outcome"]):
        counts[sample.outcome] = counts.get(sample.outcome, 0) + 1
    return counts


@pytest.mark.parametrize("outcome", FAULTS)
def test_unusable_answers_are_shown_everywhere_and_asked_again(
    mock_teacher: Mock, tmp_path: Path, outcome: str
) -> None:
    fault, sampling = FAULTS[outcome]
    mock = mock_teacher()
    good = [{"action": "content", "value": "{}"}] if sampling else []
    faults = [{**fault, "every": 2}, *good]
    first = run_harvest(mock, tmp_path, faults, prompts=MANY[:10], sampling=sampling)
    assert (first.exit_code, first.outcomes[outcome]) == (0, 5)
    assert first.fired >= 5
    assert f"5 of 10 rows of this run (5 {outcome})" in first.output
    assert f"--retry {outcome}" in first.output
    status = current_status(tmp_path / "store")
    assert any(f"5 of 10 answers: 5 {outcome}" in line for line in status_lines(status))
    mock.set_faults(good)
    again = run_again(tmp_path)
    assert again.counts.requests_sent == 0
    assert any(f"5 {outcome}" in line for line in again.lines())
    retried = run_again(tmp_path, retry=frozenset({outcome}))
    assert (retried.counts.requests_sent, retried.counts.from_cache) == (5, 5)
    assert outcomes(tmp_path / "store") == {"ok": 10}
    assert Corpus.open(tmp_path / "store").verify() == []
    assert current_status(tmp_path / "store")["held_outcomes"] == {"ok": 10}
    retried_rows = [
        json.loads(line) for line in (tmp_path / "store" / "retried.jsonl").read_text().splitlines()
    ]
    assert {row["outcome"] for row in retried_rows} == {outcome}
    assert len({row["key"] for row in retried_rows}) == 5
    assert all(b"choices" in base64.b64decode(row["raw"]) for row in retried_rows)


def test_only_the_named_outcomes_are_asked_again(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    run_harvest(mock, tmp_path, [{"action": "empty_content", "every": 2}], prompts=MANY[:10])
    assert run_again(tmp_path, retry=frozenset({"invalid", "refused"})).counts.requests_sent == 0
    assert outcomes(tmp_path / "store") == {"ok": 5, "empty": 5}


def test_rows_of_other_prompts_keep_their_answers(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    run_harvest(mock, tmp_path, [{"action": "empty_content"}], prompts=MANY[:4])
    run_harvest(mock, tmp_path, [{"action": "empty_content"}], prompts=MANY[4:8])
    mock.set_faults([])
    assert run_again(tmp_path, retry=frozenset({"empty"})).counts.requests_sent == 4
    assert outcomes(tmp_path / "store") == {"ok": 4, "empty": 4}


def test_failed_rows_are_asked_again_with_retry_dead(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    fault = {"action": "status", "status": 400, "every": 3}
    first = run_harvest(mock, tmp_path, [fault], prompts=MANY[:9])
    assert (first.exit_code, len(first.letters)) == (3, 3)
    assert "--retry-dead" in first.output
    mock.set_faults([])
    assert run_again(tmp_path).counts.requests_sent == 0
    again = run_again(tmp_path, retry_dead=True)
    assert (again.exit_code, again.counts.requests_sent, again.counts.dead) == (0, 3, 0)
    assert not (tmp_path / "store" / "dead_letters.jsonl").exists()


@pytest.mark.parametrize("outcome", ["empty", "refused"])
def test_a_run_parks_above_the_share_of_unusable_answers(
    mock_teacher: Mock, tmp_path: Path, outcome: str
) -> None:
    mock = mock_teacher(latency_s=0.01)
    fault = [{**FAULTS[outcome][0], "every": 2}]
    ended = run_harvest(mock, tmp_path, fault, prompts=MANY, run={"max_unusable": 0.3})
    assert ended.exit_code == 10
    assert ended.output.startswith("parked")
    assert "max_unusable = 0.3" in ended.output
    assert 20 <= ended.billed["requests"] < 40


@pytest.mark.parametrize("action", ["junk_json", "null_choices"])
def test_a_teacher_that_is_broken_part_of_the_time_is_not_paid_to_the_end(
    mock_teacher: Mock, tmp_path: Path, action: str
) -> None:
    mock = mock_teacher(latency_s=0.01)
    fault = [{"action": action, "every": 2}]
    ended = run_harvest(mock, tmp_path, fault, prompts=MANY, run={"max_unusable": 0.3})
    assert ended.exit_code == 10
    assert "possibly paid without an answer" in ended.output
    assert ended.billed["requests"] < len(MANY)


def test_a_complete_run_with_too_many_unusable_answers_exits_with_3(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    fault = [{"action": "empty_content", "every": 2}]
    assert run_harvest(mock, tmp_path, fault, prompts=MANY[:10], run={"max_unusable": 0.4}).exit_code == 3
    assert run_harvest(mock, tmp_path, fault, prompts=MANY[:10], run={"max_unusable": 0.5}).exit_code == 0


@pytest.mark.parametrize("text", ["ok", "empty,good", "", ","])
def test_only_outcomes_can_be_asked_again(text: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        library.outcomes(text)
    assert library.outcomes("empty, invalid") == {"empty", "invalid"}


@pytest.mark.parametrize("status", [498, 499, 460])
def test_a_passing_4xx_is_asked_again_in_the_next_run(
    mock_teacher: Mock, tmp_path: Path, status: int
) -> None:
    mock = mock_teacher()
    fault = {"action": "status", "status": status, "prompt": "100 + 30"}
    first = run_harvest(mock, tmp_path, [fault], prompts=MANY[:4])
    assert (first.exit_code, first.fired > 0, len(first.letters)) == (3, True, 1)
    mock.set_faults([])
    again = run_again(tmp_path)
    assert (again.exit_code, again.counts.requests_sent, again.counts.dead) == (0, 1, 0)


def test_a_complete_run_with_too_many_failures_sends_nothing_when_it_is_started_again(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    """A timer starts it every hour of its hours; docs/how-to/long-job.md says so."""
    mock = mock_teacher()
    fault = [{"action": "status", "status": 400, "every": 3}]
    assert run_harvest(mock, tmp_path, fault, prompts=MANY[:10]).exit_code == 3
    received = mock.state()["received"]
    assert received > 0
    assert run_harvest(mock, tmp_path, fault, prompts=MANY[:10]).exit_code == 3
    assert mock.state()["received"] == received
