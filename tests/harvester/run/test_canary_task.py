"""Test canaries: asked on schedule, kept out of the corpus; a change is reported and can pause the run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from harvester.mock_teacher.running import RunningMock
from harvester.observe.canary import (
    MOST_BUILDS,
    CanaryReply,
    KnownReplies,
    compare,
    distance,
    known_after,
    learn,
    read_rounds,
)
from harvester.observe.report import prometheus, report
from harvester.observe.status import current_status, status_lines
from harvester.run import job
from harvester.run.control.client import ask
from harvester.run.prepare import prepare
from harvester.store import pauses
from harvester.store.journal.journal import Journal
from harvester.store.reader import Corpus
from tests.faults import bench
from tests.harvester.store_rows import without_outcome

words = st.lists(st.sampled_from("abcdef"), max_size=12).map(" ".join)


@given(words, words)
def test_distance_is_a_share(before: str, after: str):
    result = distance(before, after)
    assert 0.0 <= result <= 1.0
    assert result == distance(after, before)
    assert distance(before, before) == 0.0
    assert (result == 1.0) == (before != after and not set(before.split()) & set(after.split()))


def test_distance_by_known_answers():
    assert distance("a b  c\nd", "a b c d") == 0.0
    assert distance("a b c d", "a b c e") == 1 - 2 * 5 / 14
    assert distance("a b", "b a") == 1 - 2 * 2 / 6
    assert distance("a b", "") == 1.0
    assert distance("", "") == 0.0


def reply(text: str = "one two", model: str = "m", fingerprint: str = "f") -> CanaryReply:
    return CanaryReply(text, model, fingerprint)


def test_what_counts_as_a_change():
    first = {"a": reply(), "b": reply("three four")}
    before = learn({}, first, changed=False)
    assert compare(before, first, 0.5).changes == []
    assert compare({}, first, 0.0).changes == []
    assert compare(before, {"a": reply(model="n"), "b": reply("three four")}, 0.5).changes == [
        "model 'm' -> 'n'"
    ]
    assert compare(before, {"a": reply(fingerprint="g")}, 0.5).changes == ["fingerprint 'f' -> 'g'"]
    assert compare(before, {"a": reply("six seven")}, 0.5).changes == [
        "answers differ by 100%, tolerance 50%"
    ]
    half = compare(before, {"a": reply("one six"), "b": reply("three four")}, 0.5)
    assert (half.distance, half.changes, half.furthest) == (pytest.approx(1 / 3), [], "a")


@given(st.lists(st.fixed_dictionaries({}, optional={name: st.integers(0, 4) for name in "ab"}), max_size=12))
def test_a_teacher_of_several_builds_is_reported_once_for_each(rounds: list[dict[str, int]]):
    known: KnownReplies = {}
    heard: dict[str, set[int]] = {"a": set(), "b": set()}
    answers, changed = [], set()
    for number, builds in enumerate(rounds, 1):
        replies = {name: reply(f"{name} {build}", fingerprint=str(build)) for name, build in builds.items()}
        common = [entry for entry in builds if heard[entry]]
        fresh = {builds[entry] for entry in common} - heard["a"] - heard["b"]
        finding = compare(known, replies, 1.0)
        assert bool(finding.changes) == bool(fresh)
        if fresh:
            changed.add(number)
        known = learn(known, replies, changed=bool(finding.changes))
        for entry in builds:
            heard[entry].add(builds[entry])
        assert compare(known, replies, 0.0).changes == [], "each build is known by its own words now"
        answers += [(number, name, entry) for name, entry in replies.items()]
    assert known_after(reversed(answers), changed) == known


def test_answers_that_change_under_one_name_are_reported_once_and_then_known():
    known = learn({}, {"a": reply("one"), "b": reply("two")}, changed=False)
    moved = {"a": reply("six"), "b": reply("seven")}
    assert compare(known, moved, 0.5).changes == ["answers differ by 100%, tolerance 50%"]
    known = learn(known, moved, changed=True)
    assert compare(known, moved, 0.0).changes == []
    for number in range(3 * MOST_BUILDS):
        known = learn(known, {"a": reply("x", fingerprint=str(number))}, changed=True)
    assert len(known["a"]) == MOST_BUILDS


def folder(root: Path, mock: RunningMock, rows: int, **canary_table: Any) -> Path:
    prompts = [json.dumps({"prompt": f"What is {n} + 5?"}) + "\n" for n in range(rows)]
    (root / "p.jsonl").write_text("".join(prompts), encoding="utf-8")
    (root / "canaries").mkdir()
    lines = [json.dumps({"prompt": f"Write w{n}x backwards."}) + "\n" for n in range(4)]
    (root / "canaries" / "c.jsonl").write_text("".join(lines), encoding="utf-8")
    tables: dict[str, Mapping[str, Any]] = {
        "teacher": {
            "base_url": mock.base_url,
            "model": "mock-teacher",
            "terms": "mock-teacher",
            "limits": {"max_concurrency": 2},
        },
        "prompts": {"files": ["p.jsonl"]},
        "sampling": {"max_tokens": 64, "temperature": 0.7},
        "canary": {"prompts": "canaries/*.jsonl", "every_s": 0.4, **canary_table},
    }
    path = root / "harvest.toml"
    path.write_text("".join(bench.toml(name, table) for name, table in tables.items()), encoding="utf-8")
    return path


def live(path: Path, on_told: Callable[[Mapping[str, Any]], None] = lambda _: None) -> Any:
    return asyncio.run(job.run(prepare(path), on_told))


def test_a_steady_teacher_is_asked_again_and_kept_apart(tmp_path: Path, mock_teacher):
    mock = mock_teacher(latency_s=0.05)
    path = folder(tmp_path, mock, 60)
    summary = live(path)
    assert (summary.exit_code, summary.counts.answers_stored) == (0, 60)
    rounds = read_rounds(tmp_path / "store")
    assert len(rounds) >= 2
    assert all((entry["asked"], entry["answered"], entry["changes"]) == (4, 4, []) for entry in rounds)
    assert [entry["distance"] for entry in rounds] == [None] + [0.0] * (len(rounds) - 1)
    samples = list(Corpus.open(tmp_path / "store" / "canary").samples())
    assert len(samples) == 4 * len(rounds)
    assert {sample.purpose for sample in samples} == {"eval"}
    assert json.loads(samples[0].request_json)["temperature"] == 0.0
    assert Corpus.open(tmp_path / "store").count() == 60
    assert mock.totals()["answers"] == 60 + len(samples)
    with Journal.open(tmp_path / "store" / "canary", read_only=True) as journal:
        assert without_outcome(journal) == []
        assert journal.totals().cost_microusd == sum(sample.cost_microusd for sample in samples)
    with (tmp_path / "p.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": f"What is {n} + 6?"}) + "\n" for n in range(10))
    live(path)
    again = read_rounds(tmp_path / "store")
    assert [entry["round"] for entry in again] == list(range(1, len(again) + 1))
    assert [entry["distance"] for entry in again[len(rounds) :]] == [0.0] * (len(again) - len(rounds))
    assert len(again) > len(rounds)


CHANGES = [
    ({"action": "patch", "value": {"model": "mock-teacher-2"}}, "model 'mock-teacher' -> 'mock-teacher-2'"),
    ({"action": "patch", "value": {"system_fingerprint": "fp_b"}}, "'fp_b'"),
    ({"action": "content", "value": "something else altogether, in many more words"}, "answers differ by"),
]


@pytest.mark.slow
def test_every_kind_of_change_is_recorded_and_shown_once(tmp_path: Path, mock_teacher):
    for number, (rule, text) in enumerate(CHANGES):
        root = tmp_path / str(number)
        root.mkdir()
        mock = mock_teacher(latency_s=0.05)
        path = folder(root, mock, 40)
        news: list[Mapping[str, Any]] = []

        def change(
            status: Mapping[str, Any], mock: RunningMock = mock, rule: Any = rule, news: Any = news
        ) -> None:
            if status["canary"].get("rounds") and not news:
                mock.set_faults([{**rule, "prompt": "backwards"}])
            if status["canary"].get("rounds"):
                news.append(status)

        assert live(path, change).exit_code == 0
        rounds = read_rounds(root / "store")
        changed = [entry for entry in rounds if entry["changes"]]
        assert len(changed) == 1, rounds
        assert text in "; ".join(changed[0]["changes"])
        assert news[-1]["canary"]["changes"] == 1
        assert text in news[-1]["canary"]["said"]
        assert any(text in complaint for complaint in news[-1]["complaints"])
        assert text in "\n".join(status_lines(current_status(root / "store")))
        assert "harvester_canary_changes 1\n" in prometheus.metrics_text(root / "store")
        page = report.write_report(root / "store", root / "report.html").read_text(encoding="utf-8")
        assert str(escape(text)) in page


@pytest.mark.slow  # 3 s of waiting
def test_a_change_holds_the_run_when_asked_to_until_the_operator_resumes(tmp_path: Path, mock_teacher):
    mock = mock_teacher(latency_s=0.05)
    path = folder(tmp_path, mock, 60, pause=True)
    seen: dict[str, Any] = {"changed": False, "held": 0}

    def act(status: Mapping[str, Any]) -> None:
        if status["canary"].get("rounds") and not seen["changed"]:
            seen["changed"] = True
            mock.set_faults([{"action": "patch", "value": {"model": "mock-teacher-2"}}])
        if status["state"] == "on hold" and status["in_flight"] == 0:
            seen["held"] += 1
            assert seen["held"] < 100, "it was never resumed"
            seen.setdefault("stored", status["answers_stored"])
            seen["why"] = status["waiting"]
            if seen["held"] == 3:
                assert status["answers_stored"] == seen["stored"]
                asyncio.get_running_loop().run_in_executor(None, ask, tmp_path / "store", "resume")

    summary = live(path, act)
    assert seen["held"] >= 3
    assert "the teacher changed (model 'mock-teacher' -> 'mock-teacher-2')" in seen["why"]
    assert seen["stored"] < 60
    assert (summary.exit_code, summary.counts.answers_stored) == (0, 60)


def test_a_hold_for_a_changed_teacher_outlives_the_process_until_resume(tmp_path: Path, mock_teacher):
    mock = mock_teacher(latency_s=0.05)
    path = folder(tmp_path, mock, 400, pause=True, every_s=0.1)
    store = tmp_path / "store"

    def change_and_stop(status: Mapping[str, Any]) -> None:
        if status["canary"].get("rounds") == 1:
            mock.set_faults([{"action": "patch", "value": {"model": "mock-teacher-2"}}])
        if status["state"] == "on hold" and status["in_flight"] == 0:
            asyncio.get_running_loop().run_in_executor(None, ask, store, "stop")

    assert live(path, change_and_stop).exit_code == 10
    assert "the teacher changed" in current_status(store)["holds"]["drift"]
    statuses: list[Mapping[str, Any]] = []

    def stop_again(now: Mapping[str, Any]) -> None:
        statuses.append(now)
        if len(statuses) == 4:
            asyncio.get_running_loop().run_in_executor(None, ask, store, "stop")

    sent = mock.totals()["requests"]
    assert live(path, stop_again).exit_code == 10
    assert mock.totals()["requests"] == sent
    held = [entry for entry in statuses if entry["state"] == "on hold"]
    assert len(held) >= 2
    assert "the teacher changed (model 'mock-teacher' -> 'mock-teacher-2') (20" in held[0]["waiting"]
    assert held[-1]["canary"]["changes"] == 1
    assert held[-1]["canary"]["said"] == "model 'mock-teacher' -> 'mock-teacher-2'"
    assert set(pauses.clear_without_run(store)) == {"drift"}
    assert pauses.clear_without_run(store) == {}

    def stop_at_work(now: Mapping[str, Any]) -> None:
        assert now["state"] != "on hold"
        if now["answers_stored"]:
            asyncio.get_running_loop().run_in_executor(None, ask, store, "stop")

    assert live(path, stop_at_work).counts.answers_stored > 0


def test_a_round_that_can_not_be_asked_is_reported_and_the_next_one_is_asked(tmp_path: Path, mock_teacher):
    mock = mock_teacher(latency_s=0.05)
    path = folder(tmp_path, mock, 400, every_s=0.1)
    store, canaries = tmp_path / "store", tmp_path / "canaries"
    seen: list[list[str]] = []

    def watch(status: Mapping[str, Any]) -> None:
        if status["canary"].get("missed") and not canaries.exists():
            seen.append(status_lines(status))
            (tmp_path / "away").rename(canaries)
        elif seen and not status["canary"].get("missed"):
            asyncio.get_running_loop().run_in_executor(None, ask, store, "stop")
        elif status["canary"].get("rounds") and not seen and canaries.exists():
            canaries.rename(tmp_path / "away")

    assert live(path, watch).exit_code == 10
    assert any("the last round failed, the next one tries again" in line for line in seen[0])
    assert any(line.startswith("complaint ") and "canaries" in line for line in seen[0])
    assert len(read_rounds(store)) >= 2
    status = current_status(store)
    assert "missed" not in status["canary"]
    assert len(status["complaints"]) == 1


def test_what_canaries_cost_is_shown_beside_the_rows(tmp_path: Path, mock_teacher):
    mock = mock_teacher(latency_s=0.02)
    path = folder(tmp_path, mock, 20)
    path.write_text(path.read_text() + "[teacher.price]\ninput = 1000.0\noutput = 2000.0\n")
    statuses: list[Mapping[str, Any]] = []
    summary = live(path, statuses.append)
    store = tmp_path / "store"
    with Journal.open(store / "canary", read_only=True) as journal:
        spent = journal.totals().cost_microusd
    status = current_status(store)
    assert spent == summary.canary_microusd == status["canary"]["cost_microusd"] > 0
    assert status["canary_microusd_ever"] == spent
    assert status["budget"]["microusd_spent"] == summary.counts.cost_microusd + spent
    assert f" and ${spent / 1e6:.4f} for canaries" in summary.lines()[0]
    text = "\n".join(status_lines(status))
    assert f"this run and ${spent / 1e6:.4f} for canaries" in text
    assert f"{mock.totals()['answers'] - 20} answers billed for ${spent / 1e6:.4f} beside the rows" in text
    assert f"harvester_canary_cost_dollars_total {spent / 1e6}\n" in prometheus.metrics_text(store)
    likely = [
        entry["cost_projected_microusd"]["likely"] for entry in statuses if entry["cost_projected_microusd"]
    ]
    assert likely[-1] == pytest.approx(summary.counts.cost_microusd + spent, abs=1)


def test_a_canary_that_is_refused_for_good_is_asked_no_more_and_that_is_shown(tmp_path: Path, mock_teacher):
    mock = mock_teacher(latency_s=0.05, faults=[{"action": "status", "status": 401, "prompt": "backwards"}])
    live(folder(tmp_path, mock, 20, every_s=0.05))
    assert sum(mock.fired().values()) <= 4
    text = "\n".join(status_lines(current_status(tmp_path / "store")))
    assert "canaries  stopped: " in text
    assert "as before" not in text


def test_a_failing_canary_does_not_disturb_the_run(tmp_path: Path, mock_teacher):
    mock = mock_teacher(latency_s=0.02, faults=[{"action": "status", "status": 400, "prompt": "w1x"}])
    summary = live(folder(tmp_path, mock, 20))
    assert (summary.exit_code, summary.counts.answers_stored) == (0, 20)
    assert read_rounds(tmp_path / "store")[0]["answered"] == 3


def test_too_many_and_unreadable_canaries_are_refused_before_anything_is_sent(tmp_path: Path, mock_teacher):
    mock = mock_teacher()
    path = folder(tmp_path, mock, 1)
    (tmp_path / "canaries" / "c.jsonl").write_text('{"prompt": "x"}\n' * 51)
    exit_code, stderr = bench.run(path)
    assert exit_code == 2
    assert "51 canaries" in stderr
    (tmp_path / "canaries" / "c.jsonl").write_text('{"prompt": 3}\n')
    exit_code, stderr = bench.run(path)
    assert exit_code == 2
    assert "c.jsonl:1" in stderr
    assert mock.totals()["answers"] == 0
