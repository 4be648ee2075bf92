"""Own records are found from configuration, store and project root, and written by `harvester terms new`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path

import pytest

from harvester.errors import ConfigError, TermsRefused
from harvester.terms.gate import RecordedTerms, allows
from harvester.terms.manage import RECORD_QUESTIONS, ask_record
from harvester.terms.places import places

DAY = date(2026, 11, 28)
ANSWERS = {
    "layer": "weights",
    "model": "ourmodel-7b*",
    "host": "*",
    "licence": "Apache-2.0",
    "url": "https://example.com/licence",
    "read": "no",
    "verdict": "permit",
    "gist": "Apache-2.0; silent on outputs",
    "source": "the model card",
    "id": "ourmodel",
}


def written(folder: Path, isatty: bool = True, **more: str) -> str:
    answers: Mapping[str, str] = {**ANSWERS, **more}
    questions = {question: answers[name] for name, question in RECORD_QUESTIONS}
    return ask_record(folder / "terms", lambda question: questions[question], isatty=isatty, today=DAY)[1].id


def permitted(*folders: Path, model: str = "ourmodel-7b-instruct", host: str = "127.0.0.1") -> bool:
    return allows(
        RecordedTerms.load(*folders),
        host=host,
        model=model,
        declared="ourmodel",
        use="harvest",
        purpose="train",
    ).permitted


def test_a_written_record_opens_its_own_model_alone(tmp_path: Path) -> None:
    assert not permitted(tmp_path)
    written(tmp_path)
    assert permitted(tmp_path)
    assert not permitted(tmp_path, model="gpt-9")
    assert not permitted(tmp_path, model="ourmodel-7b-opus-distill")
    assert not permitted(tmp_path, host="gpu.corp.internal")  # its service has no record


def test_a_record_is_found_from_below_and_up_to_the_root_of_the_project(tmp_path: Path) -> None:
    project = tmp_path / "project"
    run = project / "runs" / "first"
    run.mkdir(parents=True)
    (project / "pyproject.toml").touch()
    written(project)
    assert permitted(run)
    assert permitted(run / "store")
    written(tmp_path, id="ourmodel2")  # above the root: not looked at
    assert tmp_path not in places(run)
    assert set(places(run)) == {project, project / "runs", run}


def test_without_a_project_the_folder_and_the_one_around_it_are_looked_at(tmp_path: Path) -> None:
    run = tmp_path / "a" / "b" / "c"
    run.mkdir(parents=True)
    assert places(run) == (run.parent, run)
    assert places(run, run) == (run.parent, run)


def test_a_refusal_names_the_way_and_every_place(tmp_path: Path) -> None:
    terms = RecordedTerms.load(tmp_path / "run")
    for model, way in (("SmolLM2-135M-Instruct", "smollm2-3-apache"), ("nobody-knows-1b", "terms new")):
        with pytest.raises(TermsRefused) as refused:
            allows(
                terms, host="127.0.0.1", model=model, declared="", use="harvest", purpose="train"
            ).require()
        text = str(refused.value)
        assert way in text
        assert "harvester terms new" in text
        assert all(str(folder / "terms") in text for folder in (tmp_path / "run", tmp_path))


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"licence": "LicenseRef-Own"}, ConfigError),  # permits, and nobody read it
        ({"model": "*"}, ConfigError),
        ({"layer": "service", "host": "*"}, ConfigError),
        ({"verdict": "yes"}, ConfigError),
        ({"id": "../x"}, ConfigError),
        ({"id": "phi-mit"}, ConfigError),
        ({"isatty": False}, TermsRefused),
    ],
)
def test_answers_that_can_be_no_record_write_nothing(
    tmp_path: Path, more: dict[str, str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        written(tmp_path, **more)  # type: ignore[arg-type]
    assert not list(tmp_path.rglob("*.toml"))


def test_a_licence_that_was_read_may_permit_and_an_unknown_one_stays_closed(tmp_path: Path) -> None:
    written(tmp_path, licence="LicenseRef-Own", read="yes")
    assert permitted(tmp_path)
    other = tmp_path / "other" / "run"
    other.mkdir(parents=True)
    written(other, verdict="unknown", licence="LicenseRef-Own")
    assert not permitted(other)


def test_no_own_record_loosens_a_shipped_one(tmp_path: Path) -> None:
    written(tmp_path, model="llama-2-7b*", id="ourmodel")
    assert not permitted(tmp_path, model="llama-2-7b")
