"""Test a raised `max_tokens`: truncated answers are asked again, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harvester.mock_teacher.running import RunningMock
from harvester.run.prepare import look_ahead
from harvester.store.reader import Corpus
from tests.faults.bench import run_harvest

Mock = Callable[..., RunningMock]
MANY = tuple(f"What is {n} + {2 * n}?" for n in range(12))
CUT = {"action": "length", "prompt": "What is 3 + 6?"}


def asked_again(mock: RunningMock, root: Path, sampling: dict[str, Any]) -> int:
    ended = run_harvest(mock, root, prompts=MANY, sampling=sampling)
    assert ended.exit_code == 0
    return ended.billed["requests"]


@pytest.mark.parametrize("raised", [{"max_tokens": 128}, {"max_tokens": 10_000, "stream": True}])
def test_only_the_truncated_are_asked_again(
    mock_teacher: Mock, tmp_path: Path, raised: dict[str, Any]
) -> None:
    mock = mock_teacher()
    first = run_harvest(mock, tmp_path, [CUT], prompts=MANY, sampling={"max_tokens": 64})
    assert (first.outcomes["truncated"], first.fired, first.billed["requests"]) == (1, 1, 12)
    assert asked_again(mock, tmp_path, raised) == 1
    assert asked_again(mock, tmp_path, raised) == 0
    assert asked_again(mock, tmp_path, {"max_tokens": 64}) == 0
    rows = list(Corpus.open(tmp_path / "store").samples())
    assert sorted(row.outcome for row in rows) == ["ok"] * 12 + ["truncated"]


def test_the_plan_knows_it_too(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    run_harvest(mock, tmp_path, [CUT], prompts=MANY, sampling={"max_tokens": 64})
    path = tmp_path / "harvest.toml"
    path.write_text(path.read_text().replace("max_tokens = 64", "max_tokens = 65"))
    assert look_ahead(path).cached == 11


@pytest.mark.parametrize("other", [{"max_tokens": 32}, {"max_tokens": 128, "temperature": 0.5}])
def test_a_lower_ceiling_or_another_temperature_is_another_question(
    mock_teacher: Mock, tmp_path: Path, other: dict[str, Any]
) -> None:
    mock = mock_teacher()
    run_harvest(mock, tmp_path, prompts=MANY, sampling={"max_tokens": 64})
    assert asked_again(mock, tmp_path, other) == 12


def test_a_further_asker_of_an_older_answer_is_written_down_there(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    run_harvest(mock, tmp_path, prompts=MANY, sampling={"max_tokens": 64})
    named = [{"prompt": text, "id": f"again-{n}"} for n, text in enumerate(MANY)]
    ended = run_harvest(mock, tmp_path, prompts=named, sampling={"max_tokens": 128})
    assert (ended.exit_code, ended.billed["requests"]) == (0, 0)
    samples = {row.prompt_id for row in Corpus.open(tmp_path / "store").samples()}
    assert {f"again-{n}" for n in range(12)} <= samples
