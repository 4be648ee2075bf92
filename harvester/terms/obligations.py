"""What a student owes to the terms of its teachers, and whether it pays. Pure.

A duty is one string, `kind` or `kind:value`, that travels in the lineage of every row:

    same_line:LINE        the student's base has to belong to that line of models
    name_prefix:WORD      the student's name has to begin with the word
    card_licence:ID       the student's licence has to be that one
    noncommercial         the student's licence has to forbid commercial use
    display:SENTENCE      the card has to show the sentence
    notice:SENTENCE       the NOTICE file has to carry the sentence
    pass_terms:URL        the terms at that address are passed on with the student

The first four are evaluated here; the last three are paid by the papers, which print them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from harvester.errors import ConfigError

LINES = {
    "llama-2": re.compile(r"(?:^|[/_-])(?:code-?)?llama-?2-(?:7b|13b|70b)(?![0-9])"),
    "llama-3": re.compile(r"(?:^|[/_-])llama-?3-(?:8b|70b)(?![0-9])"),
}
"""Lines of models whose licence lets outputs improve only themselves, by name of the base. Llama 3.1 and
later are other lines under another licence."""

_VALUED = {"same_line", "name_prefix", "card_licence", "display", "notice", "pass_terms"}
_BARE = {"noncommercial"}
_NONCOMMERCIAL = re.compile(r"(^cc-by-nc(-|$))|non-?commercial|-nc(-|$)|research")


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedModel:
    """What the duties ask about: base model, the name it will bear, its licence (None: computed)."""

    base: str
    name: str
    licence: str | None = None


def checked(duty: str, place: str) -> str:
    """The duty itself.

    Raises:
        ConfigError: a kind this version can't evaluate: passing over it would break a promise.
    """
    kind, _, value = duty.partition(":")
    if kind in _BARE and not value:
        return duty
    if kind not in _VALUED or not value or (kind == "same_line" and value not in LINES):
        known = ", ".join(sorted(_BARE | _VALUED))
        raise ConfigError(f"unknown duty {duty!r}", place=place, remedy=f"known kinds: {known}")
    return duty


def is_of_line(base: str, line: str) -> bool:
    """Whether a base model's name says it belongs to a line of `LINES`; an unknown line has no members."""
    pattern = LINES.get(line)
    return pattern is not None and pattern.search(base.lower()) is not None


def unpaid(duties: Sequence[str], student: DerivedModel) -> list[str]:
    """One sentence for each duty this student does not meet. A duty of unknown kind is never met."""
    return [reason for duty in duties if (reason := _unpaid(duty, student))]


def _unpaid(duty: str, student: DerivedModel) -> str:
    try:
        kind, _, value = checked(duty, "lineage").partition(":")
    except ConfigError as error:
        return error.message
    licence = (student.licence or "").lower()
    if kind == "same_line" and not is_of_line(student.base, value):
        return f"answers may only improve models of the line {value}; the base {student.base!r} is not one"
    if kind == "name_prefix" and not student.name.rsplit("/", 1)[-1].startswith(value):
        return f"the student's name has to begin with {value!r}; {student.name!r} does not"
    if kind == "card_licence" and licence not in {"", value.lower()}:
        return f"the student's licence has to be {value!r}, not {student.licence!r}"
    if kind == "noncommercial" and licence and not _NONCOMMERCIAL.search(licence):
        return f"answers are for non-commercial use; licence {student.licence!r} permits more"
    return ""


def owed(duties: Sequence[str], kind: str) -> list[str]:
    """Values of the duties of one kind, in order, each once."""
    found = [duty.partition(":")[2] for duty in duties if duty.partition(":")[0] == kind]
    return list(dict.fromkeys(found))


def licence_of(duties: Sequence[str], preferred: str | None = None) -> str:
    """Licence id for the student's card: the operator's where one is given, else what the duties force.

    Two licences that both have to be carried make "other"; the NOTICE names them.
    """
    if preferred:
        return preferred
    forced = owed(duties, "card_licence")
    if len(forced) > 1 or (forced and "noncommercial" in duties):
        return "other"
    if forced:
        return forced[0]
    return "cc-by-nc-4.0" if "noncommercial" in duties else "other"
