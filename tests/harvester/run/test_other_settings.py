"""A store with answers under several settings says so, and curate can keep those of one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.errors import ConfigError
from harvester.export import curate
from harvester.export.filters import named
from harvester.mock_teacher.running import RunningMock
from harvester.run import prepare
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
