"""Test that `plan` corrects its estimate of input tokens by what the teacher counted for stored answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.mock_teacher.running import RunningMock
from harvester.run.planning.plan import RECEIVED_LOGPROB_BYTES
from harvester.run.planning.token_estimate import FEWEST_ANSWERS, InputCorrection, fit
from harvester.store.reader import Corpus
from tests import commands
from tests.faults.bench import run_harvest

Mock = Callable[..., RunningMock]


@given(
    st.lists(st.integers(1, 5000), min_size=FEWEST_ANSWERS, max_size=60),
    st.sampled_from([0.5, 1.0, 1.3, 3.0]),
    st.integers(0, 200),
)
def test_a_template_and_a_tokenizer_are_learned(estimates: list[int], factor: float, frame: int) -> None:
    correction = fit([(estimate, round(factor * estimate) + frame) for estimate in estimates])
    expected = sum(round(factor * estimate) + frame for estimate in estimates)
    assert abs(correction.total(sum(estimates), len(estimates)) - expected) <= 1 + expected * 1e-6
    assert correction.answers == len(estimates)


def test_a_few_answers_teach_nothing() -> None:
    correction = fit([(10, 100)] * (FEWEST_ANSWERS - 1))
    assert correction == InputCorrection()
    assert (correction.total(70, 7), "template" in correction.basis()) == (70, True)


def test_plan_counts_as_the_teacher_counted(mock_teacher: Mock, tmp_path: Path) -> None:
    prompts = [f"What is {n} + {n}?" for n in range(100, 130)]
    usage = {"prompt_tokens": 90, "completion_tokens": 5, "total_tokens": 95}
    price = {"input": 1.0, "output": 0.0, "as_of": "2026-11-01"}
    fault = {"action": "usage", "value": usage}
    run_harvest(mock_teacher(), tmp_path, [fault], prompts=prompts[:20], teacher={"price": price})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    planned = json.loads(commands.run("harvester", ["plan", tmp_path / "harvest.toml", "--json"]).stdout)
    assert (planned["rows"], planned["cached"], planned["input_tokens"]) == (30, 20, 900)
    assert "20 stored answers" in planned["input_basis"]
    assert planned["low_usd"] == planned["high_usd"] == 900e-6


def test_plan_sizes_log_probabilities(mock_teacher: Mock, tmp_path: Path) -> None:
    prompts = [f"What is {n} + {n}?" for n in range(100, 120)]
    with_logprobs = {"top_logprobs": 5, "max_tokens": 8}
    run_harvest(mock_teacher(), tmp_path, prompts=prompts, sampling=with_logprobs)
    answers = list(Corpus.open(tmp_path / "store").samples())
    listed = 6 * sum(answer.output_tokens for answer in answers)
    received = sum(len(json.dumps(json.loads(a.raw)["choices"][0]["logprobs"])) for a in answers)
    assert received / listed == pytest.approx(RECEIVED_LOGPROB_BYTES, rel=0.3)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "What is 1 + 1?"}) + "\n")
    planned = json.loads(commands.run("harvester", ["plan", tmp_path / "harvest.toml", "--json"]).stdout)
    assert planned["logprob_bytes"] == {"received": 8 * 6 * RECEIVED_LOGPROB_BYTES, "sealed": 8 * 6 * 18}
