"""`[store] read_also`: answers of another store are copied with their lineage, and not paid for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harvester.errors import ConfigError
from harvester.mock_teacher.running import RunningMock
from harvester.run import prepare
from harvester.store import terms_check
from harvester.store.journal.journal import Journal
from harvester.store.maintain.merge import merge
from harvester.store.reader import Corpus
from tests.faults.bench import PROMPTS, Ended, run_harvest
from tests.harvester.store_rows import verified

Mock = Callable[..., RunningMock]
MORE = (*PROMPTS, "What is 8 + 8?")


def two_folders(root: Path) -> tuple[Path, Path]:
    first, second = root / "first", root / "second"
    first.mkdir()
    second.mkdir()
    return first, second


def borrow(mock: RunningMock, root: Path, **more: Any) -> Ended:
    return run_harvest(mock, root, store={"read_also": ["../first/store"]}, **{"prompts": MORE, **more})


def facts(store: Path) -> dict[str, tuple[Any, ...]]:
    names = ("completion", "raw", "run_id", "teacher_id", "terms_id", "cost_microusd", "endpoint", "outcome")
    names += ("latency_s", "created_at", "messages", "request_json", "input_tokens", "output_tokens")
    return {row.key: tuple(getattr(row, name) for name in names) for row in Corpus.open(store).samples()}


@pytest.mark.parametrize("is_sealed", [True, False])
def test_answers_of_another_store_are_copied_and_not_paid(
    mock_teacher: Mock, tmp_path: Path, is_sealed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mock = mock_teacher(accuracy=1.0)
    first, second = two_folders(tmp_path)
    if is_sealed:
        run_harvest(mock, first)
    else:
        unsealed_run(mock, first, monkeypatch)
    ended = borrow(mock, second)
    assert (ended.exit_code, ended.billed["answers"]) == (0, 1)
    assert "copied 3 answers from" in ended.output
    assert (ended.totals.answers, ended.totals.copied, ended.totals.held) == (1, 3, 4)
    assert dict(ended.totals.held_outcomes) == {"ok": 4}
    mine, theirs = facts(second / "store"), facts(first / "store")
    assert {key: mine[key] for key in theirs} == theirs
    assert len(mine) == 4
    terms_check.require_lineage(Corpus.open(second / "store"))
    report, findings = verified(second / "store", repair=False)
    assert (findings, report["billed"]) == (0, 1)
    # A second run copies nothing and asks nothing; the other store may be gone by then.
    again = borrow(mock, second)
    assert (again.exit_code, again.billed["answers"], again.totals.copied) == (0, 0, 3)
    assert "copied" not in again.output
    assert "no usable answer" not in ended.output + again.output
    shutil.rmtree(first)
    assert run_harvest(mock, second, prompts=MORE).billed["answers"] == 0


def unsealed_run(mock: RunningMock, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Harvest without sealing, as a run that was killed leaves a store."""

    async def nothing(*_: object) -> int:
        return 0

    with monkeypatch.context() as patched:
        patched.setattr("harvester.store.maintain.seal_task.seal_all", nothing)
        run_harvest(mock, root)
    assert not list((root / "store").glob("shards/*.parquet"))


def test_plan_counts_what_would_be_copied(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=1.0)
    first, second = two_folders(tmp_path)
    run_harvest(mock, first)
    run_harvest(mock, second, prompts=MORE[3:])
    path = second / "harvest.toml"
    path.write_text(path.read_text() + '[store]\nread_also = ["../first/store"]\n')
    (second / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in MORE))
    plan = prepare.look_ahead(path)
    assert (plan.rows, plan.cached, plan.requests) == (4, 4, 0)
    with Journal.open(second / "store", read_only=True) as journal:
        assert journal.totals().copied == 0


def test_a_copy_is_stored_under_the_prompt_that_needs_it(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=1.0)
    first, second = two_folders(tmp_path)
    run_harvest(mock, first)
    rows = [{"id": f"own{n}", "prompt": text, "split": "test"} for n, text in enumerate(PROMPTS)]
    rows.append({"id": "again", "prompt": PROMPTS[0], "split": "test"})
    assert borrow(mock, second, prompts=rows).billed["answers"] == 0
    samples = list(Corpus.open(second / "store").samples())
    assert sorted(row.prompt_id for row in samples) == ["again", "own0", "own1", "own2"]
    assert {row.metadata["split"] for row in samples} == {"test"}


def test_a_store_without_an_answer_to_these_requests_is_named(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=1.0)
    first, second = two_folders(tmp_path)
    run_harvest(mock, first)
    ended = borrow(mock, second, sampling={"temperature": 0.7})
    assert (ended.billed["answers"], ended.totals.copied) == (4, 0)
    words = "no usable answer to the 4 requests that the store lacks"
    assert words in ended.output
    path = second / "harvest.toml"
    assert not any(words in note for note in prepare.look_ahead(path).warnings)  # all are held now
    shutil.rmtree(second / "store")
    assert any(words in note for note in prepare.look_ahead(path).warnings)


def test_other_purposes_are_not_used(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=1.0)
    first, second = two_folders(tmp_path)
    run_harvest(mock, first, run={"purpose": "eval"})
    ended = borrow(mock, second)
    assert (ended.billed["answers"], ended.totals.copied) == (4, 0)
    assert {row.purpose for row in Corpus.open(second / "store").samples()} == {"train"}


def test_the_terms_of_the_other_rows_are_asked(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=1.0)
    first, second = two_folders(tmp_path)
    refused = run_harvest(mock, first, [{"action": "model", "value": "another-model"}])
    assert (refused.exit_code, refused.fired) == (77, 3)
    ended = borrow(mock, second)
    assert (ended.exit_code, ended.billed["answers"]) == (77, 0)
    assert "first/store can't be used here" in ended.output
    assert ended.totals.copied == 0


@pytest.mark.parametrize(
    ("other", "words"), [("../nowhere", "no store is in"), ("store", "the store of this run itself")]
)
def test_what_is_no_other_store_is_refused(
    mock_teacher: Mock, tmp_path: Path, other: str, words: str
) -> None:
    mock = mock_teacher(accuracy=1.0)
    run_harvest(mock, tmp_path)
    ended = run_harvest(mock, tmp_path, prompts=MORE, store={"read_also": [other]})
    assert (ended.exit_code, ended.billed["requests"]) == (2, 0)
    assert words in ended.output
    with pytest.raises(ConfigError, match=words):
        prepare.look_ahead(tmp_path / "harvest.toml")


@pytest.mark.parametrize(
    "order", [("first", "second"), pytest.param(("second", "first"), marks=pytest.mark.slow)]
)
def test_a_store_and_one_with_copies_of_it_are_merged_with_one_ledger(
    mock_teacher: Mock, tmp_path: Path, order: tuple[str, str]
) -> None:
    mock = mock_teacher(accuracy=1.0)
    first, second = two_folders(tmp_path)
    run_harvest(mock, first)
    borrow(mock, second)
    merged = merge([tmp_path / name / "store" for name in order], tmp_path / "out")
    assert (merged.answers, merged.repeated) == (4, 3)
    with Journal.open(tmp_path / "out", read_only=True) as journal:
        totals = journal.totals()
    assert (totals.answers, totals.copied, dict(totals.held_outcomes)) == (4, 0, {"ok": 4})
    report, findings = verified(tmp_path / "out", repair=False)
    assert (findings, report["billed"]) == (0, 4)
