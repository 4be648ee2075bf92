"""Learn how many answers one request may ask for (`n`), and keep it in the journal.

`[teacher] max_n` is what the operator or the preset says. A teacher that refuses the field, or answers fewer
choices again and again, is asked for fewer from then on. What was learned holds until `max_n` is changed.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from harvester.api.error_body import excerpt
from harvester.config.teacher_section import TeacherSection
from harvester.errors import RateLimited, TeacherError
from harvester.store.journal.journal import Journal
from harvester.store.journal.meta_values import read_value, write_values

# So many times in a row must fewer choices come, or a request be accepted only without `n`, before fewer are
# asked for: once may be chance.
ENOUGH = 2
# Words of an error that name the field `n`, or its purpose.
_NAMES_N = re.compile(
    r"""(['"`])n\1|\bn\s*(?:=|>|<|:|must|should|has to|is not|is too|cannot|can't|exceeds)|\bparameter n\b"""
    r"|multiple (?:choices|completions|candidates)|candidate_?count",
    re.IGNORECASE,
)
_LARGEST = re.compile(
    r"(?:at most|<=|≤|maximum(?: value)?(?: of| is|:)?|up to|less than or equal to)\D{0,12}?(\d{1,3})\b",
    re.IGNORECASE,
)


class ChoiceLimit:
    """The most answers that one request asks for.

    Args:
        teacher: with `max_n`, and the identity under which the limit is kept.
        learned: what an earlier run learned under the same `max_n`; None for nothing.

    Attributes:
        size: the most answers to ask for now.
        reason: what the teacher did, "" while `max_n` holds.
    """

    def __init__(self, teacher: TeacherSection, learned: dict[str, Any] | None = None) -> None:
        self.size = self._configured = teacher.max_n
        self.reason = ""
        self._row_name = _row_name(teacher)
        self._short = self._most_given = self._refusals = 0
        if learned is not None:
            self.size, self.reason = min(self.size, int(learned["size"])), str(learned["reason"])

    @classmethod
    def of(cls, journal: Journal, teacher: TeacherSection) -> ChoiceLimit:
        """Return the limit that holds for this teacher: what an earlier run learned, else `max_n`."""
        with journal.reading() as connection:
            saved = read_value(connection, _row_name(teacher)) or {}
        return cls(teacher, saved if saved.get("max_n") == teacher.max_n else None)

    def text(self) -> str:
        """Say what holds now, and why."""
        return f"asks for {self.size} answers a request at most: {self.reason}"

    async def save(self, call: Callable[[Callable[[Journal], None]], Awaitable[None]]) -> None:
        """Write what was learned to the journal, by `AsyncWriter.call`."""
        state = {"max_n": self._configured, "size": self.size, "reason": self.reason}
        await call(lambda journal: _write(journal, self._row_name, state))

    def answered(self, asked: int, given: int) -> bool:
        """Note how many choices came; return whether fewer are asked for from now on."""
        if asked == 1:
            return False
        self._refusals = 0
        if given >= asked:
            self._short = self._most_given = 0
            return False
        self._short += 1
        self._most_given = max(self._most_given, given)
        return self._short >= ENOUGH and self._lower(
            max(1, self._most_given), f"the teacher answers {given} of {asked} choices"
        )

    def named_in(self, error: TeacherError) -> bool:
        """Whether a refusal says that `n` is the reason."""
        return not isinstance(error, RateLimited) and (
            _param_of(error) == "n" or bool(_NAMES_N.search(error.message))
        )

    def refused(self, asked: int, error: TeacherError) -> bool:
        """Note that a request was refused for its `n`; return whether fewer are asked for from now on."""
        why = f"the teacher refuses n = {asked}: {excerpt(error.message)}"
        if self.named_in(error):
            largest = _LARGEST.search(error.message)
            return self._lower(min(int(largest[1]) if largest else asked // 2, asked - 1), why)
        self._refusals += 1
        return self._refusals >= ENOUGH and self._lower(asked // 2, why)

    def _lower(self, size: int, reason: str) -> bool:
        self._short = self._most_given = self._refusals = 0
        size = max(1, size)
        if size >= self.size:
            return False
        self.size, self.reason = size, reason
        return True


def _param_of(error: TeacherError) -> str:
    """The field that the teacher's error names as its reason, "" for none."""
    try:
        document = orjson.loads(error.raw)
        return str(document["error"]["param"])
    except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
        return ""


def _row_name(teacher: TeacherSection) -> str:
    return f"max_n:{teacher.teacher_id}"


def _write(journal: Journal, name: str, value: dict[str, Any]) -> None:
    with journal.writing() as connection:
        write_values(connection, {name: value})
