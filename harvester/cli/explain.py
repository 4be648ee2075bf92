"""Explain error codes and exit codes: the meaning, what the program does about it, what the user can do."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from harvester import errors
from harvester.errors import HarvesterError, TeacherError, UsageError
from harvester.system.command_line.remedies import EXIT_CODES, TEXTS, TRAINER_CODES


@dataclass(frozen=True, slots=True)
class Explanation:
    """The explanation of one error code.

    Attributes:
        code: the error code.
        meaning: what went wrong.
        done: what the program does about it.
        remedy: what the user can do.
        exit_code: exit code of a run that ends with this error, None if a run continues after it, or ends
            with that of another command that failed.
        is_permanent: for errors of the teacher: True if a further attempt is useless. None for others.
    """

    code: str
    meaning: str
    done: str
    remedy: str
    exit_code: int | None
    is_permanent: bool | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for `--json`."""
        return {
            "code": self.code,
            "meaning": self.meaning,
            "done": self.done,
            "remedy": self.remedy,
            "exit_code": self.exit_code,
            "is_permanent": self.is_permanent,
        }

    def lines(self) -> list[str]:
        """Return the explanation as lines of text."""
        lines = [f"{self.code}: {self.meaning}", f"  what we do  {self.done}", f"  remedy      {self.remedy}"]
        if self.exit_code is not None:
            lines.append(f"  exit code   {self.exit_code}")
        if self.is_permanent is not None:
            retry = "no: it would fail again" if self.is_permanent else "yes: it may succeed later"
            lines.append(f"  retry       {retry}")
        return lines


def error_classes() -> dict[str, type[HarvesterError]]:
    """Return the harvester's error class of every code: the most general one where a subclass shares it."""
    classes: dict[str, type[HarvesterError]] = {}
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, HarvesterError):
            known = classes.get(value.code)
            if known is None or issubclass(known, value):
                classes[value.code] = value
    return classes


def all_explanations() -> dict[str, Explanation]:
    """Return the explanation of every error code of both programs, the harvester's first."""
    explained = {code: _explanation(code, error) for code, error in error_classes().items()}
    for code, (meaning, exit_code) in TRAINER_CODES.items():
        explained[code] = Explanation(code, meaning, *TEXTS[code], exit_code, None)
    return explained


def explanations(text: str) -> list[Explanation]:
    """Return the explanation of an error code, or of all errors with an exit code.

    Raises:
        UsageError: there is no such code; the remedy names the nearest one.
    """
    known = all_explanations()
    wanted = text.strip().lower()
    if wanted.isascii() and wanted.isdigit() and len(wanted) < 5:
        number = 130 if wanted == "143" else int(wanted)
        found = [each for each in known.values() if each.exit_code == number]
    else:
        found = [known[wanted]] if wanted in known else []
    if not found:
        near = difflib.get_close_matches(wanted, known, n=1)
        raise UsageError(
            f"no error or exit code is called {text[:60]!r}",
            remedy=f"did you mean {near[0]!r}?" if near else "`harvester explain` lists all codes",
        )
    return found


def listing() -> list[str]:
    """Return all error and exit codes of both programs as lines of text."""
    known = all_explanations()
    width = max(map(len, known))
    exit_codes = [f"  {number:<4} {meaning}" for number, meaning in EXIT_CODES.items()]
    return [
        "exit codes",
        *(line.replace("`", "") for line in exit_codes),
        "error codes (`harvester explain CODE` says more)",
        *(f"  {code:<{width}}  {each.meaning}" for code, each in known.items()),
    ]


def _explanation(code: str, error: type[HarvesterError]) -> Explanation:
    meaning = " ".join((error.__doc__ or "").split("\n\n")[0].split())
    done, remedy = TEXTS[code]
    permanent = error.is_permanent if issubclass(error, TeacherError) else None
    return Explanation(code, meaning, done, remedy, _exit_code(error), permanent)


def _exit_code(error: type[HarvesterError]) -> int | None:
    """Return the exit code, None for an error of one request, after which the run continues."""
    survives = issubclass(error, TeacherError) and error.code not in {"teacher_refused", "teacher"}
    return None if survives else error.exit_code
