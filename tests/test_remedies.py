"""The table of remedies has every error code of both programs, and of the trainer's what its classes say."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

import harvester.errors
import trainer.errors
from harvester.errors import HarvesterError
from harvester.system.command_line.remedies import EXIT_CODES, TEXTS, TRAINER_CODES

README = Path(__file__).parent.parent / "README.md"
# They end with the exit code of the command that failed.
HAVE_ANOTHERS_CODE = {trainer.errors.HarvestFailed.code, trainer.errors.CommandFailed.code}


def classes(module: ModuleType) -> dict[str, type[HarvesterError]]:
    """The error classes that the module defines, by code."""
    return {
        error.code: error
        for error in reversed(vars(module).values())
        if isinstance(error, type)
        and issubclass(error, HarvesterError)
        and error.__module__ == module.__name__
    }


def test_every_code_of_both_programs_has_a_remedy_and_no_other() -> None:
    assert set(TEXTS) == {*classes(harvester.errors), *classes(trainer.errors)}


@pytest.mark.parametrize("code", sorted(classes(trainer.errors)))
def test_the_codes_of_the_trainer_are_those_of_its_classes(code: str) -> None:
    meaning, exit_code = TRAINER_CODES[code]
    error = classes(trainer.errors)[code]
    assert meaning == " ".join((error.__doc__ or "").split("\n\n")[0].split())
    assert exit_code == (None if code in HAVE_ANOTHERS_CODE else error.exit_code)
    assert set(TRAINER_CODES) == set(classes(trainer.errors))


def test_the_readme_has_the_exit_codes_of_the_table() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(number): meaning for number, meaning in rows} == {
        number: meaning for number, meaning in EXIT_CODES.items() if number < 130
    }
