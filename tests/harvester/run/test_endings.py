"""Test that every error has an ending, and every ending an exit code."""

from __future__ import annotations

import json

import pytest

from harvester import errors
from harvester.errors import Ending, HarvesterError, RunState, TeacherError
from harvester.observe.counters import PassResult, Snapshot
from harvester.run.endings import exit_code


def _error_classes(base: type[HarvesterError] = HarvesterError) -> list[type[HarvesterError]]:
    return [base, *(leaf for child in base.__subclasses__() for leaf in _error_classes(child))]


@pytest.mark.parametrize(
    "error_class",
    [entry for entry in _error_classes() if "__init__" not in vars(entry) or entry is TeacherError],
)
def test_every_error_has_an_ending_with_its_exit_code(error_class: type[HarvesterError]) -> None:
    error = error_class("it broke")
    ending = Ending.of(error)
    assert ending in (error.code, *(base.__dict__.get("code") for base in error_class.__mro__))
    if ending == error.code:
        assert ending.exit_code == error.exit_code


def test_errors_that_end_a_run_keep_their_code_as_the_ending() -> None:
    for name in ("TermsRefused", "TeacherRefused", "StoreFull", "StoreCorrupt", "PromptError", "ConfigError"):
        error = getattr(errors, name)("it broke")
        assert Ending.of(error) == error.code


def test_an_ending_is_plain_text_in_json_and_in_sentences() -> None:
    assert (json.dumps({"state": Ending.ROWS}), f"{Ending.ROWS}") == ('{"state": "rows"}', "rows")
    assert not set(Ending) & set(RunState)


@pytest.mark.parametrize(
    ("ending", "dead", "code"),
    [
        (Ending.COMPLETE, 0, 0),
        (Ending.COMPLETE, 3, 3),
        (Ending.INTERRUPTED, 3, 143),
        (Ending.ABORTED, 0, 143),
        (Ending.BUDGET, 3, 10),
        (Ending.STOPPED, 0, 10),
    ],
)
def test_exit_code_of_an_ending(ending: Ending, dead: int, code: int) -> None:
    assert exit_code(PassResult(ending, Snapshot(dead=dead)), 15, max_failed=2) == code
