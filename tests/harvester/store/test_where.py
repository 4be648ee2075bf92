"""Test the choice of rows by their settings, and the notes on rows that mix settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harvester.errors import ConfigError
from harvester.export import curate, export
from harvester.mock_teacher.running import RunningMock
from harvester.run import prepare
from harvester.store.reader import Corpus
from harvester.store.shards.schema import Sample
from harvester.store.where import Where
from tests.commands import run as run_command
from tests.faults.bench import run_harvest

Mock = Callable[..., RunningMock]


def row(number: int, system: str = "", **more: Any) -> Sample:
    sampling = more.pop("sampling", {})
    messages = [{"role": "system", "content": system}] if system else []
    facts: dict[str, Any] = {
        "key": f"{number:064x}",
        "prompt_id": f"p{number}",
        "messages": [*messages, {"role": "user", "content": "2+2?"}],
        "completion": "4",
        "outcome": "ok",
        "finish_reason": "stop",
        "request_json": json.dumps({"model": "m", **sampling}),
        "run_id": "run-1",
        **more,
    }
    return Sample(**facts)


ROWS = [
    row(0, request_model="a", tags=["math", "easy"]),
    row(1, "Be brief.", request_model="a", outcome="truncated", run_id="run-2"),
    row(2, "Be brief.", request_model="b", sampling={"temperature": 0.7}, tags=["math"]),
    row(3, request_model="b", metadata_json='{"task": "sum", "level": 2}', sampling={"temperature": 1}),
]


@pytest.mark.parametrize(
    ("condition", "chosen"),
    [
        ("", [0, 1, 2, 3]),
        ('model = "a"', [0, 1]),
        ({"model": ["a", "b"], "outcome": "ok"}, [0, 2, 3]),
        ('system = "Be brief.", not = {outcome = "truncated"}', [2]),
        ('system = ""', [0, 3]),
        ('tags = ["easy", "hard"]', [0]),
        ('run = "run-2"', [1]),
        ("sampling.temperature = 0.7", [2]),
        ("sampling.temperature = 1.0", [3]),
        ('sampling.temperature = "none"', [0, 1]),
        ('task = "sum"', [3]),
        ('task = "none"', [0, 1, 2]),
        ("metadata.level = 2", [3]),
        ("metadata.level = true", []),
        ('not = {model = "a", outcome = "ok"}', [1, 2, 3]),
    ],
)
def test_a_condition_chooses_rows(condition: str | dict[str, Any], chosen: list[int]) -> None:
    where = Where.parse(condition)
    assert [number for number, sample in enumerate(ROWS) if where.matches(sample)] == chosen
    assert set(where.columns) <= set(Sample.__dataclass_fields__)


@pytest.mark.parametrize(
    ("condition", "asked"),
    [
        ('not = {outcome = "truncated"}', [0, 1, 2, 3]),
        ('model = "a", outcome = "ok"', [0, 1]),
        ('model = "a", not = {response_model = "none"}', [0, 1]),
        ('not = {model = "a"}', [2, 3]),
        ('not = {model = "a", outcome = "ok"}', [0, 1, 2, 3]),
        ('tags = "math", not = {model = "a", epoch = 1, outcome = "ok"}', [0, 2]),
        ('provider = "x", not = {tags = "easy", run = "run-1"}', [1, 2, 3]),
    ],
)
def test_what_a_condition_says_of_requests_leaves_out_no_reply(condition: str, asked: list[int]) -> None:
    where = Where.parse(condition)
    of_requests = where.of_requests()
    assert [number for number, sample in enumerate(ROWS) if of_requests.matches(sample)] == asked
    assert (of_requests.epochs, of_requests.without_epochs) == ((), ())
    assert all(of_requests.matches(sample) for sample in ROWS if where.matches(sample))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("modle = 'a'", "did you mean 'model'"),
        ("model = 'a' }, x = {", "is no condition"),
        ("__import__('os')", "is no condition"),
        ("model = []", "is a text, a number"),
        ("model = {a = 1}", "is a text, a number"),
        ("not = 1", "'not' is a table"),
        ("epoch = 'one'", "whole number"),
    ],
)
def test_a_condition_that_is_none_is_refused(condition: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Where.parse(condition)


def test_epochs_are_those_of_the_runs_of_a_journal(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only the journal"):
        Where.parse("epoch = 1").bind(tmp_path)


def test_mixed_rows_are_named_and_chosen_everywhere(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=1.0)
    run_harvest(mock, tmp_path)
    assert export.export(tmp_path / "store", tmp_path / "plain").notes == ()
    run_harvest(mock, tmp_path, prompt_table={"system": "Be brief."}, sampling={"temperature": 0.7})
    run_harvest(mock, tmp_path, run={"epoch": 1})
    config = tmp_path / "harvest.toml"
    config.write_text(config.read_text().replace("epoch = 1", ""))
    assert any("run.epoch 1, now none" in note for note in prepare.look_ahead(config).warnings)
    mixed = export.export(tmp_path / "store", tmp_path / "mixed")
    assert mixed.rows == 9
    assert [note.partition(":")[0] for note in mixed.notes] == [
        "mixes rows of 2 system prompts",
        "mixes rows of 2 sampling settings",
        "mixes rows of 2 epochs",
    ]
    brief = export.RowChoice(where=Where.parse('system = "Be brief."'))
    chosen = export.export(tmp_path / "store", tmp_path / "brief", choice=brief)
    assert (chosen.rows, dict(chosen.left_out), chosen.notes) == (3, {"where": 6}, ())
    card = (tmp_path / "brief" / "README.md").read_text()
    assert "Be brief." in card
    path = tmp_path / "curate.toml"
    path.write_text('corpus = "store"\nout = "later"\nwhere = {epoch = 1}\n')
    counts = curate.curate(curate.load(path))
    assert (counts.kept, dict(counts.dropped), counts.notes) == (3, {"where": 6}, ())
    assert Corpus.open(tmp_path / "later").count() == 3
    done = run_command(
        "harvester", ["export", tmp_path / "store", tmp_path / "cli", "--where", "epoch = 0"], timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "mixes rows of 2 system prompts" in done.stdout
