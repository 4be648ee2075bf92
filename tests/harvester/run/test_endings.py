"""Test that every error has an ending, and every ending an exit code."""

from __future__ import annotations

import json

import pytest

from harvester import errors
from harvester.errors import Ending, HarvesterError, RunState, TeacherError
from harvester.observe.counters import PassResult, Snapshot
from harvester.observe.status import status_lines
from harvester.run.endings import Summary, exit_code
from harvester.store.journal.records import Totals


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


@pytest.mark.parametrize(
    ("totals", "share"),
    [
        (Totals(answers=10, outcomes={"ok": 8, "empty": 2}), "2 of 10"),
        (Totals(answers=10, lost=4, outcomes={"ok": 8, "empty": 2}), "at most 2 of 6"),
        (Totals(answers=10, lost=9, outcomes={"ok": 8, "empty": 2}), "at most 1 of 1"),
        (Totals(answers=10, purged=2, outcomes={"ok": 8, "empty": 2}), "at most 2 of 8"),
        (Totals(answers=3, purged=1, purged_outcomes={"empty": 1}, outcomes={"ok": 1, "empty": 2}), "1 of 2"),
        (Totals(answers=2, lost=2, outcomes={"empty": 2}), ""),
    ],
)
def test_lost_and_purged_answers_are_not_among_those_that_are_not_usable(totals: Totals, share: str) -> None:
    """The outcomes of lost ones aren't known, nor in a store of an earlier release those of purged ones."""
    held = {"held": totals.held, "held_outcomes": totals.held_outcomes}
    lines = Summary("r", Ending.COMPLETE, 0, 1, Snapshot(), 0, "s", "harvester run c", **held).lines()
    split = "" if share.startswith("at most") else f"{share.partition(' ')[0]} empty"
    of_run = [line for line in lines if line.startswith("not usable")]
    of_store = [line for line in status_lines({"run_id": "r", **held}) if line.startswith("unusable")]
    if not share:
        assert (of_run, of_store) == ([], [])
        return
    assert of_run == [
        f"not usable: {share} answers in the store{split and f' ({split})'}; "
        "`harvester run c --retry empty` asks for them again"
    ]
    assert of_store == [
        f"unusable  {share} answers{split and f': {split}'}   (`harvester run CONFIG --retry empty`)"
    ]
