"""Run a fixed slice of the fuzz inputs of `benchmarks/fuzz.py`, and prove that its oracle finds faults."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from benchmarks.fuzzing import bodies, keys, loop_lag, oracle, run, scaling, targets, texts
from benchmarks.fuzzing.large_replies import Recipe
from harvester.api import parse_in_child, redaction
from harvester.api.replies import choices, completion
from harvester.api.types import Completion, Outcome, Usage
from harvester.errors import TeacherError
from tests.tiers import rest_is_slow

SEED = 20_261_128
SLICES = 4
INPUTS = 3_000


@pytest.mark.parametrize("part", rest_is_slow(range(SLICES), first=1))
def test_no_input_of_the_slice_breaks_a_rule(part: int) -> None:
    progress = run.Progress(SEED, next=part * INPUTS)
    run.fuzz(progress, (part + 1) * INPUTS)
    assert [(f.number, f.target, f.problem, f.raw[:300]) for f in progress.findings] == []
    assert set(progress.tried) == set(targets.TARGETS)


def test_a_bill_that_does_not_add_up_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(usage: Usage, weights: Sequence[int], _: object) -> list[Usage]:
        return [usage] * len(weights)

    assert not any(targets.several_choices(Random(number))[1] for number in range(50))
    monkeypatch.setattr(choices, "split_usage", wrong)
    problems = {problem for number in range(50) for problem in targets.several_choices(Random(number))[1]}
    assert "output_tokens do not add up" in problems


@pytest.mark.parametrize(
    ("text", "outcome"),
    [("αβ", Outcome.OK), ("αβγδ", Outcome.OK), ("βαγ", Outcome.OK), ("", Outcome.OK)],
)
def test_the_oracle_finds_a_row_with_another_text(
    monkeypatch: pytest.MonkeyPatch, text: str, outcome: Outcome
) -> None:
    raw = b'{"choices": [{"message": {"content": "\\u03b1\\u03b2\\u03b3"}, "finish_reason": "stop"}]}'
    assert targets.check_answer(raw, is_stream=False) == []
    wrong = Completion(text, outcome, "stop", Usage(1, 1))
    monkeypatch.setattr(completion, "_parse", lambda *_: wrong)
    assert targets.check_answer(raw, is_stream=False) != []


@pytest.mark.parametrize(
    "raw",
    [
        b'{"choices": [{"message": {"content": "\xce\xb1"}, "finish_reason": null}]}',  # no end
        b'{"choices": [{"message": {"content": "\xce\xb1"}, "finish_reason": "stop"}',  # no JSON
    ],
)
def test_the_oracle_finds_a_row_that_never_ended(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    assert targets.check_answer(raw, is_stream=False) == []
    monkeypatch.setattr(completion, "_parse", lambda *_: Completion("α", Outcome.OK, "stop", Usage(1, 1)))
    assert targets.check_answer(raw, is_stream=False) != []


def test_the_oracle_reads_a_stream_by_itself() -> None:
    raw = (
        b': x\r\ndata: {"choices":[{"delta":\r\ndata: {"content":"\xce\xb1"}}]}\r\n\r\n'
        b'event: y\ndata:{"choices":[{"delta":{"content":[{"text":"\\u03b2"}]},"finish_reason":"eos"}]}\n\n'
        b'data: [DONE]\n\ndata: {"choices":[{"delta":{"content":"\xce\xb3"}}]}\n\n'
    )
    spelled = oracle.spelled(raw, is_stream=True)
    assert ("".join(spelled.greek), spelled.ends) == ("αβ", 1)


def test_a_lost_exception_and_a_lost_key_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Completion:
        raise KeyError("x")

    answers = [number for number in range(200) if run.target_of(1, number)[0] == "valid answer"]
    with monkeypatch.context() as patch:
        patch.setattr(completion, "_parse", fails)
        assert "KeyError" in run.attempt(1, answers[0])[2][0]
    monkeypatch.setattr(redaction.Redactor, "body", lambda _, body: body)
    echoes = [number for number in range(400) if run.target_of(1, number)[0] == "echoed key"]
    assert sum(bool(run.attempt(1, number)[2]) for number in echoes) > len(echoes) / 2


def test_an_input_is_made_again_from_its_number_and_a_run_continues(tmp_path: Path) -> None:
    assert run.attempt(3, 77) == run.attempt(3, 77)
    progress = run.fuzz(run.Progress(3), 40)
    progress.findings.append(run.Finding(1, "x", "y", "z"))
    progress.save(tmp_path / "state.json")
    again = run.load(tmp_path / "state.json", 3)
    assert again == progress
    assert run.load(tmp_path / "state.json", 4) == run.Progress(4)
    assert run.fuzz(again, 60).next == 60
    assert sum(again.tried.values()) == 60


def test_texts_and_keys_are_what_they_claim() -> None:
    random = Random(1)
    for _ in range(200):
        assert texts.greek(texts.answer(random))
        assert not texts.greek(texts.reasoning(random) + texts.decoy(random))
        key = keys.make_key(random)
        assert keys.holds(f"x{key}y", key)
        assert keys.holds(key.encode().hex(), key)
        assert bodies.make_body(random).raw


def test_large_replies_are_asked_for_by_a_whole_run() -> None:
    assert Recipe.random(1, 3).reply() == Recipe.random(1, 3).reply()
    progress = run.Progress(1)
    run._ask(progress, [Recipe.of_shape("ticks before tags", 300_000)])
    assert progress.findings == []
    assert progress.worst_lag_s > 0


def test_work_on_the_event_loop_is_measured_and_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> float:
        lag = loop_lag.Lag()
        watching = asyncio.create_task(lag.watch())
        await asyncio.sleep(2 * loop_lag.INTERVAL_S)
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass
        await asyncio.sleep(2 * loop_lag.INTERVAL_S)
        watching.cancel()
        return lag.worst_s

    measured = asyncio.run(work())
    assert measured > loop_lag.MOST_LAG_S
    monkeypatch.setattr(loop_lag, "measure", lambda _: (measured, ""))
    progress = run.Progress(1)
    run._ask(progress, [Recipe.random(1, 3)])
    assert progress.kinds == {"too slow": 1}
    assert progress.worst_lag_s == measured


@pytest.mark.parametrize("name", scaling.BODIES)
def test_a_stored_body_is_read_alike_in_a_child(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = scaling.BODIES[name](20_000)
    for logprobs in (True, False):
        results = []
        for limit in (1 << 30, 0):
            monkeypatch.setattr(parse_in_child, "STORED_INLINE_BYTES", limit)
            try:
                results.append(parse_in_child.parse_stored(raw, 10, None, logprobs=logprobs))
            except TeacherError as error:
                results.append((type(error), error.message, error.raw))
        assert results[0] == results[1]
