"""A store with answers under several settings says so, and curate can keep those of one run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.errors import ConfigError
from harvester.export import curate
from harvester.export.filters import named
from harvester.mock_teacher.running import RunningMock
from harvester.run import prepare
from harvester.store.maintain.adopt import adopt
from harvester.store.reader import Corpus
from tests.faults.bench import run_harvest

Mock = Callable[..., RunningMock]


def notes_of(root: Path) -> list[str]:
    lines = prepare.prepare(root / "harvest.toml").lines()
    plan = prepare.look_ahead(root / "harvest.toml").warnings
    notes = [line for line in lines if "with other settings" in line]
    assert [line.partition("note    ")[2] for line in notes] == [
        w for w in plan if "with other settings" in w
    ]
    return notes


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sampling": {"temperature": 0.7}}, "sampling.temperature none, now 0.7"),
        ({"prompt_table": {"system": "Be brief."}}, 'prompts.system none, now "Be brief."'),
        ({"sampling": {"extra": {"top_k": 5}}}, 'sampling.extra none, now {"top_k":5}'),
        ({"sampling": {"max_tokens": 99}}, ""),
        ({"run": {"max_failed": 3}}, ""),
    ],
)
def test_answers_under_other_settings_are_named(
    mock_teacher: Mock, tmp_path: Path, changed: dict[str, dict[str, object]], words: str
) -> None:
    mock = mock_teacher(accuracy=1.0)
    run_harvest(mock, tmp_path)
    assert notes_of(tmp_path) == []
    again = run_harvest(mock, tmp_path, **changed)
    assert again.exit_code == 0
    assert [words in line for line in notes_of(tmp_path)] == ([True] if words else [])


def teacher_notes_of(root: Path, held: int) -> list[str]:
    """Return the notes on other names of the teacher, which `plan` and `run` give alike."""
    plan = prepare.look_ahead(root / "harvest.toml")
    assert plan.cached == held
    words = ("paid for, again", "([store] read_also) fits")
    notes = [note for note in plan.warnings if any(word in note for word in words)]
    lines = [line.partition("note    ")[2] for line in prepare.prepare(root / "harvest.toml").lines()]
    assert [line for line in lines if any(word in line for word in words)] == notes
    return notes


def test_answers_under_another_identity_or_address_are_named(mock_teacher: Mock, tmp_path: Path) -> None:
    mock, path = mock_teacher(accuracy=1.0), tmp_path / "harvest.toml"
    run_harvest(mock, tmp_path)
    by_address = path.read_text()
    assert teacher_notes_of(tmp_path, held=3) == []
    moved = by_address.replace(mock.base_url, "http://127.0.0.1:9/v1")
    path.write_text(moved)
    (note,) = teacher_notes_of(tmp_path, held=0)
    assert f"at {mock.base_url}, and none at http://127.0.0.1:9/v1" in note
    assert f"--identity NAME --from {mock.base_url}" in note
    adopt(tmp_path / "store", "team")
    (note,) = teacher_notes_of(tmp_path, held=0)
    assert "under the identity team, and none under 'http://127.0.0.1:9/v1'" in note
    for name, held in (("team2", 0), ("team", 3)):
        path.write_text(moved.replace("[teacher]", f'[teacher]\nidentity = "{name}"'))
        notes = teacher_notes_of(tmp_path, held)
        assert [f"under the identity team, and none under {name!r}" in note for note in notes] == [True] * (
            not held
        )
    # Answers under both identities lie there knowingly.
    run_harvest(mock, tmp_path, teacher={"identity": "team2"})
    assert teacher_notes_of(tmp_path, held=3) == []


def test_a_store_to_read_of_which_nothing_fits_is_named(mock_teacher: Mock, tmp_path: Path) -> None:
    mock, mine = mock_teacher(accuracy=1.0), tmp_path / "mine"
    mine.mkdir()
    run_harvest(mock, tmp_path, teacher={"identity": "team"})
    read = {"read_also": ["../store"]}
    run_harvest(mock, mine, teacher={"identity": "team"}, store=read)
    assert teacher_notes_of(mine, held=3) == []
    path = mine / "harvest.toml"
    path.write_text(path.read_text().replace('"team"', '"team2"'))
    shutil.rmtree(mine / "store")
    (note,) = teacher_notes_of(mine, held=0)
    assert (
        "no answer of ../store ([store] read_also) fits: it holds answers of mock-teacher under team" in note
    )
    assert "this run asks mock-teacher under team2 for train" in note


def test_curate_keeps_the_answers_of_one_run(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=1.0)
    for temperature in (0.0, 0.7):
        run_harvest(mock, tmp_path, sampling={"temperature": temperature})
    samples = list(Corpus.open(tmp_path / "store").samples())
    cold = {s.run_id for s in samples if json.loads(s.request_json)["temperature"] == 0.0}
    (run_id,) = cold
    assert len({sample.run_id for sample in samples}) == 2
    path = tmp_path / "curate.toml"
    path.write_text(f'corpus = "store"\nout = "cold"\nfilters = ["finished", {{run = "{run_id}"}}]\n')
    counts = curate.curate(curate.load(path))
    assert (counts.kept, dict(counts.dropped)) == (3, {"other_run": 3})
    for value in (3, [], [1], None):
        with pytest.raises(ConfigError, match="needs the id of a run"):
            named("run", value)
